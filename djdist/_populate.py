"""One ``populate()`` call: options in, parts joined, summary out."""

import logging
import os
import platform
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal, TypedDict, overload
from uuid import uuid4

import cloudpickle
import pandas as pd
from typing_extensions import Unpack

from djdist import executors
from djdist._executor import Executor, Loop
from djdist._job import Job, KeysPerTransaction, Policy, Recipe, RunInfo, checked_keys_per_transaction
from djdist._job_store import JobStore
from djdist._needs import Needs, bytes_of, checked
from djdist._notifier import Notifier
from djdist._settings import ExceptionClasses, class_names, config
from djdist._signals import catching
from djdist.database.job_statements import JobStatements
from djdist.driver import drive
from djdist.errors import OptionError
from djdist.executors import ExecutorLike
from djdist.job_stores.jobs_table.lease import new_token
from djdist.job_stores.jobs_table.missing_keys import MissingKeys
from djdist.job_stores.jobs_table.several import JobsTables
from djdist.job_stores.jobs_table.store import JobsTable, Owner
from djdist.job_stores.jobs_table.transactions import Transactions
from djdist.job_stores.memory import MemoryStore
from djdist.job_stores.pipeline import PipelineStore
from djdist.jobs.forecast import forecast
from djdist.jobs.table import jobs_of, refreshing
from djdist.monitoring.notifications import notifier_of
from djdist.monitoring.progress_bar import ProgressBar
from djdist.monitoring.runs import Run, result_of
from djdist.pipeline.checks import makes_in_parts
from djdist.pipeline.connection import reachable
from djdist.pipeline.jobs_table import jobs_table_spec_of, keys_spec_of
from djdist.pipeline.keys import keys_to_make
from djdist.pipeline.plan import Plan, PlannedTable, plan_of, plan_of_one
from djdist.pipeline.provenance import code_version, user_of
from djdist.pipeline.targets import holds_tables, is_table, names_in_schema
from djdist.shipping.large_parts import warn_if_large
from djdist.shipping.packing import pack, settings_of, shared_settings
from djdist.shipping.pickled_task import PickledTask
from djdist.worker import Pace, WorkerContext, WorkerTask, is_making

logger = logging.getLogger(__name__)

MOST_NAMES = 3
"""A run of more tables than this is called by the first and the last one."""


class Options(TypedDict, total=False):
    """What :func:`populate` takes besides ``detach``, which decides what it returns."""

    suppress_errors: bool
    return_exception_objects: bool
    reserve_jobs: bool
    max_calls: int | None
    display_progress: bool
    processes: int | None
    make_kwargs: dict[str, Any] | None
    priority: int | None
    refresh: bool | None
    executor: ExecutorLike | None
    timeout_seconds: float | None
    retries: int | None
    retry_on: ExceptionClasses | None
    upstream: bool
    downstream: bool
    order: str
    needs: Needs | Mapping[str, Needs] | None
    keys_per_transaction: KeysPerTransaction | Mapping[str, KeysPerTransaction] | None
    memory_max: int | str | None
    watch: bool
    poll_seconds: float
    idle_exit_seconds: float | None


@overload
def populate(
    target: Any,
    *restrictions: Any,
    detach: Literal[False] = False,
    dry_run: Literal[False] = False,
    **options: Unpack[Options],
) -> dict[str, Any]: ...
@overload
def populate(
    target: Any, *restrictions: Any, dry_run: Literal[True], **options: Unpack[Options]
) -> pd.DataFrame: ...
@overload
def populate(target: Any, *restrictions: Any, detach: Literal[True], **options: Unpack[Options]) -> Run: ...
@overload
def populate(
    target: Any, *restrictions: Any, detach: bool, **options: Unpack[Options]
) -> dict[str, Any] | Run: ...
def populate(
    target: Any,
    *restrictions: Any,
    suppress_errors: bool = False,
    return_exception_objects: bool = False,
    reserve_jobs: bool = False,
    max_calls: int | None = None,
    display_progress: bool = False,
    processes: int | None = 1,
    make_kwargs: dict[str, Any] | None = None,
    priority: int | None = None,
    refresh: bool | None = None,
    executor: ExecutorLike | None = None,
    timeout_seconds: float | None = None,
    retries: int | None = None,
    retry_on: ExceptionClasses | None = None,
    detach: bool = False,
    upstream: bool = False,
    downstream: bool = False,
    order: str = "downstream",
    needs: Needs | Mapping[str, Needs] | None = None,
    keys_per_transaction: KeysPerTransaction | Mapping[str, KeysPerTransaction] | None = None,
    memory_max: int | str | None = None,
    watch: bool = False,
    poll_seconds: float = 10.0,
    idle_exit_seconds: float | None = None,
    dry_run: bool = False,
) -> dict[str, Any] | Run | pd.DataFrame:
    """Make the missing keys of a table, or of a whole pipeline in one run, here or on a cluster.

    After :func:`djdist.enable` it is the method ``populate`` of every Computed and Imported table. It takes
    all that DataJoint's own ``populate()`` takes, with the same meaning, and ``executor``. Called
    within a ``make()``, it makes the keys at once in the same process, unless it names an executor.

    A run of several tables makes each key as soon as its parents are there, while others are still
    upstream. Where any rows of a table upstream may be part of a key's result, that table is finished first.

    Parameters
    ----------
    target : table, module, datajoint.Schema or list of these
        A Computed or Imported table, its class or an instance (``self`` where this is a method), or what
        holds such tables.
    *restrictions
        Which keys of the key source to refresh and to make. In a run of several tables each applies to
        those that have its attributes. A module or a schema here is a further target.
    suppress_errors : bool, optional
        Collect errors instead of raising the first. Default False: at the first error
        no more tasks are begun, what runs is finished, and the error is raised.
    return_exception_objects : bool, optional
        Collect exceptions instead of messages. Default False.
    reserve_jobs : bool, optional
        Share the keys with other runs and with native workers through the jobs table.
        Default False.
    max_calls : int, optional
        Maximum number of keys to make.
    display_progress : bool, optional
        Show a bar. Default False.
    processes : int, optional
        Processes of the local executor, which is then the default; None for one per
        processor. Default 1.
    make_kwargs : dict, optional
        Keyword arguments for each ``make()``; in a run of several tables a dict of them by the name of the
        table.
    priority : int, optional
        Make only jobs of this priority or a more urgent one; new jobs get it.
    refresh : bool, optional
        Refresh the jobs table first. Default: ``dj.config.jobs.auto_refresh``.
    executor : {"local", "ray", "dask"} or object, optional
        Where keys are made; an object is an executor of djdist, a ``distributed.Client`` or any
        ``concurrent.futures.Executor``. Default: ``djdist.config.executor``.
    timeout_seconds : float, optional
        End a ``make()`` that takes longer, with its process, and record an error. Default:
        the attribute ``timeout_seconds`` of the table's class, else of ``djdist.config``.
    retries : int, optional
        Retry a failed key up to this many times, after pauses that double. Default:
        ``djdist.config.retries``.
    retry_on : exception class, its name, or several, optional
        Which errors are worth a retry. Default: ``djdist.config.retry_on``.
    detach : bool, optional
        Return at once and let the run go on without this process, on a Ray or Dask cluster
        that lives longer. Default False.
    upstream : bool, optional
        Populate all that the target needs, too. Default False.
    downstream : bool, optional
        Populate all that depends on the target, too, which may be a Manual or Lookup table then. Default
        False.
    order : {"downstream", "upstream"}, optional
        Which of two tables goes first where jobs are equally urgent: the one nearer to a last table, so that
        first results come early, or the one with the longer way before it. Default ``"downstream"``.
    needs : Needs, or dict of them by the table's name, optional
        What one key needs. Default: what ``djdist.config.needs`` says of the table, else its attribute or
        method ``needs``, else the executor.
    keys_per_transaction : int or "auto", or dict of them by the table's name, optional
        How many tiny keys may share a transaction; their ``make()`` may run twice then. Default: the
        attribute ``keys_per_transaction`` of the table's class, which also wins over one value for several
        tables, else ``djdist.config.keys_per_transaction``, which is 1.
    memory_max : int or str, optional
        How much memory a key gets at most that has run out of it before. Default: what the largest node has.
    watch : bool, optional
        Go on when nothing is left, and make new keys as they come. Default False.
    poll_seconds : float, optional
        How often a run that watches looks for new keys. Default 10.
    idle_exit_seconds : float, optional
        End a run that watches after so long without anything to make. Default: never.
    dry_run : bool, optional
        Return what the run would do, and touch nothing. Default False.

    Returns
    -------
    dict, djdist.Run or pandas.DataFrame
        ``success_count`` and ``error_list``, pairs of a key and its error, of which there
        are at most ``djdist.config.max_errors_listed``. After a run of several tables these are triples that
        begin with the table's name, and ``tables`` has by table how many keys were ``made``,
        ``failed`` and ``held_back``, ``held_back_by`` which tables' errors, and ``peak_memory`` how many
        bytes a process had at most that made keys, 0 where that can't be told. With ``detach`` a handle
        of the run. With ``dry_run`` a row for each table, in their order.

    Raises
    ------
    OptionError
        An option can't be used; no job was touched.
    WorkerSetupError
        The workers can't load the pipeline or connect; no job was touched.
    Exception
        What ``make()`` raised, unless ``suppress_errors``.
    """
    plan, is_one = _plan(target, restrictions, upstream=upstream, downstream=downstream)
    kwargs = _make_kwargs(plan, make_kwargs, is_one=is_one)
    _check_names("needs", needs, plan)
    _check_names("keys_per_transaction", keys_per_transaction, plan)
    recipes = {
        planned.name: replace(
            _recipe(planned, timeout_seconds, retries, retry_on),
            keys_per_transaction=_keys_per_transaction(planned, keys_per_transaction, is_one=is_one),
        )
        for planned in plan.tables
    }
    policy = Policy(
        max_calls=max_calls,
        suppress_errors=suppress_errors,
        return_exception_objects=return_exception_objects,
        max_worker_losses=config.max_worker_losses,
        lease_seconds=config.lease_seconds,
        count_pending=display_progress or detach,
        grace_seconds=config.grace_seconds,
        retry_pause_seconds=config.retry_pause_seconds,
        task_seconds=config.task_seconds,
        max_errors_listed=config.max_errors_listed,
        order=order,
        memory_max=bytes_of(memory_max),
        poll_seconds=poll_seconds if watch else None,
        idle_exit_seconds=idle_exit_seconds if watch else None,
    )
    chosen = executors.resolve(_default(processes) if executor is None else executor, processes)
    if any(recipe.timeout_seconds is not None for recipe in recipes.values()):
        chosen = chosen.with_kill()
    if detach:
        chosen.check_detaches()
    with reachable(plan.tables[0].table.connection):
        _check_needs_set(plan)
        if dry_run:
            return forecast(plan, {p.name: _needs(p, needs, chosen.needs) for p in plan.tables})
        info = _info(plan, policy, detached=detach, is_one=is_one)
        if not detach:
            chosen.prepare(info.table)
        notifier = _notifier(info)
        store, of_worker = (
            _jobs_tables(plan, priority, refresh, watch=watch)
            if reserve_jobs
            else _missing_keys(plan, max_calls, is_one=is_one, watch=watch)
        )
    for planned in plan.tables:
        name = planned.name
        context = WorkerContext(
            planned.table,
            kwargs[name],
            settings_of(planned.table.connection),
            *of_worker[name],
            pace=Pace(recipes[name].most_per_transaction),
        )
        task = context if chosen.runs_in_caller else _worker_task(context, recipes[name])
        said = _needs(planned, needs, chosen.needs)
        recipes[name] = replace(recipes[name], task=task, needs=said, default_needs=chosen.needs)
    loop = partial(drive, store=store, recipes=recipes, policy=policy, info=info, notifier=notifier)
    if detach:
        return _detach(chosen, loop, info)
    with (
        chosen,
        catching(signal.SIGTERM),
        ProgressBar(info.table, max_calls, shown=display_progress) as bar,
    ):
        summary = chosen.drive(loop, bar.show, info)
    return result_of(summary, info)


def _plan(target: Any, restrictions: Sequence[Any], *, upstream: bool, downstream: bool) -> tuple[Plan, bool]:
    """Return the plan of a run, and whether it is DataJoint's own case, one table."""
    more = [given for given in restrictions if holds_tables(given)]
    if is_table(target) and not (more or upstream or downstream):
        return plan_of_one(target() if isinstance(target, type) else target, restrictions), True
    conditions = [given for given in restrictions if not holds_tables(given)]
    targets = [target, *more] if more else target
    return plan_of(targets, conditions, upstream=upstream, downstream=downstream), False


def _make_kwargs(plan: Plan, given: dict[str, Any] | None, *, is_one: bool) -> dict[str, dict[str, Any]]:
    """Return the keyword arguments for the ``make()`` of each table."""
    names = [planned.name for planned in plan.tables]
    if is_one:
        return {names[0]: given or {}}
    by_table = dict(given or {})
    _check_names("make_kwargs of a run of several tables", by_table, plan)
    return {name: by_table.get(name, {}) for name in names}


def _check_names(what: str, by_table: object, plan: Plan) -> None:
    """Raise OptionError where a dict by the table's name has one that is no table of the run."""
    names = [planned.name for planned in plan.tables]
    if isinstance(by_table, Mapping) and (unknown := by_table.keys() - {*names}):
        raise OptionError(
            f"{what} is a dict by the table's name: {', '.join(unknown)} is none of {', '.join(names)}."
        )


def _check_needs_set(plan: Plan) -> None:
    """Raise OptionError where the settings name a table that a schema of the run hasn't.

    Tables of other schemas may be those of pipelines that aren't loaded here.
    """
    connections = {planned.table.database: planned.table.connection for planned in plan.tables}
    for name in config.needs:
        schema, _, table = name.rpartition(".")
        if not schema:
            raise OptionError(f'djdist.config.needs has {name!r}: write "schema.Table".')
        if schema in connections and table not in names_in_schema(schema, connections[schema]):
            known = dict.fromkeys(names_in_schema(schema, connections[schema]))
            likely = get_close_matches(table, known, n=1) or known
            raise OptionError(
                f"djdist.config.needs has {name!r}, but {schema} has no Computed or Imported table "
                f"{table}: did you mean {next(iter(likely))}?"
            )


def _recipe(
    planned: PlannedTable,
    timeout_seconds: float | None,
    retries: int | None,
    retry_on: ExceptionClasses | None,
) -> Recipe:
    """Return how the table's keys are made, still without the task, for which its database is asked."""
    return Recipe(
        planned.name,
        timeout_seconds=_timeout_seconds(planned.table, timeout_seconds),
        retries=config.retries if retries is None else retries,
        retry_on=config.retry_on if retry_on is None else class_names(retry_on),
        upstream=planned.upstream,
        follows=planned.followed,
        after=planned.after,
    )


def _keys_per_transaction(planned: PlannedTable, given: Any, *, is_one: bool) -> KeysPerTransaction:
    """Return how many keys share a transaction, which those of a ``make()`` in three parts can't.

    What a table says of itself wins over one value for several tables: its ``make()`` may not run twice.
    """
    name, is_by_table = planned.name, isinstance(given, Mapping)
    said = given.get(name) if is_by_table else given if is_one else None
    said = getattr(planned.table, "keys_per_transaction", None) if said is None else said
    default = config.keys_per_transaction if is_by_table or given is None else given
    chosen: KeysPerTransaction = default if said is None else said
    if checked_keys_per_transaction(chosen) == 1 or not makes_in_parts(planned.table):
        return chosen
    if said is None:
        return 1
    raise OptionError(
        f"keys_per_transaction={said!r} is not for {name}: a make() in three parts computes outside of its "
        "transaction, so each key needs its own."
    )


def _needs(
    planned: PlannedTable, given: Needs | Mapping[str, Needs] | None, of_executor: Needs
) -> Needs | None:
    """Return what a key needs: as the call says, or the settings, the table, or at last the executor.

    None where the table says so of each key.
    """
    table, name = planned.table, planned.name
    said = given.get(name) if isinstance(given, Mapping) else given
    if said is None:
        said = config.needs_of(table.database, type(table).__name__, table.table_name)
    said = getattr(table, "needs", of_executor) if said is None else said
    return None if callable(said) else checked(said, name).over(of_executor)


OfWorker = dict[str, tuple[str, JobStatements | None]]
"""What workers have to know by table: the code's version, and the statements by which they finish jobs."""


def _jobs_tables(
    plan: Plan, priority: int | None, refresh: bool | None, *, watch: bool
) -> tuple[JobStore, OfWorker]:
    """Keep the jobs of all tables in their jobs tables, for one owner by two connections."""
    ships, token = config.ship_credentials, new_token(config.lease_seconds)
    stores, of_worker = dict[str, JobsTable](), OfWorker()
    transactions = _transactions(plan, watch=watch)
    for planned in plan.tables:
        table = planned.table
        settings = table.connection._config.jobs
        refreshes = settings.auto_refresh if refresh is None else refresh
        options = refreshing(table, priority=priority)
        version = code_version(table)
        store = JobsTable(
            jobs_table_spec_of(plan, planned, jobs_of(table), ship_credentials=ships),
            Owner(token, user_of(table), version),
            None if priority is None else int(priority),  # it may be numpy's
            options if refreshes else None,
            config.database_patience_seconds,
            transactions,
        )
        stores[planned.name] = store
        of_worker[planned.name] = version, store.job_statements()
    return JobsTables(stores, transactions), of_worker


def _missing_keys(
    plan: Plan, max_calls: int | None, *, is_one: bool, watch: bool
) -> tuple[JobStore, OfWorker]:
    """Keep the keys that tables lack in the driver's process; those of one table may all be known now."""
    stores, of_worker = dict[str, JobStore](), OfWorker()
    transactions, failed = _transactions(plan, watch=watch), dict[str, list[Job]]()
    for planned in plan.tables:
        stores[planned.name] = (
            MemoryStore(planned.name, keys_to_make(planned.table, planned.restrictions, max_calls))
            if is_one and not watch
            else MissingKeys(
                keys_spec_of(plan, planned, ship_credentials=config.ship_credentials), transactions, failed
            )
        )
        of_worker[planned.name] = code_version(planned.table), None
    return PipelineStore(stores), of_worker


def _transactions(plan: Plan, *, watch: bool) -> Transactions:
    settings = settings_of(plan.tables[0].table.connection, ship_credentials=config.ship_credentials)
    return Transactions(settings, config.database_patience_seconds, outlasts=watch)


def _info(plan: Plan, policy: Policy, *, detached: bool, is_one: bool) -> RunInfo:
    names = [planned.name for planned in plan.tables]
    first = plan.tables[0].table
    return RunInfo(
        id=uuid4().hex[:8],
        table=_title(names),
        schema=", ".join(dict.fromkeys(planned.table.database for planned in plan.tables)),
        user=user_of(first),
        host=platform.node(),
        pid=os.getpid(),
        started_at=datetime.now(timezone.utc),
        detached=detached,
        suppress_errors=policy.suppress_errors,
        return_exception_objects=policy.return_exception_objects,
        tables=() if is_one else tuple(names),
    )


def _title(names: Sequence[str]) -> str:
    """Return what a run of these tables is called."""
    return ", ".join(names) if len(names) <= MOST_NAMES else f"{names[0]} to {names[-1]}, {len(names)} tables"


def _worker_task(context: WorkerContext, recipe: Recipe) -> PickledTask:
    ships, table, connection = config.ship_credentials, context.table, context.table.connection
    task = WorkerTask(
        name=recipe.table,
        settings=settings_of(connection, ship_credentials=ships),
        pickled=pack(table, context.make_kwargs, ship_credentials=ships),
        version=context.version,
        statements=context.statements,
        preload=config.preload,
        timeout_seconds=recipe.timeout_seconds,
        keys_per_transaction=recipe.most_per_transaction,
        shared=shared_settings(connection, ship_credentials=ships),
    )
    pickled = PickledTask(cloudpickle.dumps(task))
    warn_if_large(len(pickled.pickled), table, context.make_kwargs)
    return pickled


def _notifier(info: RunInfo) -> Notifier:
    """Return what tells people of a run, but not of one within a ``make()``, whose own run is told of."""
    urls = () if is_making() else config.notify
    return notifier_of(urls, config.notify_period_seconds, f"{info} by {info.user} on {info.host}")


def _detach(executor: Executor, loop: Loop, info: RunInfo) -> Run:
    """Start a run; the way to the cluster stays open for its handle."""
    executor.__enter__()
    logger.info("%s goes on without its caller on %r", info, executor)
    return Run(info, executor.detach(loop, info))


def _default(processes: int | None) -> Any:
    """Return the executor of a call that names none, which means processes as DataJoint does."""
    return config.executor if processes == 1 and not is_making() else "local"


def _timeout_seconds(table: Any, given: float | None) -> float | None:
    if given is None and is_making():  # the limit of the make() around it holds, in whose process this is
        return None
    chosen = getattr(table, "timeout_seconds", None) if given is None else given
    return config.timeout_seconds if chosen is None else chosen
