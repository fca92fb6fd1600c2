"""The benchmarks' charts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt

DATABASES = {"mysql": "MariaDB", "postgresql": "PostgreSQL"}


def draw(results: dict[str, dict[str, Any]], folder: Path) -> None:
    """Draw what there is of it."""
    if throughput := results.get("jobs per second"):
        _draw_throughput(throughput, folder / "throughput.png")
    if reserve := results.get("milliseconds to reserve 100 by pending keys"):
        _draw_reserve(reserve, folder / "reserve.png")


def _draw_throughput(throughput: dict[str, dict[str, float]], file: Path) -> None:
    figure, axes = plt.subplots(
        1, len(throughput), figsize=(4 * len(throughput), 3), sharey=True, squeeze=False
    )
    for axis, (database, rates) in zip(axes[0], throughput.items(), strict=True):
        colors = ["0.6" if name in ("bare make", "native") else "C0" for name in rates]
        axis.bar(list(rates), [rate / rates["bare make"] for rate in rates.values()], color=colors)
        axis.set_title(DATABASES[database])
        axis.tick_params(axis="x", rotation=30)
    axes[0][0].set_ylabel("jobs/s, as a part of\nbare make()")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _draw_reserve(reserve: dict[str, dict[str, dict[int, float]]], file: Path) -> None:
    figure, axes = plt.subplots(1, len(reserve), figsize=(4 * len(reserve), 3), sharey=True, squeeze=False)
    for axis, (database, times) in zip(axes[0], reserve.items(), strict=True):
        for name, by_pending in times.items():
            color = "0.6" if name == "bare" else "C0"
            axis.plot(list(by_pending), list(by_pending.values()), marker="o", color=color, label=name)
        axis.set(title=DATABASES[database], xscale="log", xlabel="pending keys", ylim=(0, None))
    axes[0][0].set_ylabel("ms to reserve 100")
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)
