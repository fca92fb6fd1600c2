"""One ``populate()`` call: options in, parts joined, summary out."""

import logging
import os
import platform
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property, partial
from numbers import Real
from typing import Any
from uuid import uuid4

import cloudpickle

from djdist import executors
from djdist.driver import drive
from djdist.errors import OptionError
from djdist.executor import Drive, Executor
from djdist.executors import Choice
from djdist.fence import Fence
from djdist.job import Policy, RunInfo, Work
from djdist.job_store import JobStore
from djdist.job_stores.jobs_table import JobsTable, Owner, new_token
from djdist.job_stores.memory import MemoryStore
from djdist.jobs import jobs_of, refreshing
from djdist.pipeline import check_populates, code_version, jobs_table_source, keys_to_make, reachable, user_of
from djdist.progress_bar import ProgressBar
from djdist.runs import Run, result_of
from djdist.settings import LONGEST_SECONDS, ExceptionClasses, class_names, config
from djdist.shipping import pack_table, settings_of
from djdist.signals import catching
from djdist.worker import Parcel, Workplace

logger = logging.getLogger(__name__)


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
    executor: Choice | None = None,
    timeout_seconds: float | None = None,
    retries: int | None = None,
    retry_on: ExceptionClasses | None = None,
    detach: bool = False,
) -> Any:
    """Make the missing keys of a Computed or Imported table, here or on a cluster.

    After :func:`djdist.enable` it is the method ``populate`` of every such table. It takes all
    that DataJoint's own ``populate()`` takes, with the same meaning, and ``executor``.

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
        The most keys to make.
    display_progress : bool, optional
        Show a bar. Default False.
    processes : int, optional
        Processes of the local executor, which is then the default; None for one a
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
        Try a key that failed so often again, after pauses that double. Default:
        ``djdist.config.retries``.
    retry_on : exception class, its name, or several, optional
        Which errors are worth another try. Default: ``djdist.config.retry_on``.
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
    call = Call(
        table,
        restrictions,
        suppress_errors,
        return_exception_objects,
        max_calls,
        display_progress,
        detach,
        make_kwargs or {},
        priority,
        refresh,
        _timeout_seconds(table, timeout_seconds),
        config.retries if retries is None else retries,
        config.retry_on if retry_on is None else class_names(retry_on),
    )
    chosen = executors.resolve(_default(processes) if executor is None else executor, processes)
    if call.timeout_seconds is not None:
        chosen = chosen.killing()
    if detach:
        chosen.check_detaches()
    with reachable(table.connection):
        store, fence = _jobs_table(call) if reserve_jobs else _keys_only(call)
        info = _info(call)
    run = _run(call, chosen, store, fence, info)
    return _detach(chosen, run, info) if detach else _drive(call, chosen, run, info)


@dataclass(frozen=True)
class Call:
    """What one call of ``populate()`` was given."""

    table: Any
    restrictions: Sequence[Any]
    suppress_errors: bool
    return_exception_objects: bool
    max_calls: int | None
    display_progress: bool
    detach: bool
    make_kwargs: dict[str, Any]
    priority: int | None
    refresh: bool | None
    timeout_seconds: float | None
    retries: int
    retry_on: tuple[str, ...]

    def __post_init__(self) -> None:
        timeout = self.timeout_seconds
        if timeout is not None and not (_is_number(timeout) and 0 < timeout <= LONGEST_SECONDS):
            raise OptionError(
                f"timeout_seconds={timeout!r} must be a number above 0, up to {LONGEST_SECONDS:g}, or None."
            )
        if not isinstance(self.retries, int) or self.retries < 0:
            raise OptionError(f"retries={self.retries!r} must be a whole number from 0.")
        if self.max_calls is not None and (not isinstance(self.max_calls, int) or self.max_calls < 0):
            raise OptionError(
                f"max_calls={self.max_calls!r} must be a whole number from 0, or None for no limit."
            )

    @property
    def name(self) -> str:
        """The table's name."""
        return type(self.table).__name__

    @cached_property
    def version(self) -> str:
        """The code's version, looked up once a run."""
        return code_version(self.table)


def _jobs_table(call: Call) -> tuple[JobStore, Fence]:
    jobs = jobs_of(call.table)
    settings = call.table.connection._config.jobs
    source = jobs_table_source(jobs, call.restrictions, ship_credentials=config.ship_credentials)
    owner = Owner(new_token(config.lease_seconds), user_of(call.table), call.version)
    refreshes = settings.auto_refresh if call.refresh is None else call.refresh
    options = refreshing(call.table, priority=call.priority)
    store = JobsTable(
        source, owner, call.priority, options if refreshes else None, config.database_patience_seconds
    )
    return store, store.fence(keep_completed=settings.keep_completed)


def _keys_only(call: Call) -> tuple[JobStore, None]:
    return MemoryStore(keys_to_make(call.table, call.restrictions, call.max_calls)), None


def _info(call: Call) -> RunInfo:
    return RunInfo(
        id=uuid4().hex[:8],
        table=call.name,
        schema=call.table.database,
        user=user_of(call.table),
        host=platform.node(),
        pid=os.getpid(),
        started_at=datetime.now(timezone.utc),
        detached=call.detach,
        suppress_errors=call.suppress_errors,
        return_exception_objects=call.return_exception_objects,
    )


def _run(call: Call, executor: Executor, store: JobStore, fence: Fence | None, info: RunInfo) -> Drive:
    policy = Policy(
        max_calls=call.max_calls,
        suppress_errors=call.suppress_errors,
        max_losses=config.max_losses,
        lease_seconds=config.lease_seconds,
        count_pending=call.display_progress or call.detach,
        grace_seconds=config.grace_seconds,
        timeout_seconds=call.timeout_seconds,
        retries=call.retries,
        retry_on=call.retry_on,
        max_errors_listed=config.max_errors_listed,
    )
    work = _workplace(call, fence) if executor.in_process else _parcel(call, fence)
    return partial(drive, store=store, work=work, policy=policy, info=info)


def _drive(call: Call, executor: Executor, run: Drive, info: RunInfo) -> dict[str, Any]:
    with (
        executor,
        catching(signal.SIGTERM),
        ProgressBar(call.name, call.max_calls, shown=call.display_progress) as bar,
    ):
        summary = executor.drive(run, bar.show, info)
    return result_of(summary, info)


def _detach(executor: Executor, run: Drive, info: RunInfo) -> Run:
    """Start a run; the way to the cluster stays open for its handle."""
    executor.__enter__()
    logger.info("%s goes on without its caller on %r", info, executor)
    return Run(info, executor.detach(run, info))


def _workplace(call: Call, fence: Fence | None) -> Work:
    settings = settings_of(call.table.connection)
    return Workplace(call.table, call.make_kwargs, settings, call.version, fence)


def _parcel(call: Call, fence: Fence | None) -> Work:
    return Parcel(
        run=new_token(config.lease_seconds),
        name=call.name,
        settings=settings_of(call.table.connection, ship_credentials=config.ship_credentials),
        table=_packed(call, pack_table, type(call.table), f"the class {call.name}"),
        make_kwargs=_packed(call, cloudpickle.dumps, call.make_kwargs, "make_kwargs"),
        version=call.version,
        fence=fence,
        preload=config.preload,
        timeout_seconds=call.timeout_seconds,
    )


def _default(processes: int | None) -> Any:
    """Name the executor of a call that names none, which means processes as DataJoint does."""
    return config.executor if processes == 1 else "local"


def _timeout_seconds(table: Any, given: float | None) -> float | None:
    chosen = getattr(table, "timeout_seconds", None) if given is None else given
    return config.timeout_seconds if chosen is None else chosen


def _is_number(given: object) -> bool:
    return isinstance(given, Real)


def _packed(call: Call, pack: Any, value: Any, what: str) -> bytes:
    try:
        packed: bytes = pack(value)
    except Exception as error:
        raise OptionError(
            f"{what} can't be sent to the workers of {call.name}: {type(error).__name__}: {error}. "
            "Let it hold only what can be pickled: no open files, connections, locks or generators."
        ) from error
    return packed
