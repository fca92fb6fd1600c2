"""The benchmarks' charts, which docs/explanation/performance.md shows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from benchmarks.goals import (
    DATABASES,
    MAKESPAN,
    RESERVE,
    ROUND_TRIPS,
    STATEMENTS,
    THROUGHPUT,
    of_pipelines,
    ratio,
)
from benchmarks.whole_pipelines import KEYS, LENGTHS

Draw = Callable[[Axes, Any], None]

COLORS = {"mysql": "#0072B2", "postgresql": "#E69F00"}
PIPELINES = {
    "local": ("one run, processes=8", "#0072B2"),
    "ray": ("one run, Ray", "#56B4E9"),
    "dask": ("one run, Dask", "#009E73"),
    "table by table": ("djdist, table by table", "#E69F00"),
    "native": ("native, table by table", "#999999"),
    "no cost": ("no cost but the keys", "#CCCCCC"),
}
FAR_COLORS = {
    "local, shared transactions": "#0072B2",
    "local": "#56B4E9",
    "bare make": "#333333",
    "native": "#999999",
}
OURS, THEIRS = "-", ":"
WIDTH = 0.4


def draw(results: dict[str, dict[str, Any]], folder: Path) -> None:
    """Draw each picture of the page as far as it was measured."""
    pictures: dict[str, list[tuple[str, Draw]]] = {
        "results.png": [
            (THROUGHPUT, _draw_throughput),
            (STATEMENTS, _draw_statements),
            (RESERVE, _draw_reserve),
        ],
        "pipelines.png": [(MAKESPAN, partial(_draw_pipelines, lengths=lengths)) for lengths in LENGTHS],
        "round_trips.png": [(ROUND_TRIPS, partial(_draw_round_trips, database=name)) for name in DATABASES],
    }
    for name, panels in pictures.items():
        if shown := [(topic, panel) for topic, panel in panels if topic in results]:
            _draw_picture(results, shown, folder / name)


def _draw_picture(results: dict[str, dict[str, Any]], panels: list[tuple[str, Draw]], file: Path) -> None:
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), squeeze=False)
    for axis, (topic, panel) in zip(axes[0], panels, strict=True):
        panel(axis, results[topic])
        if axis.get_yscale() == "linear":
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
        names = [name.replace(", shared transactions", ",\nshared") for name in rates]
        if len(names) > len(axis.get_xticks()) or not number:  # one database may have more contestants
            axis.set_xticks(range(len(rates)), names, fontsize=6)
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


def _draw_pipelines(axis: Axes, makespan: dict[str, Any], lengths: str) -> None:
    width = 0.8 / len(PIPELINES)
    for number, (name, (label, color)) in enumerate(PIPELINES.items()):
        ratios = [of_pipelines(makespan, name, f"{tables} tables, {lengths} keys") for tables in KEYS]
        places = [place + (number - len(PIPELINES) / 2 + 0.5) * width for place in range(len(KEYS))]
        axis.bar(places, ratios, width, color=color, label=label)
    axis.axhline(1, color="black", linewidth=0.5)
    axis.set_xticks(range(len(KEYS)), [f"{tables} tables" for tables in KEYS])
    axis.set_title(f"Makespan by its lower bound, {lengths} keys", fontsize=10)


def _draw_round_trips(axis: Axes, rates: dict[str, Any], database: str) -> None:
    for name, color in FAR_COLORS.items():
        if name in rates.get(database, {}):
            medians = [np.median(rounds or [np.nan]) for rounds in rates[database][name].values()]
            axis.plot(list(rates[database][name]), medians, marker="o", color=color, label=name)
    axis.set(yscale="log", xlabel="milliseconds of a round trip")
    axis.set_title(f"Keys per second, {DATABASES[database]}", fontsize=10)
