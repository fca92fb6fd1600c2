"""Random schedules of completions, errors, losses and new arrivals, against a Driver."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from djdist._job import Completion, Ending, Failure, Job, Policy
from djdist._job_store import JobStore
from djdist.driver import WAIT_SECONDS
from lab.scripted import Clock, ScriptedPool, driver_of, ended, failed, lost, made

MAX_LOSSES = 3


class PriorityStore(JobStore):
    """Jobs with priorities, that notes what it sees."""

    def __init__(self) -> None:
        self.waiting: dict[int, int] = {}
        self.owned: dict[int, int] = {}
        self.finished: Counter[int] = Counter()
        self.failed: Counter[int] = Counter()
        self.out_of_order: list[str] = []

    def add(self, number: int, priority: int) -> None:
        self.waiting[number] = priority

    def refresh(self) -> dict[str, int]:
        return {}

    def reserve(self, limit: int, max_priority: int | None = None) -> list[Job]:
        urgent = sorted(self.waiting, key=lambda number: self.waiting[number])[:limit]
        self.owned |= {number: self.waiting.pop(number) for number in urgent}
        return [Job("Square", {"n": number}) for number in urgent]

    def next_priority(self) -> int | None:
        return min(self.waiting.values(), default=None)

    def reserved(self) -> list[Job]:
        return [Job("Square", {"n": number}) for number in self.owned]

    def release(self, jobs: Any, *, delay_seconds: float = 0) -> int:
        self.waiting |= {job.key["n"]: self.owned.pop(job.key["n"]) for job in jobs}
        return len(jobs)

    def release_waiting(self, jobs: Any) -> list[Job]:
        return []

    def release_all(self) -> None:
        self.release(self.reserved())

    def fail(self, job: Job, failure: Failure, host: str = "", pid: int = 0) -> bool:
        self.failed[job.key["n"]] += 1
        del self.owned[job.key["n"]]
        return True

    def forget(self, job: Job) -> None:
        self.finished[job.key["n"]] += 1
        del self.owned[job.key["n"]]

    def renew(self, jobs: Any) -> list[Job]:
        return list(jobs)

    def rescue(self) -> int:
        return 0

    def begun(self, jobs: Any) -> list[Job]:
        return list(jobs)

    def handed_back(self, jobs: Any) -> bool:
        return False

    def begun_by(self, host: str, pid: int) -> list[Job]:
        return []

    def pending(self, most: int | None = None) -> int:
        return len(self.waiting) if most is None else min(most, len(self.waiting))


class DriverMachine(RuleBasedStateMachine):
    """Whatever happens: made at most once, none lost, in order, within the window."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.store = PriorityStore()
        self.next_completion: Completion | None = None
        self.pool = ScriptedPool(slots=3, answer=self.answer)
        policy = Policy(suppress_errors=True, max_worker_losses=MAX_LOSSES)
        self.driver = driver_of(self.store, self.pool, policy, clock=self.clock, sleep=self.pass_by)
        self.added: dict[int, int] = {}
        self.losses: Counter[int] = Counter()

    def answer(self, ticket: int, job: Job) -> Completion | None:
        completion = self.next_completion
        return completion if completion and completion.ticket == ticket else None

    def pass_by(self, seconds: float) -> None:
        self.clock.seconds += seconds

    def step(self) -> None:
        before = dict(self.store.waiting)
        begun = len(self.pool.begun)
        self.driver.step()
        taken = [job.key["n"] for job in self.pool.begun[begun:]]
        assert [before[n] for n in taken] == sorted(before[n] for n in taken)
        left = [priority for number, priority in before.items() if number not in taken]
        assert all(before[n] <= priority for n in taken for priority in left)

    @rule(priority=st.integers(-3, 3))
    def arrive(self, priority: int) -> None:
        number = len(self.added)
        self.added[number] = priority
        self.store.add(number, priority)

    @rule(seconds=st.sampled_from([0.1, WAIT_SECONDS]))
    def pass_time(self, seconds: float) -> None:
        self.clock.seconds += seconds
        self.step()

    @rule(slots=st.integers(0, 6))
    def resize(self, slots: int) -> None:
        self.pool.size = slots

    @precondition(lambda self: self.pool.running)
    @rule(data=st.data(), how=st.sampled_from(["made", "failed", "lost", "interrupted", "present"]))
    def end_one(self, data: st.DataObject, how: str) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.pool.running)))
        job = self.pool.running[ticket]
        self.losses[job.key["n"]] += how == "lost"
        self.next_completion = {
            "made": made(ticket, job),
            "failed": failed(ticket, job),
            "lost": lost(ticket, job),
            "interrupted": ended(ticket, job, Ending.INTERRUPTED),
            "present": ended(ticket, job, Ending.ALREADY_MADE),
        }[how]
        self.step()
        self.next_completion = None

    @invariant()
    def each_ends_at_most_once(self) -> None:
        ends = self.store.finished + self.store.failed
        assert all(count == 1 for count in ends.values())

    @invariant()
    def none_is_lost(self) -> None:
        known = [*self.store.waiting, *self.store.owned, *self.store.finished, *self.store.failed]
        assert sorted(known) == sorted(self.added)

    @invariant()
    def what_is_owned_is_in_flight(self) -> None:
        assert sorted(self.store.owned) == sorted(job.key["n"] for job in self.pool.running.values())

    @invariant()
    def never_more_in_flight_than_the_window(self) -> None:
        assert not self.pool.overfull

    @invariant()
    def priorities_are_kept(self) -> None:
        assert (self.store.waiting | self.store.owned).items() <= self.added.items()

    @invariant()
    def no_more_losses_than_allowed(self) -> None:
        assert all(count <= MAX_LOSSES for count in self.losses.values())

    def teardown(self) -> None:
        self.pool.size = 3
        self.pool.answer = made
        self.clock.seconds += WAIT_SECONDS
        while self.driver.step():
            pass
        assert sorted(self.store.finished + self.store.failed) == sorted(self.added)
        summary = self.driver.summary()
        assert len(summary.errors) == sum(self.store.failed.values())
        assert summary.success_count <= sum(self.store.finished.values())


DriverMachine.TestCase.settings = settings(stateful_step_count=40)
TestDriver = DriverMachine.TestCase
