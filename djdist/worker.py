"""Makes one key and finishes its job; never raises."""

import faulthandler
import multiprocessing
import os
import platform
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import cloudpickle

from djdist.errors import LeaseLostError, Terminated
from djdist.fence import Fence, key_name
from djdist.grouping import GROUP_SECONDS
from djdist.job import Ending, Failure, Identity, Job, Outcome, Report
from djdist.making import Making, Session, load_early
from djdist.pipeline import (
    connect_anew,
    end_session,
    is_duplicate,
    is_full,
    is_infrastructure,
    is_made,
    job_columns,
)
from djdist.rights import RIGHTS, is_denial, lacking_right
from djdist.shipping import ConnectionSettings, is_alive, open_dbapi_connection, unpack_table
from djdist.signals import Signals, catching

MADE = (Ending.MADE, Ending.PRESENT)
EXIT_CODE_OF_SIGTERM = 128 + signal.SIGTERM
OVERDUE_FACTOR = 1.2
OVERDUE_SECONDS = 5.0
TABLES_KEPT = 8
TEXT_LENGTH = 100_000
PICKLE_LENGTH = 1_000_000
THREADS = (
    "A worker process with several threads makes one key at a time, because a DataJoint connection serves "
    "one thread: give workers one thread each (Dask: threads_per_worker=1, or --nthreads 1)."
)
CURES = (
    "Install the pipeline's package on every node, or send it along "
    '(Ray: RayExecutor(runtime_env={"working_dir": "."}), Dask: client.upload_file(...)), '
    "or pickle it by value: cloudpickle.register_pickle_by_value(module)."
)


@dataclass(frozen=True)
class Parcel:
    """All that workers need to make the keys of one table in one run.

    What it holds of credentials and of the user's code doesn't show when printed.

    Parameters
    ----------
    run : int
        Tells runs apart.
    name : str
        The table's name, for messages.
    settings : ConnectionSettings
        How to connect, and DataJoint's settings.
    table, make_kwargs : bytes
        The pickled class and the pickled arguments of ``make()``.
    version : str
        The code's version.
    fence : Fence or None
        Statements on the jobs table; None where a run has none.
    preload : tuple of str
        Modules to import first.
    timeout_seconds : float or None
        How long a ``make()`` may take.
    """

    run: int
    name: str
    settings: ConnectionSettings = field(repr=False)
    table: bytes = field(repr=False)
    make_kwargs: bytes = field(repr=False)
    version: str = ""
    fence: Fence | None = field(default=None, repr=False)
    preload: tuple[str, ...] = ()
    timeout_seconds: float | None = None

    def __call__(self, jobs: Sequence[Job]) -> Report:
        """Make a group of jobs on a worker; what comes back can be pickled."""
        with _making():
            try:
                workplace = _workplace(self)
            except Exception as error:
                return _without_workplace(self.name, jobs, error)
            if not jobs:
                return _trial(workplace)
            group = _Group(workplace, jobs)
            _making_now.append(group)
            try:
                report = make_group(group, self._limit)
            finally:
                _making_now.remove(group)
            _leave_if_told_to(group, report)
            return replace(report, outcomes=tuple(map(_portable_outcome, report.outcomes)))

    def _limit(self) -> AbstractContextManager[None]:
        return _ending_itself(self.timeout_seconds, watched=self.fence is not None)


@dataclass(frozen=True)
class Workplace:
    """A table and what belongs to it, ready in this process.

    Where the connection is the worker's own, it is closed after all that was not made, and the
    next key gets a new one: what was left behind, such as locks, must not meet any key.
    """

    table: Any
    make_kwargs: dict[str, Any]
    settings: ConnectionSettings
    version: str = ""
    fence: Fence | None = None
    own_connection: bool = False

    def __call__(self, jobs: Sequence[Job]) -> Report:
        """Make a group of jobs in the process of the caller, with the caller's own table."""
        with _making():
            if not jobs:
                return _trial(self)
            return make_group(_Group(self, jobs))


@dataclass(eq=False)
class _Group:
    """Jobs of one task, which are begun together when the first of them is."""

    workplace: Workplace
    jobs: Sequence[Job]
    _values: dict[Identity, dict[str, Any]] = field(init=False)
    _begun: dict[Identity, bool] | None = None
    all_missing: bool = False

    def __post_init__(self) -> None:
        self._values = {job.identity: _values(self.workplace, job) for job in self.jobs}

    def making(self) -> Making:
        at = self.workplace
        return Making(at.table, at.make_kwargs, at.version, several=len(self.jobs) > 1)

    def values(self, job: Job) -> dict[str, Any]:
        return self._values[job.identity]

    def begins(self, job: Job) -> bool:
        fence = self.workplace.fence
        if fence is None:
            return True
        if self._begun is None:
            begun = fence.begins(self.workplace.table.connection, list(self._values.values()))
            self._begun = dict(zip(self._values, begun, strict=True))
            self.all_missing = not fence.any_made(self.workplace.table.connection, [*self._values.values()])
        return self._begun[job.identity]

    def forgo(self, connection: Any) -> None:
        """Undo the beginning of what is not finished, so that it costs the keys nothing."""
        if self.workplace.fence:
            self.workplace.fence.forgo_begun(connection, list(self._values.values()))


def leave(*, end_process: bool) -> None:
    """Give back what this process is making, because it is told to go."""
    for group in _making_now.copy():
        with suppress(Exception), _opened(group.workplace.settings) as connection:
            group.forgo(connection)
        if end_process:
            os._exit(EXIT_CODE_OF_SIGTERM)


def make_group(group: _Group, limit: Callable[[], AbstractContextManager[None]] = nullcontext) -> Report:
    """Make jobs one after the other until one is not made, or they take long; what is left has not begun."""
    jobs, outcomes, received = group.jobs, list[Outcome](), None
    started = time.monotonic()
    with catching(signal.SIGINT, signal.SIGTERM) as signals, group.making() as making:
        try:
            for job in jobs:
                with limit():
                    outcomes.append(make_job(group, job, making, signals))
                if outcomes[-1].ending not in MADE or time.monotonic() - started > GROUP_SECONDS:
                    break
        except KeyboardInterrupt as error:  # between two keys
            received, failure = signal.SIGINT, _failure(error)
        except Terminated as error:
            received, failure = signal.SIGTERM, _failure(error)
    if received and len(outcomes) == len(jobs):
        signal.raise_signal(received)
    elif received:
        outcomes.append(Outcome(jobs[len(outcomes)], Ending.INTERRUPTED, failure))
    left = tuple(Outcome(job, Ending.LEFT) for job in jobs[len(outcomes) :])
    return Report((*outcomes, *left), seconds=time.monotonic() - started)


def make_job(group: _Group, job: Job, making: Making, signals: Signals) -> Outcome:
    """Begin, make and finish one job."""
    try:
        ending, failure = _attempt(group, job, making), None
    except LeaseLostError:
        ending, failure = Ending.DISOWNED, None
    except BaseException as error:
        ending, failure = _ending(error, interrupted=signals.received), _failure(error)
    if ending not in MADE:
        _leave_behind(group.workplace)
    return Outcome(job, ending, failure, platform.node(), os.getpid())


@contextmanager
def _opened(settings: ConnectionSettings) -> Iterator[Session]:
    """Open a connection beside DataJoint's, which the thread uses that makes keys."""
    connection = open_dbapi_connection(settings)
    yield Session(connection)
    connection.commit()


def _leave_behind(workplace: Workplace) -> None:
    _left_behind.add(id(workplace.table.connection))
    if workplace.own_connection:
        end_session(workplace.table.connection)


def _values(workplace: Workplace, job: Job) -> dict[str, Any]:
    key = {key_name(k): v for k, v in job_columns(job.key, workplace.settings).items()}
    return {"worker_host": platform.node(), "worker_pid": os.getpid(), **key}


def _leave_if_told_to(group: _Group, report: Report) -> None:
    """End this process if it was told to, with its jobs given back so that this costs the keys nothing."""
    if not any(isinstance(o.failure.exception, Terminated) for o in report.outcomes if o.failure):
        return
    connection = group.workplace.table.connection
    with suppress(Exception):
        connect_anew(connection)
        group.forgo(connection)
    signal.raise_signal(signal.SIGTERM)


def _attempt(group: _Group, job: Job, making: Making) -> Ending:
    workplace = group.workplace
    table, fence = workplace.table, workplace.fence
    if id(table.connection) in _left_behind:
        if workplace.own_connection or not is_alive(table.connection):
            connect_anew(table.connection)
        _left_behind.discard(id(table.connection))
    if not group.begins(job):
        return Ending.MADE if is_made(table, job.key) else Ending.DISOWNED  # a cluster may run a task again
    started = time.monotonic()

    def finish() -> None:
        if fence:
            values = {**group.values(job), "seconds": time.monotonic() - started}
            fence.finish_or_undo(making.session, values)

    missing = group.all_missing
    try:
        if making(job.key, finish, is_missing=missing):
            return Ending.MADE
    except Exception as error:
        if not (missing and is_duplicate(error) and is_made(table, job.key)):
            raise
    finish()
    return Ending.PRESENT


def _ending(error: BaseException, *, interrupted: bool) -> Ending:
    if isinstance(error, Terminated) or (interrupted and isinstance(error, KeyboardInterrupt)):
        return Ending.INTERRUPTED
    return Ending.DEFERRED if is_infrastructure(error) else Ending.FAILED


def _failure(error: BaseException) -> Failure:
    text = str(error)
    message = type(error).__name__ + (f": {text}" if text else "")
    kinds = tuple(kind.__name__ for kind in type(error).__mro__)
    return Failure(_shortened(message), _shortened(traceback.format_exc()), error, kinds)


def _shortened(text: str) -> str:
    """Leave the middle out of what is too long to travel."""
    half = TEXT_LENGTH // 2
    return text if len(text) <= TEXT_LENGTH else f"{text[:half]}\n...\n{text[-half:]}"


def _portable_outcome(outcome: Outcome) -> Outcome:
    return replace(outcome, failure=_portable(outcome.failure)) if outcome.failure else outcome


def _portable(failure: Failure) -> Failure:
    return replace(failure, exception=_pickled(failure.exception))


def _pickled(error: BaseException | bytes | None) -> bytes | None:
    try:
        pickled: bytes = cloudpickle.dumps(error)
        cloudpickle.loads(pickled)
    except Exception:
        return None
    return pickled if len(pickled) <= PICKLE_LENGTH else None


_left_behind: set[int] = set()
_making_now: list[_Group] = []
_workplaces: dict[tuple[int, int], Workplace] = {}
_lock = threading.Lock()


def _workplace(parcel: Parcel) -> Workplace:
    """Unpack a parcel once in a process, not again after a fork's parent has."""
    here = (os.getpid(), parcel.run)
    if here not in _workplaces:
        _allow_children()
        load_early()
        table = unpack_table(parcel.table, parcel.settings, parcel.preload)
        make_kwargs = cloudpickle.loads(parcel.make_kwargs)
        while len(_workplaces) >= TABLES_KEPT:
            del _workplaces[next(iter(_workplaces))]
        _workplaces[here] = Workplace(
            table, make_kwargs, parcel.settings, parcel.version, parcel.fence, own_connection=True
        )
    return _workplaces[here]


def _allow_children() -> None:
    """Let make() use multiprocessing in a worker that is a daemon, as Dask's are."""
    process = multiprocessing.current_process()
    if process.daemon:
        process.daemon = False


@contextmanager
def _making() -> Iterator[None]:
    """One make() at a time in a process: DataJoint's connection serves one thread."""
    if _lock.locked():
        warnings.warn(THREADS, stacklevel=3)
    with _lock:
        yield


@contextmanager
def _ending_itself(timeout_seconds: float | None, *, watched: bool) -> Iterator[None]:
    """End this process where a make() takes too long, even if it lets no other thread run.

    Where a driver watches, that does it first and records why; but it may sit on the very
    Dask worker whose interpreter hangs.
    """
    if timeout_seconds is None:
        yield
        return
    patience_seconds = timeout_seconds * OVERDUE_FACTOR + OVERDUE_SECONDS if watched else timeout_seconds
    faulthandler.dump_traceback_later(patience_seconds, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _without_workplace(name: str, jobs: Sequence[Job], error: Exception) -> Report:
    if (jobs and is_infrastructure(error)) or is_full(error):
        return Report(tuple(Outcome(job, Ending.DEFERRED, _portable(_failure(error))) for job in jobs))
    return Report(trouble=_setup_trouble(name, error))


def _trial(workplace: Workplace) -> Report:
    """See before any job is touched whether this worker may do what each of them needs."""
    table, fence = workplace.table, workplace.fence
    lacking = lacking_right(table, fence) if fence else ""
    return Report(trouble=f"{_place(type(table).__name__)}: {lacking}" if lacking else "")


def _setup_trouble(name: str, error: Exception) -> str:
    place = f"{_place(name)}: {type(error).__name__}: {error}"
    if isinstance(error, (ImportError, AttributeError)):
        return f"{place}\n{CURES}"
    return f"{place}\n{RIGHTS}" if is_denial(error) else place


def _place(name: str) -> str:
    return f"A worker on {platform.node()} can't make {name}"
