"""One process of this machine: if it dies, it takes no other with it."""

import concurrent.futures as cf
import os
import pickle
import signal
import threading
from collections.abc import Sequence

from djdist._job import Job, Report
from djdist.executors.local.forks import Fork, NotBornError
from djdist.shipping.pickled_task import Sendable

SETTINGS_TRAVEL = "ignore:No datajoint.json found"
"""What DataJoint warns of is no lack in a process that gets its caller's settings."""

LIMITS_OF_THREADS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMBA_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)
MOST_BIRTHS = 3
NOT_STARTED = "no worker process could be started on this machine; its standard error says why"
ENDED = "the worker process ended by itself or was ended, {how}"


class Process:
    """A process, and what it has of this machine as long as it lives.

    Parameters
    ----------
    threads : int
        How many the libraries may use of which the user has not said it.
    gpus : sequence of str
        Its GPUs; without any, it sees those that the caller does.
    gpu_share : float
        How much it has of each of them.

    Attributes
    ----------
    run : object
        The run for which it has made keys last.
    table : str
        Their table.
    idle_since : float
        When it had made them.
    """

    def __init__(self, threads: int, gpus: Sequence[str] = (), gpu_share: float = 0) -> None:
        self.threads, self.gpus, self.gpu_share = threads, tuple(gpus), gpu_share
        self.run: object = None
        self.table, self.idle_since = "", 0.0
        self._is_ended = False
        self._changing = threading.Lock()
        self._fork = self._new_fork()

    def _new_fork(self) -> Fork:
        on_gpu = {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {}
        return Fork({**environment(self.threads), **on_gpu})

    def submit(self, work: Sendable, jobs: Sequence[Job]) -> "cf.Future[Report | None]":
        """Make a group of jobs there, in a new process if it has died while it was idle."""
        future: cf.Future[Report | None] = cf.Future()
        future.set_running_or_notify_cancel()
        request = pickle.dumps((work, jobs))
        # a daemon, so that nothing which hangs there keeps this process from ending
        threading.Thread(target=self._do, args=(future, request), name="djdist-process", daemon=True).start()
        return future

    def _do(self, future: "cf.Future[Report | None]", request: bytes) -> None:
        try:
            is_done, report = pickle.loads(self._answer(request))
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(report) if is_done else future.set_exception(RuntimeError(report))

    def _answer(self, request: bytes) -> bytes:
        for _ in range(MOST_BIRTHS):
            try:
                if answer := self._fork.exchange(request):
                    return answer
            except NotBornError:
                pass
            except EOFError:
                raise cf.BrokenExecutor(ENDED.format(how=_how(self._fork.exit_code))) from None
            self._begin_again()
        raise cf.BrokenExecutor(NOT_STARTED)

    def _begin_again(self) -> None:
        with self._changing:
            if self._is_ended:
                raise cf.BrokenExecutor(ENDED.format(how="before it began"))
            self._fork = self._new_fork()

    @property
    def pid(self) -> int:
        """Its number, once it has been given something."""
        return self._fork.pid

    @property
    def was_killed(self) -> bool:
        """Whether somebody has ended it who let it do nothing more."""
        return self._fork.exit_code == -signal.SIGKILL

    def end(self) -> None:
        """End it, whatever it does."""
        with self._changing:
            self._is_ended = True
        self._fork.kill()


def environment(threads: int) -> dict[str, str]:
    """Return the variables of a process whose libraries may use so many threads."""
    # the others heed it where they have no limit of their own
    everywhere = os.environ.get("OMP_NUM_THREADS", str(threads))
    limits = {name: os.environ.get(name, everywhere) for name in LIMITS_OF_THREADS}
    return {**os.environ, "PYTHONWARNINGS": SETTINGS_TRAVEL, **limits}


def _how(exit_code: int | None) -> str:
    if exit_code is None:
        return "and nothing tells how"
    if exit_code < 0:
        return f"by {signal.Signals(-exit_code).name}"
    return f"with exit code {exit_code}"
