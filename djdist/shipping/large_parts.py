"""What makes the task function of a table large, by the names that its user knows."""

import dis
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import CodeType, FunctionType
from typing import Any

import cloudpickle

logger = logging.getLogger("djdist.populate")

MEGABYTE = 1_000_000
WARNED_OF_BYTES = 10 * MEGABYTE
NAMED_BYTES = 1 * MEGABYTE
MOST_NAMED = 3
OF_DATAJOINT = {"connection", "declaration_context", "heading"}

Named = tuple[str, Any]


def warn_if_large(size: int, table: Any, make_kwargs: dict[str, Any]) -> None:
    """Say what each worker is sent, if it is much, and which variables are to blame."""
    if size < WARNED_OF_BYTES:
        return
    sizes = {name: _size(value) for name, value in _parts_of(table, make_kwargs)}
    largest = sorted((size, name) for name, size in sizes.items() if size >= NAMED_BYTES)[
        : -MOST_NAMED - 1 : -1
    ]
    named = ", ".join(f"{name} ({size / MEGABYTE:.0f} MB)" for size, name in largest)
    logger.warning(
        "Each worker of %s is sent %.0f MB: %s. Let make() load what is large from a file, or put it into a "
        "module that workers import.",
        type(table).__name__,
        size / MEGABYTE,
        named or "its class",
    )


def _parts_of(table: Any, make_kwargs: dict[str, Any]) -> Iterator[Named]:
    yield from ((f"make_kwargs[{name!r}]", value) for name, value in make_kwargs.items())
    yield from ((f"self.{name}", value) for name, value in vars(table).items() if _is_the_users(name))
    yield from _parts(type(table).__name__, type(table), set())


def _parts(name: str, thing: Any, seen: set[int]) -> Iterator[Named]:
    """Return what travels with a thing, which is itself if that is neither a function nor a class."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    thing = getattr(thing, "__func__", getattr(thing, "fget", thing))  # of class methods and properties
    if isinstance(thing, type | FunctionType):
        parts = _of_class(thing) if isinstance(thing, type) else _of_function(thing)
        for part in parts if _travels_by_value(thing) else ():
            yield from _parts(*part, seen)
    else:
        yield name, thing


def _of_class(kind: type[Any]) -> Iterator[Named]:
    yield from (
        (f"{kind.__name__}.{name}", value) for name, value in vars(kind).items() if _is_the_users(name)
    )
    yield from ((base.__name__, base) for base in kind.__bases__)


def _of_function(function: Callable[..., Any]) -> Iterator[Named]:
    variables = function.__globals__
    yield from ((name, variables[name]) for name in _globals_of(function.__code__) if name in variables)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # it is empty
            yield name, cell.cell_contents


def _globals_of(code: CodeType) -> Iterator[str]:
    yield from (step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL")
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals_of(constant)


def _travels_by_value(thing: Any) -> bool:
    module = thing.__module__ or ""
    by_value = {"__main__", *cloudpickle.list_registry_pickle_by_value()}
    return module not in sys.modules or any(f"{module}.".startswith(f"{name}.") for name in by_value)


def _is_the_users(name: str) -> bool:
    return not name.startswith("_") and name not in OF_DATAJOINT


def _size(value: Any) -> int:
    try:
        return len(cloudpickle.dumps(value))
    except Exception:  # such as a table, which travels in its own way
        return 0
