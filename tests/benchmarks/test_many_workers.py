"""How much of the time 32 real workers of a Ray cluster make keys that sleep, with its CPUs faked."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from benchmarks.conftest import Record
from benchmarks.contestants import Bench
from benchmarks.goals import IDLE
from servers import Server

pytestmark = pytest.mark.timeout(900)

WORKERS = 32
WARM_UP = 40 * WORKERS
LONG_GAP_SECONDS = 0.05
KEYS = WARM_UP + 100 * WORKERS
SCRIPT = f"""
import os, time
from pathlib import Path

import djdist, ray

@ray.remote
def meet(folder):
    import djdist.worker

    (folder / str(os.getpid())).touch()
    while len(list(folder.iterdir())) < {WORKERS}:
        time.sleep(0.1)

folder = Path("workers")
folder.mkdir()
ray.init("local", num_cpus={WORKERS}, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
ray.get([meet.remote(folder.resolve()) for _ in range({WORKERS})])
djdist.enable()
Napped.populate("n < {WARM_UP}", reserve_jobs=True, executor="ray")
Napped.populate(reserve_jobs=True, executor="ray")
"""


def test_slots_idle_between_keys(server: Server, lab: ModuleType, tmp_path: Path, record: Record) -> None:
    lab.Number.insert({"n": n, "x": n} for n in range(KEYS))
    Bench(server, lab.__name__, tmp_path, {}).run(SCRIPT)
    figures = idle_times((lab.Napped & f"n >= {WARM_UP}").to_pandas())
    record(IDLE, server.backend, figures)
    assert figures["idle share"] < 0.5


def idle_times(naps: pd.DataFrame) -> dict[str, float]:
    """Tell how long slots make nothing, from when all have begun until one gets no more.

    What follows on the sleep counts as idle too: the INSERT, the end of the job and the COMMIT.
    """
    by_slot = naps.sort_values("began").groupby("pid")
    assert len(by_slot) == WORKERS
    since, until = by_slot.began.min().max(), by_slot.ended.max().min()
    gaps = (by_slot.began.shift(-1) - naps.ended)[(naps.ended > since) & (naps.ended < until)]
    slot_seconds = WORKERS * (until - since)
    figures = {
        "idle share": gaps.sum() / slot_seconds,
        "of it in gaps over 50 ms": gaps[gaps > LONG_GAP_SECONDS].sum() / slot_seconds,
        "median gap in ms": gaps.median() * 1000,
    }
    return {name: round(float(figure), 3) for name, figure in figures.items()}
