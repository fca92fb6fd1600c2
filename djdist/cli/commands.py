"""The command line: populate tables, look at their jobs and put them right."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import datajoint as dj
import typer
from typer.core import TyperGroup

import djdist
from djdist.cli.printing import print_errors, print_progress, watch_progress
from djdist.errors import DjdistError, OptionError, Terminated
from djdist.executors import NAMES, executor_class
from djdist.history import last_errors
from djdist.jobs import jobs_to_look_at
from djdist.pipeline import is_infrastructure
from djdist.progress import progress
from djdist.tables import tables_named

ERRORS_LEFT, MISTAKE, INTERRUPTED, TERMINATED = 1, 2, 130, 143


class Commands(TyperGroup):
    """Ends with one line and exit code 2 where a user can put it right, and with a traceback elsewhere."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, Terminated) as stop:
            _say("djdist: stopped")
            raise typer.Exit(TERMINATED if isinstance(stop, Terminated) else INTERRUPTED) from None
        except Exception as error:
            if not (isinstance(error, DjdistError | dj.DataJointError) or is_infrastructure(error)):
                raise
            _say(f"djdist: {_line(error)}")
            raise typer.Exit(MISTAKE) from error


def _line(error: Exception) -> str:
    text = error.args[0] if isinstance(error, dj.DataJointError) and error.args else error
    return " ".join(str(text).split())


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _examples(*commands: str) -> str:
    return "\n\n".join(["Examples:", *(f"`{command}`" for command in commands)])


app = typer.Typer(
    cls=Commands,
    name="djdist",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

TABLE = "my_pipeline:Table"
Name = Annotated[str, typer.Argument(metavar="MODULE:TABLE", help="A Computed or Imported table.")]
NameOrModule = Annotated[
    str, typer.Argument(metavar="MODULE[:TABLE]", help="A table, or all those of a module.")
]
Names = Annotated[
    list[str], typer.Argument(metavar="MODULE[:TABLE]", help="Tables, or modules for all of theirs.")
]
Restrictions = Annotated[
    list[str] | None,
    typer.Argument(metavar="RESTRICTION", help="Conditions in SQL, such as 'subject_id = 3'; all hold."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON to standard output, and nothing else.")]


@app.callback()
def begin() -> None:
    """Run DataJoint pipelines on Ray, on Dask and on this machine, and look at their jobs.

    Tables are written as my_pipeline:Table, where my_pipeline is a module of the current folder or an
    installed one. The database is the one of DataJoint's own configuration: datajoint.json, or DJ_HOST,
    DJ_USER and DJ_PASS.

    Exit codes: 0 all is done, 1 errors are left, 2 something was asked for that can't be done.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    djdist.enable()


@app.command(
    epilog=_examples(
        f"djdist populate {TABLE} --processes 4",
        f"djdist populate {TABLE} 'subject_id = 3' \"rig = 'east'\" --executor ray",
        f"djdist populate {TABLE} --executor dask --address tcp://head:8786 --detach",
        f"ray job submit --working-dir . -- djdist populate {TABLE} --executor ray",
    )
)
def populate(
    name: Name,
    restrictions: Restrictions = None,
    executor: Annotated[
        str | None,
        typer.Option("--executor", "-e", help="local, ray or dask. Default: DJDIST_EXECUTOR, else local."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="The cluster. Default: RAY_ADDRESS or DASK_SCHEDULER_ADDRESS, else a new one."),
    ] = None,
    processes: Annotated[
        int, typer.Option("--processes", "-p", help="Processes on this machine; 0 for one a processor.")
    ] = 1,
    max_calls: Annotated[int | None, typer.Option(help="The most keys to make.")] = None,
    priority: Annotated[
        int | None, typer.Option(help="Only jobs as urgent as this, the smaller the more; new jobs get it.")
    ] = None,
    retries: Annotated[
        int | None, typer.Option(help="Try a key that failed so often again. Default: DJDIST_RETRIES.")
    ] = None,
    retry_on: Annotated[
        list[str] | None, typer.Option(help="Only after errors of this class; may be given again.")
    ] = None,
    timeout_seconds: Annotated[
        float | None, typer.Option(help="End a make() that takes longer, and record an error.")
    ] = None,
    refresh: Annotated[
        bool | None,
        typer.Option(
            "--refresh/--no-refresh", help="Look for new keys first. Default: DataJoint's auto_refresh."
        ),
    ] = None,
    watch: Annotated[
        bool | None, typer.Option("--watch/--quiet", help="Show a bar. Default: in a terminal.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Leave the run to the cluster.")] = False,
) -> None:
    """Make the missing keys of a table.

    Keys are shared with other runs through the jobs table, so the same command may run on many machines.
    """
    table = _one(name)
    _check(table, restrictions)
    result = table.populate(
        *restrictions or (),
        reserve_jobs=True,
        suppress_errors=True,
        executor=_executor(executor, address),
        processes=processes or None,
        max_calls=max_calls,
        priority=priority,
        retries=retries,
        retry_on=retry_on or None,
        timeout_seconds=timeout_seconds,
        refresh=refresh,
        display_progress=not detach and (sys.stderr.isatty() if watch is None else watch),
        detach=detach,
    )
    if detach:
        typer.echo(f"{result!r} goes on. Look at it: djdist top {name}")
        return
    left = len(_of_keys(table, table.jobs.errors, restrictions))
    typer.echo(f"{result['success_count']:,} made, {left:,} errors left")
    if left:
        _say(f"See them: djdist errors {name}. Then: djdist retry {name}, and populate again.")
        raise typer.Exit(ERRORS_LEFT)


@app.command(epilog=_examples("djdist status my_pipeline", f"djdist status {TABLE} other_pipeline --json"))
def status(names: Names, as_json: AsJson = False) -> None:
    """Tell how far tables are: jobs by status, keys done, runs, rate and time left.

    The rate is known where dj.config.jobs.keep_completed is on; `djdist top` measures it elsewhere.
    """
    print_progress(progress(*_all(names)), as_json=as_json)


@app.command(epilog=_examples("djdist top my_pipeline", "djdist top my_pipeline --every-seconds 10"))
def top(
    names: Names,
    every_seconds: Annotated[float, typer.Option(min=0.1, help="How often to look.")] = 2,
) -> None:
    """Show how far tables are until Ctrl-C, as status does, with the rate since the start."""
    tables = _all(names)
    watch_progress(lambda: progress(*tables), every_seconds)


@app.command(
    epilog=_examples(
        f"djdist errors {TABLE} --traceback",
        f"djdist errors {TABLE} \"error_message LIKE 'OSError%'\" --json",
    )
)
def errors(
    name: Name,
    restrictions: Restrictions = None,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where they were raised.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the last errors by their message, with the keys.

    RESTRICTION is about jobs: their keys, error_message, host, completed_time …
    """
    jobs = jobs_to_look_at(_one(name))
    found = last_errors(_restricted(jobs, restrictions) if jobs.is_declared else jobs)
    print_errors(found if traceback else found.drop(columns="traceback"), as_json=as_json)


@app.command(
    epilog=_examples(f"djdist retry {TABLE}", f"djdist retry {TABLE} \"error_message LIKE 'OSError%'\"")
)
def retry(name: Name, restrictions: Restrictions = None) -> None:
    """Put errors back to pending, so that the next run tries them again.

    RESTRICTION is about jobs: their keys, error_message, host, completed_time …
    """
    jobs = _one(name).jobs
    _restricted(jobs, restrictions)
    typer.echo(f"{jobs.retry(*restrictions or ()):,} errors are pending again")


@app.command(epilog=_examples(f"djdist ignore {TABLE} 'subject_id = 3'"))
def ignore(
    name: Name,
    restrictions: Annotated[list[str], typer.Argument(metavar="RESTRICTION", help="Which jobs, in SQL.")],
) -> None:
    """Leave pending jobs and errors out of all runs; `djdist refresh` first makes jobs of new keys.

    RESTRICTION is about jobs: their keys, error_message, host, completed_time …
    """
    jobs = _one(name).jobs
    keys = (_restricted(jobs, restrictions) & "status IN ('pending', 'error')").keys()
    for key in keys:
        jobs.ignore(key)
    typer.echo(f"{len(keys):,} jobs are ignored from now on")


@app.command(epilog=_examples("djdist refresh my_pipeline", f"djdist refresh {TABLE} --priority 1"))
def refresh(
    name: NameOrModule,
    restrictions: Restrictions = None,
    priority: Annotated[int | None, typer.Option(help="Of new jobs; the smaller the more urgent.")] = None,
    delay: Annotated[float, typer.Option(help="Seconds until new jobs become due.")] = 0,
    orphan_timeout: Annotated[
        float | None,
        typer.Option(help="Free what workers of plain DataJoint have held for so many seconds."),
    ] = None,
) -> None:
    """Bring jobs up to date: add new keys, remove vanished ones, free what dead runs hold."""
    for table in tables_named(name):
        _check(table, restrictions)
        options = {"priority": priority, "delay": delay, "orphan_timeout": orphan_timeout}
        counts = table.jobs.refresh(*restrictions or (), **options)
        typer.echo(f"{table.__name__}: " + ", ".join(f"{count:,} {what}" for what, count in counts.items()))


@app.command(epilog=_examples("djdist rescue my_pipeline"))
def rescue(names: Names) -> None:
    """Put what dead runs hold back to pending now; every run does so by itself, too."""
    for table in _all(names):
        typer.echo(f"{table.__name__}: {jobs_to_look_at(table).rescue():,} jobs rescued")


@app.command(epilog=_examples("djdist report my_pipeline", f"djdist report {TABLE} --output table.png"))
def report(
    names: Names,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write, .html or .png.")] = Path(
        "report.html"
    ),
) -> None:
    """Draw when and where jobs ran, how many, for how long, and the errors."""
    typer.echo(djdist.report(*_all(names), file=output))


def _all(names: Sequence[str]) -> list[Any]:
    return list(dict.fromkeys(table for name in names for table in tables_named(name)))


def _one(name: str) -> Any:
    if ":" not in name:
        names = ", ".join(f"{name}:{table.__name__}" for table in tables_named(name))
        raise OptionError(f"Which table of {name}? There are: {names}.")
    return tables_named(name)[0]


def _executor(name: str | None, address: str | None) -> Any:
    if address is None:
        return name
    if name in (None, "local"):
        clusters = [f"--executor {cluster}" for cluster in NAMES if cluster != "local"]
        raise OptionError(f"--address goes with {' or '.join(clusters)}.")
    return executor_class(name)(address)  # type: ignore[call-arg]


def _check(table: Any, restrictions: Sequence[str] | None) -> None:
    """Let the database refuse a restriction before anything is changed."""
    _tried(lambda: _todo(table, restrictions), restrictions)


def _restricted(jobs: Any, restrictions: Sequence[str] | None) -> Any:
    return _tried(lambda: jobs & dj.AndList(restrictions or ()), restrictions)


def _tried(query: Callable[[], Any], restrictions: Sequence[str] | None) -> Any:
    try:
        bool(query() & dj.Top(limit=1))
    except Exception as error:
        if not restrictions or is_infrastructure(error):
            raise
        raise OptionError(f"{' AND '.join(restrictions)!r} is no restriction: {_line(error)}") from error
    return query()


def _todo(table: Any, restrictions: Sequence[str] | None) -> Any:
    return table().key_source & dj.AndList(restrictions or ())


def _of_keys(table: Any, jobs: Any, restrictions: Sequence[str] | None) -> Any:
    """Choose the jobs of the keys that a call of populate() was about."""
    return jobs.restrict(_todo(table, restrictions).proj(), semantic_check=False) if restrictions else jobs
