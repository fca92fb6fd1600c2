from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest

from djdist._job import (
    Breakage,
    BreakageKind,
    Completion,
    Ending,
    Failure,
    Job,
    Outcome,
    Policy,
    Recipe,
    Report,
    Status,
)
from djdist._needs import Needs
from djdist._task_pool import task_name
from djdist.driver import Driver
from djdist.driver.backlog import LOOK_AHEAD, LOOK_SECONDS, Backlog
from djdist.driver.grouping import (
    LARGEST,
    SMALLEST_SHARE,
    Grouping,
)
from djdist.job_stores.memory import MemoryStore
from lab.scripted import SQUARE, Clock, ScriptedPool, driver_of

Answer = Callable[[int, Sequence[Job]], Completion | None]


def jobs(count: int) -> list[Job]:
    return [Job("Square", {"n": n}) for n in range(count)]


def sizes(grouping: Grouping, count: int, slots: int) -> list[int]:
    return [len(group) for group in grouping.split(jobs(count), grouping.size, slots)]


def grown(seconds: float, size: int) -> Grouping:
    """Give what has seen keys of this length in groups of up to this size."""
    grouping = Grouping()
    while grouping.size < size:
        grouping.note(grouping.size, grouping.size * seconds)
    return grouping


class TestSize:
    def test_a_task_holds_one_key_at_first_and_then_many_more_each_time(self) -> None:
        grouping, seen = Grouping(), []
        for _ in range(4):
            seen.append(grouping.size)
            grouping.note(grouping.size, grouping.size * 0.001)
        assert seen == [1, 8, 64, LARGEST]

    def test_a_task_takes_about_half_a_second(self) -> None:
        grouping = Grouping()
        for _ in range(20):
            grouping.note(grouping.size, grouping.size * 0.02)
        assert grouping.size == int(Policy().task_seconds / 0.02)

    def test_no_task_is_larger_than_the_largest(self) -> None:
        assert grown(1e-6, LARGEST).size == LARGEST

    def test_long_keys_go_alone(self) -> None:
        grouping = grown(0.001, 64)
        for _ in range(10):
            grouping.note(1, 10)
        assert grouping.size == 1

    def test_what_took_no_time_and_made_nothing_says_nothing(self) -> None:
        grouping = Grouping()
        grouping.note(0, 3)
        grouping.note(3, 0)
        assert grouping.size == 1


class TestSplit:
    def test_plenty_is_split_by_size(self) -> None:
        assert sizes(grown(0.001, 8), 20, slots=1) == [8, 8, 4]

    def test_what_is_scarce_is_spread_over_the_slots(self) -> None:
        assert sizes(grown(0.001, 8), 10, slots=4) == [3, 3, 3, 1]
        assert sizes(grown(0.001, 8), 3, slots=4) == [1, 1, 1]

    def test_suspects_go_alone_once(self) -> None:
        grouping = grown(0.001, 8)
        grouping.isolate(jobs(2))
        assert sizes(grouping, 6, slots=1) == [1, 1, 4]
        assert sizes(grouping, 6, slots=1) == [6]


class TestShares:
    def test_a_group_is_whole_while_plenty_is_left(self) -> None:
        assert grown(0.001, 64).size_of_shares(lambda most: most, slots=4) == 64

    def test_groups_shrink_with_what_is_left_and_not_without_end(self) -> None:
        grouping = grown(0.001, 64)
        for left, size in ((255, 64), (80, 20), (9, 8), (0, 8)):
            assert grouping.size_of_shares(partial(min, left), slots=2) == size

    def test_nobody_counts_for_keys_that_go_alone(self) -> None:
        def never(most: int) -> int:
            raise AssertionError

        assert Grouping().size_of_shares(never, slots=4) == 1


def test_jobs_that_are_isolated_are_not_compared_with_each_other() -> None:
    class Incomparable(Job):
        def __eq__(self, other: object) -> bool:
            raise AssertionError

        __hash__ = None  # type: ignore[assignment]

    grouping, lost = Grouping(), [Incomparable("Square", {"n": n}) for n in range(4)]
    grouping.isolate(lost[:3])
    assert [[job.key["n"] for job in group] for group in grouping.split(lost, 4, 1)] == [[0], [1], [2], [3]]


class TestLeft:
    def test_it_is_counted_again_when_what_was_seen_is_used_up(self) -> None:
        store = CountingStore(1000)
        backlog = Backlog(store, Clock())
        for _ in range(8):
            assert backlog.estimate(100) == 100
            backlog.reserve(50, idle=False)
        assert store.asked == [100 * LOOK_AHEAD] * 2

    def test_the_last_of_it_is_counted_once(self) -> None:
        store = CountingStore(90)
        backlog = Backlog(store, Clock())
        for left in (90, 60, 30, 0):
            assert backlog.estimate(100) == left
            backlog.reserve(30, idle=False)
        assert len(store.asked) == 1

    def test_what_is_put_back_is_left_again(self) -> None:
        backlog = Backlog(CountingStore(90), Clock())
        assert backlog.estimate(100) == 90
        backlog.returned(5)
        assert backlog.estimate(100) == 95

    def test_what_others_add_is_seen_later(self) -> None:
        clock, store = Clock(), CountingStore(0)
        backlog = Backlog(store, clock)
        assert backlog.estimate(100) == 0
        store._pending.extend(jobs(7))
        assert backlog.estimate(100) == 0
        clock.seconds += LOOK_SECONDS
        assert backlog.estimate(100) == 7

    def test_a_store_that_counts_slowly_is_asked_seldom(self) -> None:
        clock = Clock()
        store = CountingStore(0, clock, seconds=1)
        backlog = Backlog(store, clock)
        for _ in range(3):
            backlog.estimate(100)
            clock.seconds += LOOK_SECONDS
        assert len(store.asked) == 1


class Groups(ScriptedPool):
    """Holds whole groups until a test lets them end."""

    def __init__(self, slots: int, answer_group: Answer) -> None:
        super().__init__(slots)
        self.groups: dict[int, Sequence[Job]] = {}
        self.submitted: list[list[int]] = []
        self.answer_group = answer_group

    def submit(self, table: str, jobs: Sequence[Job], needs: Needs) -> int:
        if not jobs:
            return super().submit(table, jobs, needs)
        self._submitted += 1
        self.names.append(task_name(table, jobs))
        self.groups[self._submitted] = jobs
        self.submitted.append([job.key["n"] for job in jobs])
        return self._submitted

    def wait(self, timeout_seconds: float) -> list[Completion]:
        answers = [self.answer_group(ticket, jobs) for ticket, jobs in list(self.groups.items())]
        for completion in filter(None, answers):
            del self.groups[completion.ticket]
        return [*super().wait(timeout_seconds), *filter(None, answers)]

    def kill(self, ticket: int) -> None:
        self.killed.append(self.groups.pop(ticket)[0])


def all_made(ticket: int, jobs: Sequence[Job]) -> Completion:
    return Completion(
        ticket, Report(tuple(Outcome(job, Ending.MADE) for job in jobs), seconds=0.001 * len(jobs))
    )


def dies(ticket: int) -> Completion:
    return Completion(ticket, error=Breakage(BreakageKind.WORKER_DIED, "WorkerCrashedError: out of memory"))


class CountingStore(MemoryStore):
    """Notes how far it was asked to count, which takes it some time."""

    def __init__(self, count: int, clock: Clock | None = None, seconds: float = 0) -> None:
        super().__init__("Square", (job.key for job in jobs(count)))
        self.asked: list[int | None] = []
        self._clock = clock or Clock()
        self._seconds = seconds

    def pending(self, most: int | None = None) -> int:
        self.asked.append(most)
        self._clock.seconds += self._seconds
        return super().pending(most)


class SeeingStore(MemoryStore):
    """Knows what has begun, as the jobs table does: what a test says, and all else but what is gone."""

    sees_beginnings = True

    def __init__(self, count: int) -> None:
        super().__init__("Square", ({"n": n} for n in range(count)))
        self.made_in_secret: set[int] = set()
        self.nothing_begun = False
        self.waiting: set[int] = set()

    def begun(self, jobs: Sequence[Job]) -> list[Job]:
        if self.nothing_begun:
            return []
        return [job for job in jobs if job.key["n"] not in self.made_in_secret]

    def release(self, jobs: Sequence[Job], *, delay_seconds: float = 0) -> int:
        owned = [job for job in jobs if job.key["n"] not in self.made_in_secret]
        return super().release(owned, delay_seconds=delay_seconds)

    def release_waiting(self, jobs: Sequence[Job]) -> list[Job]:
        waiting = list(jobs) if self.nothing_begun else [job for job in jobs if job.key["n"] in self.waiting]
        self.release(waiting)
        return waiting


def timed(
    store: MemoryStore, pool: ScriptedPool, policy: Policy, clock: Clock, recipe: Recipe = SQUARE
) -> Driver:
    return driver_of(store, pool, policy, recipe, clock=clock, sleep=clock.sleep)


def going_on(status: Status) -> bool:
    return True


class TestDriver:
    @pytest.mark.parametrize("policy", [Policy(), Policy(max_calls=5000)])
    def test_the_last_groups_are_small(self, policy: Policy) -> None:
        pool = Groups(2, all_made)
        timed(SeeingStore(9000), pool, policy, Clock()).run(going_on)
        sizes = [len(group) for group in pool.submitted]
        assert max(sizes) == LARGEST
        assert sum(sizes) == (policy.max_calls or 9000)
        assert sizes[-1] <= LARGEST // SMALLEST_SHARE
        assert sizes[sizes.index(LARGEST) :] == sorted(sizes[sizes.index(LARGEST) :], reverse=True)

    def test_tiny_keys_share_tasks_and_each_is_made_once(self) -> None:
        pool = Groups(2, all_made)
        summary = timed(SeeingStore(200), pool, Policy(), Clock()).run(going_on)
        assert summary.success_count == 200
        assert sorted(n for group in pool.submitted for n in group) == list(range(200))
        assert len(pool.submitted) < 20
        assert max(map(len, pool.submitted)) > 10
        assert "Square(n=2, +7 more)" in pool.names

    def test_max_calls_bounds_what_groups_hold(self) -> None:
        pool = Groups(2, all_made)
        assert timed(SeeingStore(200), pool, Policy(max_calls=37), Clock()).run(going_on).success_count == 37

    def test_a_lost_worker_charges_the_key_it_was_making_and_no_other(self) -> None:
        store = SeeingStore(60)

        def answer(ticket: int, jobs: Sequence[Job]) -> Completion:
            numbers = [job.key["n"] for job in jobs]
            if 40 not in numbers:
                return all_made(ticket, jobs)
            store.made_in_secret |= set(numbers[: numbers.index(40)])
            return dies(ticket)

        pool = Groups(1, answer)
        summary = timed(store, pool, Policy(suppress_errors=True), Clock()).run(going_on)
        ((job, failure),) = summary.errors
        assert (summary.success_count, job.key) == (59, {"n": 40})
        assert failure.message.startswith("lost 3 times")

    def test_where_nobody_knows_which_key_it_was_they_go_alone(self) -> None:
        def answer(ticket: int, jobs: Sequence[Job]) -> Completion:
            return dies(ticket) if any(job.key["n"] == 40 for job in jobs) else all_made(ticket, jobs)

        store = MemoryStore("Square", ({"n": n} for n in range(60)))
        pool = Groups(1, answer)
        summary = timed(store, pool, Policy(suppress_errors=True), Clock()).run(going_on)
        assert (summary.success_count, [job.key["n"] for job, _ in summary.errors]) == (59, [40])

    def test_what_a_worker_leaves_is_made_by_another_task(self) -> None:
        def answer(ticket: int, jobs: Sequence[Job]) -> Completion:
            left = tuple(Outcome(job, Ending.NOT_STARTED) for job in jobs[1:])
            first = Outcome(jobs[0], Ending.MADE)
            return Completion(ticket, Report((first, *left), seconds=0.001))

        pool = Groups(1, answer)
        summary = timed(SeeingStore(20), pool, Policy(max_calls=20), Clock()).run(going_on)
        assert summary.success_count == 20

    def test_a_group_may_be_left_of_which_a_stop_gave_back_all_that_ended(self) -> None:
        store = SeeingStore(60)

        def answer(ticket: int, jobs: Sequence[Job]) -> Completion:
            if len(jobs) == 1:
                return all_made(ticket, jobs)
            store.waiting = {jobs[0].key["n"]}
            driver.stop()
            left = tuple(Outcome(job, Ending.NOT_STARTED) for job in jobs[1:])
            return Completion(ticket, Report((Outcome(jobs[0], Ending.LEASE_LOST), *left)))

        driver = timed(store, Groups(1, answer), Policy(), Clock())
        assert driver.run(going_on).success_count == 1
        assert store.pending() == 59

    def test_what_waits_behind_a_long_key_goes_to_others(self) -> None:
        clock, store = Clock(), SeeingStore(60)

        def answer(ticket: int, jobs: Sequence[Job]) -> Completion | None:
            clock.seconds += 0.1
            numbers = [job.key["n"] for job in jobs]
            if 30 not in numbers:
                return all_made(ticket, jobs)
            store.made_in_secret |= set(numbers[: numbers.index(30)])
            return None if len(store._reserved) > 1 or clock.seconds < 60 else all_made(ticket, jobs[:1])

        pool = Groups(2, answer)
        timed(store, pool, Policy(), clock).run(lambda status: clock.seconds < 60)
        (behind,) = [group[group.index(30) + 1 :] for group in pool.submitted if 30 in group]
        assert behind
        again = [n for group in pool.submitted for n in group if n in behind]
        assert sorted(again) == sorted(behind * 2)

    def test_a_key_of_a_group_that_takes_too_long_is_the_only_error(self) -> None:
        clock, store = Clock(), SeeingStore(30)

        def answer(ticket: int, jobs: Sequence[Job]) -> Completion | None:
            clock.seconds += 0.1
            numbers = [job.key["n"] for job in jobs]
            if 10 not in numbers:
                return all_made(ticket, jobs)
            store.made_in_secret |= set(numbers[: numbers.index(10)])
            return None

        policy, recipe = Policy(suppress_errors=True), Recipe("Square", timeout_seconds=3)
        summary = timed(store, Groups(1, answer), policy, clock, recipe).run(going_on)
        assert (summary.success_count, [job.key["n"] for job, _ in summary.errors]) == (29, [10])

    def test_the_store_is_asked_at_most_once_per_round_which_jobs_run(self) -> None:
        class Counting(SeeingStore):
            asked = 0

            def begun(self, jobs: Sequence[Job]) -> list[Job]:
                self.asked += 1
                return super().begun(jobs)

        def answer(ticket: int, jobs: Sequence[Job]) -> Completion | None:
            return all_made(ticket, jobs) if len(jobs) == 1 else None

        clock, store = Clock(), Counting(30)
        driver = timed(store, Groups(2, answer), Policy(), clock, Recipe("Square", timeout_seconds=30))
        asked = []
        for clock.seconds in range(0, 25, 5):
            driver.step()
            asked.append(store.asked)
        assert asked == [0, 1, 2, 3, 4]

    def test_an_error_in_a_group_is_one_keys_own(self) -> None:
        def answer(ticket: int, jobs: Sequence[Job]) -> Completion:
            numbers = [job.key["n"] for job in jobs]
            bad = next((i for i, n in enumerate(numbers) if n % 10 == 9), len(jobs))
            outcomes = [Outcome(job, Ending.MADE) for job in jobs[:bad]]
            outcomes += [
                Outcome(job, Ending.FAILED, Failure("ValueError: no")) for job in jobs[bad : bad + 1]
            ]
            outcomes += [Outcome(job, Ending.NOT_STARTED) for job in jobs[bad + 1 :]]
            return Completion(ticket, Report(tuple(outcomes), seconds=0.001 * len(jobs)))

        summary = timed(SeeingStore(100), Groups(2, answer), Policy(suppress_errors=True), Clock()).run(
            going_on
        )
        assert summary.success_count == 90
        assert sorted(job.key["n"] for job, _ in summary.errors) == list(range(9, 100, 10))
