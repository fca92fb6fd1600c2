"""How fast trivial keys are made by two workers whose server is far away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.conftest import Record
from benchmarks.contestants import WARM_UP, Bench, empty, in_another_order, jobs_per_second
from benchmarks.goals import FAR, ROUND_TRIPS
from lab.delay import delayed
from servers import Server

KEYS = {1: 1_000, 5: 400, 20: 50}
"""By the milliseconds of a round trip: as many as take some seconds."""
ROUNDS = 1
WORKERS = 2
NAPS = 20
SLOW = "native"
"""It is measured once, and not where it would take minutes."""
SLOW_MS = (1,)


@pytest.mark.timeout(1800)
def test_trivial_keys_far_from_the_server(
    server: Server, lab: ModuleType, tmp_path: Path, record: Record
) -> None:
    rates: dict[str, dict[str, list[int]]] = {name: {str(ms): [] for ms in KEYS} for name in FAR}
    for ms, keys in KEYS.items():
        empty(lab)
        lab.Number.delete_quick()
        lab.Number.insert({"n": n, "x": n} for n in range(WARM_UP + keys))
        with away(server, ms) as far:
            bench = Bench(far, lab.__name__, tmp_path, {})
            for number in range(ROUNDS):
                for name in in_another_order(number, contestants(number, ms)):
                    empty(lab)
                    bench.make(name, WORKERS, NAPS)
                    assert len(lab.Doubled()) == WARM_UP + keys
                    rates[name][str(ms)].append(round(jobs_per_second(lab)))
    record(ROUND_TRIPS, server.backend, rates)


def contestants(number: int, ms: int) -> list[str]:
    return [name for name in FAR if name != SLOW or (number == 0 and ms in SLOW_MS)]


@contextmanager
def away(server: Server, ms: int) -> Iterator[Server]:
    """Give a server as it looks from so many milliseconds away."""
    if not ms:
        yield server
        return
    with delayed(server.host, server.port, ms / 1000) as port:
        yield replace(server, host="127.0.0.1", port=port)
