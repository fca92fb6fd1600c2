"""``Table.jobs`` as a notebook shows it."""

from html import escape
from typing import Any

from djdist._style import STATUSES, format_duration
from djdist.jobs.history import RunSeen, Snapshot

MOST_CAUSES = 5
MOST_RUNS = 10
MOST_SHOWN = 200
"""Characters of a message."""
WIDEST_PIXELS = 300
MEANINGS = {
    "made": "in the table",
    "reserved": "running, or about to",
    "pending": "waiting",
    "error": "failed: jobs.errors, jobs.retry()",
    "ignore": "left out: jobs.ignored",
}
TABLE = '<table style="border-collapse: collapse; margin: 0.3em 0">{}</table>'
CELL = '<td style="text-align: {}; padding: 1px 10px 1px 0; vertical-align: top">{}</td>'
BAR = (
    '<span style="display: inline-block; vertical-align: middle; height: 0.8em; width: {pixels:.0f}px; '
    'background: {colour}; -webkit-print-color-adjust: exact; print-color-adjust: exact"></span>'
)


def jobs_html(table: str, snapshot: Snapshot, remaining: int, total: int) -> str:
    """Draw keys that are made and jobs by status as bars, the last errors by cause, and who runs jobs."""
    made = total - remaining
    parts = [_title(f"{table}: {made:,} of {total:,} keys made"), _bars({"made": made} | snapshot.counts)]
    if len(snapshot.causes):
        parts += [_title(_errors_title(snapshot)), _causes(snapshot)]
    if snapshot.notes:
        rows = [[f"{jobs:,} ×", escape(note[:MOST_SHOWN])] for note, jobs in snapshot.notes]
        parts += [_title("To be made again"), _table(rows, ("right", "left"))]
    if snapshot.runs:
        parts += [_title("Runs"), _runs(snapshot.runs)]
    return f"<div>{''.join(parts)}</div>"


def notice_html(table: str, text: str) -> str:
    """Say why there is nothing to draw."""
    return f"<div>{_title(f'Jobs of {table}')}<div>{escape(text)}</div></div>"


def rows_html(
    columns: dict[str, bool], rows: list[dict[str, Any]], *, has_more: bool, total: int | None
) -> str:
    """Draw some jobs as rows, with the columns in bold that are of the key."""
    heads = [f"<b>{escape(name)}</b>" if of_key else escape(name) for name, of_key in columns.items()]
    cells = [[escape(str(row.get(name, "<blob>"))) for name in columns] for row in rows]
    more = ["…"] if has_more else []
    notes = more if total is None else [*more, f"Total: {total:,}"]
    table = _table([heads, *cells], ("left",) * len(columns))
    return f"<div>{table}{''.join(f'<p>{note}</p>' for note in notes)}</div>"


def _title(text: str) -> str:
    return f'<div style="font-weight: bold; margin-top: 0.4em">{escape(text)}</div>'


def _table(rows: list[list[str]], alignments: tuple[str, ...]) -> str:
    cells = ["".join(map(CELL.format, alignments, row)) for row in rows]
    return TABLE.format("".join(f"<tr>{row}</tr>" for row in cells))


def _bars(counts: dict[str, int]) -> str:
    colours = {"made": STATUSES["success"]} | STATUSES
    most = max(1, *(counts[status] for status in MEANINGS))
    rows = [
        [status, f"{counts[status]:,}", _bar(counts[status] / most, colours[status]) + _meaning(meaning)]
        for status, meaning in MEANINGS.items()
    ]
    return _table(rows, ("left", "right", "left"))


def _bar(share: float, colour: str) -> str:
    return BAR.format(pixels=max(2, share * WIDEST_PIXELS), colour=colour) if share else ""


def _meaning(meaning: str) -> str:
    return f'<small style="opacity: 0.7; padding-left: 0.5em">{escape(meaning)}</small>'


def _errors_title(snapshot: Snapshot) -> str:
    shown = int(snapshot.causes["errors"].sum())
    return f"The last {shown:,} errors" if shown < snapshot.counts["error"] else "Errors"


def _causes(snapshot: Snapshot) -> str:
    first = snapshot.causes.head(MOST_CAUSES)
    rows = [
        [f"{errors:,} ×", escape(cause[:MOST_SHOWN]), f"last {last:%Y-%m-%d %H:%M:%S}"]
        for cause, errors, last in zip(first["cause"], first["errors"], first["last"], strict=True)
    ]
    if others := len(snapshot.causes) - len(first):
        rows.append(["", f"and {others:,} other causes", ""])
    return _table(rows, ("right", "left", "left"))


def _runs(runs: tuple[RunSeen, ...]) -> str:
    rows = [[escape(run.user), f"{run.jobs:,} jobs", _state(run)] for run in runs[:MOST_RUNS]]
    if (others := len(runs) - MOST_RUNS) > 0:
        rows.append(["", "", f"and {others:,} other runs"])
    return _table(rows, ("left", "right", "left"))


def _state(run: RunSeen) -> str:
    hosts = f"{run.begun:,} of them begun, on {run.hosts:,} host{'s' * (run.hosts != 1)}"
    ago = f"{format_duration(max(0, run.since_renewal.total_seconds()))} ago"
    if run.is_native:
        return f"{hosts}; plain DataJoint, last reserved {ago}"
    if run.is_dead:
        return f"⚠ dead: last heard of {ago}; its jobs go back with the next refresh() or run"
    return f"{hosts}; alive: heard of {ago}"
