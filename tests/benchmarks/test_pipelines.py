"""How much longer whole pipelines take than they must: in one run, and table by table."""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from subprocess import CalledProcessError
from types import ModuleType

import pytest

from benchmarks.conftest import Record
from benchmarks.contestants import EXECUTORS, Bench
from benchmarks.goals import FIRST_LEAF, MAKESPAN
from benchmarks.whole_pipelines import KEYS, LENGTHS, SLOTS, Pipeline
from lab import clusters
from servers import Server

ROUNDS = 1
"""Each with other graphs, and with other lengths of keys."""
WARM_UP = 10 * SLOTS
SCRIPT = """
import os
from importlib import import_module
from pathlib import Path

caller = os.getppid()

def pipelines():
    for number in range({count}):
        tables = import_module(f"{prefix}_{{number}}").TABLES
        Path(f"../{{number}}-{{os.getpid()}}").touch()
        while len([*Path("..").glob(f"{{number}}-*")]) < {contestants}:
            if os.getppid() != caller or Path("../failed").exists():
                raise SystemExit("the others don't come")
            time.sleep(0.01)
        yield tables
"""
DJDIST = """
import djdist

djdist.enable()
with djdist.{executor} as executor:
    Warm.populate(reserve_jobs=True, executor=executor)
    for tables in pipelines():
        {populate}
"""
WHOLE = "djdist.populate(tables, reserve_jobs=True, executor=executor)"
BY_TABLE = "for table in tables: table.populate(reserve_jobs=True, executor=executor)"
NATIVE = f"""
from multiprocessing import Barrier, Process

def work(tables, done):
    tables[0].connection.connect()
    for table in tables:
        table.populate(reserve_jobs=True)
        done.wait()

for tables in pipelines():
    for table in tables:
        table.jobs.refresh()  # else several would declare it at the same moment, which some don't survive
    done = Barrier({SLOTS})
    workers = [Process(target=work, args=(tables, done)) for _ in range({SLOTS})]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
"""
"""Its own ``processes=8`` starts no more than there are processors."""


def with_djdist(executor: str, populate: str) -> str:
    return DJDIST.format(executor=executor.format(workers=SLOTS), populate=populate)


CONTESTANTS = {
    **{name: with_djdist(executor, WHOLE) for name, executor in EXECUTORS.items()},
    "table by table": with_djdist(EXECUTORS["local"], BY_TABLE),
    "native": NATIVE,
}
Ratios = dict[str, dict[str, dict[str, list[float]]]]
BY_TABLE_ON = "mysql"
"""Run after run is measured on one database only: each contestant more slows all others down."""
NO_COST = "no cost"
"""What a schedule would take where nothing but keys takes time."""


@pytest.mark.timeout(1800)
def test_makespan(server: Server, lab: ModuleType, tmp_path: Path, record: Record) -> None:
    """All contestants make each pipeline at the same time: keys that sleep leave the processors to others."""
    pipelines = [Pipeline(*each) for each in product(KEYS, LENGTHS, range(ROUNDS))]
    contestants = CONTESTANTS if server.backend == BY_TABLE_ON else [*EXECUTORS]

    def prefix(contestant: str) -> str:
        return f"{lab.__name__}_{contestant.replace(' ', '_')}"

    with ExitStack() as stack:
        made = {
            contestant: [
                stack.enter_context(declared(pipeline, server, tmp_path, f"{prefix(contestant)}_{number}"))
                for number, pipeline in enumerate(pipelines)
            ]
            for contestant in contestants
        }
        ray = stack.enter_context(clusters.place("ray", [SLOTS]))
        dask = stack.enter_context(clusters.place("dask", [1] * SLOTS))
        environments = {"ray": ray.environment, "dask": dask.environment}

        def run(contestant: str) -> None:
            (folder := tmp_path / contestant).mkdir()
            bench = Bench(server, f"{prefix(contestant)}_0", folder, environments.get(contestant, {}))
            head = SCRIPT.format(
                count=len(pipelines), prefix=prefix(contestant), contestants=len(contestants)
            )
            try:
                bench.run(head + CONTESTANTS[contestant])
            except CalledProcessError:
                (tmp_path / "failed").touch()  # the others wait for it
                raise

        with ThreadPoolExecutor(len(contestants)) as threads:
            list(threads.map(run, contestants))
        times = {
            contestant: [*map(Pipeline.times, pipelines, modules)] for contestant, modules in made.items()
        }
    times[NO_COST] = [pipeline.scheduled() for pipeline in pipelines]
    for topic, ratios in compared(pipelines, times).items():
        record(topic, server.backend, ratios)


def compared(pipelines: Sequence[Pipeline], times: Mapping[str, Sequence[tuple[float, float]]]) -> Ratios:
    """Divide what each contestant took, and took to a first leaf, by what that takes at least."""
    ratios: Ratios = {MAKESPAN: defaultdict(dict), FIRST_LEAF: defaultdict(dict)}
    for contestant, each in times.items():
        for pipeline, (makespan, first_leaf) in zip(pipelines, each, strict=True):
            kind = f"{pipeline.tables} tables, {pipeline.lengths} keys"
            for topic, ratio in (
                (MAKESPAN, makespan / pipeline.lower_bound_seconds),
                (FIRST_LEAF, first_leaf / pipeline.first_leaf_seconds),
            ):
                ratios[topic][kind].setdefault(contestant, []).append(round(ratio, 3))
    return ratios


@contextmanager
def declared(pipeline: Pipeline, server: Server, folder: Path, name: str) -> Iterator[ModuleType]:
    """Give a pipeline as a module that workers can import."""
    (folder / f"{name}.py").write_text(pipeline.code(name))
    importlib.invalidate_caches()
    module = importlib.import_module(name)
    pipeline.fill(module, WARM_UP)
    yield module
    server.drop_schema(name)
