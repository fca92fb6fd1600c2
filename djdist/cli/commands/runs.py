"""``djdist runs``, ``stop`` and ``wait``: runs on a cluster."""

from typing import Any

import typer

import djdist
from djdist.cli.app import (
    ERRORS_LEFT,
    INTERRUPTED,
    Address,
    AsJson,
    Bar,
    Command,
    ExecutorOption,
    RunId,
    app,
    examples,
    mistake,
    print_json,
    say,
    shows_bar,
)
from djdist.cli.clusters import executor_of, run_of


@app.command(
    cls=Command,
    epilog=examples("djdist runs --executor ray", "djdist runs -e dask --address tcp://head:8786"),
)
def runs(executor: ExecutorOption = None, address: Address = None, as_json: AsJson = False) -> None:
    """List the runs on a cluster, of all its users."""
    from djdist.cli.printing import print_runs

    print_runs(djdist.runs(executor_of(executor, address)), as_json=as_json)


@app.command(cls=Command, epilog=examples("djdist stop 396303eb --executor ray"))
def stop(run: RunId, executor: ExecutorOption = None, address: Address = None) -> None:
    """Stop a run on a cluster: it reserves no more keys, and finishes what it is making."""
    found = run_of(run, executor_of(executor, address))
    found.stop()
    typer.echo(f"{found.info} reserves no more keys")


@app.command(cls=Command, epilog=examples("djdist wait 396303eb --executor ray"))
def wait(
    run: RunId,
    executor: ExecutorOption = None,
    address: Address = None,
    bar: Bar = None,
    as_json: AsJson = False,
) -> None:
    """Wait for a run on a cluster to end; Ctrl-C ends the waiting, not the run.

    The result of a detached run is kept for a day, and for an hour after somebody has waited for it.
    """
    found = run_of(run, executor_of(executor, address))
    result = _awaited(found, shows_bar(bar))
    made, failed = result["success_count"], found.failed
    if as_json:
        print_json({"run": run, "table": found.info.table, "made": made, "failed": failed})
    else:
        typer.echo(f"{made:,} made, {failed:,} failed")
    if failed:
        raise typer.Exit(ERRORS_LEFT)


def _awaited(run: "djdist.Run", display_progress: bool) -> dict[str, Any]:
    """Wait for a run, which may end with the first error of make()."""
    try:
        return run.wait(display_progress=display_progress)
    except KeyboardInterrupt:
        say(f"djdist: {run.info} goes on")
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if run.info.suppress_errors or mistake(error):
            raise
        say(f"djdist: {run.info} ended with {type(error).__name__}: {error}")
        raise typer.Exit(ERRORS_LEFT) from error
