"""Objects in photographs: load, segment by several methods, measure each object."""

from typing import Any, cast

import datajoint as dj
import numpy as np
from numpy.typing import NDArray
from skimage import color, data, filters, measure, morphology, transform

schema = dj.Schema("djdist_demo")

LONGEST_SIDE = 500
SMOOTHING_PIXELS = 1.5
SMALLEST_OBJECT_PIXELS = 30


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


def _spacing(centres: NDArray[np.float64]) -> NDArray[np.float64]:
    if len(centres) < 2:
        raise ValueError(f"{len(centres)} object found, spacing needs 2: are objects darker than background?")
    distances = np.linalg.norm(centres[:, None] - centres[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    return cast("NDArray[np.float64]", distances.min(axis=1))
