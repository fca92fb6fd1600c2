from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

import lab as pipelines

CODE = """
import sys, {module} as lab
lab.Fragile.populate(
    reserve_jobs=True,
    suppress_errors=True,
    display_progress=sys.argv[1] == "shown",
    processes=int(sys.argv[2]),
)
"""


@pytest.mark.parametrize("processes", [pytest.param("1", marks=pytest.mark.long), "2"])
def test_one_bar_at_the_caller_tells_done_errors_and_running(
    lab: ModuleType, script: Callable[..., Any], processes: str
) -> None:
    pipelines.fill(lab)
    _, error = script(CODE.format(module=lab.__name__), "shown", processes).communicate(timeout=120)
    bars = [line for line in error.replace("\r", "\n").splitlines() if line.startswith("Fragile: ")]
    assert "6/6" in bars[-1]
    assert "errors=1, running=0" in bars[-1]
    assert error.count("errors=1, running=0]") <= 2


def test_no_bar_where_none_is_asked_for(lab: ModuleType, script: Callable[..., Any]) -> None:
    pipelines.fill(lab)
    _, error = script(CODE.format(module=lab.__name__), "hidden", "1").communicate(timeout=120)
    assert "Fragile" not in error
    assert len(lab.Fragile()) == 5
