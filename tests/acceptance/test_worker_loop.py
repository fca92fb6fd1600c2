from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

import lab as pipelines

LOOP = """
import json, os, sys, {module} as lab
made = []
while True:
    summary = lab.Logged.populate(reserve_jobs=True, max_calls=2, {options})
    made.append(summary["success_count"])
    if not made[-1]:
        break
print(json.dumps({{"pid": os.getpid(), "made": sum(made)}}))
"""
NAPPING = 'make_kwargs={"seconds": 0.02}'


def test_the_documented_loop_ends_when_everything_is_made(lab: ModuleType, executor: Any) -> None:
    pipelines.fill(lab)
    rounds: list[int] = []
    while not rounds or rounds[-1]:
        summary = lab.Square.populate(reserve_jobs=True, max_calls=4, executor=executor)
        rounds.append(summary["success_count"])
    assert rounds == [4, 2, 0]
    assert len(lab.Square()) == 6


@pytest.mark.parametrize("others", ["djdist", pytest.param("native", marks=pytest.mark.long)])
def test_several_workers_on_one_table_make_each_key_once(
    lab: ModuleType, script: Callable[..., Any], others: str
) -> None:
    """Native workers stop early when they lose a race, so they only have to leave nothing undone."""
    pipelines.fill(lab, subjects=6, sessions=5)
    loop = LOOP.format(module=lab.__name__, options=NAPPING)
    companion = loop if others == "djdist" else "djdist.disable()\n" + loop
    if others == "native":  # which can't declare a jobs table on PostgreSQL while others do
        assert len(lab.Logged.jobs) == 0
    workers = [script(loop), script(loop), script(companion)]
    outputs = [worker.communicate(timeout=120) for worker in workers]
    reports = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    assert sum(report["made"] for report in reports) == 30
    assert len(lab.Logged()) == 30
    assert len(lab.Logged.jobs) == 0
    made_by = lab.Logged().to_arrays("pid").tolist()
    assert {report["pid"]: report["made"] for report in reports if report["made"]} == {
        pid: made_by.count(pid) for pid in set(made_by)
    }


def test_max_calls_is_the_most_that_is_made(lab: ModuleType, executor: Any) -> None:
    pipelines.fill(lab)
    options = {"reserve_jobs": True, "executor": executor}
    assert lab.Square.populate(max_calls=0, **options)["success_count"] == 0
    assert lab.Square.populate(max_calls=5, **options)["success_count"] == 5
    assert len(lab.Square.jobs.pending) == 1
