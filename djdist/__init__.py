"""djdist runs DataJoint pipelines on Ray, on Dask and on all processors of this machine."""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from djdist.activation import disable, enable
    from djdist.embedded import embedded
    from djdist.errors import (
        ClusterError,
        DatabaseError,
        DjdistError,
        IncompatibleDataJointError,
        LeaseLostError,
        MakeError,
        MissingLibraryError,
        OptionError,
        WorkerSetupError,
    )
    from djdist.executors.dask import DaskExecutor as DaskExecutor
    from djdist.executors.futures import FuturesExecutor
    from djdist.executors.local import LocalExecutor as LocalExecutor
    from djdist.executors.ray import RayExecutor as RayExecutor
    from djdist.populate import populate
    from djdist.progress import progress
    from djdist.report import report
    from djdist.runs import Run, runs
    from djdist.settings import config

__version__ = "0.1.0"

__all__ = [
    "ClusterError",
    "DatabaseError",
    "DjdistError",
    "FuturesExecutor",
    "IncompatibleDataJointError",
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

_MODULES = {
    "FuturesExecutor": "executors.futures",
    "Run": "runs",
    "config": "settings",
    "disable": "activation",
    "embedded": "embedded",
    "enable": "activation",
    "populate": "populate",
    "progress": "progress",
    "report": "report",
    "runs": "runs",
}
_EXECUTORS = {"DaskExecutor": "distributed", "LocalExecutor": "loky", "RayExecutor": "ray"}
"""The executors' classes, and the libraries without which they can't be had."""


class _Package(ModuleType):
    """Loads each public name when it is first asked for, since DataJoint alone takes seconds."""

    def __getattr__(self, name: str) -> Any:
        if name in _EXECUTORS:
            return import_module("djdist.executors").executor_class(name.removesuffix("Executor").lower())
        if name in __all__:
            value = getattr(import_module(f"djdist.{_MODULES.get(name, 'errors')}"), name)
            super().__setattr__(name, value)
            return value
        if name.startswith("_") or find_spec(f"djdist.{name}") is None:
            raise AttributeError(f"module 'djdist' has no attribute {name!r}")
        return import_module(f"djdist.{name}")

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep ``djdist.populate`` a function when Python loads the module of that name."""
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        executors = {name for name, library in _EXECUTORS.items() if find_spec(library)}
        return sorted({*super().__dir__(), *__all__, *executors})

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel by name, as any module does."""
        return import_module, (__name__,)


sys.modules[__name__].__class__ = _Package
