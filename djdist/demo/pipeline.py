"""Objects in photographs: load, segment by several methods, measure, and choose the method by the edges.

.. code-block:: text

    Image ── GreyImage ─┬─ Edges ────────────────────┐
                        │                            ├─ Agreement ─┐
    Method ─────────────┴─ Segmentation ─┬───────────┘             ├─ Choice, Choice.Rank
                                         └─ Statistics ────────────┘
                                            Statistics.Region
"""

from typing import Any, cast

import datajoint as dj
import numpy as np
from numpy.typing import NDArray
from skimage import color, data, feature, filters, measure, morphology, segmentation, transform

schema = dj.Schema("djdist_demo")

LONGEST_SIDE = 500
SMOOTHING_PIXELS = 1.5
SMALLEST_OBJECT_PIXELS = 30
TOLERANCE_PIXELS = 3


@schema
class Image(dj.Lookup):
    definition = """
    # photographs that come with scikit-image
    image : varchar(32)
    """
    contents = [
        [name]
        for name in (
            "astronaut", "brick", "camera", "chelsea", "coffee",
            "coins", "hubble_deep_field", "page", "rocket", "text",
        )
    ]  # fmt: skip


@schema
class Method(dj.Lookup):
    definition = """
    # how to choose the threshold between object and background
    method : varchar(16)
    """
    contents = [["otsu"], ["li"], ["triangle"], ["yen"]]


@schema
class DarkObjects(dj.Manual):
    definition = """
    # images whose objects are darker than their background
    -> Image
    """


@schema
class GreyImage(dj.Imported):
    definition = """
    -> Image
    ---
    pixels : <blob>  # brightness from 0 to 1
    """

    def make(self, key: dict[str, Any]) -> None:
        loaded = getattr(data, key["image"])()
        grey = color.rgb2gray(loaded[..., :3]) if loaded.ndim == 3 else loaded.astype(float)
        shrink = max(1, max(grey.shape) // LONGEST_SIDE)
        small = transform.downscale_local_mean(grey, (shrink, shrink))
        self.insert1({**key, "pixels": ((small - small.min()) / np.ptp(small)).astype(np.float32)})


@schema
class Edges(dj.Computed):
    definition = """
    # where brightness changes, whatever is object and background
    -> GreyImage
    ---
    edges : <blob>
    """

    def make(self, key: dict[str, Any]) -> None:
        pixels = (GreyImage & key).fetch1("pixels")
        self.insert1({**key, "edges": feature.canny(pixels, SMOOTHING_PIXELS)})


@schema
class Segmentation(dj.Computed):
    definition = """
    -> GreyImage
    -> Method
    ---
    threshold : float64   # brightness that parts object from background
    n_objects : int32
    labels    : <blob>    # 0 for background, else the object's number
    """

    def make(self, key: dict[str, Any]) -> None:
        smooth = filters.gaussian((GreyImage & key).fetch1("pixels"), SMOOTHING_PIXELS)
        threshold = getattr(filters, f"threshold_{key['method']}")(smooth)
        is_object = smooth < threshold if DarkObjects & key else smooth > threshold
        labels = measure.label(morphology.remove_small_objects(is_object, max_size=SMALLEST_OBJECT_PIXELS))
        row = {"threshold": threshold, "n_objects": labels.max(), "labels": labels.astype(np.uint16)}
        self.insert1({**key, **row})


@schema
class Statistics(dj.Computed):
    definition = """
    -> Segmentation
    ---
    median_area    : float64  # pixels
    median_spacing : float64  # pixels from an object's centre to the next one's
    """

    class Region(dj.Part):
        definition = """
        -> master
        region : int32
        ---
        area         : float64  # pixels
        eccentricity : float64  # 0 for a circle, 1 for a line
        spacing      : float64  # pixels
        """

    def make(self, key: dict[str, Any]) -> None:
        labels = (Segmentation & key).fetch1("labels")
        found = measure.regionprops_table(labels, properties=("label", "area", "eccentricity", "centroid"))
        spacing = _spacing(np.column_stack([found["centroid-0"], found["centroid-1"]]))
        medians = {"median_area": np.median(found["area"]), "median_spacing": np.median(spacing)}
        self.insert1({**key, **medians})
        columns = zip(found["label"], found["area"], found["eccentricity"], spacing, strict=True)
        names = ("region", "area", "eccentricity", "spacing")
        self.Region.insert({**key, **dict(zip(names, row, strict=True))} for row in columns)


@schema
class Agreement(dj.Computed):
    definition = """
    # how well the objects' outlines lie on edges
    -> Segmentation
    -> Edges
    ---
    precision : float64  # part of the outlines that has an edge nearby
    recall    : float64  # part of the edges that has an outline nearby
    """

    def make(self, key: dict[str, Any]) -> None:
        outlines = segmentation.find_boundaries((Segmentation & key).fetch1("labels"), mode="inner")
        edges = (Edges & key).fetch1("edges").astype(bool)
        shares = {"precision": _share_near(outlines, edges), "recall": _share_near(edges, outlines)}
        self.insert1({**key, **shares})


@schema
class Choice(dj.Computed):
    definition = """
    # the method whose outlines lie best on edges
    -> GreyImage
    ---
    -> Method
    """

    class Rank(dj.Part):
        definition = """
        -> master
        rank : int32  # from 1
        ---
        -> Agreement
        score : float64  # harmonic mean of precision and recall
        """

    @property
    def key_source(self) -> Any:
        """Take images all of whose methods are measured."""
        measured = GreyImage.aggr(Statistics * Agreement, methods="count(*)")
        return GreyImage.proj() & (measured & f"methods = {len(Method())}")

    def make(self, key: dict[str, Any]) -> None:
        scores = {
            row["method"]: _harmonic_mean(row["precision"], row["recall"])
            for row in (Agreement & key).to_dicts(order_by="method")
        }
        methods = sorted(scores, key=lambda method: -scores[method])
        self.insert1({**key, "method": methods[0]})
        ranked = enumerate(methods, 1)
        self.Rank.insert({**key, "rank": n, "method": name, "score": scores[name]} for n, name in ranked)


def _spacing(centres: NDArray[np.float64]) -> NDArray[np.float64]:
    if len(centres) < 2:
        raise ValueError(f"{len(centres)} object found, spacing needs 2: are objects darker than background?")
    distances = np.linalg.norm(centres[:, None] - centres[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    return cast("NDArray[np.float64]", distances.min(axis=1))


def _share_near(lines: NDArray[np.bool_], others: NDArray[np.bool_]) -> float:
    near = morphology.dilation(others, morphology.disk(TOLERANCE_PIXELS))
    return float(near[lines].mean()) if lines.any() else 0.0


def _harmonic_mean(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision and recall else 0.0
