"""One ``populate()`` call: options in, parts joined, summary out."""

import logging
import os
import platform
import signal
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from typing import Any, Literal, TypedDict, overload
from uuid import uuid4

import cloudpickle
from typing_extensions import Unpack

from djdist import executors
from djdist._executor import Executor, Loop
from djdist._job import Policy, Recipe, RunInfo, TaskFunction
from djdist._job_store import JobStore
from djdist._settings import ExceptionClasses, class_names, config
from djdist._signals import catching
from djdist.database.job_statements import JobStatements
from djdist.driver import drive
from djdist.executors import ExecutorLike
from djdist.job_stores.jobs_table.lease import new_token
from djdist.job_stores.jobs_table.store import JobsTable, Owner
from djdist.job_stores.memory import MemoryStore
from djdist.job_stores.pipeline import PipelineStore
from djdist.jobs.table import jobs_of, refreshing
from djdist.monitoring.progress_bar import ProgressBar
from djdist.monitoring.runs import Run, result_of
from djdist.pipeline.checks import check_populates
from djdist.pipeline.connection import reachable
from djdist.pipeline.jobs_table import jobs_table_spec
from djdist.pipeline.keys import keys_to_make
from djdist.pipeline.provenance import code_version, user_of
from djdist.shipping.large_parts import warn_if_large
from djdist.shipping.packing import pack, settings_of, shared_settings
from djdist.shipping.pickled_task import PickledTask
from djdist.worker import WorkerContext, WorkerTask, is_making

logger = logging.getLogger(__name__)


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


@overload
def populate(
    table: Any, *restrictions: Any, detach: Literal[False] = False, **options: Unpack[Options]
) -> dict[str, Any]: ...
@overload
def populate(table: Any, *restrictions: Any, detach: Literal[True], **options: Unpack[Options]) -> Run: ...
@overload
def populate(
    table: Any, *restrictions: Any, detach: bool, **options: Unpack[Options]
) -> dict[str, Any] | Run: ...
def populate(
    table: Any,
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
) -> dict[str, Any] | Run:
    """Make the missing keys of a Computed or Imported table, here or on a cluster.

    After :func:`djdist.enable` it is the method ``populate`` of every such table. It takes all
    that DataJoint's own ``populate()`` takes, with the same meaning, and ``executor``. Called
    within a ``make()``, it makes the keys at once in the same process, unless it names an executor.

    Parameters
    ----------
    table : datajoint.Computed or datajoint.Imported
        The table, its class or an instance (``self`` where this is a method).
    *restrictions
        Which keys of the key source to refresh and to make.
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
        Keyword arguments for each ``make()``.
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

    Returns
    -------
    dict or djdist.Run
        ``success_count`` and ``error_list``, pairs of a key and its error, of which there
        are at most ``djdist.config.max_errors_listed``; with ``detach`` a handle of the run.

    Raises
    ------
    OptionError
        An option can't be used; no job was touched.
    WorkerSetupError
        The workers can't load the pipeline or connect; no job was touched.
    Exception
        What ``make()`` raised, unless ``suppress_errors``.
    """
    table = table() if isinstance(table, type) else table
    check_populates(table)
    recipe = _recipe(table, timeout_seconds, retries, retry_on)
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
    )
    chosen = executors.resolve(_default(processes) if executor is None else executor, processes)
    if recipe.timeout_seconds is not None:
        chosen = chosen.with_kill()
    if detach:
        chosen.check_detaches()
    with reachable(table.connection):
        version = code_version(table)
        store, statements = (
            _jobs_table(table, restrictions, priority, refresh, version)
            if reserve_jobs
            else (MemoryStore(recipe.table, keys_to_make(table, restrictions, policy.max_calls)), None)
        )
        info = _info(table, policy, detached=detach, return_exception_objects=return_exception_objects)
    task: TaskFunction = (
        WorkerContext(table, make_kwargs or {}, settings_of(table.connection), version, statements)
        if chosen.runs_in_caller
        else _worker_task(table, make_kwargs or {}, version, statements, recipe.timeout_seconds)
    )
    stores, recipes = {recipe.table: store}, {recipe.table: replace(recipe, task=task, needs=chosen.needs)}
    loop = partial(drive, store=PipelineStore(stores), recipes=recipes, policy=policy, info=info)
    if detach:
        return _detach(chosen, loop, info)
    with (
        chosen,
        catching(signal.SIGTERM),
        ProgressBar(info.table, max_calls, shown=display_progress) as bar,
    ):
        summary = chosen.drive(loop, bar.show, info)
    return result_of(summary, info)


def _recipe(
    table: Any, timeout_seconds: float | None, retries: int | None, retry_on: ExceptionClasses | None
) -> Recipe:
    """Return how the table's keys are made, still without the task, for which its database is asked."""
    return Recipe(
        type(table).__name__,
        timeout_seconds=_timeout_seconds(table, timeout_seconds),
        retries=config.retries if retries is None else retries,
        retry_on=config.retry_on if retry_on is None else class_names(retry_on),
    )


def _jobs_table(
    table: Any, restrictions: Sequence[Any], priority: int | None, refresh: bool | None, version: str
) -> tuple[JobStore, JobStatements]:
    settings = table.connection._config.jobs
    spec = jobs_table_spec(jobs_of(table), restrictions, ship_credentials=config.ship_credentials)
    owner = Owner(new_token(config.lease_seconds), user_of(table), version)
    refreshes = settings.auto_refresh if refresh is None else refresh
    options = refreshing(table, priority=priority)
    max_priority = None if priority is None else int(priority)  # it may be numpy's
    store = JobsTable(
        spec, owner, max_priority, options if refreshes else None, config.database_patience_seconds
    )
    return store, store.job_statements()


def _info(table: Any, policy: Policy, *, detached: bool, return_exception_objects: bool) -> RunInfo:
    return RunInfo(
        id=uuid4().hex[:8],
        table=type(table).__name__,
        schema=table.database,
        user=user_of(table),
        host=platform.node(),
        pid=os.getpid(),
        started_at=datetime.now(timezone.utc),
        detached=detached,
        suppress_errors=policy.suppress_errors,
        return_exception_objects=return_exception_objects,
    )


def _worker_task(
    table: Any,
    make_kwargs: dict[str, Any],
    version: str,
    statements: JobStatements | None,
    timeout_seconds: float | None,
) -> PickledTask:
    ships = config.ship_credentials
    task = WorkerTask(
        name=type(table).__name__,
        settings=settings_of(table.connection, ship_credentials=ships),
        pickled=pack(table, make_kwargs, ship_credentials=ships),
        version=version,
        statements=statements,
        preload=config.preload,
        timeout_seconds=timeout_seconds,
        shared=shared_settings(table.connection, ship_credentials=ships),
    )
    pickled = PickledTask(cloudpickle.dumps(task))
    warn_if_large(len(pickled.pickled), table, make_kwargs)
    return pickled


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
