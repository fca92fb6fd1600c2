"""The benchmarks' chart, which docs/explanation/performance.md shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.goals import DATABASES, RESERVE, STATEMENTS, THROUGHPUT, ratio

COLORS = {"mysql": "#0072B2", "postgresql": "#E69F00"}
OURS, THEIRS = "-", ":"
WIDTH = 0.4


def draw(results: dict[str, dict[str, Any]], file: Path) -> None:
    """Draw speed, statements and reservations side by side, as far as they were measured."""
    panels: dict[str, Callable[[Axes, Any], None]] = {
        THROUGHPUT: _draw_throughput,
        STATEMENTS: _draw_statements,
        RESERVE: _draw_reserve,
    }
    shown = [topic for topic in panels if topic in results]
    if not shown:
        return
    figure, axes = plt.subplots(1, len(shown), figsize=(4.2 * len(shown), 3.2), squeeze=False)
    for axis, topic in zip(axes[0], shown, strict=True):
        panels[topic](axis, results[topic])
        axis.set_ylim(0, None)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _draw_throughput(axis: Axes, throughput: dict[str, dict[str, list[float]]]) -> None:
    for number, (database, rates) in enumerate(throughput.items()):
        places = [place + (number - 0.5) * WIDTH for place in range(len(rates))]
        shares = [ratio(name, "bare make")(rates) for name in rates]
        axis.bar(places, shares, WIDTH, color=COLORS[database], label=DATABASES[database])
        axis.set_xticks(range(len(rates)), list(rates))
    axis.set_title("Jobs per second, of those of bare make()", fontsize=10)


def _draw_statements(axis: Axes, statements: dict[str, dict[str, dict[str, float]]]) -> None:
    for database, counts in statements.items():
        for name, by_workers in counts.items():
            _draw_line(axis, by_workers, database, name, THEIRS if name != "local" else OURS)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="workers")
    axis.set_title("Statements a key (make() and its transaction: 4)", fontsize=10)


def _draw_reserve(axis: Axes, reserve: dict[str, dict[str, dict[str, float]]]) -> None:
    for database, times in reserve.items():
        for name, by_pending in times.items():
            _draw_line(axis, by_pending, database, name, THEIRS if name == "bare" else OURS)
    axis.set(xscale="log", xlabel="pending keys")
    axis.set_title("Milliseconds to reserve 100 jobs", fontsize=10)


def _draw_line(axis: Axes, values: dict[str, float], database: str, name: str, style: str) -> None:
    label = f"{DATABASES[database]}, {'djdist' if style == OURS else name}"
    numbers = [int(number) for number in values]
    axis.plot(numbers, list(values.values()), style, marker="o", color=COLORS[database], label=label)
