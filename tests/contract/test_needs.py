"""What keys need, on the pools that can tell: this machine, Ray and Dask."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from djdist._executor import Executor
from djdist._job import BreakageKind, Completion, Ending, Job, Outcome, Policy, Recipe, Report
from djdist._job_store import JobStore
from djdist._needs import Needs
from djdist._task_pool import TaskPool
from djdist.driver import Driver, RunContext
from djdist.errors import OptionError
from djdist.executors.futures import FuturesExecutor
from djdist.executors.local import LocalExecutor, machine
from djdist.job_stores.memory import MemoryStore
from djdist.job_stores.pipeline import PipelineStore
from lab.watching import wait_until

GPU = Needs(gpus=1)
HALF = Needs(gpus=0.5)


def note(jobs: Sequence[Job]) -> Report:
    """Leave a file that says where a key was begun; wait at its gate, for another table's key, or die."""
    for job in jobs:
        folder = Path(job.key["folder"])
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "-").replace(",", "+")
        (folder / f"{job.table}_{job.key['n']}_{os.getpid()}_{visible}_{time.monotonic_ns()}").touch()
        while job.key["gate"] == "meet" and not list(folder.glob("B_*" if job.table == "A" else "A_*")):
            time.sleep(0.01)
        if job.key["gate"] in ("meet", "linger"):
            time.sleep(0.1)
            continue
        if job.key["gate"] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if job.key["gate"].startswith("/"):
            Path(job.key["gate"], "cgroup.procs").write_text(str(os.getpid()))
        grown = list[bytes]()
        while job.key["gate"] == "grow" or job.key["gate"].startswith("/"):
            grown.append(bytes(50_000_000) + b"x")
            time.sleep(0.1)
        while job.key["gate"] and not (folder / f"gate {job.key['gate']}").exists():
            time.sleep(0.01)
    return Report(tuple(Outcome(job, Ending.MADE, host=platform.node(), pid=os.getpid()) for job in jobs))


def key(folder: Path, table: str, n: int, gate: str = "") -> Job:
    return Job(table, {"n": n, "folder": str(folder), "gate": gate})


def submit(pool: TaskPool, needs: Needs, *jobs: Job) -> list[int]:
    return [pool.submit(job.table, (job,), needs) for job in jobs]


def begun(folder: Path) -> list[tuple[str, int, int, str]]:
    """Give table, number, process and GPUs of what has begun, in its order."""
    parts = sorted((file.name.split("_") for file in folder.glob("*_*")), key=lambda part: int(part[4]))
    return [(table, int(n), int(pid), visible) for table, n, pid, visible, _ in parts]


def numbers(folder: Path) -> set[int]:
    return {n for _, n, *_ in begun(folder)}


def ended(pool: TaskPool, count: int) -> list[Completion]:
    completions: list[Completion] = []
    deadline = time.monotonic() + 60
    while len(completions) < count and time.monotonic() < deadline:
        completions += pool.wait(0.2)
    assert len(completions) == count
    return completions


def waiting_for(pool: TaskPool, folder: Path, wanted: set[int]) -> None:
    wait_until(lambda: pool.wait(0.05) == [] and numbers(folder) >= wanted, f"{wanted} to begin")
    pool.wait(0.3)
    assert numbers(folder) == wanted


@contextmanager
def opened(executor: Executor) -> Iterator[TaskPool]:
    with executor, executor.open(dict.fromkeys("ABC", note)) as pool:
        yield pool


def run(pool: TaskPool, folder: Path, *tables: tuple[str, Needs, int], do: str = "linger") -> list[str]:
    """Let a driver make so many keys of tables, those upstream first; return whose keys began."""
    stores: dict[str, JobStore] = {}
    for first, (table, _, count) in enumerate(tables):
        jobs = [key(folder, table, 100 * first + n, do) for n in range(count)]
        stores[table] = MemoryStore(table, [job.key for job in jobs])
    recipes = {table: Recipe(table, needs=needs) for table, needs, _ in tables}
    policy = Policy(suppress_errors=True, task_seconds=0.01)
    summary = Driver(RunContext(PipelineStore(stores), pool, recipes, policy, "run")).run(lambda status: True)
    assert summary.success_count == sum(count for *_, count in tables)
    return [table for table, *_ in begun(folder)]


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group of this machine whose processes have 400 MB together."""
    mounted, limit = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
    if not mounted.exists():
        mounted, limit = mounted.parent, "memory.max"
    group = mounted / f"djdist-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text("400000000")
    except OSError as error:
        pytest.skip(f"no control group of its own: {error}")
    yield group
    wait_until(lambda: not (group / "cgroup.procs").read_text(), "its processes to end")
    group.rmdir()


class TestLocal:
    def test_each_gpu_has_its_process_which_keeps_its_model(
        self, modules_folder: Path, tmp_path: Path
    ) -> None:
        with opened(LocalExecutor(3, gpus=2)) as pool:
            submit(pool, GPU, *(key(tmp_path, "A", n, "a") for n in range(3)))
            waiting_for(pool, tmp_path, {0, 1})
            (tmp_path / "gate a").touch()
            ended(pool, 3)
            submit(pool, GPU, *(key(tmp_path, "A", n) for n in range(3, 8)))
            ended(pool, 5)
        assert {visible for *_, visible in begun(tmp_path)} == {"0", "1"}
        assert len({(pid, visible) for *_, pid, visible in begun(tmp_path)}) == 2

    def test_parts_of_a_gpu_share_one(self, modules_folder: Path, tmp_path: Path) -> None:
        with opened(LocalExecutor(6, gpus=["3", "5"])) as pool:
            submit(pool, HALF, *(key(tmp_path, "A", n, "a") for n in range(5)))
            waiting_for(pool, tmp_path, {0, 1, 2, 3})
            (tmp_path / "gate a").touch()
            ended(pool, 5)
        processes = {pid: visible for _, _, pid, visible in begun(tmp_path)}
        assert Counter(processes.values()) == {"3": 2, "5": 2}

    def test_several_gpus_and_none(self, modules_folder: Path, tmp_path: Path) -> None:
        with opened(LocalExecutor(3, gpus=2)) as pool:
            submit(pool, Needs(gpus=2), *(key(tmp_path, "A", n, "a") for n in range(2)))
            submit(pool, Needs(), key(tmp_path, "B", 2, "a"))
            waiting_for(pool, tmp_path, {0, 2})
            (tmp_path / "gate a").touch()
            ended(pool, 3)
        seen = {(table, visible) for table, *_, visible in begun(tmp_path)}
        assert ("A", "0+1") in seen
        assert ("B", os.environ.get("CUDA_VISIBLE_DEVICES", "-")) in seen

    def test_what_another_table_has_loaded_into_a_gpu_ends(
        self, modules_folder: Path, tmp_path: Path
    ) -> None:
        with opened(LocalExecutor(2, gpus=1)) as pool:
            for n, table in enumerate("AAB"):
                submit(pool, GPU, key(tmp_path, table, n))
                ended(pool, 1)
            (_, _, first, _), (_, _, again, _), (_, _, other, _) = begun(tmp_path)
            assert first == again != other
            wait_until(lambda: not Path(f"/proc/{first}").exists(), "the end of the first table's process")

    @pytest.mark.long
    def test_a_loaded_model_serves_first_but_not_for_ever(
        self, modules_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for switch_seconds, order in ((60.0, "AAAB"), (0.0, "AABA")):
            monkeypatch.setattr("djdist.executors.local.pools.SWITCH_SECONDS", switch_seconds)
            folder = tmp_path / order
            folder.mkdir()
            with opened(LocalExecutor(2, gpus=1)) as pool:
                submit(pool, GPU, *(key(folder, table, n, "a") for n, table in enumerate("AABA")))
                waiting_for(pool, folder, {0})
                (folder / "gate a").touch()
                ended(pool, 4)
            assert "".join(table for table, *_ in begun(folder)) == order

    def test_no_more_run_at_once_than_their_needs_fit(self, modules_folder: Path, tmp_path: Path) -> None:
        with opened(LocalExecutor(3, gpus=0)) as pool:
            (node,) = pool.nodes()
            assert pool.nodes() is pool.nodes()
            large = Needs(memory=int(node.amounts["memory"] * 0.6))
            submit(pool, large, *(key(tmp_path, "A", n, "a") for n in range(2)))
            submit(pool, Needs(cpus=node.amounts["cpus"]), key(tmp_path, "B", 2, "a"))
            submit(pool, Needs(cpus=0.5), *(key(tmp_path, "C", n, "a") for n in range(3, 6)))
            waiting_for(pool, tmp_path, {0, 3, 4})
            (tmp_path / "gate a").touch()
            ended(pool, 6)

    def test_what_waits_can_be_cancelled(self, modules_folder: Path, tmp_path: Path) -> None:
        with opened(LocalExecutor(2, gpus=1)) as pool:
            tickets = submit(pool, GPU, *(key(tmp_path, "A", n, "a") for n in range(2)))
            waiting_for(pool, tmp_path, {0})
            assert [pool.cancel(ticket) for ticket in tickets] == [False, True]
            (tmp_path / "gate a").touch()
            ended(pool, 1)

    @pytest.mark.long
    def test_in_a_run_neither_plain_nor_gpu_keys_wait_behind_the_others(
        self, modules_folder: Path, tmp_path: Path
    ) -> None:
        with opened(LocalExecutor(3, gpus=1)) as pool:
            order = run(pool, tmp_path, ("A", GPU, 8), ("B", Needs(), 24), do="meet")
        assert Counter(order) == {"A": 8, "B": 24}
        assert len({pid for table, _, pid, _ in begun(tmp_path) if table == "A"}) == 1

    @pytest.mark.long
    def test_in_a_run_a_large_key_is_not_starved_by_small_ones(
        self, modules_folder: Path, tmp_path: Path
    ) -> None:
        with opened(LocalExecutor(2)) as pool:
            cpus = pool.nodes()[0].amounts["cpus"]
            order = run(pool, tmp_path, ("A", Needs(cpus=cpus), 2), ("B", Needs(cpus=cpus / 2), 40))
        assert order.index("A") < 30

    def test_what_the_kernel_kills_for_want_of_memory_is_told(
        self, modules_folder: Path, tmp_path: Path, small_group: Path
    ) -> None:
        causes = {"die": BreakageKind.WORKER_DIED, str(small_group): BreakageKind.OUT_OF_MEMORY}
        with opened(LocalExecutor(2, gpus=1)) as pool:
            for gate, kind in causes.items():
                submit(pool, GPU, key(tmp_path, "A", 0, gate))
                (completion,) = ended(pool, 1)
                assert completion.error is not None
                assert completion.error.kind is kind

    @pytest.mark.parametrize("processes", [1, 2])
    def test_what_this_machine_lacks_is_refused(self, processes: int) -> None:
        executor = LocalExecutor(processes, gpus=1)
        executor.check_needs("Sorting", Needs(gpus=1, memory="1MB"))
        with pytest.raises(OptionError, match=r"A key of Sorting needs 1 CPU, 2 GPUs, which this machine"):
            executor.check_needs("Sorting", Needs(gpus=2))
        with pytest.raises(OptionError, match=r"A key of Sorting needs 1 CPU, 1 camera"):
            executor.check_needs("Sorting", Needs(custom={"camera": 1}))
        with pytest.raises(OptionError, match=r"LocalExecutor\(gpus=…\)"):
            LocalExecutor(processes, gpus=0).check_needs("Sorting", GPU)

    def test_pools_of_others_take_default_needs_only(self) -> None:
        import concurrent.futures as cf

        with cf.ThreadPoolExecutor(1) as threads:
            FuturesExecutor(threads).check_needs("Sorting", Needs())
            with pytest.raises(OptionError, match="A key of Sorting needs 2 CPUs, and FuturesExecutor"):
                FuturesExecutor(threads).check_needs("Sorting", Needs(cpus=2))


@pytest.fixture
def on_ray(ray_cluster: Any) -> Iterator[TaskPool]:
    """A pool on a Ray cluster of two CPUs and two GPUs."""
    from djdist.executors.ray import RayExecutor

    with opened(RayExecutor()) as pool:
        yield pool


class TestRay:
    def test_nodes_are_what_lives_and_the_same_while_it_does(self, on_ray: TaskPool) -> None:
        (node,) = on_ray.nodes()
        assert node.amounts.keys() == {"cpus", "gpus", "memory"}
        assert (node.amounts["cpus"], node.amounts["gpus"], node.slots) == (2, 2, None)
        assert on_ray.nodes() is on_ray.nodes()

    def test_neither_cpu_nor_gpu_keys_wait_behind_the_others(self, on_ray: TaskPool, tmp_path: Path) -> None:
        submit(on_ray, Needs(), *(key(tmp_path, "A", n, "a") for n in range(3)))
        submit(on_ray, Needs(cpus=0, gpus=1), *(key(tmp_path, "B", n, "b") for n in range(10, 13)))
        wait_until(lambda: on_ray.wait(0.1) == [] and len(numbers(tmp_path)) == 4, "two of each")
        assert Counter(table for table, *_ in begun(tmp_path)) == {"A": 2, "B": 2}
        (tmp_path / "gate b").touch()
        ended(on_ray, 3)
        (tmp_path / "gate a").touch()
        ended(on_ray, 3)

    @pytest.mark.parametrize(("gpus", "slots"), [(1, 2), pytest.param(0.5, 4, marks=pytest.mark.long)])
    def test_each_slot_keeps_its_process_and_model(
        self, on_ray: TaskPool, tmp_path: Path, gpus: float, slots: int
    ) -> None:
        needs = Needs(cpus=0, gpus=gpus)
        submit(on_ray, needs, *(key(tmp_path, "A", n, "a") for n in range(slots)))
        waiting_for(on_ray, tmp_path, {*range(slots)})
        (tmp_path / "gate a").touch()
        ended(on_ray, slots)
        submit(on_ray, needs, *(key(tmp_path, "A", n) for n in range(10, 20)))
        ended(on_ray, 10)
        assert len({pid for *_, pid, _ in begun(tmp_path)}) == slots

    def test_in_a_run_neither_cpu_nor_gpu_keys_wait_behind_the_others(
        self, on_ray: TaskPool, tmp_path: Path
    ) -> None:
        order = run(on_ray, tmp_path, ("A", Needs(cpus=0, gpus=1), 8), ("B", Needs(), 24), do="meet")
        assert Counter(order) == {"A": 8, "B": 24}
        assert len({pid for table, _, pid, _ in begun(tmp_path) if table == "A"}) <= 2

    def test_what_another_table_has_loaded_into_a_gpu_ends(self, on_ray: TaskPool, tmp_path: Path) -> None:
        needs = Needs(cpus=0, gpus=2)
        for n, table in enumerate("AAB"):
            submit(on_ray, needs, key(tmp_path, table, n))
            ended(on_ray, 1)
        (_, _, first, _), (_, _, again, _), (_, _, other, _) = begun(tmp_path)
        assert first == again != other
        wait_until(lambda: not Path(f"/proc/{first}").exists(), "the end of the first table's process")

    def test_what_no_node_has_waits_alone(self, on_ray: TaskPool, tmp_path: Path) -> None:
        submit(on_ray, Needs(custom={"camera": 1}), key(tmp_path, "A", 0))
        submit(on_ray, Needs(gpus=9), key(tmp_path, "A", 1))
        submit(on_ray, Needs(), key(tmp_path, "B", 2))
        submit(on_ray, GPU, key(tmp_path, "C", 3))
        ended(on_ray, 2)
        assert numbers(tmp_path) == {2, 3}


OUT_OF_MEMORY_ON_RAY = """
import sys, tempfile
from pathlib import Path
import ray
from contract.test_needs import GPU, ended, key, opened, submit
from djdist._needs import Needs
from djdist.executors.ray import RayExecutor

with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
    few = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 100_000_000}
    ray.init("local", include_dashboard=False, _temp_dir=folder, **few)
    with opened(RayExecutor()) as pool:
        for needs in (Needs(), GPU):
            submit(pool, needs, key(Path(sys.argv[1]), "A", 0, "grow"))
            (completion,) = ended(pool, 1)
            print(completion.error.kind.name, len(completion.error.message.splitlines()), file=sys.stderr)
    ray.shutdown()
"""


@pytest.mark.long
def test_what_rays_memory_monitor_kills_is_told(modules_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    threshold = f"{machine.memory_share() + 0.05:.3f}"
    environment = {"RAY_memory_usage_threshold": threshold, "RAY_memory_monitor_refresh_ms": "100"}
    command = [sys.executable, "-c", OUT_OF_MEMORY_ON_RAY, str(tmp_path)]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=200
    )
    told = [line for line in done.stderr.splitlines() if line.startswith("OUT_OF_MEMORY")]
    assert told == ["OUT_OF_MEMORY 1"] * 2, done.stderr[-2000:]


@pytest.fixture(scope="class")
def mixed_workers(modules_folder: Path) -> Iterator[Any]:
    """A Dask cluster of two plain workers, one of them large, and one with a GPU that two keys can share."""
    distributed = pytest.importorskip("distributed")
    spec = {
        "small": {"nthreads": 1, "memory_limit": "1GiB"},
        "large": {"nthreads": 2, "memory_limit": "3GiB"},
        "gpu": {"nthreads": 1, "memory_limit": "1GiB", "resources": {"GPU": 1}},
    }
    workers = {name: {"cls": distributed.Nanny, "options": options} for name, options in spec.items()}
    scheduler = {"cls": distributed.Scheduler, "options": {"dashboard_address": ":0", "port": 0}}
    with (
        distributed.SpecCluster(workers=workers, scheduler=scheduler) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        client.wait_for_workers(3)
        yield client


@pytest.fixture
def on_dask(mixed_workers: Any) -> Iterator[TaskPool]:
    from djdist.executors.dask import DaskExecutor

    with mixed_workers.as_current(), opened(DaskExecutor(mixed_workers)) as pool:
        yield pool


class TestDask:
    def test_each_worker_is_a_node_of_one_slot(self, on_dask: TaskPool) -> None:
        nodes = on_dask.nodes()
        assert on_dask.nodes() is nodes
        assert sorted((n.amounts["cpus"], n.amounts.get("gpus", 0), n.slots) for n in nodes) == [
            (1, 0, 1),
            (1, 1, 1),
            (2, 0, 1),
        ]

    def test_neither_plain_nor_gpu_keys_wait_behind_the_others(
        self, on_dask: TaskPool, tmp_path: Path
    ) -> None:
        submit(on_dask, GPU, key(tmp_path, "A", 0, "a"))
        submit(on_dask, Needs(), *(key(tmp_path, "B", n, "b") for n in range(1, 4)))
        submit(on_dask, GPU, key(tmp_path, "A", 4, "a"))
        waiting_for(on_dask, tmp_path, {0, 1, 2})
        (tmp_path / "gate b").touch()
        ended(on_dask, 3)
        (tmp_path / "gate a").touch()
        ended(on_dask, 2)
        assert len({pid for table, _, pid, _ in begun(tmp_path) if table == "A"}) == 1

    @pytest.mark.long
    def test_what_another_table_has_loaded_into_a_gpu_ends(self, on_dask: TaskPool, tmp_path: Path) -> None:
        for n, table in enumerate("AAB"):
            submit(on_dask, GPU, key(tmp_path, table, n))
            ended(on_dask, 1)
            assert len(on_dask.nodes()) == 3
        (_, _, first, _), (_, _, again, _), (_, _, other, _) = begun(tmp_path)
        assert first == again != other
        assert not Path(f"/proc/{first}").exists()

    @pytest.mark.long
    def test_a_loaded_model_serves_first_but_not_for_ever(
        self, on_dask: TaskPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for switch_seconds, order in ((60.0, "AAAB"), (0.0, "AABA")):
            monkeypatch.setattr("djdist.executors.dask.pool.SWITCH_SECONDS", switch_seconds)
            folder = tmp_path / order
            folder.mkdir()
            submit(on_dask, GPU, *(key(folder, table, n, "a") for n, table in enumerate("AABA")))
            waiting_for(on_dask, folder, {0})
            (folder / "gate a").touch()
            ended(on_dask, 4)
            assert "".join(table for table, *_ in begun(folder)) == order

    def test_in_a_run_gpu_keys_have_their_worker(self, on_dask: TaskPool, tmp_path: Path) -> None:
        order = run(on_dask, tmp_path, ("A", GPU, 8), ("B", Needs(), 24))
        assert Counter(order) == {"A": 8, "B": 24}
        assert len({pid for table, _, pid, _ in begun(tmp_path) if table == "A"}) == 1

    def test_threads_and_memory_choose_the_worker(self, on_dask: TaskPool, tmp_path: Path) -> None:
        submit(on_dask, Needs(cpus=2), key(tmp_path, "A", 0), key(tmp_path, "A", 1))
        submit(on_dask, Needs(memory="2GiB"), key(tmp_path, "B", 2), key(tmp_path, "B", 3))
        submit(on_dask, Needs(memory="1TiB"), key(tmp_path, "C", 4))
        ended(on_dask, 4)
        assert len({pid for *_, pid, _ in begun(tmp_path)}) == 1
        assert numbers(tmp_path) == {0, 1, 2, 3}

    def test_what_no_worker_has_is_waited_for_at_leisure(self, on_dask: TaskPool, tmp_path: Path) -> None:
        submit(on_dask, Needs(memory="1TiB"), key(tmp_path, "C", 0))
        began_at = time.monotonic()
        assert on_dask.wait(0.2) == []
        assert time.monotonic() - began_at >= 0.2

    @pytest.mark.long
    def test_a_chosen_worker_that_dies_is_a_breakage_and_tells_of_memory(
        self, on_dask: TaskPool, tmp_path: Path
    ) -> None:
        for do, kind in (("grow", BreakageKind.OUT_OF_MEMORY), ("die", BreakageKind.WORKER_DIED)):
            (ticket,) = submit(on_dask, GPU, key(tmp_path, "A", 0, do))
            ((broken, error),) = [(end.ticket, end.error) for end in ended(on_dask, 1)]
            assert broken == ticket
            assert error is not None
            assert error.kind is kind
            wait_until(lambda: len(on_dask.nodes()) == 3, "the nanny's next worker")
        assert [n for _, n, *_ in begun(tmp_path)] == [0, 0]
