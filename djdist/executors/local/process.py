"""One process of this machine, in a pool of one: if it dies, it takes no other with it."""

import concurrent.futures as cf
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any

import loky

from djdist._job import Job, Report
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
GROWTH_LIMIT = "LOKY_MAX_MEMORY_LEAK_SIZE"
"""A process that has grown by more begins anew, which on a GPU would load the model again."""

PARENT_CHECK_SECONDS = 1.0


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
        self._processes: list[Any] = []
        self._pool = self._new_pool()

    def _new_pool(self) -> loky.ProcessPoolExecutor:
        on_gpu = {
            "CUDA_VISIBLE_DEVICES": ",".join(self.gpus),
            GROWTH_LIMIT: os.environ.get(GROWTH_LIMIT, "1e18"),
        }
        return loky.ProcessPoolExecutor(
            max_workers=1,
            initializer=_begin,
            initargs=(os.getpid(), multiprocessing.get_start_method(allow_none=True)),
            env={
                "PYTHONWARNINGS": SETTINGS_TRAVEL,
                **_limits_of_threads(self.threads),
                **(on_gpu if self.gpus else {}),
            },
        )

    def submit(self, work: Sendable, jobs: Sequence[Job]) -> "cf.Future[Report | None]":
        """Make a group of jobs there, in a new process if it has died while it was idle."""
        try:
            future: cf.Future[Report | None] = self._pool.submit(work, jobs)
        except cf.BrokenExecutor:
            self.end()
            self._pool = self._new_pool()
            future = self._pool.submit(work, jobs)
        self._processes = list(self._pool._processes.values())  # loky forgets those that die
        return future

    @property
    def pid(self) -> int:
        """Its number, once it has been given something."""
        return self._processes[0].pid if self._processes else 0

    @property
    def was_killed(self) -> bool:
        """Whether somebody has ended it who let it do nothing more."""
        return any(process.exitcode == -signal.SIGKILL for process in self._processes)

    def end(self) -> None:
        """End it, whatever it does."""
        self._pool.shutdown(kill_workers=True)


def _limits_of_threads(threads: int) -> dict[str, str]:
    # the others heed it where they have no limit of their own
    everywhere = os.environ.get("OMP_NUM_THREADS", str(threads))
    return {name: os.environ.get(name, everywhere) for name in LIMITS_OF_THREADS}


def _begin(parent: int, start_method: str | None) -> None:
    """Allow ``make()`` to start processes as at the caller: in a process of loky only one method works."""
    multiprocessing.set_start_method(start_method, force=True)
    _end_with_parent(parent)


def _end_with_parent(parent: int) -> None:
    """End this process when its caller was killed before it could close its pool.

    A Ctrl-C at the terminal reaches it too, but it is the caller who then gives it its grace.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_CHECK_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="djdist-parent", daemon=True).start()
