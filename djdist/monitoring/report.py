"""``djdist.report()``: how the jobs of some tables went, as pictures and tables."""

import base64
import os
from html import escape
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import pandas as pd

from djdist._libraries import explained
from djdist.errors import OptionError
from djdist.jobs.history import History, history
from djdist.jobs.table import all_jobs_to_look_at

if TYPE_CHECKING:
    from djdist.monitoring.report_figure import ReportFigure

MOST_SLOW, MOST_CAUSES = 50, 200
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font-family: sans-serif; margin: 2em auto; max-width: 90em; padding: 0 1em; color: #222 }}
img {{ max-width: 100% }}
table {{ border-collapse: collapse }}
th, td {{ text-align: left; padding: 0.2em 1em 0.2em 0; border-bottom: 1px solid #ddd }}
td {{ overflow-wrap: anywhere }}
</style>
</head>
<body>
<img alt="{title}" src="data:image/png;base64,{picture}">
{tables}
</body>
</html>
"""


@overload
def report(*modules_or_tables: Any, file: None = None) -> "ReportFigure": ...
@overload
def report(*modules_or_tables: Any, file: str | Path) -> Path: ...
def report(*modules_or_tables: Any, file: str | Path | None = None) -> "ReportFigure | Path":
    """Draw how the jobs of some tables went: when and where, how many, how long, and the errors.

    Of several tables it also draws which need which, and the longest chain of keys that need one another.

    It reads the jobs table, which keeps the jobs that were made if ``dj.config.jobs.keep_completed``
    was on where ``populate()`` was called, or else the hidden columns of
    ``dj.config.jobs.add_job_metadata``. The picture says what neither keeps. Of jobs that are kept and asked
    for memory it also shows how much the processes had that made them. Nothing is written to the
    database.

    Parameters
    ----------
    *modules_or_tables
        Modules or schemas, for all of their Computed and Imported tables, or such tables, or a part of
        their jobs, such as ``Table.jobs & "completed_time > '2026-11-01'"``.
    file : str or pathlib.Path, optional
        Where to write it: ``.html`` for one page that holds all, with tables of the slowest
        keys and of the errors, or ``.png`` for the picture. Default: nowhere.

    Returns
    -------
    matplotlib.figure.Figure or pathlib.Path
        The picture, which a notebook shows, or the file that was written.

    Raises
    ------
    OptionError
        There is no such table, or the file can't be written or is neither HTML nor PNG.
    MissingLibraryError
        matplotlib isn't installed.
    """
    path = None if file is None else _checked(Path(file).expanduser())
    if not modules_or_tables:
        raise OptionError("report() needs a module or a table: djdist.report(my_pipeline)")
    drawing = _drawing()
    found = history(all_jobs_to_look_at(modules_or_tables))
    figure: ReportFigure = drawing.draw(found)
    if path is None:
        return figure
    picture = figure.png()
    if path.suffix.lower() == ".png":
        path.write_bytes(picture)
    else:
        path.write_text(_page(drawing.headline(found), picture, found), encoding="utf-8")
    return path


def _checked(path: Path) -> Path:
    if path.suffix.lower() not in (".html", ".png"):
        raise OptionError(f"file={str(path)!r} must end in .html or .png.")
    if not os.access(path.parent, os.W_OK) or path.is_dir():
        raise OptionError(f"file={str(path)!r} can't be written: there is no such folder, or it isn't yours.")
    return path


def _drawing() -> Any:
    try:
        return import_module("djdist.monitoring.report_figure")
    except ImportError as error:
        raise explained(error, "A report", "report") from error


def _page(title: str, picture: bytes, found: History) -> str:
    slowest = found.made.nlargest(MOST_SLOW, "seconds")[["table", "key", "seconds", "began", "host", "pid"]]
    causes = found.causes.head(MOST_CAUSES)
    memory = found.memory.rename(columns={"asked_for": "asked for"}).reset_index()
    tables = {
        "Keys and jobs": found.counts.rename_axis("table").reset_index(),
        f"The {len(slowest)} slowest keys": slowest,
        "Memory in GiB that processes had, and that keys asked for": memory,
        f"The {len(causes)} most frequent errors": causes,
    }
    return PAGE.format(
        title=escape(title),
        picture=base64.b64encode(picture).decode(),
        tables="\n".join(_table(name, rows) for name, rows in tables.items() if len(rows)),
    )


def _table(title: str, rows: pd.DataFrame) -> str:
    times = {name: rows[name].dt.floor("s") for name in rows.select_dtypes("datetime")}
    with pd.option_context("display.max_colwidth", None):
        html = rows.assign(**times).to_html(
            index=False, border=0, justify="left", float_format="{:,.3f}".format
        )
    return f"<h2>{escape(title)}</h2>\n{html}"
