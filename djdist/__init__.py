"""djdist runs DataJoint pipelines on Ray, on Dask and on all processors of this machine."""

from typing import TYPE_CHECKING, Any

from djdist.activation import disable, enable
from djdist.embedded import embedded
from djdist.errors import (
    ClusterError,
    DatabaseError,
    DjdistError,
    LeaseLostError,
    MakeError,
    MissingLibraryError,
    OptionError,
    WorkerSetupError,
)
from djdist.executors import NAMES, executor_class
from djdist.executors.futures import FuturesExecutor
from djdist.populate import populate
from djdist.progress import progress
from djdist.report import report
from djdist.runs import Run, runs
from djdist.settings import config

if TYPE_CHECKING:
    from djdist.executors.dask import DaskExecutor as DaskExecutor
    from djdist.executors.local import LocalExecutor as LocalExecutor
    from djdist.executors.ray import RayExecutor as RayExecutor

__version__ = "0.1.0"

__all__ = [
    "ClusterError",
    "DatabaseError",
    "DjdistError",
    "FuturesExecutor",
    "LeaseLostError",
    "MakeError",
    "MissingLibraryError",
    "OptionError",
    "Run",
    "WorkerSetupError",
    "config",
    "disable",
    "embedded",
    "enable",
    "populate",
    "progress",
    "report",
    "runs",
]

_EXECUTORS = {attribute: name for name, (_, attribute) in NAMES.items()}


def __getattr__(name: str) -> Any:
    if name in _EXECUTORS:
        return executor_class(_EXECUTORS[name])
    raise AttributeError(f"module 'djdist' has no attribute {name!r}")
