"""``djdist populate``."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer

import djdist
from djdist._needs import bytes_of
from djdist.cli.app import (
    ERRORS_LEFT,
    TABLE,
    Address,
    AsJson,
    Bar,
    Command,
    ExecutorOption,
    Name,
    Restrictions,
    app,
    examples,
    number,
    print_json,
    say,
    shows_bar,
)
from djdist.cli.clusters import executor_of, flags_of, resources_of


@app.command(
    cls=Command,
    epilog=examples(
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
        int, typer.Option("--processes", "-p", help="Processes on this machine; 0 for one per processor.")
    ] = 1,
    num_cpus: Annotated[float | None, typer.Option(help="CPUs that one key needs, on Ray.")] = None,
    num_gpus: Annotated[float | None, typer.Option(help="GPUs that one key needs, on Ray.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory that one key needs, on Ray: bytes, or 500M, 4G, 4GiB.")
    ] = None,
    resource: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=N", help="What else one key needs, on Ray or Dask; repeatable."),
    ] = None,
    max_calls: Annotated[int | None, typer.Option(help="Maximum number of keys to make.")] = None,
    priority: Annotated[
        int | None,
        typer.Option(help="Only jobs of this priority or a more urgent (smaller) one; new jobs get it."),
    ] = None,
    retries: Annotated[
        int | None, typer.Option(help="Retry a failed key up to N times. Default: DJDIST_RETRIES.")
    ] = None,
    retry_on: Annotated[
        list[str] | None, typer.Option(help="Only after errors of this class; repeatable.")
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
    bar: Bar = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return at once; the cluster goes on with the run.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make the missing keys of a table.

    Keys are shared with other runs through the jobs table, so the same command may run on many machines.
    Exit code 0 means that no errors are left. Keys may be: beyond --max-calls, or held by other runs.
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
        display_progress=not detach and shows_bar(bar),
        detach=detach,
    )
    if detach:
        _tell_detached(result, name, flags_of(executor, address), as_json)
    else:
        _tell_result(result, name, table, restrictions, as_json)


def _tell_detached(run: "djdist.Run", name: str, flags: str, as_json: bool) -> None:
    if as_json:
        print_json({"run": run.info.id, "table": run.info.table, "schema": run.info.schema})
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
        print_json({"table": table.__name__, "made": made, **counts})
    else:
        waiting = [f", {left[status]:,} {status}" for status in ("pending", "reserved") if left[status]]
        typer.echo(f"{made:,} made, {number(left['error'], 'error')} left{''.join(waiting)}")
    if left["error"]:
        say(f"See them: djdist errors {name}. Then: djdist retry {name}, and populate again.")
        raise typer.Exit(ERRORS_LEFT)
