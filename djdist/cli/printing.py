"""What the command line prints: listings as tables for people, or as JSON."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import pandas as pd
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table as Rows

from djdist.drawing import ERROR, STATUSES, lasting
from djdist.job import Job
from djdist.progress import with_time_left

MOST_KEYS = 10


def print_progress(frame: pd.DataFrame, *, as_json: bool = False) -> None:
    """Print how far tables are."""
    if as_json:
        _print_json(_records(frame.reset_index()))
    else:
        _console().print(_progress_rows(frame))


def watch_progress(look: Callable[[], pd.DataFrame], every_seconds: float) -> None:
    """Show how far tables are until Ctrl-C."""
    began, first = time.monotonic(), look()
    try:
        with Live(_progress_rows(first), console=_console(), auto_refresh=False) as live:
            while True:
                live.refresh()
                time.sleep(every_seconds)
                live.update(_progress_rows(_measured(look(), first, time.monotonic() - began)))
    except KeyboardInterrupt:
        return


def print_errors(errors: pd.DataFrame, *, as_json: bool = False) -> None:
    """Print errors by cause, the most frequent first, with the traceback of the last one if given."""
    causes = sorted(errors.groupby("cause", sort=False), key=lambda cause: -len(cause[1]))
    if as_json:
        _print_json([{"cause": cause, "errors": len(rows), "jobs": _records(rows)} for cause, rows in causes])
        return
    for cause, rows in causes:
        _print_cause(str(cause), rows)
    if not causes:
        print("No errors.")


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 200, highlight=False)


def _progress_rows(frame: pd.DataFrame) -> Rows:
    rows = Rows("table", box=None, pad_edge=False)
    for heading in ("done", "%"):
        rows.add_column(heading, justify="right", style=STATUSES["success"])
    for heading in ("pending", "reserved", "error", "ignore"):
        rows.add_column(heading, justify="right", style=STATUSES[heading])
    for heading in ("runs", "rate", "left"):
        rows.add_column(heading, justify="right")
    for row in frame.reset_index().to_dict("records"):
        rows.add_row(*_cells(row))
    return rows


def _cells(row: dict[Any, Any]) -> list[str]:
    share = f"{int(100 * row['done'] / row['total'])} %" if row["total"] else ""
    counts = [row[name] for name in ("pending", "reserved", "error", "ignore", "runs")]
    rate, left = row["keys_per_second"], row["seconds_left"]
    return [
        escape(row["table"]),
        f"{row['done']:,} of {row['total']:,}",
        share,
        *[f"{count:,}" if count else "·" for count in counts],
        _rate(rate) if rate > 0 else "",
        lasting(left) if left > 0 else "",
    ]


def _rate(keys_per_second: float) -> str:
    units = {"s": 1, "min": 60, "h": 3600}
    unit = next((unit for unit, seconds in units.items() if keys_per_second * seconds >= 1), "h")
    return f"{keys_per_second * units[unit]:.3g}/{unit}"


def _print_cause(cause: str, rows: pd.DataFrame) -> None:
    console = _console()
    console.print(f"[bold {ERROR}]{len(rows):,} ×[/] [bold]{escape(cause)}[/]", soft_wrap=True)
    for row in rows.head(MOST_KEYS).to_dict("records"):
        where = f"on {row['host']}, process {row['pid']}" if row["host"] else ""
        text = f"    {Job(row['key'])}   {row['ended']:%Y-%m-%d %H:%M:%S} {where}"
        console.print(text.rstrip(), markup=False, soft_wrap=True)
    if (others := len(rows) - MOST_KEYS) > 0:
        console.print(f"    and {others:,} more keys, which --json lists")
    if "traceback" in rows:
        console.print(f"\n{rows['traceback'].iloc[0]}\n", markup=False, soft_wrap=True)


def _records(frame: pd.DataFrame) -> list[dict[Any, Any]]:
    plain = frame.drop(columns="cause", errors="ignore").astype(object)
    records: list[dict[Any, Any]] = plain.where(plain.notna(), None).to_dict("records")
    return records


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))


def _measured(frame: pd.DataFrame, first: pd.DataFrame, seconds: float) -> pd.DataFrame:
    """Fill in the rates that the jobs tables don't tell."""
    made = (frame["done"] - first["done"]).where(lambda number: number > 0)
    return with_time_left(frame.assign(keys_per_second=frame["keys_per_second"].fillna(made / seconds)))
