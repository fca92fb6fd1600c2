"""Makes one key and finishes its job; never raises."""

import os
import platform
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import cloudpickle

from djdist.errors import LeaseLostError, Terminated
from djdist.fence import Fence, key_name
from djdist.job import Ending, Failure, Job, Outcome, Report
from djdist.pipeline import is_infrastructure, is_made, job_columns, make_key
from djdist.shipping import ConnectionSettings, unpack_table
from djdist.signals import catching

TABLES_KEPT = 8
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
    """

    run: int
    name: str
    settings: ConnectionSettings = field(repr=False)
    table: bytes = field(repr=False)
    make_kwargs: bytes = field(repr=False)
    version: str = ""
    fence: Fence | None = field(default=None, repr=False)
    preload: tuple[str, ...] = ()

    def __call__(self, jobs: Sequence[Job]) -> Report:
        """Make a group of jobs on a worker; what comes back can be pickled."""
        with _making():
            try:
                workplace = _workplace(self)
            except Exception as error:
                return Report(trouble=_setup_trouble(self.name, error))
            return Report(tuple(_portable(make_job(workplace, job)) for job in jobs))


@dataclass(frozen=True)
class Workplace:
    """A table and what belongs to it, ready in this process."""

    table: Any
    make_kwargs: dict[str, Any]
    settings: ConnectionSettings
    version: str = ""
    fence: Fence | None = None

    def __call__(self, jobs: Sequence[Job]) -> Report:
        """Make a group of jobs in the process of the caller, with the caller's own table."""
        with _making():
            return Report(tuple(make_job(self, job) for job in jobs))


def make_job(workplace: Workplace, job: Job) -> Outcome:
    """Begin, make and finish one job."""
    host, pid = platform.node(), os.getpid()
    key = {key_name(k): v for k, v in job_columns(job.key, workplace.settings).items()}
    values = {"worker_host": host, "worker_pid": pid, **key}
    with catching(signal.SIGINT) as signals:
        try:
            ending, failure = _attempt(workplace, job, values), None
        except LeaseLostError:
            ending, failure = Ending.DISOWNED, None
        except BaseException as error:
            ending, failure = _ending(error, interrupted=signals.received), _failure(error)
    return Outcome(job, ending, failure, host, pid)


def _attempt(workplace: Workplace, job: Job, values: Mapping[str, Any]) -> Ending:
    table, fence = workplace.table, workplace.fence
    if fence and not fence.begins(table.connection, values):
        return Ending.MADE if is_made(table, job.key) else Ending.DISOWNED  # a cluster may run a task again
    started = time.monotonic()

    def finish() -> None:
        if fence:
            fence.finish_or_undo(table.connection, {**values, "seconds": time.monotonic() - started})

    if make_key(table, job.key, workplace.make_kwargs, workplace.version, finish):
        return Ending.MADE
    finish()
    return Ending.PRESENT


def _ending(error: BaseException, *, interrupted: bool) -> Ending:
    if isinstance(error, Terminated) or (interrupted and isinstance(error, KeyboardInterrupt)):
        return Ending.INTERRUPTED
    return Ending.LOST if is_infrastructure(error) else Ending.FAILED


def _failure(error: BaseException) -> Failure:
    text = str(error)
    message = type(error).__name__ + (f": {text}" if text else "")
    return Failure(message, traceback.format_exc(), error)


def _portable(outcome: Outcome) -> Outcome:
    if outcome.failure is None:
        return outcome
    return replace(outcome, failure=replace(outcome.failure, exception=_pickled(outcome.failure.exception)))


def _pickled(error: BaseException | bytes | None) -> bytes | None:
    try:
        pickled: bytes = cloudpickle.dumps(error)
        cloudpickle.loads(pickled)
    except Exception:
        return None
    return pickled


_workplaces: dict[tuple[int, int], Workplace] = {}
_lock = threading.Lock()


def _workplace(parcel: Parcel) -> Workplace:
    """Unpack a parcel once in a process, not again after a fork's parent has."""
    here = (os.getpid(), parcel.run)
    if here not in _workplaces:
        table = unpack_table(parcel.table, parcel.settings, parcel.preload)
        make_kwargs = cloudpickle.loads(parcel.make_kwargs)
        while len(_workplaces) >= TABLES_KEPT:
            del _workplaces[next(iter(_workplaces))]
        _workplaces[here] = Workplace(table, make_kwargs, parcel.settings, parcel.version, parcel.fence)
    return _workplaces[here]


@contextmanager
def _making() -> Iterator[None]:
    """One make() at a time in a process: DataJoint's connection serves one thread."""
    if _lock.locked():
        warnings.warn(THREADS, stacklevel=3)
    with _lock:
        yield


def _setup_trouble(name: str, error: Exception) -> str:
    place = f"A worker on {platform.node()} can't make {name}: {type(error).__name__}: {error}"
    return f"{place}\n{CURES}" if isinstance(error, (ImportError, AttributeError)) else place
