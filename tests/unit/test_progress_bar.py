"""The bars of a run of several tables, as a terminal gets them."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stderr
from typing import Any

import pytest

from djdist._job import Counts, Handover, Status
from djdist.monitoring import progress_bar
from djdist.monitoring.progress_bar import MOST_LINES, ProgressBar

MOVES = re.compile("\x1b\\[A")


class Terminal(io.StringIO):
    """Keeps what is written; it has lines that can be drawn again."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal

    @property
    def screen(self) -> list[str]:
        """The lines as they stand."""
        lines, row = [""], 0
        for move in re.split("(\r|\n|\x1b\\[A)", self.getvalue()):
            if move == "\x1b[A":
                row -= 1
            elif move == "\n":
                row += 1
                lines += [""] * (row == len(lines))
            elif move not in ("\r", ""):
                lines[row] = move
        return [line.rstrip() for line in lines if line.strip()]


@pytest.fixture
def terminal() -> Terminal:
    return Terminal(is_terminal=True)


def status(**tables: Counts) -> Status:
    return Status.of(tables, Handover(), begun=True)


def test_each_table_has_a_line_below_that_of_the_run(terminal: Terminal) -> None:
    with redirect_stderr(terminal), ProgressBar("lab") as bar:
        bar.show(status(Raw=Counts(running=2, pending=8), Spikes=Counts()))
        bar.show(status(Raw=Counts(made=4, running=2, pending=4), Spikes=Counts(running=1)))
        bar.show(status(Raw=Counts(made=9, failed=1), Spikes=Counts(made=9)))
    lab, raw, spikes = terminal.screen
    assert lab.startswith("lab: 100%")
    assert "19/19" in lab
    assert raw.startswith("  Raw   : 100%")
    assert "errors=1, running=0, queued=0]" in raw
    assert spikes.startswith("  Spikes: 100%")


def test_a_run_of_one_table_has_one_line(terminal: Terminal) -> None:
    with redirect_stderr(terminal), ProgressBar("Raw") as bar:
        bar.show(status(Raw=Counts(made=10)))
    (raw,) = terminal.screen
    assert raw.startswith("Raw: 100%")


def test_of_many_tables_those_have_a_line_that_have_work(terminal: Terminal) -> None:
    with redirect_stderr(terminal), ProgressBar("lab") as bar:
        for working in range(30):
            tables = {f"T{n}": Counts(made=3 * (n < working), running=n == working) for n in range(30)}
            bar.show(status(**tables))
            assert f"T{working}" in bar._lines
            assert len(bar._lines) <= MOST_LINES
    assert len(terminal.screen) == MOST_LINES + 1


def test_a_log_file_has_one_line() -> None:
    terminal = Terminal(is_terminal=False)
    with redirect_stderr(terminal), ProgressBar("lab") as bar:
        bar.show(status(Raw=Counts(made=4, pending=4), Spikes=Counts(made=1, pending=3)))
    assert "  5/12 " in terminal.screen[-1].replace("|", " ")
    assert "Raw" not in terminal.getvalue()
    assert not MOVES.search(terminal.getvalue())


def test_max_calls_bound_all_totals(terminal: Terminal) -> None:
    with redirect_stderr(terminal), ProgressBar("lab", 6) as bar:
        bar.show(status(Raw=Counts(made=2, pending=8), Spikes=Counts(made=1, running=1)))
        assert bar._bar.total == 6
        assert [line.total for line in bar._lines.values()] == [5, 2]


def test_a_silent_bar_draws_nothing(terminal: Terminal) -> None:
    with redirect_stderr(terminal), ProgressBar("lab", shown=False) as bar:
        bar.show(status(Raw=Counts(made=2, pending=8), Spikes=Counts(made=1, running=1)))
    assert terminal.getvalue() == ""


def test_a_notebook_has_a_widget_per_table(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ipywidgets")
    from tqdm.notebook import tqdm

    shown: list[Any] = []
    monkeypatch.setattr(progress_bar, "tqdm", tqdm)
    monkeypatch.setattr(progress_bar, "IN_NOTEBOOK", True)
    monkeypatch.setattr("tqdm.notebook.display", shown.append)
    with ProgressBar("lab") as bar:
        bar.show(status(Raw=Counts(made=4, pending=4), Spikes=Counts(made=1, pending=3)))
    assert len(shown) == 3
