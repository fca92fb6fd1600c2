"""``djdist status``, ``top`` and ``report``: how far tables are, and how it went."""

from pathlib import Path
from typing import Annotated

import typer

import djdist
from djdist.cli.app import TABLE, AsJson, Command, NameOrModule, Names, app, examples
from djdist.errors import OptionError

PICTURES = (".html", ".png")


@app.command(
    cls=Command, epilog=examples("djdist status my_pipeline", f"djdist status {TABLE} other_pipeline --json")
)
def status(names: Names, as_json: AsJson = False) -> None:
    """Show progress of tables: keys done and new, jobs by status, runs, rate and time left.

    The rate is known where dj.config.jobs.keep_completed is on; `djdist top` measures it elsewhere.
    """
    from djdist.cli.choosing import all_tables
    from djdist.cli.printing import print_progress

    print_progress(djdist.progress(*all_tables(names)), as_json=as_json)


@app.command(
    cls=Command, epilog=examples("djdist top my_pipeline", "djdist top my_pipeline --every-seconds 10")
)
def top(
    names: Names,
    every_seconds: Annotated[float, typer.Option(min=0.1, help="How often to look.")] = 2,
) -> None:
    """Show progress of tables until Ctrl-C, as status does, with the rate of the last minute."""
    from djdist.cli.choosing import all_tables, reconnected
    from djdist.cli.printing import watch_progress

    tables = all_tables(names)
    watch_progress(lambda: djdist.progress(*reconnected(tables)), every_seconds)


@app.command(
    cls=Command,
    epilog=examples(
        "djdist report my_pipeline", f"djdist report {TABLE} \"completed_time > '2026-11-01'\" table.png"
    ),
)
def report(
    name: NameOrModule,
    restrictions: Annotated[
        list[str] | None,
        typer.Argument(metavar="RESTRICTION … FILE", help="Conditions in SQL; a file to write may be last."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The file to write, .html or .png. Default: report.html."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Draw when and where jobs ran, how many and for how long, and their errors.

    RESTRICTION is about jobs: their keys, error_message, host, completed_time …
    """
    from djdist.cli.choosing import all_tables, jobs_seen

    conditions = list(restrictions or ())
    if output is None and conditions and conditions[-1].lower().endswith(PICTURES):
        output = Path(conditions.pop())
    output = output or Path("report.html")
    if output.exists() and not overwrite:
        raise OptionError(f"{output} exists already: give --overwrite, or another file with --output.")
    tables = [jobs_seen(table, conditions) for table in all_tables([name])]
    typer.echo(djdist.report(*tables, file=output))
