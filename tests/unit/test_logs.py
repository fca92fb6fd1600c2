"""What a person reads at night in the log, and what the dashboards are told."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone

import pytest

from djdist._executor import Executor
from djdist._job import Completion, Ending, Job, Policy, Report, RunInfo, Status, Summary, TaskFunction
from djdist._task_pool import TaskPool
from djdist.driver import Driver, drive
from djdist.driver.logs import log_here
from djdist.job_stores.memory import MemoryStore
from lab.scripted import SQUARE, Clock, ScriptedPool, driver_of, ended, failed, lost, made

RUN = RunInfo("1a2b", "Square", "lab", "ada", "laptop", 7, datetime.now(timezone.utc))


@pytest.fixture(autouse=True)
def at_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def going_on(status: Status) -> bool:
    return True


class OnePool(Executor):
    def __init__(self, pool: TaskPool) -> None:
        self._pool = pool

    def open(self, tasks: Mapping[str, TaskFunction]) -> TaskPool:
        return self._pool


def run(pool: ScriptedPool, keys: int, policy: Policy) -> Summary:
    store = MemoryStore("Square", ({"n": n} for n in range(keys)))
    recipes = {"Square": SQUARE}
    return drive(OnePool(pool), going_on, None, store=store, recipes=recipes, policy=policy, info=RUN)


def timed(pool: ScriptedPool, keys: int, clock: Clock) -> Driver:
    store = MemoryStore("Square", ({"n": n} for n in range(keys)))
    return driver_of(store, pool, Policy(suppress_errors=True), clock=clock, sleep=clock.sleep)


def test_a_run_is_told_at_its_begin_and_end_and_not_for_each_key(caplog: pytest.LogCaptureFixture) -> None:
    run(ScriptedPool(slots=4), 1000, Policy())
    begin, slots, end = caplog.messages
    assert begin.startswith("Run 1a2b of lab.Square begins on <")
    assert "called by ada on laptop (pid 7), driven on " in begin
    assert slots == "Square has 4 slots, 0 before; 1000 keys are pending"
    assert end == "Run 1a2b of lab.Square is over: 1000 made, 0 failed, 0 running, 0 pending"


def test_errors_are_counted_and_not_told_for_each_key(caplog: pytest.LogCaptureFixture) -> None:
    run(ScriptedPool(slots=4, answer=failed), 100, Policy(suppress_errors=True))
    assert len(caplog.messages) == 3
    assert "0 made, 100 failed" in caplog.messages[-1]


def test_the_first_error_stops_a_run_and_what_ends_it_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def interrupted(ticket: int, job: Job) -> Completion:
        raise KeyboardInterrupt

    run(ScriptedPool(slots=1, answer=failed), 3, Policy())
    assert "Square reserves no more keys" in caplog.messages
    with pytest.raises(KeyboardInterrupt):
        run(ScriptedPool(slots=1, answer=interrupted), 3, Policy())
    last = caplog.records[-1]
    assert last.levelno == logging.WARNING
    assert last.message.startswith("Run 1a2b of lab.Square was ended by KeyboardInterrupt(): 0 made")


def test_slots_are_told_when_their_number_changes(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    pool = ScriptedPool(slots=2, answer=lambda ticket, job: None)
    driver = timed(pool, 20, clock)
    for clock.seconds, pool.size in ((0, 2), (0.5, 3), (2.5, 8), (5, 8), (7.5, 1)):
        driver.step()
    assert caplog.messages == [
        "Square has 2 slots, 0 before; 20 keys are pending",
        "Square has 8 slots, 2 before; 17 keys are pending",
        "Square has 1 slots, 8 before; 12 keys are pending",
    ]


def test_a_lost_worker_is_told(caplog: pytest.LogCaptureFixture) -> None:
    run(
        ScriptedPool(slots=1, answer=lambda t, job: lost(t, job) if t == 2 else made(t, job)),
        2,
        Policy(max_worker_losses=3),
    )
    (loss,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert loss == "Square(n=0) was lost, 1 of 3: WorkerCrashedError: out of memory"


def test_a_wait_for_the_database_is_told_once_however_many_keys_wait(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    until = 60

    def answer(ticket: int, job: Job) -> Completion:
        away = clock.seconds < until
        return ended(ticket, job, Ending.TRANSIENT, "OperationalError: gone") if away else made(ticket, job)

    class Patient(MemoryStore):
        """Has what is given back due at once."""

        def release(self, jobs, *, delay_seconds=0):  # type: ignore[no-untyped-def]
            clock.seconds += delay_seconds / 10
            return super().release(jobs)

    store = Patient("Square", ({"n": n} for n in range(10)))
    driver = driver_of(store, ScriptedPool(10, answer), clock=clock, sleep=clock.sleep)
    while driver.step():
        pass
    assert driver.summary().success_count == 10
    assert [message for message in caplog.messages if "database" in message] == [
        "Square waits for the database: OperationalError: gone",
        "Square waits no more for the database",
    ]


def test_the_dashboard_is_told_once_a_second_and_at_the_end() -> None:
    clock = Clock()

    def answer(ticket: int, job: Job) -> Completion:
        clock.seconds += 0.25
        return Completion(ticket, Report(made(ticket, job).report.outcomes, seconds=0.6))  # type: ignore[union-attr]

    pool = ScriptedPool(slots=1, answer=answer)
    pool.has_dashboard = True
    timed(pool, 10, clock).run(going_on)
    tables, statuses, seconds = zip(*pool.shown, strict=True)
    assert set(tables) == {"Square"}
    assert [counts.counts for counts in statuses] == [
        "0 made, 0 failed, 0 running, 10 pending",
        "4 made, 0 failed, 0 running, 6 pending",
        "8 made, 0 failed, 0 running, 2 pending",
        "10 made, 0 failed, 0 running, 0 pending",
    ]
    assert seconds == ((), (0.6,) * 4, (0.6,) * 4, (0.6,) * 2)


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """Djdist's logger, put back at the end."""
    logger = logging.getLogger("djdist")
    yield logger
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)


def test_a_driver_writes_lines_from_info_on_where_logging_is_not_set_up(
    logger: logging.Logger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    root_level = logging.root.level
    log_here()
    log_here()
    logging.getLogger("djdist.driver").info("Square has 4 slots")
    assert capsys.readouterr().err.count("INFO djdist.driver: Square has 4 slots") == 1
    assert (logging.root.handlers, logging.root.level) == ([], root_level)


def test_a_driver_leaves_logging_alone_that_is_set_up(
    logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [logging.NullHandler()])
    log_here()
    assert (logger.handlers, logger.level) == ([], logging.NOTSET)
    monkeypatch.setattr(logging.root, "handlers", [])
    logger.setLevel(logging.ERROR)
    log_here()
    assert (logger.handlers, logger.level) == ([], logging.ERROR)
