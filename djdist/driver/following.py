"""How a caller follows its run on a cluster, through the loss of drivers, to its end."""

import logging
import time
from collections.abc import Callable
from contextlib import suppress

from djdist._executor import ActorCall, Executor
from djdist._job import RunInfo, Status, Summary, Watch
from djdist.driver.unmet import warning_of_unmet
from djdist.errors import ClusterError, DjdistError, DriverLostError

logger = logging.getLogger(__package__)

FIRST_POLL_SECONDS = 0.02
POLL_SECONDS = 0.5
MAX_DRIVERS = 3
LOST_AGAIN = f"The cluster lost the run's driver {MAX_DRIVERS} times in a row before it got anywhere"
DriveOnce = Callable[[Watch, Status | None], Summary]


def supervise(
    executor: Executor,
    drive_once: DriveOnce,
    watch: Watch,
    info: RunInfo,
    predecessor: Status | None = None,
    *,
    lease_seconds: float = 60.0,
    clock: Callable[[], float] = time.monotonic,
) -> Summary:
    """Do a run by one driver after another, where the cluster loses them.

    Parameters
    ----------
    executor : Executor
        Is named in the log.
    drive_once : callable
        Starts a driver, given who watches it and where its predecessor had got to, and follows it.
    watch : callable
        Is told the run's status.
    info : RunInfo
        Names the run in the log.
    predecessor : Status or None
        Where a driver that was lost before had got to.
    lease_seconds : float
        Drivers that were lost are forgotten once one has lived for longer.
    clock : callable
        Seconds that pass.

    Raises
    ------
    ClusterError
        Too many drivers in a row were lost before they got anywhere.
    """
    logger.info("%s goes to a driver on %r", info, executor)
    last, told_watch = predecessor or Status(), warning_of_unmet(watch)
    answers_since: float | None = None

    def note(status: Status) -> bool:
        nonlocal last, answers_since
        last = status
        answers_since = clock() if answers_since is None else answers_since
        return told_watch(status)

    in_vain = 0
    while in_vain < MAX_DRIVERS:
        before, answers_since = last, None
        try:
            summary = drive_once(note, predecessor)
        except DriverLostError as error:
            logger.warning("Lost the run's driver: %s", error)
            lived_seconds = 0.0 if answers_since is None else clock() - answers_since
            is_stable = lived_seconds > lease_seconds
            lost, in_vain = error, 0 if last.progress > before.progress or is_stable else in_vain + 1
            predecessor = last
        else:
            logger.info("%s is over: %d made, %d failed", info, summary.success_count, last.failed)
            return summary
    raise ClusterError(f"{LOST_AGAIN}, last: {lost}") from lost


def follow(call: ActorCall, watch: Watch) -> Summary:
    """Follow an actor's run from the caller until it ends; stop it where the caller is stopped.

    Parameters
    ----------
    call : callable
        Calls one of the actor's methods by name.
    watch : callable
        Is told the run's status.

    Raises
    ------
    DjdistError
        What ended the run.
    """
    try:
        summary = await_summary(call, watch)
        watch(call("status"))
    except (KeyboardInterrupt, SystemExit):
        with suppress(Exception):  # a driver that is lost now must not hide the signal
            _stop(call)
        raise
    return summary


def await_summary(call: ActorCall, watch: Watch) -> Summary:
    """Wait until a run ends, which is watched until then; leave it alone where the waiting is ended."""
    poll_seconds = FIRST_POLL_SECONDS
    while (result := call("result")) is None:
        if not watch(call("status")):
            call("stop")
        time.sleep(poll_seconds)
        poll_seconds = min(2 * poll_seconds, POLL_SECONDS)
    if isinstance(result, DjdistError):
        raise result
    summary: Summary = result
    return summary


def _stop(call: ActorCall) -> None:
    """Stop a run, at once where the user asks again."""
    call("stop")
    try:
        _wait_for_end(call)
    except (KeyboardInterrupt, SystemExit):
        call("cut")
        _wait_for_end(call)


def _wait_for_end(call: ActorCall) -> None:
    while call("result") is None:
        time.sleep(FIRST_POLL_SECONDS)
