"""A run in a thread of its own on a cluster, which answers while it goes on."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from djdist._executor import Executor, Loop
from djdist._job import Status, Summary
from djdist.driver.shutdown import Shutdown
from djdist.errors import ClusterError, DjdistError, DriverLostError

logger = logging.getLogger(__package__)

ABSENT = "its caller was away for longer than the lease"
STEP_SECONDS = 1.0
"""The longest that a driver's step takes as a rule."""


class DriverActor:
    """Lets a run's loop go in a thread of its own, and answers at once however long it takes.

    Parameters
    ----------
    loop : callable
        The loop.
    executor : Executor
        Where its tasks go.
    patience_seconds : float
        The run stops when its caller hasn't asked for its result for this time, and so is gone.
        Time in which this process itself was frozen doesn't count: nobody could ask then.
    predecessor : Status or None
        Where a driver that was lost had got to, if this one goes on with its run.
    clock : callable
        Seconds that pass.
    """

    def __init__(
        self,
        loop: Loop,
        executor: Executor,
        patience_seconds: float,
        predecessor: Status | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._status = self._first_status = predecessor or Status()
        self._reported = threading.Event()
        if predecessor is None:
            self._reported.set()
        self._shutdown = Shutdown(clock)
        self._result: Summary | DjdistError | None = None
        self._patience_seconds = patience_seconds
        self._clock = clock
        self._asked_at = self._watched_at = clock()
        executor.attach()
        self._thread = threading.Thread(
            target=self._do, args=(loop, executor, predecessor), name="djdist-driver", daemon=True
        )
        self._thread.start()

    def status(self) -> Status:
        """Return the run's progress.

        That it stops for want of a caller is no wish of a caller that is back and goes on with it.
        """
        if self._status is not self._first_status:
            self._reported.set()
        status = self._status
        if not self._shutdown.is_forsaken:
            return status
        return replace(status, handover=replace(status.handover, stopping=False))

    def stop(self) -> None:
        """Stop the run: it reserves no more jobs."""
        self._shutdown.stop()

    def cut(self) -> None:
        """End the run without any grace."""
        self._shutdown.stop(grace_seconds=0)

    def result(self) -> Summary | DjdistError | None:
        """Return the run's summary, or what ended it; None while it goes on."""
        self._asked_at = self._clock()
        return self._result

    def _do(self, loop: Loop, executor: Executor, predecessor: Status | None) -> None:
        result = result_or_error(partial(loop, executor, self._watch, predecessor))
        self._result = DriverLostError(ABSENT) if self._shutdown.is_forsaken else result
        if self._shutdown.is_forsaken:
            executor.abandon()

    def _caller_is_gone(self) -> bool:
        return self._clock() - self._asked_at > self._patience_seconds

    def _watch(self, status: Status) -> bool:
        self._status = status
        if not self._reported.is_set():
            self._await_report()
        if self._shutdown.is_cut:
            raise KeyboardInterrupt
        self._forget_own_absence()
        if self._caller_is_gone() and self._shutdown.forsake():
            logger.warning("The run's caller is gone, so it stops")
        return not self._shutdown.is_stopping

    def _await_report(self) -> None:
        """Tell the caller what a successor has charged to keys, before one of them ends it too."""
        self._reported.wait(self._patience_seconds)
        self._reported.set()

    def _forget_own_absence(self) -> None:
        now = self._clock()
        absence_seconds = max(0.0, now - self._watched_at - STEP_SECONDS)
        self._asked_at = min(now, self._asked_at + absence_seconds)
        self._watched_at = now


def result_or_error(run: Callable[[], Summary]) -> Summary | DjdistError:
    """Return the summary of a run, or what ended it; each can be sent to its caller."""
    try:
        return run()
    except DjdistError as error:
        return error
    except KeyboardInterrupt:
        return Summary()
    except BaseException as error:
        logger.exception("The run's driver failed")
        return ClusterError(f"The run's driver failed: {type(error).__name__}: {error}")
