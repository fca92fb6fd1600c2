"""The command line: populate tables, look at their jobs and put them right.

It loads pandas, DataJoint and the pipeline in the commands that need them, since help and completion don't.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import djdist
from djdist.cli.clusters import bytes_of, executor_of, flags_of, resources_of, run_of
from djdist.cli.starting import start
from djdist.errors import DjdistError, OptionError, Terminated
from djdist.executors import ExecutorName

ERRORS_LEFT, MISTAKE, INTERRUPTED, TERMINATED = 1, 2, 130, 143
LEVEL = "djdist.level"
LEVELS = {
    "-v": logging.INFO,
    "--verbose": logging.INFO,
    "-q": logging.ERROR,
    "--quiet": logging.ERROR,
}
PICTURES = (".html", ".png")


class Commands(TyperGroup):
    """Ends with one line and exit code 2 where a user can put it right, and with a traceback elsewhere."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, Terminated) as stop:
            _say("djdist: stopped")
            raise typer.Exit(TERMINATED if isinstance(stop, Terminated) else INTERRUPTED) from None
        except Exception as error:
            if (line := _mistake(error)) is None:
                raise
            _say(f"djdist: {line}")
            raise typer.Exit(MISTAKE) from error


class Command(TyperCommand):
    """Gets ready when its options are known, so that help needs no DataJoint.

    Like the options before the command's name, -v and -q may stand among those after it.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        for flag in LEVELS.keys() & {*args}:
            ctx.meta[LEVEL] = LEVELS[flag]
        return super().parse_args(ctx, [argument for argument in args if argument not in LEVELS])

    def invoke(self, ctx: Any) -> Any:
        start(ctx.meta.get(LEVEL, logging.WARNING))
        return super().invoke(ctx)


def _mistake(error: Exception) -> str | None:
    """Write an error in one line if a user can put it right."""
    if isinstance(error, DjdistError):
        return " ".join(str(error).split())
    if "datajoint" not in sys.modules:
        return None
    import datajoint as dj

    from djdist.cli.choosing import line_of
    from djdist.database.errors import is_infrastructure

    return line_of(error) if isinstance(error, dj.DataJointError) or is_infrastructure(error) else None


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _number(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'s' * (count != 1)}"


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


def _modules_here(incomplete: str) -> list[str]:
    """Complete the module only: to know its tables takes its import, and shells part words at the colon."""
    return sorted(file.stem for file in Path().glob("*.py") if file.stem.startswith(incomplete))


TABLE = "my_pipeline:Table"
Name = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:TABLE", help="A Computed or Imported table.", autocompletion=_modules_here
    ),
]
NameOrModule = Annotated[
    str,
    typer.Argument(
        metavar="MODULE[:TABLE]", help="A table, or all those of a module.", autocompletion=_modules_here
    ),
]
Names = Annotated[
    list[str],
    typer.Argument(
        metavar="MODULE[:TABLE]", help="Tables, or modules for all of theirs.", autocompletion=_modules_here
    ),
]
Restrictions = Annotated[
    list[str] | None,
    typer.Argument(metavar="RESTRICTION", help="Conditions in SQL, such as 'subject_id = 3'; all hold."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON to standard output, and nothing else.")]
ExecutorOption = Annotated[
    ExecutorName | None, typer.Option("--executor", "-e", help="Default: DJDIST_EXECUTOR, else local.")
]
Address = Annotated[
    str | None,
    typer.Option(help="The cluster. Default: RAY_ADDRESS or DASK_SCHEDULER_ADDRESS, else a new one."),
]
RunId = Annotated[str, typer.Argument(metavar="RUN", help="Its id, which `djdist runs` lists.")]
Watch = Annotated[
    bool | None, typer.Option("--watch/--no-watch", help="Show a bar. Default: in a terminal, without -q.")
]


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"djdist {djdist.__version__}")
        raise typer.Exit


@app.callback()
def begin(
    ctx: typer.Context,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what a run does.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Log errors only, and show no bar.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_tell_version, help="Show the version.")
    ] = False,
) -> None:
    """Run DataJoint pipelines on Ray, on Dask and on this machine, and look at their jobs.

    Tables are written as my_pipeline:Table, where my_pipeline is a module of the current folder or an
    installed one. The database is the one of DataJoint's own configuration: datajoint.json, or DJ_HOST,
    DJ_USER and DJ_PASS.

    Exit codes: 0 it is done, and populate or wait left no errors; 1 they left errors, or djdist itself
    failed, with a traceback; 2 something was asked for that can't be done, or the database or the cluster
    can't be reached; 130 after Ctrl-C (top: 0); 143 after SIGTERM.
    """
    if verbose or quiet:
        ctx.meta[LEVEL] = LEVELS["-v" if verbose else "-q"]


@app.command(
    cls=Command,
    epilog=_examples(
        f"djdist populate {TABLE} --processes 4",
        f"djdist populate {TABLE} 'subject_id = 3' \"rig = 'east'\" --executor ray",
        f"djdist populate {TABLE} --executor ray --num-gpus 0.5 --memory 8G",
        f"djdist populate {TABLE} --executor dask --address tcp://head:8786 --detach",
        f"ray job submit --working-dir . -- djdist populate {TABLE} --executor ray",
    ),
)
def populate(
    name: Name,
    restrictions: Restrictions = None,
    executor: ExecutorOption = None,
    address: Address = None,
    processes: Annotated[
        int, typer.Option("--processes", "-p", help="Processes on this machine; 0 for one a processor.")
    ] = 1,
    num_cpus: Annotated[float | None, typer.Option(help="CPUs that one key needs, on Ray.")] = None,
    num_gpus: Annotated[float | None, typer.Option(help="GPUs that one key needs, on Ray.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory that one key needs, on Ray: bytes, or 500M, 4G, 4GiB.")
    ] = None,
    resource: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=N", help="What else one key needs, on Ray or Dask; may be given again."),
    ] = None,
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
    watch: Watch = None,
    detach: Annotated[bool, typer.Option("--detach", help="Leave the run to the cluster.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make the missing keys of a table.

    Keys are shared with other runs through the jobs table, so the same command may run on many machines.
    Exit code 0 means that no errors are left; keys may be, which --max-calls spared or other runs hold.
    """
    from djdist.cli.choosing import check, one_table

    table = one_table(name)
    check(table, restrictions)
    needs = {"num_cpus": num_cpus, "num_gpus": num_gpus, "memory": bytes_of(memory)}
    result = table.populate(
        *restrictions or (),
        reserve_jobs=True,
        suppress_errors=True,
        executor=executor_of(executor, address, resources=resources_of(resource), **needs),
        processes=processes or None,
        max_calls=max_calls,
        priority=priority,
        retries=retries,
        retry_on=retry_on or None,
        timeout_seconds=timeout_seconds,
        refresh=refresh,
        display_progress=not detach and _shows(watch),
        detach=detach,
    )
    if detach:
        _tell_detached(result, name, flags_of(executor, address), as_json)
    else:
        _tell_result(result, name, table, restrictions, as_json)


def _shows(watch: bool | None) -> bool:
    is_quiet = logging.getLogger("djdist").level >= logging.ERROR
    return sys.stderr.isatty() and not is_quiet if watch is None else watch


def _tell_detached(run: "djdist.Run", name: str, flags: str, as_json: bool) -> None:
    if as_json:
        _print_json({"run": run.info.id, "table": run.info.table, "schema": run.info.schema})
        return
    typer.echo(f"{run.info} goes on. Look at it, wait for it or stop it:")
    for command in (f"top {name}", f"wait {run.info.id} {flags}", f"stop {run.info.id} {flags}"):
        typer.echo(f"  djdist {command}")


def _tell_result(
    result: dict[str, Any], name: str, table: Any, restrictions: Sequence[str] | None, as_json: bool
) -> None:
    from djdist.cli.choosing import jobs_of_keys
    from djdist.jobs.history import counts_of

    made, left = result["success_count"], counts_of(jobs_of_keys(table, restrictions))
    if as_json:
        counts = {status: left[status] for status in ("error", "pending", "reserved")}
        _print_json({"table": table.__name__, "made": made, **counts})
    else:
        waiting = [f", {left[status]:,} {status}" for status in ("pending", "reserved") if left[status]]
        typer.echo(f"{made:,} made, {_number(left['error'], 'error')} left{''.join(waiting)}")
    if left["error"]:
        _say(f"See them: djdist errors {name}. Then: djdist retry {name}, and populate again.")
        raise typer.Exit(ERRORS_LEFT)


def _print_json(value: Any) -> None:
    from djdist.cli.printing import print_json

    print_json(value)


@app.command(
    cls=Command, epilog=_examples("djdist status my_pipeline", f"djdist status {TABLE} other_pipeline --json")
)
def status(names: Names, as_json: AsJson = False) -> None:
    """Tell how far tables are: keys done and new, jobs by status, runs, rate and time left.

    The rate is known where dj.config.jobs.keep_completed is on; `djdist top` measures it elsewhere.
    """
    from djdist.cli.choosing import all_tables
    from djdist.cli.printing import print_progress

    print_progress(djdist.progress(*all_tables(names)), as_json=as_json)


@app.command(
    cls=Command, epilog=_examples("djdist top my_pipeline", "djdist top my_pipeline --every-seconds 10")
)
def top(
    names: Names,
    every_seconds: Annotated[float, typer.Option(min=0.1, help="How often to look.")] = 2,
) -> None:
    """Show how far tables are until Ctrl-C, as status does, with the rate of the last minute."""
    from djdist.cli.choosing import all_tables, reconnected
    from djdist.cli.printing import watch_progress

    tables = all_tables(names)
    watch_progress(lambda: djdist.progress(*reconnected(tables)), every_seconds)


@app.command(
    cls=Command,
    epilog=_examples(
        f"djdist errors {TABLE} --traceback",
        f"djdist errors {TABLE} \"error_message LIKE 'OSError%'\" --json",
    ),
)
def errors(
    name: Name,
    restrictions: Restrictions = None,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where they were raised.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the last 1,000 errors by their message, with the keys.

    RESTRICTION is about jobs: their keys, error_message, host, completed_time …
    """
    from djdist.cli.choosing import jobs_seen, one_table
    from djdist.cli.printing import print_errors
    from djdist.jobs.history import last_errors

    jobs = jobs_seen(one_table(name), restrictions)
    found = last_errors(jobs)
    total = len(jobs.errors) if len(found) else 0
    print_errors(found if traceback else found.drop(columns="traceback"), total, as_json=as_json)


@app.command(
    cls=Command,
    epilog=_examples(f"djdist retry {TABLE}", f"djdist retry {TABLE} \"error_message LIKE 'OSError%'\""),
)
def retry(name: Name, restrictions: Restrictions = None, as_json: AsJson = False) -> None:
    """Put errors back to pending, so that the next run tries them again.

    RESTRICTION is about jobs: their keys, error_message, host, completed_time …
    """
    from djdist.cli.choosing import one_table, restricted

    table = one_table(name)
    restricted(table.jobs, restrictions)
    count = table.jobs.retry(*restrictions or ())
    if as_json:
        _print_json({"table": table.__name__, "retried": count})
    else:
        typer.echo(f"{_number(count, 'error')} {'is' if count == 1 else 'are'} pending again")


@app.command(cls=Command, epilog=_examples(f"djdist ignore {TABLE} 'subject_id = 3'"))
def ignore(
    name: Name,
    restrictions: Annotated[list[str], typer.Argument(metavar="RESTRICTION", help="Which jobs, in SQL.")],
    as_json: AsJson = False,
) -> None:
    """Leave pending jobs and errors out of all runs; `djdist refresh` first makes jobs of new keys.

    RESTRICTION is about jobs: their keys, error_message, host, completed_time …
    """
    from djdist.cli.choosing import one_table, restricted

    table = one_table(name)
    restricted(table.jobs, restrictions)
    count = table.jobs.ignore_where(*restrictions)
    if as_json:
        _print_json({"table": table.__name__, "ignored": count})
    else:
        typer.echo(f"{_number(count, 'job')} {'is' if count == 1 else 'are'} ignored from now on")


@app.command(
    cls=Command, epilog=_examples("djdist refresh my_pipeline", f"djdist refresh {TABLE} --priority 1")
)
def refresh(
    name: NameOrModule,
    restrictions: Restrictions = None,
    priority: Annotated[int | None, typer.Option(help="Of new jobs; the smaller the more urgent.")] = None,
    delay: Annotated[float, typer.Option(help="Seconds until new jobs become due.")] = 0,
    orphan_timeout: Annotated[
        float | None,
        typer.Option(help="Free what workers of plain DataJoint have held for so many seconds."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Bring jobs up to date: add new keys, remove vanished ones, free what dead runs hold."""
    from djdist.cli.choosing import all_tables, check

    options = {"priority": priority, "delay": delay, "orphan_timeout": orphan_timeout}
    records = []
    for table in all_tables([name]):
        check(table, restrictions)
        counts = table.jobs.refresh(*restrictions or (), **options)
        records.append({"table": table.__name__, **counts})
        if not as_json:
            told = ", ".join(f"{count:,} {what}" for what, count in counts.items())
            typer.echo(f"{table.__name__}: {told}")
    if as_json:
        _print_json(records)


@app.command(cls=Command, epilog=_examples("djdist rescue my_pipeline"))
def rescue(names: Names, as_json: AsJson = False) -> None:
    """Put what dead runs hold back to pending now; every run does so by itself, too."""
    from djdist.cli.choosing import all_tables
    from djdist.jobs.table import jobs_to_look_at

    records = [
        {"table": table.__name__, "rescued": jobs_to_look_at(table).rescue()} for table in all_tables(names)
    ]
    if as_json:
        _print_json(records)
        return
    for record in records:
        typer.echo(f"{record['table']}: {_number(record['rescued'], 'job')} rescued")


@app.command(
    cls=Command,
    epilog=_examples(
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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Draw when and where jobs ran, how many, for how long, and the errors.

    RESTRICTION is about jobs: their keys, error_message, host, completed_time …
    """
    from djdist.cli.choosing import all_tables, jobs_seen

    conditions = list(restrictions or ())
    if output is None and conditions and conditions[-1].lower().endswith(PICTURES):
        output = Path(conditions.pop())
    output = output or Path("report.html")
    if output.exists() and not overwrite:
        raise OptionError(f"{output} is there already: give --overwrite, or another file with --output.")
    tables = [jobs_seen(table, conditions) for table in all_tables([name])]
    typer.echo(djdist.report(*tables, file=output))


@app.command(
    cls=Command,
    epilog=_examples("djdist runs --executor ray", "djdist runs -e dask --address tcp://head:8786"),
)
def runs(executor: ExecutorOption = None, address: Address = None, as_json: AsJson = False) -> None:
    """List the runs on a cluster, of all its users."""
    from djdist.cli.printing import print_runs

    print_runs(djdist.runs(executor_of(executor, address)), as_json=as_json)


@app.command(cls=Command, epilog=_examples("djdist stop 396303eb --executor ray"))
def stop(run: RunId, executor: ExecutorOption = None, address: Address = None) -> None:
    """Let a run on a cluster reserve no more keys; what it makes now may finish."""
    found = run_of(run, executor_of(executor, address))
    found.stop()
    typer.echo(f"{found.info} reserves no more keys")


@app.command(cls=Command, epilog=_examples("djdist wait 396303eb --executor ray"))
def wait(
    run: RunId,
    executor: ExecutorOption = None,
    address: Address = None,
    watch: Watch = None,
    as_json: AsJson = False,
) -> None:
    """Wait for the end of a run on a cluster; Ctrl-C ends the waiting, not the run.

    The result of a detached run is kept for a day, and for an hour after somebody has waited for it.
    """
    found = run_of(run, executor_of(executor, address))
    result = _awaited(found, _shows(watch))
    made, failed = result["success_count"], found.failed
    if as_json:
        _print_json({"run": run, "table": found.info.table, "made": made, "failed": failed})
    else:
        typer.echo(f"{made:,} made, {failed:,} failed")
    if failed:
        raise typer.Exit(ERRORS_LEFT)


def _awaited(run: "djdist.Run", display_progress: bool) -> dict[str, Any]:
    """Wait for a run, which may end with the first error of make()."""
    try:
        return run.wait(display_progress=display_progress)
    except KeyboardInterrupt:
        _say(f"djdist: {run.info} goes on")
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if run.info.suppress_errors or _mistake(error):
            raise
        _say(f"djdist: {run.info} ended with {type(error).__name__}: {error}")
        raise typer.Exit(ERRORS_LEFT) from error
