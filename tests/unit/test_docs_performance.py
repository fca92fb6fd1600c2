"""docs/explanation/performance.md has the figures of the last benchmark."""

from __future__ import annotations

import json

import pytest

from benchmarks.page import PAGE, Figures

FIGURES = Figures(json.loads((PAGE.parents[2] / "tests" / "benchmarks" / "results.json").read_text()))
TEXT = PAGE.read_text()


@pytest.mark.parametrize("line", [*FIGURES.rows(), *FIGURES.sentences()])
def test_it_has_the_figures_of_the_benchmark(line: str) -> None:
    assert line in " ".join(TEXT.splitlines()) or line in TEXT.splitlines()
