from __future__ import annotations

from collections.abc import Iterable

from djdist._job import GROUP_SECONDS, SHARED_SECONDS, Job, Recipe
from djdist.driver.overdue import CHECKS, LAST_BEGIN_SECONDS, BlockedJobs, Overdue
from djdist.driver.tasks import Task
from lab.scripted import Clock

FIRST, SECOND, THIRD = (Job("Square", {"n": n}) for n in range(3))


def see(task: Task, jobs: Iterable[Job], now: float) -> None:
    task.see({job.identity for job in jobs}, now)


class TestTask:
    def test_time_counts_from_when_a_job_was_first_seen_to_have_begun(self) -> None:
        task = Task(1, (FIRST, SECOND), submitted_at=0)
        for now in (3, 5):
            see(task, [FIRST, SECOND], now)
            assert (task.running, task.running_since) == (FIRST, 3)

    def test_each_job_has_its_own_time(self) -> None:
        task = Task(1, (FIRST, SECOND), submitted_at=0)
        see(task, [FIRST, SECOND], 3)
        see(task, [SECOND], 5)
        assert (task.running, task.running_since) == (SECOND, 5)

    def test_what_has_not_begun_does_not_run(self) -> None:
        task = Task(1, (FIRST,), submitted_at=0)
        see(task, [], 3)
        assert (task.running, task.blocked) == (None, ())

    def test_what_shares_a_transaction_with_the_job_that_runs_is_suspected_and_not_blocked(self) -> None:
        task = Task(1, (FIRST, SECOND, THIRD), submitted_at=0, shares=2)
        see(task, [FIRST, SECOND, THIRD], 3)
        assert (task.running, task.suspects, task.blocked) == (FIRST, (FIRST, SECOND), (THIRD,))
        see(task, [THIRD], 5)
        assert (task.running, task.suspects, task.blocked) == (THIRD, (THIRD,), ())


class TestOverdue:
    def overdue(self, clock: Clock, timeout_seconds: float | None = 10, *, sees: bool = True) -> Overdue:
        recipes = {"Square": Recipe("Square", timeout_seconds=timeout_seconds)}
        return Overdue(recipes, clock, sees_beginnings=sees)

    def test_a_job_that_runs_for_too_long_is_found(self) -> None:
        clock = Clock()
        overdue, tasks = self.overdue(clock), [Task(n, (job,), 0) for n, job in enumerate((FIRST, SECOND))]
        for clock.seconds, begun in ((100, [FIRST]), (105, [FIRST, SECOND])):
            for task in tasks:
                see(task, begun, clock.seconds)
            assert overdue.among(tasks) == []
        clock.seconds = 110
        assert overdue.among(tasks) == tasks[:1]

    def test_those_before_it_in_its_transaction_had_time_too(self) -> None:
        clock, task = Clock(), Task(1, (FIRST, SECOND), 0, shares=2)
        overdue = self.overdue(clock)
        see(task, [FIRST, SECOND], 0)
        clock.seconds = 10 + SHARED_SECONDS / 2
        assert overdue.among([task]) == []
        clock.seconds = 10 + SHARED_SECONDS
        assert overdue.among([task]) == [task]

    def test_it_looks_ten_times_within_the_timeout(self) -> None:
        clock, task = Clock(), Task(1, (FIRST,), 0)
        overdue = self.overdue(clock)
        assert overdue.suspects([task]) == []
        clock.seconds = 10 / CHECKS
        assert overdue.suspects([task]) == [task]
        assert overdue.suspects([task]) == []

    def test_without_a_timeout_nothing_is_overdue_and_it_never_looks(self) -> None:
        clock, task = Clock(), Task(1, (FIRST,), 0)
        overdue = self.overdue(clock, None, sees=False)
        clock.seconds = 1e9
        assert overdue.suspects([task]) == []
        assert not overdue.explains(task)

    def test_a_death_is_explained_by_the_time_since_the_beginning_where_that_is_seen(self) -> None:
        clock = Clock()
        for sees_beginnings, explained in ((True, False), (False, True)):
            clock.seconds = 0
            overdue, task = self.overdue(clock, sees=sees_beginnings), Task(1, (FIRST,), 0)
            see(task, [FIRST], 9)
            clock.seconds = 12
            assert overdue.explains(task) is explained
            clock.seconds = 19
            assert overdue.explains(task)


class TestBlockedJobs:
    def test_what_is_behind_a_long_key_is_found_when_its_worker_begins_no_more(self) -> None:
        clock, task = Clock(), Task(1, (FIRST, SECOND, THIRD), 0)
        blocked = BlockedJobs(clock)
        found: list[tuple[float, tuple[Job, ...]]] = []
        for clock.seconds in range(20):
            if suspects := blocked.suspects([task]):
                see(task, [SECOND, THIRD], clock.seconds)
                found += [(clock.seconds, stuck.blocked) for stuck in blocked.among(suspects)]
        assert all(jobs == (THIRD,) for _, jobs in found)
        assert found[0][0] >= LAST_BEGIN_SECONDS

    def test_it_suspects_groups_that_stay(self) -> None:
        clock = Clock()
        blocked = BlockedJobs(clock)
        clock.seconds = GROUP_SECONDS
        old, alone, new = Task(1, (FIRST, SECOND), 0), Task(2, (FIRST,), 0), Task(3, (FIRST, SECOND), 4)
        assert blocked.suspects([old, alone, new]) == [old]
        assert blocked.suspects([old, alone, new]) == []
