"""What a Dask worker does around a task: one key at a time, whose slot others get while it waits for them."""

import re
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import distributed
from distributed.threadpoolexecutor import thread_state, threads_lock
from distributed.worker_state_machine import SecedeEvent

from djdist._job import Job, Report, TaskFunction
from djdist.worker import give_back_and_exit, one_at_a_time

DRIVER = "djdist driver"
TASK_ID = r"[0-9a-f]{8}-[0-9a-f]{4,8}-\d+"
TURN_SECONDS = 1.0
"""So long a task waits for the make() that its process is at, before it looks for another worker."""
LOOK_SECONDS = 0.1
"""As often a worker looks whether the make() that it is at waits for other tasks."""


def with_plugin(work: TaskFunction, jobs: Sequence[Job]) -> Report:
    worker = distributed.get_worker()
    worker.loop.add_callback(_add_plugin, worker)
    with one_at_a_time(_await_turn), _Slot(worker):
        return replace(work(jobs), place=worker.address)


def _await_turn(lock: Any) -> None:
    """Leave the slot to what the make() may have submitted that this process is at, and come back later.

    A make() that computes on its own cluster gives up its slot until the chunks are there. If
    the next task kept it, waiting, there would never be any; and another worker may be free.
    """
    distributed.secede()
    if lock.acquire(timeout=TURN_SECONDS):
        lock.release()
    raise distributed.Reschedule


class _Slot:
    """The slot of this thread's task, which others get if its make() waits for what it has submitted itself.

    ``compute()`` and ``worker_client()`` give the slot up. ``future.result()`` doesn't, which works where
    make() runs outside the cluster, and on it waits forever once all slots are taken by such tasks.
    """

    def __init__(self, worker: distributed.Worker) -> None:
        self._worker, self._key = worker, worker.get_current_task()
        self._pool: Any = worker.executors["default"]
        self._thread = threading.current_thread()
        self._began_at, self._is_over = time.monotonic(), False

    def __enter__(self) -> None:
        self._worker.loop.add_callback(self._look_later)

    def __exit__(self, *error: object) -> None:
        with threads_lock:
            self._is_over = True
            if self._thread not in self._pool._threads:
                thread_state.proceed = False  # another thread has taken its place

    def _look_later(self) -> None:
        self._worker.loop.call_later(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        if _awaits_results(self._worker):
            self._give_up()
        if not self._is_over:
            self._look_later()

    def _give_up(self) -> None:
        """Do what ``secede()`` does, for a thread that can't do it itself any more."""
        with threads_lock:
            if self._is_over or self._thread not in self._pool._threads:
                return
            self._pool._threads.remove(self._thread)
            self._pool._adjust_thread_count()
        seconds = time.monotonic() - self._began_at
        self._worker.handle_stimulus(
            SecedeEvent(key=self._key, compute_duration=seconds, stimulus_id=f"djdist-{time.time()}")
        )


def _awaits_results(worker: distributed.Worker) -> bool:
    """Return whether tasks have not ended that were submitted in this process, but for those of runs."""
    futures = dict(worker._client.futures) if worker._client else {}
    return any(state.status == "pending" and not is_of_run(key) for key, state in futures.items())


def is_of_run(key: Any) -> bool:
    """Return whether a task is a run's: its driver, or some of its keys."""
    return isinstance(key, tuple) and bool(key[0] == DRIVER or re.fullmatch(TASK_ID, str(key[-1])))


async def _add_plugin(worker: distributed.Worker) -> None:
    if _GiveBackPlugin.name not in worker.plugins:
        await worker.plugin_add(_GiveBackPlugin())


class _GiveBackPlugin(distributed.WorkerPlugin):
    """Gives back what a worker is making that is told to go."""

    name = "djdist gives back"

    def teardown(self, worker: distributed.Worker) -> None:
        give_back_and_exit(end_process=worker.nanny is not None)  # else it may be the user's own process
