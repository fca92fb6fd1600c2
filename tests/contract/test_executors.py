"""One suite for every executor."""

from __future__ import annotations

import concurrent.futures as cf
import multiprocessing
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import loky
import psutil
import pytest

from djdist._executor import Executor
from djdist._job import BreakageKind, Completion, Job, Policy, Recipe, Report, RunInfo, Status, Summary
from djdist._needs import ONE_CPU, Needs
from djdist._task_pool import TaskPool
from djdist.driver.room import Room
from djdist.errors import ClusterError, OptionError
from djdist.executors.futures import FuturesExecutor
from djdist.executors.local import LocalExecutor
from djdist.job_stores.memory import MemoryStore
from djdist.shipping.pickled_task import _Kept
from lab import work
from lab.scripted import ScriptedPool, driver_of
from lab.watching import wait_until

SECONDS = 60


@contextmanager
def started(executor: Executor) -> Iterator[TaskPool]:
    """A pool that does `work.work`; what its executor started is gone afterwards."""
    with executor, opened(executor) as pool:
        yield pool


def opened(executor: Executor) -> TaskPool:
    pool = executor.open({"Table": work.work})
    executors_needs[pool] = executor.needs
    return pool


executors_needs: WeakKeyDictionary[TaskPool, Needs] = WeakKeyDictionary()
"""What jobs need in pools, where a test says nothing else: what their executors say."""


def local(processes: int) -> Callable[[Any], Any]:
    def connected(request: pytest.FixtureRequest) -> Any:
        return LocalExecutor(processes)

    return connected


@contextmanager
def on_threads(request: pytest.FixtureRequest) -> Iterator[Executor]:
    with cf.ThreadPoolExecutor(1) as pool, FuturesExecutor(pool) as executor:
        yield executor


@contextmanager
def on_process_pool(request: pytest.FixtureRequest) -> Iterator[Executor]:
    spawn = multiprocessing.get_context("spawn")
    with cf.ProcessPoolExecutor(2, mp_context=spawn) as pool, FuturesExecutor(pool) as executor:
        yield executor


@contextmanager
def on_loky(request: pytest.FixtureRequest) -> Iterator[Executor]:
    with loky.ProcessPoolExecutor(2) as pool, FuturesExecutor(pool) as executor:
        yield executor


@contextmanager
def on_ray(request: pytest.FixtureRequest) -> Iterator[Executor]:
    request.getfixturevalue("ray_cluster")
    from djdist.executors.ray import RayExecutor

    with RayExecutor() as executor:
        yield executor


@contextmanager
def on_gpus_of_ray(request: pytest.FixtureRequest) -> Iterator[Executor]:
    request.getfixturevalue("ray_cluster")
    from djdist.executors.ray import RayExecutor

    with RayExecutor(num_cpus=0, num_gpus=1) as executor:
        yield executor


@contextmanager
def on_dask(request: pytest.FixtureRequest) -> Iterator[Executor]:
    client = request.getfixturevalue("dask_client")
    from djdist.executors.dask import DaskExecutor

    with DaskExecutor(client) as executor:
        yield executor


@dataclass(frozen=True)
class Case:
    """An executor and what can be asked of it."""

    open: Callable[[pytest.FixtureRequest], Any]
    elsewhere: bool = True
    """Tasks run beside the caller."""
    processes: bool = True
    """Tasks run in processes of their own."""
    survives: bool = True
    """It goes on when one of those processes is killed."""
    once: bool = True
    """It doesn't run by itself a task again whose process was killed."""
    cluster: bool = False
    """The driver belongs there, too."""
    keeps: bool = False
    """A pool keeps its slots for itself until it is closed."""
    marks: Sequence[pytest.MarkDecorator] = ()


CASES = {
    "in process": Case(local(1), elsewhere=False, processes=False),
    "local processes": Case(local(2)),
    "threads": Case(on_threads, processes=False),
    "process pool": Case(on_process_pool, survives=False),
    "loky": Case(on_loky, survives=False, marks=[pytest.mark.long]),
    "ray": Case(on_ray, cluster=True, marks=[pytest.mark.on("ray")]),
    "GPUs of ray": Case(
        on_gpus_of_ray, cluster=True, keeps=True, marks=[pytest.mark.on("ray"), pytest.mark.long]
    ),
    "dask": Case(on_dask, once=False, cluster=True, marks=[pytest.mark.on("dask")]),
}


def cases(**wanted: bool) -> Any:
    """Let a test run on the executors that are as it needs them."""
    names = [n for n, case in CASES.items() if all(getattr(case, k) == v for k, v in wanted.items())]
    chosen = [pytest.param(CASES[n], id=n, marks=CASES[n].marks) for n in names]
    return pytest.mark.parametrize("case", chosen, scope="module")


@pytest.fixture(scope="module")
def executor(case: Case, request: pytest.FixtureRequest, modules_folder: Path) -> Iterator[Executor]:
    """An executor that is shared by the tests that leave it whole."""
    with case.open(request) as executor:
        yield executor


@pytest.fixture
def pool(executor: Executor, tmp_path: Path) -> Iterator[TaskPool]:
    with opened(executor) as pool:
        yield pool
        work.open_gate(tmp_path)
        while pool.wait(1):
            """What a test has left ends before the next one."""


@pytest.fixture
def fresh(case: Case, request: pytest.FixtureRequest, modules_folder: Path) -> Iterator[Executor]:
    """An executor for one test that breaks something."""
    with case.open(request) as executor:
        yield executor


@pytest.fixture
def fragile(fresh: Executor) -> Iterator[TaskPool]:
    """A pool for one test that breaks something."""
    with opened(fresh) as pool:
        yield pool


def submit(pool: TaskPool, *jobs: Job, needs: Needs | None = None) -> int:
    return pool.submit("Table", jobs, needs or executors_needs[pool])


def free(executor: Executor) -> int:
    """Return how many tasks a driver submits at first to a new pool."""
    return Room(opened(executor)).free(executor.needs)


def wait_for(pool: TaskPool, count: int) -> list[Completion]:
    """Wait for exactly so many tasks to end."""
    completions: list[Completion] = []
    deadline = time.monotonic() + SECONDS
    while len(completions) < count and time.monotonic() < deadline:
        completions += pool.wait(1)
    assert len(completions) == count
    return completions


def wait_for_beginning(pool: TaskPool, folder: Path) -> None:
    """Wait, as a driver does, until a task has begun."""
    wait_until(lambda: pool.wait(0.01) or work.begun(folder))


def run_all(pool: TaskPool, jobs: Sequence[Job]) -> dict[int, tuple[Job, Completion]]:
    """Run the jobs one a task, never more at once than there are slots; give them by ticket."""
    left, tickets, ended = list(jobs), dict[int, Job](), dict[int, tuple[Job, Completion]]()
    room, deadline = Room(pool), time.monotonic() + SECONDS
    while len(ended) < len(jobs) and time.monotonic() < deadline:
        while left and room.free(executors_needs[pool]) > 0:
            job = left.pop(0)
            tickets[ticket := submit(pool, job)] = job
            room.take(ticket, executors_needs[pool], "Table")
        for completion in pool.wait(1):
            assert completion.ticket not in ended
            room.leave(completion.ticket)
            ended[completion.ticket] = tickets[completion.ticket], completion
    assert len(ended) == len(jobs)
    return ended


@cases()
class TestEveryExecutor:
    def test_each_task_ends_once_under_its_own_ticket(self, pool: TaskPool, tmp_path: Path) -> None:
        jobs = [work.job(tmp_path, n) for n in range(12)]
        for job, completion in run_all(pool, jobs).values():
            assert completion.report is not None
            assert [outcome.job for outcome in completion.report.outcomes] == [job]
            assert completion.error is None
        assert work.begun(tmp_path) == list(range(12))

    def test_a_task_may_hold_several_jobs(self, pool: TaskPool, tmp_path: Path) -> None:
        jobs = tuple(work.job(tmp_path, n) for n in range(3))
        ticket = submit(pool, *jobs)
        (completion,) = wait_for(pool, 1)
        assert completion.ticket == ticket
        assert completion.report is not None
        assert tuple(outcome.job for outcome in completion.report.outcomes) == jobs

    def test_a_trial_holds_none(self, pool: TaskPool) -> None:
        ticket = submit(pool)
        assert wait_for(pool, 1) == [Completion(ticket, Report())]

    def test_it_has_nodes_which_stay_the_same_object_while_nothing_changes(self, pool: TaskPool) -> None:
        nodes = pool.nodes()
        assert nodes
        assert pool.nodes() is nodes

    def test_waiting_for_nothing_gives_nothing(self, pool: TaskPool) -> None:
        assert pool.wait(0.01) == []

    def test_a_work_that_raises_is_a_breakage(self, case: Case, fragile: TaskPool, tmp_path: Path) -> None:
        submit(fragile, work.job(tmp_path, 0, "raise"))
        (completion,) = wait_for(fragile, 1)
        assert completion.report is None
        assert completion.error is not None
        assert completion.error.kind is BreakageKind.OTHER
        assert "work should not raise" in completion.error.message
        submit(fragile, work.job(tmp_path, 1))
        assert wait_for(fragile, 1)[0].report is not None


@cases(elsewhere=True)
class TestElsewhere:
    def test_waiting_ends_with_the_timeout(self, pool: TaskPool, tmp_path: Path) -> None:
        ticket = submit(pool, work.job(tmp_path, 0, "wait"))
        assert pool.wait(0.05) == []
        work.open_gate(tmp_path)
        assert [completion.ticket for completion in wait_for(pool, 1)] == [ticket]

    def test_a_task_that_ends_does_not_wait_for_the_others(self, pool: TaskPool, tmp_path: Path) -> None:
        if Room(pool).free(executors_needs[pool]) < 3:  # one slot and one in reserve
            quick = submit(pool, work.job(tmp_path, 1))
            slow = submit(pool, work.job(tmp_path, 0, "wait"))
        else:
            slow = submit(pool, work.job(tmp_path, 0, "wait"))
            quick = submit(pool, work.job(tmp_path, 1))
        assert [completion.ticket for completion in wait_for(pool, 1)] == [quick]
        work.open_gate(tmp_path)
        assert [completion.ticket for completion in wait_for(pool, 1)] == [slow]

    def test_a_cancelled_task_never_runs_and_others_do(self, pool: TaskPool, tmp_path: Path) -> None:
        tickets = {submit(pool, work.job(tmp_path, n, "wait")): n for n in range(6)}
        wait_for_beginning(pool, tmp_path)
        cancelled = {ticket for ticket in reversed(tickets) if pool.cancel(ticket)}
        work.open_gate(tmp_path)
        ended = wait_for(pool, 6 - len(cancelled))
        assert {completion.ticket for completion in ended} == tickets.keys() - cancelled
        assert work.begun(tmp_path) == sorted(tickets[completion.ticket] for completion in ended)

    @pytest.mark.long_on("dask")
    def test_closing_forgets_what_no_worker_has_got(self, fresh: Executor, tmp_path: Path) -> None:
        with opened(fresh) as pool:
            for n in range(20):
                submit(pool, work.job(tmp_path, n, "linger"))
            wait_for_beginning(pool, tmp_path)
        with opened(fresh) as pool:
            run_all(pool, [work.job(tmp_path, n) for n in range(100, 104)])
        assert not {*range(10, 20)} & {*work.begun(tmp_path)}


@cases()
class TestTwoRuns:
    """Two runs on one executor at the same time."""

    def test_their_pools_have_tickets_and_tasks_of_their_own(
        self, executor: Executor, pool: TaskPool, tmp_path: Path
    ) -> None:
        with opened(executor) as other:
            jobs = {each: work.job(tmp_path, n) for n, each in enumerate((pool, other))}
            tickets = {each: submit(each, job) for each, job in jobs.items()}
            assert len({*tickets.values()}) == 1
            for each in (other, pool):
                (completion,) = wait_for(each, 1)
                assert completion.ticket == tickets[each]
                assert completion.report is not None
                assert [outcome.job for outcome in completion.report.outcomes] == [jobs[each]]

    def test_from_two_threads_both_end(self, executor: Executor) -> None:
        with cf.ThreadPoolExecutor(2) as threads:
            runs = [threads.submit(executor.drive, work.run_tasks, going_on, work.info(n)) for n in "ab"]
            assert [run.result(SECONDS) for run in runs] == [Summary(20), Summary(20)]

    def test_one_that_fails_or_is_interrupted_leaves_the_other_alone(
        self, executor: Executor, tmp_path: Path
    ) -> None:
        loop = partial(work.run_tasks, work=work.work, jobs=[work.job(tmp_path, 0, "wait")])
        with cf.ThreadPoolExecutor(1) as threads:
            other = threads.submit(executor.drive, loop, going_on, work.info("other"))
            wait_until(lambda: work.begun(tmp_path), "the other's task")
            with pytest.raises(OptionError):
                executor.drive(work.run_refused, going_on, work.info("one"))
            with pytest.raises(KeyboardInterrupt):
                executor.drive(work.run_until_stopped, interrupt, work.info("one"))
            work.open_gate(tmp_path)
            assert other.result(SECONDS) == Summary(1)
        assert work.begun(tmp_path) == [0]


def going_on(status: Status) -> bool:
    return True


def interrupt(status: Status) -> bool:
    raise KeyboardInterrupt


@cases(processes=True)
class TestInProcesses:
    @pytest.mark.long_on("dask")
    def test_what_ends_one_run_leaves_the_tasks_of_another_alone(
        self, fragile: TaskPool, fresh: Executor, tmp_path: Path
    ) -> None:
        submit(fragile, work.job(tmp_path, 0, "wait"))
        with opened(fresh) as other:
            killed = submit(other, work.job(tmp_path, 1, "wait"))
            for pool, number in ((fragile, 0), (other, 1)):  # as drivers do, which look at their pools
                wait_until(lambda: pool.wait(0.01) or number in work.begun(tmp_path), "its task")  # noqa: B023
            other.kill(killed)
            if fresh.can_kill:  # so that no later task meets its end
                (pid,) = {int(file.name.split("-")[2]) for file in tmp_path.glob("1-begun-*")}
                wait_until(lambda: not alive(pid), "its end")
        work.open_gate(tmp_path)
        (completion,) = wait_for(fragile, 1)
        assert completion.report is not None
        assert work.begun(tmp_path) == [0, 1]

    def test_tasks_run_in_other_processes(self, pool: TaskPool, tmp_path: Path) -> None:
        done = run_all(pool, [work.job(tmp_path, n) for n in range(8)]).values()
        outcomes = [outcome for _, ended in done if ended.report for outcome in ended.report.outcomes]
        assert len(outcomes) == 8
        assert os.getpid() not in {outcome.pid for outcome in outcomes}


class TestLargeWork:
    @cases(processes=True)
    def test_it_is_not_sent_with_each_task(self, case: Case, fresh: Executor, tmp_path: Path) -> None:
        loop = partial(work.run_tasks, work=work.large_work(tmp_path), jobs=jobs_of(tmp_path, 24))
        assert fresh.drive(loop, going_on, work.info()) == Summary(24)
        workers = sorted(pids_of(tmp_path))
        assert work.noted(tmp_path, "unpickled") == workers
        beside = 2 * case.cluster + 8 * isinstance(fresh, FuturesExecutor)  # scheduler and driver; a guess
        assert len(work.noted(tmp_path, "sent")) <= len(workers) + beside

    @cases(processes=True, once=True, survives=True)
    def test_a_process_that_comes_later_gets_it(self, case: Case, fresh: Executor, tmp_path: Path) -> None:
        jobs = [*jobs_of(tmp_path, 4), work.job(tmp_path, 4, "die"), *jobs_of(tmp_path, 12)[5:]]
        loop = partial(work.run_tasks, work=work.large_work(tmp_path), jobs=jobs)
        assert fresh.drive(loop, going_on, work.info()) == Summary(11)

    def test_a_process_that_has_lost_it_is_sent_it_again(self, tmp_path: Path) -> None:
        """Loky begins a process anew that has grown, and pools may have a new one for each task."""
        with cf.ThreadPoolExecutor(2) as pool, pytest.MonkeyPatch.context() as patch:
            patch.setattr(_Kept, "find", lambda self, name: None)
            loop = partial(work.run_tasks, work=work.large_work(tmp_path), jobs=jobs_of(tmp_path, 24))
            assert FuturesExecutor(pool).drive(loop, going_on, work.info()) == Summary(24)


@cases(processes=True, once=True)
class TestKilledProcess:
    def test_its_task_is_a_breakage_and_is_not_tried_again(
        self, case: Case, fragile: TaskPool, tmp_path: Path
    ) -> None:
        ticket = submit(fragile, work.job(tmp_path, 0, "die"))
        (completion,) = wait_for(fragile, 1)
        assert completion.ticket == ticket
        assert completion.report is None
        assert completion.error is not None
        assert completion.error.kind is BreakageKind.WORKER_DIED
        assert work.begun(tmp_path) == [0]


@cases(processes=True, survives=True)
class TestAfterAKilledProcess:
    @pytest.fixture(autouse=True)
    def give_up_at_once(self, case: Case, request: pytest.FixtureRequest) -> Iterator[None]:
        """Dask would let four workers die of one task."""
        if case is not CASES["dask"]:
            yield
            return
        client = request.getfixturevalue("dask_client")
        allowed = client.run_on_scheduler(allow_failures, 0)
        yield
        client.run_on_scheduler(allow_failures, allowed)

    @pytest.mark.long_on("ray")
    def test_later_tasks_run(self, fragile: TaskPool, tmp_path: Path) -> None:
        for n in range(2):
            submit(fragile, work.job(tmp_path, n, "die"))
            wait_for(fragile, 1)
            ended = run_all(fragile, [work.job(tmp_path, 10 * (n + 1) + m) for m in range(4)])
            assert all(completion.report for _, completion in ended.values())

    @pytest.mark.long_on("dask")
    def test_a_task_is_ended_with_its_process_and_others_run(
        self, case: Case, fresh: Executor, fragile: TaskPool, tmp_path: Path
    ) -> None:
        assert fresh.can_kill
        ticket = submit(fragile, work.job(tmp_path, 0, "wait"))
        wait_for_beginning(fragile, tmp_path)
        (pid,) = pids_of(tmp_path)
        fragile.kill(ticket)
        (completion,) = wait_for(fragile, 1)
        assert (completion.ticket, completion.report) == (ticket, None)
        wait_until(lambda: not alive(pid))
        assert all(ended.report for _, ended in run_all(fragile, [work.job(tmp_path, 5)]).values())

    @pytest.mark.long_on("dask")
    def test_closing_ends_what_runs(self, case: Case, fragile: TaskPool, tmp_path: Path) -> None:
        submit(fragile, work.job(tmp_path, 0, "wait"))
        wait_for_beginning(fragile, tmp_path)
        (pid,) = pids_of(tmp_path)
        fragile.close()
        wait_until(lambda: not alive(pid))


@cases(processes=True, survives=True, once=True)
class TestPoisonousKey:
    """Dask blames all that a dead worker had in store; only a jobs table tells what had begun."""

    @pytest.mark.long_on("local processes")
    def test_the_key_that_kills_does_not_take_the_others_with_it(
        self, case: Case, fragile: TaskPool, tmp_path: Path
    ) -> None:
        jobs = [work.job(tmp_path, n, "die" if n == 1 else "linger") for n in range(5)]
        driver = driver_of(
            MemoryStore("Table", [job.key for job in jobs]),
            fragile,
            Policy(suppress_errors=True),
            Recipe("Table"),
        )
        summary = driver.run(going_on)
        assert [job.key["n"] for job, _ in summary.errors] == [1]
        assert summary.success_count == 4


def jobs_of(folder: Path, count: int) -> list[Job]:
    return [work.job(folder, n) for n in range(count)]


def allow_failures(count: int, dask_scheduler: Any) -> int:
    """Set how often a task may lose its worker; give what it was before."""
    before: int = dask_scheduler.allowed_failures
    dask_scheduler.allowed_failures = count
    return before


@cases(cluster=True)
class TestCluster:
    def test_the_driver_is_in_another_process(self, executor: Executor) -> None:
        summary = executor.drive(work.run_here, going_on, work.info())
        assert summary.success_count not in (0, os.getpid())

    def test_the_driver_runs_tasks_from_there(self, executor: Executor) -> None:
        seen: list[Status] = []

        def watch(status: Status) -> bool:
            seen.append(status)
            return True

        assert executor.drive(work.run_tasks, watch, work.info()) == Summary(20)
        assert seen[-1].made == 20

    def test_a_run_is_found_while_it_goes_on(self, executor: Executor) -> None:
        found: list[list[RunInfo]] = []

        def look(status: Status) -> bool:
            found.append([info for info, _ in executor.runs() if info.id == "shown"])
            return False

        info = work.info("shown")
        executor.drive(work.run_until_stopped, look, info)
        assert [info] in found
        assert "shown" not in ids_of_runs(executor)

    def test_a_detached_run_is_found_stopped_and_asked_for_its_result(self, executor: Executor) -> None:
        executor.check_detaches()
        executor.taken_result_kept_seconds = 0.1
        executor.detach(work.run_until_stopped, work.info("detached", detached=True))
        (ask,) = [ask for info, ask in executor.runs() if info.id == "detached"]
        wait_until(lambda: ask("status").made > 0, "a step")
        assert ask("result") is None
        ask("stop")
        assert wait_until(lambda: ask("result"), "the end").success_count > 0
        ask("forget")
        wait_until(lambda: "detached" not in ids_of_runs(executor), "its end")

    def test_what_a_detached_run_raises_is_its_result(self, executor: Executor) -> None:
        ask = executor.detach(work.run_refused, work.info("refused", detached=True))
        assert str(wait_until(lambda: ask("result"), "the end")) == "the run refuses"
        ask("forget")


def ids_of_runs(executor: Executor) -> set[str]:
    return {info.id for info, _ in executor.runs()}


@cases(cluster=False)
class TestNoCluster:
    def test_runs_can_not_go_on_without_their_caller(self, executor: Executor) -> None:
        assert executor.runs() == []
        with pytest.raises(OptionError, match="no cluster that lives longer"):
            executor.check_detaches()


@cases()
class TestDriving:
    def test_what_the_run_raises_is_raised_as_it_is(self, executor: Executor) -> None:
        with pytest.raises(OptionError, match=r"^the run refuses$"):
            executor.drive(work.run_refused, going_on, work.info())

    def test_the_run_is_told_to_stop_and_tells_how_far_it_is(self, executor: Executor) -> None:
        seen: list[int] = []

        def watch(status: Status) -> bool:
            seen.append(status.made)
            return status.made < 3

        assert executor.drive(work.run_until_stopped, watch, work.info()).success_count >= 3
        assert max(seen) >= 3

    def test_several_runs_may_follow_each_other(self, executor: Executor) -> None:
        for _ in range(2):
            executor.drive(work.run_here, going_on, work.info())


class Refusing(ScriptedPool):
    """Breaks after its first task."""

    def submit(self, table: str, jobs: Sequence[Job], needs: Needs) -> int:
        if self.running:
            raise ClusterError("the pool is broken")
        return super().submit(table, jobs, needs)


class TestWhatIsGiven:
    def test_a_pool_that_can_not_stop_a_task_says_so(self) -> None:
        with cf.ThreadPoolExecutor(1) as pool, pytest.raises(OptionError, match="timeout_seconds"):
            FuturesExecutor(pool).with_kill()

    def test_threads_stay_usable(self) -> None:
        with cf.ThreadPoolExecutor(1) as pool:
            with started(FuturesExecutor(pool)):
                pass
            assert pool.submit(os.getpid).result(SECONDS) == os.getpid()

    def test_slots_are_the_pools_or_the_given_ones(self) -> None:
        with cf.ThreadPoolExecutor(4) as pool:
            assert free(FuturesExecutor(pool)) == 5
            assert free(FuturesExecutor(pool, slots=8)) == 10
            with pytest.warns(FutureWarning, match="slots="):
                assert free(FuturesExecutor(pool, places=8)) == 10

    @pytest.fixture
    def broken(self, modules_folder: Path, tmp_path: Path) -> Iterator[TaskPool]:
        """On processes that can't be used any more since one of them was killed."""
        spawn = multiprocessing.get_context("spawn")
        with (
            cf.ProcessPoolExecutor(2, mp_context=spawn) as futures,
            started(FuturesExecutor(futures)) as pool,
        ):
            submit(pool, work.job(tmp_path, 0, "die"))
            wait_for(pool, 1)
            yield pool

    def test_a_broken_pool_is_a_clear_error(self, broken: TaskPool) -> None:
        with pytest.raises(ClusterError, match="pool"):
            submit(broken)

    def test_no_job_that_can_not_be_submitted_is_forgotten(self) -> None:
        store = MemoryStore("Table", [{"n": n} for n in range(9)])
        with pytest.raises(ClusterError):
            driver_of(store, Refusing(slots=3), recipe=Recipe("Table")).run(going_on)
        assert store.pending() == 9

    def test_the_ray_cluster_stays(self, ray_cluster: Any) -> None:
        from djdist.executors.ray import RayExecutor

        with started(RayExecutor()):
            pass
        assert ray_cluster.is_initialized()

    def test_the_dask_client_stays(self, dask_client: Any) -> None:
        from djdist.executors.dask import DaskExecutor

        with started(DaskExecutor(dask_client)):
            pass
        assert dask_client.status == "running"
        assert dask_client.submit(len, "abc").result() == 3

    def test_a_dask_address_is_joined_and_left(self, dask_client: Any, tmp_path: Path) -> None:
        from djdist.executors.dask import DaskExecutor

        address = dask_client.scheduler.address
        with started(DaskExecutor(address)) as pool:
            assert len(run_all(pool, [work.job(tmp_path, n) for n in range(3)])) == 3
        assert dask_client.submit(len, "abcd").result() == 4

    def test_dask_resources_are_asked_for(self, dask_client: Any, tmp_path: Path) -> None:
        from djdist.executors.dask import DaskExecutor

        executor = DaskExecutor(dask_client, resources={"no worker has it": 1})
        with started(executor) as pool:
            assert free(executor) == 1  # demand that an autoscaler sees
            submit(pool, work.job(tmp_path, 0), needs=executor.needs)
            assert pool.wait(0.5) == []
        assert work.begun(tmp_path) == []

    def test_dask_shows_a_task_by_its_table_and_the_whole_key(self, dask_client: Any, tmp_path: Path) -> None:
        from djdist.executors.dask import DaskExecutor

        job = Job("Table", {**work.job(tmp_path, 0).key, "area": "V1 (left)"})
        with started(DaskExecutor(dask_client)) as pool:
            run_all(pool, [job])
        assert ("Table", str(job)) in {key[:2] for key in dask_client.run_on_scheduler(keys_of_tasks)}

    def test_ray_counts_the_slots_that_a_key_needs(self, ray_cluster: Any) -> None:
        from djdist.executors.ray import RayExecutor

        assert (free(RayExecutor(num_cpus=2)), free(RayExecutor(num_cpus=0.5))) == (2, 5)
        assert free(RayExecutor(resources={"camera": 1})) == 1  # demand that an autoscaler sees

    @pytest.mark.parametrize(
        ("needs", "slots"),
        [
            ({}, 24),
            ({"num_gpus": 1}, 1),
            ({"num_gpus": 0.1}, 8),
            ({"num_gpus": 1, "num_cpus": 9}, 0),
            ({"num_cpus": 0.1}, 240),
            ({"num_cpus": 3}, 6),
            ({"num_cpus": 0, "memory": 20e9}, 5),
            ({"num_cpus": 0, "resources": {"camera": 0.1}}, 3),
            ({"num_cpus": 0}, 24),
        ],
        ids=str,
    )
    def test_ray_counts_slots_node_by_node(
        self, needs: dict[str, Any], slots: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = pytest.importorskip("djdist.executors.ray.nodes")
        from djdist.executors.ray import RayExecutor

        plain, gone = {"CPU": 4.0, "memory": 30e9}, {"CPU": 4.0, "GPU": 4.0}
        special = {"CPU": 8.0, "GPU": 1.0, "camera": 0.3, "memory": 30e9}
        nodes = [{"Alive": node is not gone, "Resources": node} for node in [*4 * [plain], special, gone]]
        monkeypatch.setattr(found, "_nodes", lambda: nodes)
        pool = ScriptedPool(slots=0)
        monkeypatch.setattr(pool, "nodes", found.Nodes())
        assert Room(pool).slots(RayExecutor(**needs).needs) == slots

    def test_what_keeps_a_gpu_without_work_ends(
        self, ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from djdist.executors.ray import RayExecutor

        monkeypatch.setattr("djdist.executors.ray.workers.IDLE_SECONDS", 0.1)
        with started(RayExecutor(num_gpus=1)) as pool:
            run_all(pool, [work.job(tmp_path, n) for n in range(6)])
            first = pids_of(tmp_path)
            assert len(first) <= 2
            wait_until(lambda: pool.wait(0.1) == [] and not any(map(alive, first)))
            run_all(pool, [work.job(tmp_path, 9)])
            assert pids_of(tmp_path) - first

    def test_the_ray_cluster_is_known_by_its_address(self, ray_cluster: Any) -> None:
        from djdist.executors.ray import RayExecutor

        address = ray_cluster.get_runtime_context().gcs_address
        port = address.rpartition(":")[2]
        for same in ("auto", address, f"{platform.node()}:{port}", f"localhost:{port}"):
            with started(RayExecutor(same)):
                pass
        for other in ("local", "127.0.0.1:9", f"ray://{address}"):
            with pytest.raises(OptionError, match=f"connected to the Ray cluster at {address}, not through"):
                RayExecutor(other).connect()

    def test_what_ray_sends_as_it_connects_is_refused_afterwards(self, ray_cluster: Any) -> None:
        from djdist.executors.ray import RayExecutor

        there = {"working_dir": "s3://bucket/code.zip", "env_vars": {"A": "1"}}
        with started(RayExecutor(runtime_env=there)):
            pass
        with pytest.raises(OptionError, match=r"ray\.init\(…, runtime_env=\{'working_dir': '\.'\}\)"):
            RayExecutor(runtime_env={"working_dir": ".", "env_vars": {"A": "1"}}).connect()


def keys_of_tasks(dask_scheduler: Any) -> list[Any]:
    """Give those of all tasks that the scheduler has seen."""
    return [event[0] for event in dask_scheduler.transition_log]


class TestWhatIsStarted:
    def test_local_processes_end(self, tmp_path: Path, modules_folder: Path) -> None:
        before = children()
        with started(LocalExecutor(2)) as pool:
            run_all(pool, [work.job(tmp_path, n) for n in range(4)])
            submit(pool, work.job(tmp_path, 9, "wait"))
            wait_until(lambda: 9 in work.begun(tmp_path))
            pids = pids_of(tmp_path)
            assert pids <= children() - before
        wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))

    def test_an_unreachable_dask_scheduler_is_a_clear_error(self) -> None:
        import dask

        from djdist.executors.dask import DaskExecutor

        with (
            dask.config.set({"distributed.comm.timeouts.connect": "200ms"}),
            pytest.raises(ClusterError, match=r"tcp://127\.0\.0\.1:9"),
        ):
            DaskExecutor("tcp://127.0.0.1:9").connect()

    @pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "nowhere.invalid:6379"])
    def test_an_unreachable_ray_cluster_is_a_clear_error_and_nothing_else(
        self, address: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        import ray

        from djdist.executors.ray import RayExecutor

        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", lambda *arguments, **options: pytest.fail("it was tried"))
        with pytest.raises(ClusterError, match=f"Can't join the Ray cluster at {address}"):
            RayExecutor(address).connect()
        assert capfd.readouterr() == ("", "")

    def test_a_dask_cluster_of_its_own_ends(
        self, modules_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import distributed

        from djdist.executors.dask import DaskExecutor

        def no_client() -> None:
            raise ValueError("no client")

        monkeypatch.setattr(distributed, "default_client", no_client)
        before = children()
        executor = DaskExecutor()
        with started(executor) as pool:
            run_all(pool, [work.job(tmp_path, n) for n in range(3)])
            assert executor.drive(work.run_tasks, going_on, work.info()) == Summary(20)
            pids = children() - before
        wait_until(lambda: not any(alive(pid) for pid in pids))


def pids_of(folder: Path) -> set[int]:
    """Give the processes in which jobs have begun."""
    return {int(file.name.split("-")[2]) for file in folder.glob("*-begun-*")}


def children() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_signal_in_process_reaches_the_caller(tmp_path: Path) -> None:
    with LocalExecutor(1) as executor, executor.open({"Table": interrupted}) as pool:
        submit(pool, work.job(tmp_path, 0), needs=ONE_CPU)
        with pytest.raises(KeyboardInterrupt):
            pool.wait(1)


def interrupted(jobs: Sequence[Job]) -> Report:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(SECONDS)
    return Report()
