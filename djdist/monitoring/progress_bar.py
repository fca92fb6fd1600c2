"""The progress bars at the caller."""

import logging
import math
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm

from djdist._job import Counts, Status

MOST_LINES = 8
"""Bars of more tables would fill a terminal."""


class ProgressBar:
    """Shows a run's status as a bar: done, errors, running, queued, rate and time left.

    A run of several tables has one more bar per table below it; of many tables those have one that have
    something to make. A file, such as the log of a job, has no lines that can be drawn again, so the
    first bar must do there.

    Parameters
    ----------
    name : str
        What is run: a table or a pipeline.
    max_calls : int, optional
        Maximum number of keys that the run makes.
    shown : bool
        False keeps it silent.
    """

    def __init__(self, name: str, max_calls: int | None = None, *, shown: bool = True) -> None:
        self._max_calls = math.inf if max_calls is None else max_calls
        self._has_lines = shown and (sys.stderr.isatty() or IN_NOTEBOOK)
        self._bar = _new_bar(name, shown=shown)
        self._lines: dict[str, tqdm[Any]] = {}

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for bar in (self._bar, *self._lines.values()):
            bar.close()

    def show(self, status: Status) -> bool:
        """Draw a status; the run goes on."""
        calls_left = self._max_calls - _done(status)
        _draw(self._bar, status, calls_left)
        if self._has_lines and len(status.tables) > 1:
            self._assign_lines(status.tables)
            for name, bar in self._lines.items():
                _draw(bar, status.tables[name], calls_left)
        return True

    def _assign_lines(self, tables: Mapping[str, Counts]) -> None:
        """Find a line for each table that has something to make, maybe that of one that has nothing."""
        width = max(map(len, tables))
        for name in tables:
            if name in self._lines or not _left(tables[name]):
                continue
            idle = next((shown for shown in self._lines if not _left(tables[shown])), None)
            if len(self._lines) < MOST_LINES:
                self._lines[name] = _new_bar("")
            elif idle is not None:
                self._lines[name] = self._lines.pop(idle)
            else:
                return
            _begin(self._lines[name], f"  {name:{width}}", _done(tables[name]))


def _new_bar(name: str, *, shown: bool = True) -> "tqdm[Any]":
    return tqdm(desc=name, unit="key", disable=not shown, dynamic_ncols=True)


def _begin(bar: "tqdm[Any]", name: str, done: int) -> None:
    """Give a bar to a table, whose rate and time count from now on."""
    bar.reset()
    bar.set_description(name, refresh=False)
    bar.n = bar.initial = bar.last_print_n = done


def _draw(bar: "tqdm[Any]", counts: Counts, calls_left: float) -> None:
    done = _done(counts)
    bar.total = done + min(_left(counts), calls_left)
    postfix = {"errors": counts.failed, "running": counts.running, "queued": counts.queued}
    bar.set_postfix(postfix, refresh=False)
    bar.update(done - bar.n)


def _done(counts: Counts) -> int:
    return counts.made + counts.failed


def _left(counts: Counts) -> int:
    return counts.running + counts.queued + counts.pending


IN_NOTEBOOK = any("notebook" in each.__module__ for each in tqdm.__mro__)
"""Whether tqdm draws widgets."""


class LogAboveBars(logging.Handler):
    """Writes lines to stderr, above a bar that is drawn there."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)
