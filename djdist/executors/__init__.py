"""Implementations of :class:`djdist._executor.Executor`, by name."""

import concurrent.futures as cf
from importlib import import_module
from typing import Any, Literal, Protocol, get_args

from djdist._executor import Executor
from djdist._libraries import explained
from djdist.errors import MissingLibraryError, OptionError
from djdist.executors.futures import FuturesExecutor

ExecutorName = Literal["local", "ray", "dask"]


class Client(Protocol):
    """What a ``distributed.Client`` is known by where Dask isn't loaded."""

    def get_executor(self, **options: Any) -> Any: ...


ExecutorLike = ExecutorName | Executor | cf.Executor | Client
"""What ``executor=`` takes."""

NAMES: dict[str, tuple[str, str]] = {
    name: (f"{__name__}.{name}", f"{name.capitalize()}Executor") for name in get_args(ExecutorName)
}
"""Module and class of each: a new executor is one new file or folder and its name above."""


def executor_class(name: str) -> type[Executor]:
    """Load the executor of a name.

    Raises
    ------
    OptionError
        There is no such name.
    MissingLibraryError
        Its library isn't installed, is hidden or broken.
    """
    if name not in NAMES:
        raise OptionError(
            f"There is no executor {name!r}; there are {', '.join(map(repr, NAMES))}, or give an object."
        )
    module, attribute = NAMES[name]
    try:
        found: type[Executor] = getattr(import_module(module), attribute)
    except MissingLibraryError:  # from within a user's ray.py that uses djdist
        raise
    except (ImportError, AttributeError) as error:
        raise explained(error, f'executor="{name}"', name) from error
    return found


def resolve(executor: Any, processes: int | None = 1) -> Executor:
    """Turn what a user gave as ``executor=`` and ``processes=`` into an executor.

    Raises
    ------
    OptionError
        It is no executor, or ``processes`` was given for one that isn't local.
    """
    chosen = _from_name(executor, processes) if isinstance(executor, str) else _from_object(executor)
    if processes != 1 and executor != "local":
        raise OptionError(
            f"processes={processes} goes with the local executor only; {executor!r} has workers of its own. "
            "Leave processes= out, or use executor=djdist.LocalExecutor(processes=…)."
        )
    return chosen


def _from_name(name: str, processes: int | None) -> Executor:
    chosen = executor_class(name)
    return chosen(processes) if name == "local" else chosen()


def _from_object(executor: Any) -> Executor:
    if isinstance(executor, Executor):
        return executor
    if isinstance(executor, cf.Executor):
        return FuturesExecutor(executor)
    if type(executor).__module__.startswith("distributed."):
        return executor_class("dask")(executor)
    raise OptionError(
        f"{executor!r} is no executor: give a name ({', '.join(map(repr, NAMES))}), an executor of djdist, "
        "a dask.distributed.Client or a concurrent.futures.Executor."
    )
