from __future__ import annotations

import gc
import logging
import threading
import tracemalloc
from collections import Counter, deque
from collections.abc import Callable, Sequence

import numpy as np
import pytest

import djdist
from djdist._job import (
    Completion,
    Counts,
    Ending,
    Failure,
    Handover,
    Job,
    Outcome,
    Policy,
    Recipe,
    Report,
    Status,
    Summary,
)
from djdist._job_store import JobStore
from djdist._task_pool import TaskPool
from djdist.driver import WAIT_SECONDS, Driver, RunContext
from djdist.driver.counting import SHARE, Counting
from djdist.driver.retries import MAX_SETUP_ERRORS
from djdist.errors import DatabaseError, WorkerSetupError
from djdist.job_stores.memory import MemoryStore
from djdist.job_stores.pipeline import PipelineStore
from lab.scripted import Clock, ScriptedPool, driver_of, ended, failed, lost, made
from lab.watching import wait_until

Answer = Callable[[int, Job], Completion | None]
TEN_SECONDS = Recipe("Square", timeout_seconds=10)


def keys(count: int) -> list[dict[str, int]]:
    return [{"n": n} for n in range(count)]


def going_on(status: Status) -> bool:
    return True


def paced(store: JobStore, pool: TaskPool, policy: Policy) -> Driver:
    """Give a driver whose pauses take no time."""
    clock = Clock()
    return driver_of(store, pool, policy, clock=clock, sleep=clock.sleep)


def lost_status(
    made: int, failed: int = 0, handover: Handover | None = None, *, begun: bool = False
) -> Status:
    """Return where a driver of one table had got to that was lost."""
    return Status.of({"Square": Counts(made, failed)}, handover or Handover(), begun=begun)


class CountingStore(MemoryStore):
    """Counts the questions that it is asked and remembers what was given back."""

    def __init__(self, count: int) -> None:
        super().__init__("Square", keys(count))
        self.asked: list[int] = []
        self.refreshed = 0
        self.asked_back: list[Job] = []
        self.failures: list[tuple[Job, Failure]] = []
        self.not_begun: set[int] = set()
        self.has_begun: set[int] = set()
        self.preempted: set[int] = set()
        self.taken_over: set[int] = set()
        self.held: dict[tuple[str, int], list[Job]] = {}

    def refresh(self) -> dict[str, int]:
        self.refreshed += 1
        return {}

    def reserve(self, limit: int, max_priority: int | None = None) -> list[Job]:
        self.asked.append(limit)
        return super().reserve(limit)

    def begun(self, jobs: Sequence[Job]) -> list[Job]:
        return [job for job in jobs if job.key["n"] in self.has_begun]

    def begun_by(self, host: str, pid: int) -> list[Job]:
        return self.held.pop((host, pid), [])

    def handed_back(self, jobs: Sequence[Job]) -> bool:
        return any(job.key["n"] in self.preempted for job in jobs)

    def fail(self, job: Job, failure: Failure, host: str = "", pid: int = 0) -> bool:
        if job.key["n"] in self.taken_over:
            self.forget(job)
            return False
        self.failures.append((job, failure))
        return super().fail(job, failure)

    def release_waiting(self, jobs: Sequence[Job]) -> list[Job]:
        self.asked_back += jobs
        waiting = [job for job in jobs if job.key["n"] in self.not_begun]
        self.release(waiting)
        return waiting


def test_every_key_is_made_once_and_counted() -> None:
    pool = ScriptedPool(slots=3)
    summary = driver_of(MemoryStore("Square", keys(10)), pool, Policy()).run(going_on)
    assert summary.success_count == 10
    assert Counter(job.key["n"] for job in pool.begun) == Counter(range(10))


def test_no_more_in_flight_than_slots_and_no_more_reserved_than_in_flight() -> None:
    pool = ScriptedPool(slots=4, answer=lambda ticket, job: None)
    store = CountingStore(10)
    driver = driver_of(store, pool, Policy())
    driver.step()
    driver.step()
    assert store.asked == [4]
    assert pool.most_in_flight == 4
    assert driver.status().running == 4
    assert store.pending() == 6


def test_slots_that_appear_are_filled() -> None:
    pool = ScriptedPool(slots=1, answer=lambda ticket, job: None)
    driver = driver_of(MemoryStore("Square", keys(10)), pool, Policy())
    driver.step()
    pool.size = 5
    driver.step()
    assert driver.status().running == 5


def test_tasks_are_named_after_table_and_key() -> None:
    pool = ScriptedPool(slots=1)
    driver_of(MemoryStore("Square", [{"mouse": 7, "day": "mon"}]), pool, Policy()).run(going_on)
    assert pool.names == ["Square (set-up)", "Square(mouse=7, day=mon)"]


def test_a_run_may_have_two_tables() -> None:
    store = PipelineStore({name: MemoryStore(name, keys(2)) for name in ("Root", "Square")})
    pool, recipes = ScriptedPool(slots=1), {name: Recipe(name) for name in store.stores}
    assert Driver(RunContext(store, pool, recipes, Policy(), "lab")).run(going_on).success_count == 4
    assert pool.names[:2] == ["Root (set-up)", "Square (set-up)"]
    assert pool.names[2:] == ["Square(n=0)", "Square(n=1)", "Root(n=0)", "Root(n=1)"]


def test_max_calls_bounds_what_is_made() -> None:
    store = CountingStore(10)
    policy, recipe = Policy(max_calls=np.int64(6)), Recipe("Square", retries=np.int8(0))
    summary = driver_of(store, ScriptedPool(slots=4), policy, recipe).run(going_on)
    assert summary.success_count == 6
    assert store.pending() == 4


def test_max_calls_of_zero_reserves_nothing() -> None:
    store = CountingStore(3)
    assert driver_of(store, ScriptedPool(slots=4), Policy(max_calls=0)).run(going_on).success_count == 0
    assert store.asked == []


def test_errors_are_recorded_and_the_rest_goes_on_when_suppressed() -> None:
    store = CountingStore(10)
    pool = ScriptedPool(slots=2, answer=lambda t, job: failed(t, job) if job.key["n"] % 2 else made(t, job))
    summary = driver_of(store, pool, Policy(suppress_errors=True)).run(going_on)
    assert summary.success_count == 5
    assert [job.key["n"] for job, _ in summary.errors] == [1, 3, 5, 7, 9]
    assert [job.key["n"] for job, _ in store.failures] == [1, 3, 5, 7, 9]


def test_the_first_error_stops_reserving_and_gives_back_what_has_not_begun() -> None:
    store = CountingStore(10)
    pool = ScriptedPool(slots=4, answer=lambda t, job: failed(t, job) if t == 1 else None)
    driver = driver_of(store, pool, Policy())
    pool.cancellable = {4}
    assert driver.step()
    assert [job.key["n"] for job in pool.running.values()] == [1, 2]
    assert [job.key["n"] for job in store.asked_back] == [1, 2]
    assert store.pending() == 7
    pool.answer = made
    while driver.step():
        pass
    assert driver.summary().success_count == 2
    assert [job.key["n"] for job, _ in driver.summary().errors] == [0]
    assert store.pending() == 7


def test_a_lost_key_is_made_again() -> None:
    pool = ScriptedPool(slots=1, answer=lambda t, job: lost(t, job) if t == 1 else made(t, job))
    summary = driver_of(MemoryStore("Square", keys(2)), pool, Policy()).run(going_on)
    assert summary.success_count == 2
    assert summary.errors == ()


def test_a_key_that_always_loses_its_worker_becomes_an_error_and_the_rest_is_made(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pool = ScriptedPool(slots=2, answer=lambda t, job: lost(t, job) if job.key["n"] == 1 else made(t, job))
    store = CountingStore(5)
    summary = driver_of(store, pool, Policy(suppress_errors=True, max_worker_losses=3)).run(going_on)
    assert summary.success_count == 4
    ((job, failure),) = summary.errors
    assert job.key == {"n": 1}
    assert failure.message == "lost 3 times, last: WorkerCrashedError: out of memory"
    assert sum(job.key["n"] == 1 for job in pool.begun) == 3
    assert sum("was lost" in record.message for record in caplog.records) == 3


def test_keys_that_had_not_begun_are_lost_at_no_cost() -> None:
    """An engine may blame all that a dead worker had in store."""
    pool = ScriptedPool(slots=1, answer=lambda t, job: lost(t, job) if t <= 5 else made(t, job))
    store = CountingStore(1)
    store.not_begun = {0}
    store.sees_beginnings = True
    assert paced(store, pool, Policy(max_worker_losses=1)).run(going_on).success_count == 1


def test_a_bad_node_uses_up_no_keys_and_a_good_one_makes_them_all() -> None:
    """A node that can't load the pipeline is quick with its refusals, so that it gets task after task."""

    def answer(ticket: int, job: Job) -> Completion:
        return made(ticket, job) if ticket % 10 == 0 else Completion(ticket, Report(setup_error="no module"))

    pool = ScriptedPool(slots=10, answer=answer)
    store = CountingStore(200)
    summary = paced(store, pool, Policy(max_calls=200, max_worker_losses=1)).run(going_on)
    assert (summary.success_count, store.failures) == (200, [])


@pytest.mark.parametrize("dies", [False, True])
def test_a_run_ends_in_which_no_worker_begins_a_key_any_more_and_nothing_is_an_error(dies: bool) -> None:
    def answer(ticket: int, job: Job) -> Completion:
        if ticket == 2:
            return made(ticket, job)
        return lost(ticket, job) if dies else Completion(ticket, Report(setup_error="out of memory"))

    store = CountingStore(50)
    store.not_begun = set(range(50))
    store.sees_beginnings = True
    driver = paced(store, ScriptedPool(slots=4, answer=answer), Policy())
    with pytest.raises(WorkerSetupError, match="out of memory") as refused:
        driver.run(going_on)
    assert refused.value.may_pass  # or the next call says at once what it is
    assert (driver.status().made, store.failures, store.pending()) == (1, [], 49)


def test_a_job_that_an_earlier_worker_had_begun_counts_as_lost() -> None:
    """The cluster ran the task again by itself, which its worker refused."""
    pool = ScriptedPool(slots=1, answer=lambda t, job: ended(t, job, Ending.LEASE_LOST))
    policy = Policy(suppress_errors=True, max_worker_losses=3)
    ((_, failure),) = driver_of(CountingStore(1), pool, policy).run(going_on).errors
    assert "lost 3 times" in failure.message
    assert len(pool.begun) == 3


def test_losses_do_not_count_as_calls() -> None:
    pool = ScriptedPool(slots=1, answer=lambda t, job: lost(t, job) if t == 1 else made(t, job))
    assert (
        driver_of(MemoryStore("Square", keys(5)), pool, Policy(max_calls=3)).run(going_on).success_count == 3
    )


@pytest.mark.parametrize("ending", [Ending.INTERRUPTED, Ending.LOST])
def test_what_is_no_error_of_make_is_not_recorded_as_one(ending: Ending) -> None:
    pool = ScriptedPool(slots=1, answer=lambda t, job: ended(t, job, ending) if t == 1 else made(t, job))
    store = CountingStore(2)
    summary = driver_of(store, pool, Policy()).run(going_on)
    assert (summary.success_count, summary.errors, store.failures) == (2, (), [])


def test_a_key_that_is_there_already_is_finished_but_not_counted() -> None:
    pool = ScriptedPool(slots=1, answer=lambda t, job: ended(t, job, Ending.ALREADY_MADE))
    summary = driver_of(MemoryStore("Square", keys(3)), pool, Policy()).run(going_on)
    assert (summary.success_count, summary.errors) == (0, ())
    assert len(pool.begun) == 3


def test_a_job_taken_over_by_somebody_else_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    store = CountingStore(1)

    def taken_over(ticket: int, job: Job) -> Completion:
        store.forget(job)
        return ended(ticket, job, Ending.LEASE_LOST)

    pool = ScriptedPool(slots=1, answer=taken_over)
    summary = driver_of(store, pool, Policy()).run(going_on)
    assert (summary.success_count, summary.errors, store.failures) == (0, (), [])
    assert "not this run's any more" in caplog.text


def test_nothing_is_kept_of_a_job_that_somebody_else_took_over() -> None:
    store, tries = CountingStore(1), list[int]()

    def lost_then_taken_over(ticket: int, job: Job) -> Completion:
        tries.append(ticket)
        if len(tries) == 1:
            return lost(ticket, job)
        store.forget(job)
        return ended(ticket, job, Ending.LEASE_LOST)

    driver = driver_of(store, ScriptedPool(slots=1, answer=lost_then_taken_over), Policy())
    assert driver.run(going_on).success_count == 0
    assert len(tries) == 2
    assert not driver.status().handover.losses


def test_an_error_of_a_job_that_is_somebody_elses_now_is_none_of_this_run() -> None:
    store = CountingStore(3)
    store.taken_over = {0}
    driver = driver_of(store, ScriptedPool(slots=1, answer=failed), Policy(suppress_errors=True))
    summary = driver.run(going_on)
    assert [job.key["n"] for job, _ in summary.errors] == [1, 2]
    assert driver.status().failed == 2


def test_workers_that_are_preempted_count_as_no_failure() -> None:
    store = CountingStore(1)
    store.preempted = {0}
    store.sees_beginnings = True
    endings = [lost] * (MAX_SETUP_ERRORS + 5) + [made]
    pool = ScriptedPool(slots=1, answer=lambda ticket, job: endings[ticket - 2](ticket, job))
    summary = paced(store, pool, Policy(max_worker_losses=1)).run(going_on)
    assert summary == Summary(success_count=1)


def test_what_a_stop_gave_back_is_not_counted_when_its_worker_dies() -> None:
    store = CountingStore(4)
    store.not_begun = {1, 2, 3}
    pool = ScriptedPool(slots=4, answer=lambda t, job: made(t, job) if t == 2 else lost(t, job))
    driver = driver_of(store, pool, Policy(suppress_errors=True))
    looks = iter([True, False])
    summary = driver.run(lambda status: next(looks, False))
    assert summary.success_count == 1
    assert store.pending() == 3


def test_what_is_made_while_a_stop_gives_the_rest_back_is_counted() -> None:
    class MadeMeanwhile(CountingStore):
        def release_waiting(self, jobs: Sequence[Job]) -> list[Job]:
            self.forget(jobs[0])
            return super().release_waiting(jobs)

    store = MadeMeanwhile(4)
    store.not_begun = {2, 3}
    pool = ScriptedPool(slots=4, answer=lambda t, job: made(t, job) if store.asked_back else None)
    assert driver_of(store, pool, Policy()).run(lambda status: False).success_count == 2
    assert store.pending() == 2


def test_what_runs_of_jobs_that_others_took_over_is_ended_and_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)

    class LostLease(CountingStore):
        def renew(self, jobs: Sequence[Job]) -> list[Job]:
            return [job for job in jobs if job.key["n"] == 2]

        def reserved(self) -> list[Job]:
            return self.renew(super().reserved())

    def answer(ticket: int, job: Job) -> Completion | None:
        return made(ticket, job) if len(pool.killed) == 2 else None

    pool = ScriptedPool(slots=3, answer=answer)
    summary = driver_of(LostLease(3), pool, Policy(lease_seconds=0.04)).run(going_on)
    assert [job.key["n"] for job in pool.killed] == [0, 1]
    assert (summary.success_count, summary.errors) == (1, ())
    assert caplog.text.count("not this run's any more") == 1


def waking(clock: Clock) -> Callable[[float], None]:
    """Let the seconds pass at once, for the clock and for what the store holds back."""

    def sleep(seconds: float) -> None:
        clock.seconds += seconds

    return sleep


class PatientStore(CountingStore):
    """Gives jobs back when they are due by the test's clock."""

    def __init__(self, count: int, clock: Clock) -> None:
        super().__init__(count)
        self.clock = clock
        self.delayed: list[tuple[float, Job]] = []
        self.delays: list[float] = []

    def release(self, jobs: Sequence[Job], *, delay_seconds: float = 0) -> int:
        released = super().release(jobs)
        if delay_seconds:
            self.delays.append(delay_seconds)
            self.delayed += [(self.clock() + delay_seconds, job) for job in super().reserve(len(jobs))]
        return released

    def reserve(self, limit: int, max_priority: int | None = None) -> list[Job]:
        due = [job for at, job in self.delayed if at <= self.clock()][:limit]
        self.delayed = [(at, job) for at, job in self.delayed if job not in due]
        return due or super().reserve(limit)

    def reserved(self) -> list[Job]:
        waiting = [job for _, job in self.delayed]
        return [job for job in super().reserved() if job not in waiting]


def test_a_failed_key_is_tried_again_in_the_same_run_once_its_pause_is_over() -> None:
    clock = Clock()
    store = PatientStore(1, clock)
    pool = ScriptedPool(slots=1, answer=lambda t, job: failed(t, job) if t <= 3 else made(t, job))
    driver = driver_of(store, pool, Policy(), Recipe("Square", retries=2), clock=clock, sleep=waking(clock))
    assert driver.run(going_on) == Summary(1)
    assert len(store.delays) == 2
    assert store.failures == []


def test_a_key_that_fails_once_too_often_is_an_error() -> None:
    clock = Clock()
    store = PatientStore(1, clock)
    pool = ScriptedPool(slots=1, answer=failed)
    policy, recipe = Policy(suppress_errors=True), Recipe("Square", retries=2)
    summary = driver_of(store, pool, policy, recipe, clock=clock, sleep=waking(clock)).run(going_on)
    assert [job.key["n"] for job, _ in summary.errors] == [0]
    assert len(pool.begun) == 3


def test_what_the_database_gave_up_is_tried_again_at_no_cost() -> None:
    clock = Clock()
    pool = ScriptedPool(
        slots=1, answer=lambda t, job: ended(t, job, Ending.TRANSIENT, "lost") if t <= 6 else made(t, job)
    )
    policy = Policy(max_worker_losses=1, max_calls=1)
    driver = driver_of(PatientStore(1, clock), pool, policy, clock=clock, sleep=waking(clock))
    assert driver.run(going_on) == Summary(1)


def test_a_make_that_takes_too_long_is_ended_and_becomes_an_error() -> None:
    clock = Clock()

    def answer(ticket: int, job: Job) -> Completion | None:
        clock.seconds += 1
        return None if job.key["n"] == 1 else made(ticket, job)

    pool = ScriptedPool(slots=2, answer=answer)
    store = CountingStore(4)
    store.has_begun = {1}
    store.sees_beginnings = True
    policy = Policy(suppress_errors=True)
    summary = driver_of(store, pool, policy, TEN_SECONDS, clock=clock).run(going_on)
    assert summary.success_count == 3
    ((job, failure),) = summary.errors
    assert (job.key, failure.message) == ({"n": 1}, "TimeoutError: timed out after 10 seconds")
    assert [job.key["n"] for job in pool.killed] == [1]
    assert 10 <= clock.seconds <= 14


class SlowToKill(ScriptedPool):
    """Takes its time to end a task, as Dask does."""

    def __init__(self, slots: int, answer: Answer, meanwhile: Callable[[], None]) -> None:
        super().__init__(slots, answer)
        self.meanwhile = meanwhile

    def kill(self, ticket: int) -> None:
        super().kill(ticket)
        self.meanwhile()


def test_tasks_that_take_too_long_are_all_recorded_before_the_first_is_ended() -> None:
    clock, store = Clock(), CountingStore(2)
    store.sees_beginnings, store.has_begun = True, {0, 1}

    def answer(ticket: int, job: Job) -> None:
        clock.seconds += 1

    def kill_slowly() -> None:
        store.taken_over = {0, 1}  # what is made meanwhile can't become an error any more

    policy = Policy(suppress_errors=True)
    summary = driver_of(store, SlowToKill(2, answer, kill_slowly), policy, TEN_SECONDS, clock=clock).run(
        going_on
    )
    assert [job.key["n"] for job, _ in summary.errors] == [0, 1]


def test_what_is_made_while_another_task_is_ended_is_counted() -> None:
    class Renewing(CountingStore):
        renewals = 0
        made: Job | None = None

        def renew(self, jobs: Sequence[Job]) -> list[Job]:
            self.renewals += 1
            return [job for job in super().renew(jobs) if job != self.made]

    clock, store = Clock(), Renewing(2)
    store.sees_beginnings, store.has_begun = True, {0}

    def answer(ticket: int, job: Job) -> Completion | None:
        clock.seconds += 1
        return made(ticket, job) if job == store.made else None

    def make_the_other() -> None:
        store.made = Job("Square", {"n": 1})
        renewed = store.renewals
        wait_until(lambda: store.renewals >= renewed + 3, "the lease to miss it")

    policy = Policy(suppress_errors=True, lease_seconds=0.04)
    summary = driver_of(store, SlowToKill(2, answer, make_the_other), policy, TEN_SECONDS, clock=clock).run(
        going_on
    )
    assert (summary.success_count, [job.key["n"] for job, _ in summary.errors]) == (1, [0])


def test_a_worker_that_ended_itself_because_of_the_timeout_is_an_error_and_no_loss() -> None:
    clock = Clock()

    def answer(ticket: int, job: Job) -> Completion | None:
        clock.seconds += 1
        return lost(ticket, job) if clock.seconds >= 12 else None

    policy = Policy(suppress_errors=True)
    pool = ScriptedPool(slots=1, answer=answer)
    summary = driver_of(CountingStore(1), pool, policy, TEN_SECONDS, clock=clock).run(going_on)
    assert [failure.message for _, failure in summary.errors] == ["TimeoutError: timed out after 10 seconds"]
    assert len(pool.begun) == 1


def test_a_stop_ends_what_still_runs_after_the_grace() -> None:
    clock = Clock()

    def answer(ticket: int, job: Job) -> Completion | None:
        clock.seconds += 1
        return None

    pool = ScriptedPool(slots=2, answer=answer)
    store = CountingStore(4)
    driver = driver_of(store, pool, Policy(grace_seconds=5), clock=clock)
    summary = driver.run(lambda status: clock.seconds < 3)
    assert summary == Summary(0)
    assert 5 <= clock.seconds <= 12
    assert pool.closed
    assert store.pending() == 4


def test_what_runs_at_an_interrupt_may_finish_within_the_grace() -> None:
    interrupts = iter([KeyboardInterrupt()])

    def answer(ticket: int, job: Job) -> Completion:
        for interrupt in interrupts:
            raise interrupt
        return made(ticket, job)

    store = CountingStore(5)
    driver = driver_of(store, ScriptedPool(slots=3, answer=answer), Policy())
    with pytest.raises(KeyboardInterrupt):
        driver.run(going_on)
    assert driver.summary().success_count == 3
    assert store.pending() == 2


def test_no_more_errors_are_kept_than_wanted_but_all_are_counted() -> None:
    store = CountingStore(10)
    policy = Policy(suppress_errors=True, max_errors_listed=4)
    driver = driver_of(store, ScriptedPool(slots=2, answer=failed), policy)
    summary = driver.run(going_on)
    assert (len(summary.errors), summary.failed) == (4, 10)
    assert driver.status().failed == 10
    assert len(store.failures) == 10


@pytest.mark.parametrize("may_pass", [False, True])
def test_workers_that_can_not_work_end_the_run_before_anything_is_touched(may_pass: bool) -> None:
    store = CountingStore(3)
    pool = ScriptedPool(slots=1)
    pool.trial = Report(setup_error="ModuleNotFoundError: No module named 'lab'", may_pass=may_pass)
    with pytest.raises(WorkerSetupError, match="No module named 'lab'") as refused:
        driver_of(store, pool, Policy()).run(going_on)
    assert refused.value.may_pass == may_pass
    assert (store.asked, store.refreshed) == ([], 0)


@pytest.mark.parametrize(("as_objects", "kept"), [(False, None), (True, b"pickled")])
def test_exceptions_are_kept_only_for_a_caller_that_gets_them(as_objects: bool, kept: bytes | None) -> None:
    def answer(ticket: int, job: Job) -> Completion:
        failure = Failure("ValueError: no", "long", b"pickled", ("ValueError",))
        return Completion(ticket, Report((Outcome(job, Ending.FAILED, failure),)))

    store = CountingStore(1)
    policy = Policy(suppress_errors=True, return_exception_objects=as_objects)
    ((_, failure),) = driver_of(store, ScriptedPool(1, answer), policy).run(going_on).errors
    assert (failure.message, failure.exception) == ("ValueError: no", kept)
    assert store.failures[0][1].traceback == "long"


def test_what_is_given_back_is_pending_again() -> None:
    def cut_short(ticket: int, job: Job) -> Completion:
        return ended(ticket, job, Ending.NOT_STARTED)

    store = MemoryStore("Square", keys(4))
    driver = driver_of(store, ScriptedPool(slots=2, answer=cut_short), Policy(count_pending=True))
    for _ in range(3):
        driver.step()
        status = driver.status()
        assert status.running + status.queued + status.pending == 4


class TestSuccessor:
    """A driver that goes on with the run of one that was lost."""

    def drive(
        self, store: CountingStore, policy: Policy, lost_driver: Status
    ) -> tuple[Summary, list[Status]]:
        pool = ScriptedPool(slots=1)
        reported: list[Status] = []

        def watch(status: Status) -> bool:
            reported.append(status)
            return True

        return driver_of(store, pool, policy).run(watch, lost_driver), reported

    def test_it_counts_on_and_keeps_to_max_calls(self) -> None:
        store = CountingStore(10)
        summary, reported = self.drive(store, Policy(max_calls=6, suppress_errors=True), lost_status(3, 1))
        assert (summary.success_count, store.pending()) == (5, 8)
        assert (reported[0].made, reported[0].failed) == (3, 1)

    def test_it_stays_stopped(self) -> None:
        store = CountingStore(3)
        summary, _ = self.drive(store, Policy(), lost_status(1, handover=Handover(stopping=True)))
        assert (summary.success_count, store.pending()) == (1, 3)

    def test_it_keeps_the_error_that_ended_the_run(self) -> None:
        error = (Job("Square", {"n": 7}), Failure("ValueError: no"))
        inherited = Handover(stopping=True, errors=(error,))
        summary, _ = self.drive(CountingStore(3), Policy(), lost_status(1, 1, handover=inherited))
        assert summary == Summary(1, (error,), failed=1)

    def test_it_leaves_out_what_failed_where_no_jobs_table_has_it(self) -> None:
        error = (Job("Square", {"n": 1}), Failure("ValueError: no"))
        lost_driver = lost_status(0, 1, handover=Handover(errors=(error,)))
        summary, reported = self.drive(CountingStore(3), Policy(suppress_errors=True), lost_driver)
        assert summary == Summary(2, (error,), failed=1)
        assert reported[-1].handover.errors == (error,)  # for the next one

    def test_what_ran_in_the_process_of_the_lost_driver_has_lost_a_worker(self) -> None:
        store = CountingStore(3)
        store.held = {("node", 7): store.reserve(1)}
        losses = ((Job("Square", {"n": 0}).identity, 2),)
        lost_driver = Status(handover=Handover("node", 7, losses=losses))
        summary, reported = self.drive(store, Policy(max_worker_losses=3, suppress_errors=True), lost_driver)
        ((job, failure),) = summary.errors
        assert (summary.success_count, job.key) == (2, {"n": 0})
        assert "lost 3 times" in failure.message
        assert reported[0].failed == 1

    def test_its_losses_are_known_before_a_key_begins(self) -> None:
        store = CountingStore(1)
        store.held = {("node", 7): store.reserve(1)}
        _, reported = self.drive(store, Policy(max_worker_losses=3), Status(handover=Handover("node", 7)))
        assert reported[0].handover.losses == ((Job("Square", {"n": 0}).identity, 1),)
        assert (reported[0].running, reported[-1].handover.losses) == (0, ())

    def test_it_forgets_nothing_while_it_waits_for_its_database(self) -> None:
        class Asking(CountingStore):
            def wait_while(self, wanted: Callable[[], bool]) -> None:
                self.wanted = wanted

            def begun_by(self, host: str, pid: int) -> list[Job]:
                self.wanted()
                return super().begun_by(host, pid)

        losses = ((Job("Square", {"n": 0}).identity, 2),)
        error = (Job("Square", {"n": 7}), Failure("ValueError: no"))
        inherited = Handover("node", 7, stopping=True, losses=losses, errors=(error,))
        lost_driver = lost_status(300, 2, handover=inherited, begun=True)
        _, reported = self.drive(Asking(3), Policy(), lost_driver)
        for status in reported:
            assert (status.made, status.failed, status.begun) == (300, 2, True)
            assert status.handover.stopping
            assert (status.handover.losses, status.handover.errors) == (losses, (error,))


PATIENCE_SECONDS = 100


class AwayStore(CountingStore):
    """Its database is away from a moment on; it waits as long as that is wanted."""

    def __init__(self, count: int, clock: Clock) -> None:
        super().__init__(count)
        self.clock = clock
        self.away = False
        self.waited_seconds = 0.0
        self.goes_on: Callable[[], bool] = lambda: True

    def wait_while(self, wanted: Callable[[], bool]) -> None:
        self.goes_on = wanted

    def reserve(self, limit: int, max_priority: int | None = None) -> list[Job]:
        self.wait()
        return super().reserve(limit)

    def release(self, jobs: Sequence[Job], *, delay_seconds: float = 0) -> int:
        self.wait()
        return super().release(jobs, delay_seconds=delay_seconds)

    def wait(self) -> None:
        began = self.clock.seconds
        while self.away and self.goes_on() and self.clock.seconds - began < PATIENCE_SECONDS:
            self.clock.sleep(1)
            self.waited_seconds += 1
        if self.away:
            raise DatabaseError("away")


def test_an_interrupt_waits_no_longer_than_the_grace_for_a_database_that_is_away(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    store = AwayStore(5, clock)

    def interrupted(ticket: int, job: Job) -> Completion:
        store.away = True
        raise KeyboardInterrupt

    driver = driver_of(
        store, ScriptedPool(slots=3, answer=interrupted), Policy(grace_seconds=10), clock=clock
    )
    with pytest.raises(KeyboardInterrupt):
        driver.run(going_on)
    assert store.waited_seconds == 10
    assert "is free again after 60 seconds" in caplog.text


def test_a_run_that_has_waited_for_its_database_in_vain_does_not_wait_again() -> None:
    clock = Clock()
    store = AwayStore(5, clock)

    def last(ticket: int, job: Job) -> Completion:
        store.away = True
        return made(ticket, job)

    with pytest.raises(DatabaseError):
        driver_of(store, ScriptedPool(slots=1, answer=last), Policy(), clock=clock).run(going_on)
    assert store.waited_seconds == PATIENCE_SECONDS


def test_an_interrupt_does_not_wait_for_a_lease_that_waits_for_the_database() -> None:
    class Rescuing(AwayStore):
        rescuing = gave_up = False

        def rescue(self) -> int:
            self.rescuing = True
            wait_until(lambda: not self.goes_on(), "the end of the run")
            self.gave_up = True
            return 0

    def interrupted(ticket: int, job: Job) -> Completion:
        wait_until(lambda: store.rescuing, "the lease")
        raise KeyboardInterrupt

    store = Rescuing(5, Clock())
    driver = driver_of(store, ScriptedPool(slots=1, answer=interrupted), Policy(lease_seconds=0.04))
    with pytest.raises(KeyboardInterrupt):
        driver.run(going_on)
    assert store.gave_up


def test_a_stop_is_heard_while_the_database_is_away() -> None:
    clock = Clock()
    store = AwayStore(5, clock)

    def interrupted(ticket: int, job: Job) -> Completion:
        store.away = True
        return ended(ticket, job, Ending.INTERRUPTED)

    driver = driver_of(
        store, ScriptedPool(slots=3, answer=interrupted), Policy(grace_seconds=10), clock=clock
    )
    with pytest.raises(DatabaseError):
        driver.run(lambda status: clock.seconds < 30)
    assert store.waited_seconds == 40


def test_an_interrupt_gives_everything_back_and_goes_on_to_the_caller() -> None:
    def interrupted(ticket: int, job: Job) -> Completion:
        raise KeyboardInterrupt

    store = CountingStore(5)
    pool = ScriptedPool(slots=3, answer=interrupted)
    with pytest.raises(KeyboardInterrupt):
        driver_of(store, pool, Policy()).run(going_on)
    assert store.pending() == 5
    assert pool.closed


def test_a_watcher_that_has_enough_stops_the_run() -> None:
    store = CountingStore(10)
    summary = driver_of(store, ScriptedPool(slots=2), Policy()).run(lambda status: status.made < 4)
    assert summary.success_count == 4
    assert store.pending() == 6


def test_a_drained_store_is_asked_again_only_after_a_while() -> None:
    clock = Clock()
    store = CountingStore(1)
    pool = ScriptedPool(slots=3, answer=lambda t, job: None)
    driver = driver_of(store, pool, Policy(), clock=clock)
    driver.step()
    driver.step()
    assert len(store.asked) == 1
    clock.seconds += WAIT_SECONDS
    driver.step()
    assert len(store.asked) == 2


def test_a_run_does_not_end_on_a_short_answer_but_on_an_empty_one() -> None:
    store = CountingStore(3)
    driver = driver_of(store, ScriptedPool(slots=5), Policy())
    assert driver.step()
    assert not driver.step()
    assert store.asked == [5, 5]


def test_status_counts_what_is_left_only_if_the_policy_asks() -> None:
    pool = ScriptedPool(slots=2, answer=lambda t, job: None)
    for count_pending, pending in ((True, 8), (False, 0)):
        driver = driver_of(MemoryStore("Square", keys(10)), pool, Policy(count_pending=count_pending))
        pool.running.clear()
        driver.step()
        assert driver.status() == Status(made=0, failed=0, running=2, pending=pending)


def test_what_waits_on_the_cluster_is_not_told_as_running() -> None:
    pool = ScriptedPool(slots=2, answer=lambda t, job: None)
    pool.waits_for_room = True
    driver = driver_of(MemoryStore("Square", keys(10)), pool, Policy())
    driver.step()
    assert (driver.status().running, driver.status().queued) == (2, 1)
    assert driver.status().counts == "0 made, 0 failed, 2 running, 1 queued, 0 pending"


def test_status_knows_what_was_counted_for_the_dashboard() -> None:
    pool = ScriptedPool(slots=2, answer=lambda t, job: None)
    pool.has_dashboard = True
    driver = driver_of(MemoryStore("Square", keys(10)), pool, Policy())
    driver.step()
    assert driver.status().pending == 8


def test_a_count_that_takes_long_holds_up_no_key() -> None:
    class Slow(CountingStore):
        is_over = threading.Event()

        def pending(self, most: int | None = None) -> int:
            assert self.is_over.wait(60)
            return super().pending(most)

    def watch(status: Status) -> bool:
        if status.made == 9:
            store.is_over.set()
        return True

    store = Slow(10)
    assert driver_of(store, ScriptedPool(slots=1), Policy(count_pending=True)).run(watch).success_count == 10


def test_the_longer_a_count_takes_the_longer_is_the_pause_before_the_next() -> None:
    clock = Clock()

    def count() -> int:
        clock.seconds += 2.5
        return 7

    counting = Counting(count, clock)
    for _ in range(2):
        wait_until(lambda: counting.found(2) == 7, "a count")
        clock.seconds += 2.5 * SHARE - 0.1
        assert counting.found(2) is None
        clock.seconds += 0.1


def test_a_count_that_fails_is_tried_again() -> None:
    answers = iter([None, 7])

    def count() -> int:
        answer = next(answers)
        if answer is None:
            raise DatabaseError("away")
        return answer

    counting = Counting(count, Clock())
    wait_until(lambda: counting.found(0) == 7, "the second count")


@pytest.mark.parametrize("max_calls", [None, 4])
def test_the_last_status_knows_what_others_have_made_meanwhile(max_calls: int | None) -> None:
    """Of what was counted before."""
    store, told = CountingStore(20), list[Status]()

    def answer(ticket: int, job: Job) -> Completion:
        if job.key["n"] == 3:
            while len(store._pending) > 5 * (max_calls is not None):
                store._pending.pop()
        return made(ticket, job)

    def watch(status: Status) -> bool:
        told.append(status)
        return True

    policy = Policy(count_pending=True, max_calls=max_calls)
    driver_of(store, ScriptedPool(slots=2, answer=answer), policy).run(watch)
    assert max(status.pending for status in told) >= 16
    assert (told[-1].made, told[-1].pending) == ((4, 0) if max_calls is None else (4, 5))


def test_a_run_is_starting_until_its_workers_have_been_tried() -> None:
    class SlowToStart(ScriptedPool):
        waits = 0

        def wait(self, timeout_seconds: float) -> list[Completion]:
            self.waits += 1
            return super().wait(timeout_seconds) if self.waits > 1 else []

    reported: list[str] = []

    def watch(status: Status) -> bool:
        reported.append(str(status))
        return True

    driver_of(MemoryStore("Square", keys(1)), SlowToStart(1), Policy()).run(watch)
    assert (reported[0], reported[-1]) == ("starting", "1 made, 0 failed, 0 running, 0 pending")


def test_what_was_reserved_though_the_answer_was_lost_is_made_in_the_end() -> None:
    class Forgetful(CountingStore):
        """Its first answer is lost, so that it is asked again."""

        def reserve(self, limit: int, max_priority: int | None = None) -> list[Job]:
            given = super().reserve(limit)
            return given if len(self.asked) > 1 else super().reserve(limit)

    for max_calls, made_then in ((None, 10), (7, 7)):
        store, pool = Forgetful(10), ScriptedPool(slots=3)
        assert driver_of(store, pool, Policy(max_calls=max_calls)).run(going_on).success_count == made_then
        assert (len(pool.begun), store.pending()) == (made_then, 10 - made_then)


def test_an_empty_store_is_an_empty_summary() -> None:
    summary = driver_of(MemoryStore("Square", []), ScriptedPool(slots=2), Policy()).run(going_on)
    assert (summary.success_count, summary.errors) == (0, ())


def bytes_held_by(*files: str) -> int:
    """Count the memory that code of these files has taken, not that of threads that other tests left."""
    gc.collect()
    ours = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, file) for file in files])
    return sum(trace.size for trace in ours.traces)


def test_memory_stays_flat_over_many_jobs_and_errors(thorough: bool) -> None:
    count = 50_000 if thorough else 10_000

    class Endless(MemoryStore):
        """Has that many jobs, which it makes up when they are reserved."""

        left = count

        def reserve(self, limit: int, max_priority: int | None = None) -> list[Job]:
            numbers = range(self.left, max(0, self.left - limit), -1)
            self.left -= len(numbers)
            self._pending.extend(Job("Square", {"n": n}) for n in numbers)
            return super().reserve(limit)

    def answer(ticket: int, job: Job) -> Completion:
        if job.key["n"] % (count // 5) == 0:
            held.append(bytes_held_by(djdist.__path__[0] + "/*", __file__))
        return failed(ticket, job) if job.key["n"] % 10 == 0 else made(ticket, job)

    held: list[int] = []
    pool = ScriptedPool(slots=32, answer=answer)
    driver = driver_of(Endless("Square", []), pool, Policy(suppress_errors=True, max_errors_listed=10))
    pool.begun = pool.names = deque(maxlen=1)  # type: ignore[assignment]
    tracemalloc.start()
    try:
        summary = driver.run(going_on)
    finally:
        tracemalloc.stop()
    assert (summary.success_count, len(summary.errors)) == (count * 9 // 10, 10)
    assert held[-1] - held[1] < 100_000
