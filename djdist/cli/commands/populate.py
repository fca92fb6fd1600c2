"""``djdist populate``."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

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
    Restrictions,
    Targets,
    app,
    examples,
    number,
    print_json,
    say,
    shows_bar,
)
from djdist.cli.clusters import executor_of, flags_of, resources_of

if TYPE_CHECKING:
    from djdist.pipeline.plan import Plan


@app.command(
    cls=Command,
    epilog=examples(
        f"djdist populate {TABLE} --processes 4",
        f"djdist populate {TABLE} 'subject_id = 3' \"rig = 'east'\" --executor ray",
        "djdist populate my_pipeline 'subject_id = 3' --executor ray",
        "djdist populate my_pipeline --dry-run",
        f"djdist populate {TABLE} --upstream --processes 4",
        "djdist populate my_pipeline --watch --processes 8",
        f"djdist populate {TABLE} --executor ray --num-gpus 0.5 --memory 8G",
        f"djdist populate {TABLE} --executor dask --address tcp://head:8786 --detach",
        f"ray job submit --working-dir . -- djdist populate {TABLE} --executor ray",
    ),
)
def populate(
    name: Targets,
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
    keys_per_transaction: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto", help="How many tiny keys may share a transaction; make() may run twice then."
        ),
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
    upstream: Annotated[
        bool, typer.Option("--upstream", help="Populate all that the tables need, too.")
    ] = False,
    downstream: Annotated[
        bool, typer.Option("--downstream", help="Populate all that depends on the tables, too.")
    ] = False,
    order: Annotated[
        str, typer.Option(help="Which goes first of equally urgent jobs: downstream or upstream.")
    ] = "downstream",
    memory_max: Annotated[
        str | None, typer.Option(help="How much memory a key gets at most that has run out of it.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on when nothing is left, and make new keys as they come.")
    ] = False,
    poll_seconds: Annotated[float, typer.Option(help="How often --watch looks for new keys.")] = 10,
    idle_exit_seconds: Annotated[
        float | None, typer.Option(help="End --watch after so long without anything to make.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and touch nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make the missing keys of a table, or of a whole pipeline in one run.

    Of a pipeline, each key is made as soon as its parents are there, and each restriction applies to the
    tables that have its attributes.
    Keys are shared with other runs through the jobs table, so the same command may run on many machines.
    Exit code 0 means that no errors are left. Keys may be: beyond --max-calls, or held by other runs.
    """
    from djdist._settings import number_or_auto  # it reads the settings, which may be refused
    from djdist.cli.choosing import check, parted, targets_of
    from djdist.cli.printing import print_forecast
    from djdist.pipeline.plan import plan_of, plan_of_one

    names, conditions = parted(name, restrictions)
    found = targets_of(names)
    is_one = len(names) == 1 and ":" in name and not (upstream or downstream)
    if is_one:
        check(found[0], conditions)
    planned = (
        plan_of_one(found[0](), conditions)
        if is_one
        else plan_of(found, conditions, upstream=upstream, downstream=downstream)
    )
    target: Any = found[0] if is_one else [table.table for table in planned.tables]
    if dry_run:
        print_forecast(djdist.populate(target, *conditions, dry_run=True), as_json=as_json)
        return
    needs = {"num_cpus": num_cpus, "num_gpus": num_gpus, "memory": bytes_of(memory)}
    result: Any = djdist.populate(
        target,
        *conditions,
        reserve_jobs=True,
        suppress_errors=True,
        executor=executor_of(executor, address, resources=resources_of(resource), **needs),
        processes=processes or None,
        max_calls=max_calls,
        priority=priority,
        retries=retries,
        retry_on=retry_on or None,
        timeout_seconds=timeout_seconds,
        keys_per_transaction=None if keys_per_transaction is None else number_or_auto(keys_per_transaction),
        refresh=refresh,
        display_progress=not detach and shows_bar(bar),
        detach=detach,
        order=order,
        memory_max=memory_max,
        watch=watch,
        poll_seconds=poll_seconds,
        idle_exit_seconds=idle_exit_seconds,
    )
    if detach:
        _tell_detached(result, " ".join(names), flags_of(executor, address), as_json)
    elif is_one:
        _tell_result(result, name, found[0], conditions, as_json)
    else:
        _tell_results(result, " ".join(names), planned, as_json)


def _tell_detached(run: "djdist.Run", name: str, flags: str, as_json: bool) -> None:
    if as_json:
        print_json({"run": run.info.id, "table": run.info.table, "schema": run.info.schema})
        return
    typer.echo(f"{run.info} goes on. Look at it, wait for it or stop it:")
    for command in (f"top {name}", f"wait {run.info.id} {flags}", f"stop {run.info.id} {flags}"):
        typer.echo(f"  djdist {command}")


def _tell_result(
    result: dict[str, Any], name: str, table: Any, restrictions: Sequence[str], as_json: bool
) -> None:
    made, left = result["success_count"], _left(table, restrictions)
    if as_json:
        print_json({"table": table.__name__, "made": made, **left})
    else:
        typer.echo(_counts(made, left))
    _end(name, left["error"])


def _tell_results(result: dict[str, Any], names: str, plan: "Plan", as_json: bool) -> None:
    """Tell of each table of a run what was made and what is left."""
    left = {planned.name: _left(planned.table, planned.restrictions) for planned in plan.tables}
    if as_json:
        tables = [{"table": table, **result["tables"][table], **counts} for table, counts in left.items()]
        print_json({"made": result["success_count"], "tables": tables})
    width = max(map(len, left))
    for table, counts in left.items() if not as_json else ():
        told = result["tables"][table]
        by = ", ".join(f"{count:,} by {other}" for other, count in told["held_back_by"].items())
        typer.echo(f"{table:{width}}  {_counts(told['made'], counts)}{f', held back: {by}' if by else ''}")
    _end(names, sum(counts["error"] for counts in left.values()))


def _left(table: Any, restrictions: Sequence[Any]) -> dict[str, int]:
    from djdist.cli.choosing import jobs_of_keys
    from djdist.jobs.history import counts_of

    counts = counts_of(jobs_of_keys(table, restrictions))
    return {status: counts[status] for status in ("error", "pending", "reserved")}


def _counts(made: int, left: dict[str, int]) -> str:
    waiting = [f", {left[status]:,} {status}" for status in ("pending", "reserved") if left[status]]
    return f"{made:,} made, {number(left['error'], 'error')} left{''.join(waiting)}"


def _end(names: str, errors: int) -> None:
    if errors:
        say(f"See them: djdist errors {names}. Then: djdist retry {names}, and populate again.")
        raise typer.Exit(ERRORS_LEFT)
