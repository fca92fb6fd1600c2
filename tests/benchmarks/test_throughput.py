"""How fast trivial keys are made by two workers, beside native populate and bare make()."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.conftest import Record
from benchmarks.contestants import (
    CONTESTANTS,
    NAPS,
    WARM_UP,
    Bench,
    empty,
    in_another_order,
    jobs_per_second,
)
from benchmarks.goals import THROUGHPUT
from servers import Server

KEYS = 5_000 + WARM_UP
ROUNDS = 3
WORKERS = 2


@pytest.mark.timeout(1800)
def test_trivial_keys(
    server: Server, lab: ModuleType, tmp_path: Path, environments: dict[str, dict[str, str]], record: Record
) -> None:
    lab.Number.insert({"n": n, "x": n} for n in range(KEYS))
    rates: dict[str, list[int]] = {name: [] for name in CONTESTANTS}
    for number in range(ROUNDS):
        for name in in_another_order(number, CONTESTANTS):
            empty(lab)
            Bench(server, lab.__name__, tmp_path, environments.get(name.split(",")[0], {})).make(
                name, WORKERS, NAPS
            )
            assert len(lab.Doubled()) == KEYS
            rates[name].append(round(jobs_per_second(lab)))
    record(THROUGHPUT, server.backend, rates)
