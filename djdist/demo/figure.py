"""The picture at the demo's end."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm
from numpy.typing import NDArray

from djdist.demo.pipeline import Choice, DarkObjects, GreyImage, Image, Method, Segmentation, Statistics
from djdist.jobs.history import History
from djdist.monitoring.report_figure import draw_run

# Okabe and Ito's colours, which colour-blind people can tell apart
COLOURS = {"otsu": "#0072B2", "li": "#E69F00", "triangle": "#009E73", "yen": "#CC79A7"}
BRIGHT, DARK = "#E69F00", "#0072B2"
WIDTH_INCHES = 15
ROW_ASPECT = 4.4
TITLE_INCHES = 0.55
CHARTS_INCHES = 5.0
GRAPH_INCHES, TIMELINE_INCHES = 2.8, 1.6

Tile = tuple[str, str, NDArray[Any], NDArray[Any], bool]


def draw_results(path: Path, run: History) -> Path:
    """Draw the pipeline and its run, each image with its objects, and what each method finds."""
    rows = _rows(sorted(map(_tile, Image.to_arrays("image", order_by="image")), key=_aspect))
    heights = [WIDTH_INCHES / sum(map(_aspect, row)) + TITLE_INCHES for row in rows]
    heights = [GRAPH_INCHES + TIMELINE_INCHES, *heights, CHARTS_INCHES]
    size = (WIDTH_INCHES, sum(heights))
    figure: Any = plt.figure(figsize=size, layout="constrained")
    figure.suptitle("Objects in photographs, outlined by the method that follows edges best", fontsize=18)
    pipeline, *places, charts = figure.subfigures(len(heights), 1, height_ratios=heights)
    _draw_pipeline(pipeline, run)
    for place, row in zip(places, rows, strict=True):
        _draw_row(place, row)
    _draw_charts(charts)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _draw_pipeline(place: Any, run: History) -> None:
    graph, timeline = place.subplots(2, 1, height_ratios=[GRAPH_INCHES, TIMELINE_INCHES])
    parts = {
        table.__name__: f"{len(part()):,} rows of {part.__name__}"
        for table, part in ((Statistics, Statistics.Region), (Choice, Choice.Rank))
    }
    draw_run(run, graph, timeline, WIDTH_INCHES, parts)


def _tile(image: str) -> Tile:
    key = {"image": image}
    pixels = (GreyImage & key).fetch1("pixels")
    method = (Choice & key).fetch1("method")
    labels = (Segmentation & key & {"method": method}).fetch1("labels")
    return image, method, pixels, labels, bool(DarkObjects & key)


def _aspect(tile: Tile) -> float:
    height, width = tile[2].shape
    return float(width / height)


def _rows(tiles: list[Tile]) -> list[list[Tile]]:
    """Share the images out to rows that each fill the page's width."""
    rows: list[list[Tile]] = [[]]
    for tile in tiles:
        if sum(map(_aspect, rows[-1])) >= ROW_ASPECT:
            rows.append([])
        rows[-1].append(tile)
    return rows


def _draw_row(place: Any, row: list[Tile]) -> None:
    axes = place.subplots(1, len(row), width_ratios=[_aspect(tile) for tile in row], squeeze=False)
    for axis, tile in zip(axes[0], row, strict=True):
        _draw_image(axis, *tile)


def _draw_image(
    axis: Any, image: str, method: str, pixels: NDArray[Any], labels: NDArray[Any], dark: bool
) -> None:
    axis.imshow(pixels, cmap="gray", vmin=0, vmax=1.05)
    axis.contour(labels > 0, levels=[0.5], colors=DARK if dark else BRIGHT, linewidths=1.3)
    axis.set_title(
        f"{_shown(image)}: {labels.max()} {'dark ' if dark else ''}objects by {method}", fontsize=10.5
    )
    axis.axis("off")


def _shown(image: str) -> str:
    return image.replace("_", " ")


def _draw_charts(place: Any) -> None:
    counts, areas, spacings = place.subplots(1, 3, width_ratios=[1, 1.2, 1.2])
    _draw_counts(counts)
    _draw_distribution(areas, "area", "area of an object (pixels)", "How large they are")
    _draw_distribution(spacings, "spacing", "distance to the next object (pixels)", "How far apart they are")
    areas.legend(frameon=False, loc="lower right", fontsize=11)


def _draw_counts(axis: Any) -> None:
    rows = Segmentation.to_dicts(order_by=["image", "method"])
    images, methods = (sorted({row[name] for row in rows}) for name in ("image", "method"))
    counts = np.array([row["n_objects"] for row in rows]).reshape(len(images), len(methods))
    axis.imshow(counts, cmap="cividis", norm=LogNorm(1, counts.max()), aspect="auto")
    for (row, column), count in np.ndenumerate(counts):
        colour = "black" if count > counts.max() ** 0.6 else "white"
        axis.text(column, row, count, ha="center", va="center", color=colour)
    for image, method in zip(*Choice.to_arrays("image", "method"), strict=True):
        axis.plot(
            methods.index(method), images.index(image), "s", fillstyle="none", color="white", markersize=24
        )
    axis.set_xticks(range(len(methods)), methods)
    axis.set_yticks(range(len(images)), map(_shown, images))
    axis.tick_params(length=0)
    axis.set_title("How many each method finds; framed: chosen", fontsize=13)


def _draw_distribution(axis: Any, attribute: str, label: str, title: str) -> None:
    for method in Method.to_arrays("method", order_by="method"):
        values = np.sort((Statistics.Region & {"method": method}).to_arrays(attribute))
        share = 100 * np.arange(1, len(values) + 1) / len(values)
        axis.plot(values, share, color=COLOURS[method], linewidth=2, label=f"{method} ({len(values)})")
    axis.set(xscale="log", xlabel=label, ylabel="objects up to there (%)")
    axis.set_title(title, fontsize=13)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
