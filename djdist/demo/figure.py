"""The picture at the demo's end."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from skimage.segmentation import find_boundaries

from djdist.demo.pipeline import DarkObjects, GreyImage, Image, Method, Segmentation, Statistics

# Okabe and Ito's colours, which colour-blind people can tell apart
COLOURS = {"otsu": "#0072B2", "li": "#E69F00", "triangle": "#009E73", "yen": "#CC79A7"}
OUTLINE = (1.0, 0.72, 0.0)
COLUMNS = 4


def draw_results(path: Path) -> Path:
    """Draw each image with its objects, and how large and how far apart they are."""
    figure: Any = plt.figure(figsize=(15, 14), layout="constrained")
    figure.suptitle("Objects found in photographs, outlined as Otsu's method sees them", fontsize=17)
    images, distributions = figure.subfigures(2, 1, height_ratios=[2.4, 1])
    _draw_images(images)
    left, right = distributions.subplots(1, 2)
    _draw_distribution(left, "area", "area of an object (pixels)", "How large the objects are")
    _draw_distribution(right, "spacing", "distance to the next object (pixels)", "How far apart they are")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _draw_images(figure: Any) -> None:
    keys = Image.keys(order_by="image")
    axes = figure.subplots(-(-len(keys) // COLUMNS), COLUMNS).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, key in zip(axes, keys, strict=False):
        _draw_image(axis, key)


def _draw_image(axis: Any, key: dict[str, Any]) -> None:
    pixels = (GreyImage & key).fetch1("pixels")
    labels, n_objects = (Segmentation & key & "method='otsu'").fetch1("labels", "n_objects")
    coloured = plt.get_cmap("gray")(0.85 * pixels)[..., :3]
    coloured[find_boundaries(labels, mode="inner")] = OUTLINE
    axis.imshow(coloured, interpolation="nearest")
    dark = ", darker than the background" if DarkObjects & key else ""
    axis.set_title(f"{key['image'].replace('_', ' ')}: {n_objects}{dark}", fontsize=10.5)


def _draw_distribution(axis: Any, attribute: str, label: str, title: str) -> None:
    for method in Method.to_arrays("method", order_by="method"):
        values = sorted((Statistics.Region & {"method": method}).to_arrays(attribute))
        share = [100 * (rank + 1) / len(values) for rank in range(len(values))]
        axis.plot(
            values, share, color=COLOURS[method], linewidth=2, label=f"{method} ({len(values)} objects)"
        )
    axis.set(xscale="log", xlabel=label, ylabel="objects up to there (%)", title=title)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower right")
