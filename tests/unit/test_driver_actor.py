from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from datetime import datetime, timezone

import pytest

from djdist._executor import Executor
from djdist._job import Handover, RunInfo, Status, Summary, Watch
from djdist.driver.following import MAX_DRIVERS, follow, supervise
from djdist.driver.server import DriverActor
from djdist.errors import ClusterError, DriverLostError
from djdist.executors.local import LocalExecutor
from lab.scripted import Clock
from lab.watching import wait_until

RUN = RunInfo("1a2b", "Square", "lab", "ada", "laptop", 7, datetime.now(timezone.utc))


class Steps:
    """A run whose steps a test takes by hand."""

    def __init__(self) -> None:
        self._watch: Watch | None = None
        self._over = threading.Event()

    def __call__(self, executor: Executor, watch: Watch, predecessor: Status | None) -> Summary:
        self._watch = watch
        self._over.wait()
        return Summary()

    def goes_on(self, status: Status | None = None) -> bool:
        wait_until(lambda: self._watch, "the run to begin")
        assert self._watch
        return self._watch(status or Status())

    def end(self) -> None:
        self._over.set()


@pytest.fixture
def steps() -> Iterator[Steps]:
    steps = Steps()
    yield steps
    steps.end()


def test_a_run_stops_whose_caller_is_gone(steps: Steps) -> None:
    clock = Clock()
    DriverActor(steps, LocalExecutor(), 3, clock=clock)
    for clock.seconds in (0.5, 1.0, 1.5, 2.0, 2.5):
        assert steps.goes_on()
    clock.seconds = 3.5
    assert not steps.goes_on()


def test_a_run_goes_on_that_was_frozen_itself(steps: Steps) -> None:
    clock = Clock()
    actor = DriverActor(steps, LocalExecutor(), 3, clock=clock)
    clock.seconds = 100
    assert steps.goes_on()
    actor.result()
    for clock.seconds in (101, 102, 103):
        assert steps.goes_on()
    clock.seconds = 104
    assert not steps.goes_on()


def test_a_run_that_stopped_for_want_of_its_caller_goes_on_elsewhere_when_that_is_back(steps: Steps) -> None:
    """The cluster may lose the driver, as it ends its workers then, before it tells that it was forsaken."""
    clock, stopping = Clock(), Status(handover=Handover(stopping=True))
    actor = DriverActor(steps, LocalExecutor(), 3, clock=clock)
    clock.seconds = 1
    assert steps.goes_on(stopping)
    assert actor.status().handover.stopping
    for clock.seconds in (2, 3, 4, 5):
        steps.goes_on(stopping)
    assert not actor.status().handover.stopping


def test_a_signal_is_not_hidden_by_a_driver_that_is_lost() -> None:
    def call(method: str) -> None:
        if method == "stop":
            raise DriverLostError("gone")

    def interrupt(status: Status) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        follow(call, interrupt)


def test_a_run_whose_drivers_get_nowhere_ends_and_says_why() -> None:
    predecessors = list[Status | None]()

    def drive(watch: Watch, predecessor: Status | None) -> Summary:
        predecessors.append(predecessor)
        raise DriverLostError(f"node {len(predecessors)} is gone")

    with pytest.raises(ClusterError, match=r"3 times in a row .* node 3 is gone"):
        supervise(LocalExecutor(), drive, lambda status: True, RUN)
    assert predecessors == [None, Status(), Status()]


def test_a_run_with_nothing_to_do_outlives_drivers_that_lived_for_long() -> None:
    clock, drivers = Clock(), list[Status | None]()

    def drive(watch: Watch, predecessor: Status | None) -> Summary:
        drivers.append(predecessor)
        if len(drivers) > 2 * MAX_DRIVERS:
            return Summary()
        watch(Status())
        clock.seconds += 7 * 24 * 3600
        raise DriverLostError("its node is gone")

    assert supervise(LocalExecutor(), drive, lambda status: True, RUN, clock=clock) == Summary()


def test_a_run_whose_drivers_get_somewhere_goes_on_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def drive(watch: Watch, predecessor: Status | None) -> Summary:
        made = predecessor.made if predecessor else 0
        if made == 2 * MAX_DRIVERS:
            return Summary(made)
        watch(Status(made=made + 1, failed=5000))
        raise DriverLostError("gone")

    caplog.set_level(logging.INFO)
    assert supervise(LocalExecutor(), drive, lambda status: True, RUN) == Summary(2 * MAX_DRIVERS)
    begin, *losses, end = caplog.messages
    assert begin.startswith("Run 1a2b of lab.Square goes to a driver on ")
    assert losses == ["Lost the run's driver: gone"] * 2 * MAX_DRIVERS
    assert end == f"Run 1a2b of lab.Square is over: {2 * MAX_DRIVERS} made, 5000 failed"
