"""The command ``djdist`` itself: how it starts and ends, and what its commands share.

It loads DataJoint and the pipeline in the commands that need them, since help and completion don't.
"""

import logging
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import djdist
from djdist.cli.starting import start
from djdist.errors import ClusterError, DatabaseError, DjdistError, Terminated, WorkerSetupError
from djdist.executors import ExecutorName

ERRORS_LEFT, MISTAKE, UNREACHABLE, BUG, INTERRUPTED, TERMINATED = 1, 2, 3, 70, 130, 143
LEVEL = "djdist.level"
LEVELS = {
    "-v": logging.INFO,
    "--verbose": logging.INFO,
    "-q": logging.ERROR,
    "--quiet": logging.ERROR,
}


class Commands(TyperGroup):
    """Ends with one line and exit code 2 or 3 where a user can put it right, else with a traceback and 70."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, Terminated) as stop:
            say("djdist: stopped")
            raise typer.Exit(TERMINATED if isinstance(stop, Terminated) else INTERRUPTED) from None
        except Exception as error:
            if type(error).__module__.startswith(("typer", "click")):  # wrong usage, or an exit code
                raise
            if (line := mistake(error)) is None:
                traceback.print_exc()
                raise typer.Exit(BUG) from error
            say(f"djdist: {line}")
            raise typer.Exit(UNREACHABLE if may_pass(error) else MISTAKE) from error


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


def mistake(error: Exception) -> str | None:
    """Return an error in one line if the user can put it right, else None."""
    if isinstance(error, DjdistError):
        return " ".join(str(error).split())
    if "datajoint" not in sys.modules:
        return None
    import datajoint as dj

    from djdist.cli.choosing import line_of
    from djdist.database.errors import is_infrastructure

    return line_of(error) if isinstance(error, dj.DataJointError) or is_infrastructure(error) else None


def may_pass(error: Exception) -> bool:
    """Return whether the same command may do later, since the database, the cluster or workers are away."""
    from djdist.database.errors import RIGHTS, is_refused_login, is_unreachable

    if isinstance(error, WorkerSetupError):
        return error.may_pass
    if RIGHTS in str(error) or is_refused_login(error):
        return False
    return isinstance(error, DatabaseError | ClusterError) or is_unreachable(error)


def say(text: str) -> None:
    typer.echo(text, err=True)


def number(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'s' * (count != 1)}"


def examples(*commands: str) -> str:
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
        metavar="MODULE[:TABLE]",
        help="A table, or a module for all of its tables.",
        autocompletion=_modules_here,
    ),
]
Targets = Annotated[
    str,
    typer.Argument(
        metavar="MODULE[:TABLE]...",
        help="A table, or a module for all of its tables; several may follow.",
        autocompletion=_modules_here,
    ),
]
Names = Annotated[
    list[str],
    typer.Argument(
        metavar="MODULE[:TABLE]",
        help="Tables, or modules for all of their tables.",
        autocompletion=_modules_here,
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
Bar = Annotated[
    bool | None,
    typer.Option(
        "--bar/--no-bar",
        " /--no-watch",  # its former name, for one release; --watch is free for a run that goes on
        help="Show a bar. Default: in a terminal, without -q.",
    ),
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

    Exit codes: 0: done, and populate or wait left no errors; 1: errors are left; 2: what was asked for can't
    be done; 3: the database, the cluster or its workers can't be reached, and the same command may do later;
    70: djdist itself failed, with a traceback; 130: Ctrl-C (top: 0); 143: SIGTERM.
    """
    if verbose or quiet:
        ctx.meta[LEVEL] = LEVELS["-v" if verbose else "-q"]


def shows_bar(wanted: bool | None) -> bool:
    is_quiet = logging.getLogger("djdist").level >= logging.ERROR
    return sys.stderr.isatty() and not is_quiet if wanted is None else wanted


def print_json(value: Any) -> None:
    from djdist.cli.printing import print_json

    print_json(value)
