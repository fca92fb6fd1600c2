"""What the command line prints: listings as tables for people, or as JSON."""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import pandas as pd
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table as Rows

from djdist._job import key_text
from djdist._style import ERROR, STATUSES, format_duration
from djdist.cli.rates import Rates
from djdist.database.errors import is_infrastructure
from djdist.errors import DriverLostError
from djdist.monitoring.runs import Run

MOST_KEYS = 10
WIDE = 200
NOTHING = ("", "·")
STYLES = {"done": "success", "%": "success"} | {
    name: name for name in ("pending", "reserved", "error", "ignore")
}
FIRST_TO_GO = ("ignore", "new", "error", "left", "rate", "reserved", "pending")
NEXT_TO_GO = ("%", "runs")
COUNTED = ("done", "missing", "later", "error", "left")
COUNTS = ("made", "failed", "running", "queued", "pending")


def print_json(value: Any) -> None:
    """Print JSON."""
    print(json.dumps(value, indent=2, default=str))


def print_progress(frame: pd.DataFrame, *, as_json: bool = False) -> None:
    """Print how far tables are."""
    if as_json:
        print_json(_records(frame.reset_index()))
    else:
        console = _console()
        console.print(_progress_rows(frame, console.width))


def print_forecast(frame: pd.DataFrame, *, as_json: bool = False) -> None:
    """Print what a run would do."""
    if as_json:
        print_json(_records(frame.reset_index()))
        return
    rows = Rows(box=None, pad_edge=False)
    for heading in ("table", "done", "missing", "later", "error", "needs", "left", "waits for"):
        rows.add_column(heading, justify="right" if heading in COUNTED else "left")
    for row in frame.reset_index().to_dict("records"):
        counts = [f"{row[name]:,}" if row[name] else "·" for name in ("done", "missing", "later", "error")]
        left = format_duration(row["seconds_left"]) if row["seconds_left"] > 0 else ""
        rows.add_row(str(row["table"]), *counts, row["needs"], left, escape(row["waits_for"]))
    _console().print(rows)


def watch_progress(look: Callable[[], pd.DataFrame], every_seconds: float) -> None:
    """Show how far tables are until Ctrl-C, and what was seen last while the database is away."""
    rates, console = Rates(), _console()
    frame, away = rates.fill(look(), time.monotonic()), ""
    try:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                rows = _progress_rows(frame, console.width)
                foot = f"{datetime.now():%H:%M:%S}, every {every_seconds:g} s, Ctrl-C ends it. {away}"
                live.update(Group(rows, foot.rstrip()), refresh=True)
                time.sleep(every_seconds)
                try:
                    frame, away = rates.fill(look(), time.monotonic()), ""
                except Exception as error:
                    if not is_infrastructure(error):
                        raise
                    away = away or f"database away since {datetime.now():%H:%M:%S}"
    except KeyboardInterrupt:
        return


def print_errors(
    errors: Mapping[str, pd.DataFrame], total: int, *, tracebacks: bool = False, as_json: bool = False
) -> None:
    """Print the errors of tables by cause, the most frequent first, maybe with the traceback of the last."""
    read = sum(map(len, errors.values()))
    if read < total:
        print(f"The last {read:,} of {total:,} errors:", file=sys.stderr if as_json else sys.stdout)
    left_out = [] if tracebacks else ["traceback"]
    causes = [
        (table, str(cause), rows.drop(columns=left_out))
        for table, found in errors.items()
        for cause, rows in found.groupby("cause", sort=False)
    ]
    causes.sort(key=lambda cause: -len(cause[2]))
    if as_json:
        print_json(
            [
                {"table": table, "cause": cause, "errors": len(rows), "jobs": _records(rows)}
                for table, cause, rows in causes
            ]
        )
        return
    for table, cause, rows in causes:
        _print_cause(cause if len(errors) == 1 else f"{table}: {cause}", rows)
    if not causes:
        print("No errors.")


def print_runs(runs: Sequence[Run], *, as_json: bool = False) -> None:
    """Print the runs on a cluster."""
    records = [_run_record(run) for run in runs]
    if as_json:
        print_json(records)
    elif not records:
        print("No runs.")
    else:
        rows = Rows("run", box=None, pad_edge=False)
        for heading in ("table", "by", "on", "since"):
            rows.add_column(heading, overflow="fold")
        for heading in COUNTS:
            rows.add_column(heading, justify="right", no_wrap=True)
        for record in records:
            rows.add_row(*_run_cells(record))
        _console().print(rows)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else WIDE, highlight=False)


def _progress_rows(frame: pd.DataFrame, width: int) -> Rows:
    cells = [_cells(row) for row in frame.reset_index().to_dict("records")]
    widths = _widths(cells, width)
    gap = 2 if sum(widths.values()) + 2 * (len(widths) - 1) <= width else 1
    rows = Rows(box=None, pad_edge=False, padding=(0, gap, 0, 0), collapse_padding=True)
    for heading, column_width in widths.items():
        justify: Any = "left" if heading == "table" else "right"
        style = STATUSES.get(STYLES.get(heading, ""), "")
        rows.add_column(heading, justify=justify, style=style, no_wrap=True, width=column_width)
    for row in cells:
        rows.add_row(*[escape(row[heading]) for heading in widths])
    return rows


def _widths(cells: list[dict[str, str]], width: int) -> dict[str, int]:
    """Choose the columns that fit: those that say nothing go first, and at last the tables' names are cut."""
    widths = {heading: max(len(heading), *(len(row[heading]) for row in cells)) for heading in cells[0]}
    empty = [name for name in FIRST_TO_GO if all(row[name] in NOTHING for row in cells)]
    for heading in dict.fromkeys([*empty, *NEXT_TO_GO]):
        if sum(widths.values()) + len(widths) - 1 <= width:
            break
        del widths[heading]
    too_wide = max(0, sum(widths.values()) + len(widths) - 1 - width)
    return widths | {"table": max(len("table"), widths["table"] - too_wide)}


def _cells(row: dict[Any, Any]) -> dict[str, str]:
    counts = {name: row[name] for name in ("new", "pending", "reserved", "error", "ignore", "runs")}
    rate, left = row["keys_per_second"], row["seconds_left"]
    return {
        "table": str(row["table"]),
        "done": f"{row['done']:,} of {row['total']:,}",
        "%": f"{int(100 * row['done'] / row['total'])} %" if row["total"] else "",
        **{name: f"{count:,}" if count else "·" for name, count in counts.items()},
        "rate": _rate(rate) if rate > 0 else "",
        "left": format_duration(left) if left > 0 else "",
    }


def _rate(keys_per_second: float) -> str:
    units = {"s": 1, "min": 60, "h": 3600}
    unit = next((unit for unit, seconds in units.items() if keys_per_second * seconds >= 1), "h")
    return f"{keys_per_second * units[unit]:.3g}/{unit}"


def _print_cause(cause: str, rows: pd.DataFrame) -> None:
    console = _console()
    console.print(f"[bold {ERROR}]{len(rows):,} ×[/] [bold]{escape(cause)}[/]", soft_wrap=True)
    for row in rows.head(MOST_KEYS).to_dict("records"):
        where = f"on {row['host']}, process {row['pid']}" if row["host"] else ""
        text = f"    {key_text(row['key'])}   {row['ended']:%Y-%m-%d %H:%M:%S} {where}"
        console.print(text.rstrip(), markup=False, soft_wrap=True)
    if (others := len(rows) - MOST_KEYS) > 0:
        console.print(f"    and {others:,} more keys, which --json lists")
    if "traceback" in rows:
        console.print(f"\n{rows['traceback'].iloc[0]}\n", markup=False, soft_wrap=True)


def _run_record(run: Run) -> dict[str, Any]:
    info = run.info
    record = {
        "run": info.id,
        "table": info.table,
        "schema": info.schema,
        "user": info.user,
        "host": info.host,
        "pid": info.pid,
        "detached": info.detached,
        "since": info.started_at.isoformat(timespec="seconds"),
    }
    try:
        status = run.status()
    except DriverLostError:  # it has ended
        return record | dict.fromkeys(COUNTS)
    counts = {name: getattr(status, name) for name in COUNTS}
    return record | counts


def _run_cells(record: dict[str, Any]) -> list[str]:
    since = datetime.fromisoformat(record["since"]).astimezone()
    counts = [record[name] for name in COUNTS]
    return [
        record["run"],
        escape(f"{record['schema']}.{record['table']}"),
        escape(record["user"]),
        escape(record["host"]),
        f"{since:%m-%d %H:%M}",
        *["over" if count is None else f"{count:,}" for count in counts],
    ]


def _records(frame: pd.DataFrame) -> list[dict[Any, Any]]:
    plain = frame.drop(columns="cause", errors="ignore").astype(object)
    records: list[dict[Any, Any]] = plain.where(plain.notna(), None).to_dict("records")
    return records
