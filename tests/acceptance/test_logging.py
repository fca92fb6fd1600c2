"""What a run writes into the log of its own process; its log on Ray is tested with its metrics."""

from __future__ import annotations

import logging
import os
from types import ModuleType

import pytest

import djdist
import lab as pipelines


@pytest.mark.on("processes")
def test_a_run_is_told_at_its_begin_and_end(
    lab: ModuleType, processes: djdist.LocalExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "djdist")
    pipelines.fill(lab, subjects=2, sessions=5)
    lab.Fragile.populate(reserve_jobs=True, suppress_errors=True, executor=processes)
    begin, slots, end = [record.message for record in caplog.records if record.name.startswith("djdist")]
    assert f"of {lab.SCHEMA}.Fragile begins on LocalExecutor(processes=2), called by " in begin
    assert begin.count(f"(pid {os.getpid()})") == 2
    assert slots == "Fragile has 2 slots, 0 before; 10 keys are pending"
    assert end.endswith(f"of {lab.SCHEMA}.Fragile is over: 8 made, 2 failed, 0 running, 0 pending")
