"""Values of the caller's modules, pickled one by one, so that what can't travel spoils none of the others."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from types import ModuleType
from typing import Any

import cloudpickle
import datajoint as dj

from djdist.errors import WorkerSetupError

Pack = Callable[[Any], bytes]
Unpack = Callable[[bytes], Any]

CONTAINERS = {dict, list, tuple}
NOT_NAMED = "workers get only what the modules name that are linked with it"


@dataclass(frozen=True)
class Refused:
    """Stands for a value that can't be pickled."""

    reason: str

    def unpacked(self, name: str, unpack: Unpack) -> Any:
        """Raise WorkerSetupError, which says why."""
        raise WorkerSetupError(f"{name} can't be sent to workers: {self.reason}")


@dataclass(frozen=True)
class Pickled:
    """A value, pickled as a whole."""

    pickled: bytes

    def unpacked(self, name: str, unpack: Unpack) -> Any:
        """Return the value."""
        return unpack(self.pickled)


@dataclass(frozen=True)
class PackedModule:
    """A module that workers can't import, such as a script: some of its items."""

    items: Mapping[str, "Packed"]

    def unpacked(self, name: str, unpack: Unpack) -> Any:
        """Return a module with these items."""
        return _Namespace(name, self.items, unpack)


@dataclass(frozen=True)
class PackedContainer:
    """A dict, list or tuple that holds such a module."""

    kind: type
    items: tuple["Packed", ...]

    def unpacked(self, name: str, unpack: Unpack) -> Any:
        """Return the container."""
        return self.kind(item.unpacked(name, unpack) for item in self.items)


Packed = Refused | Pickled | PackedModule | PackedContainer


class Packer:
    """Packs values of modules.

    Parameters
    ----------
    pickle : callable
        Pickles a value on its own.
    named : set
        All that the code of the pipeline names: of a script as a module only those items travel.
    """

    def __init__(self, pickle: Pack, named: set[Any] = frozenset()) -> None:  # type: ignore[assignment]
        self.pickle = pickle
        self._named = named

    def pack(self, value: Any) -> Packed:
        """Pack a value; a module that workers can't import goes by its items, also within a container."""
        if type(value) in CONTAINERS and _holds_script(value):
            items = value.items() if isinstance(value, dict) else value
            return PackedContainer(type(value), tuple(map(self.pack, items)))
        return self._pack_items(value) if _is_script(value) else self._pickled(value)

    def _pack_items(self, module: ModuleType) -> Packed:
        items = {name: item for name, item in vars(module).items() if name != "__builtins__"}
        return PackedModule(
            {n: self._pickled(i) if n in self._named else Refused(NOT_NAMED) for n, i in items.items()}
        )

    def _pickled(self, value: Any) -> Packed:
        try:
            return Pickled(self.pickle(value))
        except Exception as error:
            return Refused(f"{type(error).__name__}: {error}")


def travels_by_name(name: str, module: ModuleType) -> bool:
    """Return whether workers import a module, where they can, instead of being sent what it holds."""
    by_value = cloudpickle.list_registry_pickle_by_value()
    parents = accumulate(name.split("."), "{}.{}".format)
    is_script = module is sys.modules["__main__"]  # multiprocessing gives it a second name
    return not is_script and sys.modules.get(name) is module and by_value.isdisjoint(parents)


def _is_script(value: Any) -> bool:
    is_module = isinstance(value, ModuleType) and not isinstance(value, dj.VirtualModule)
    return is_module and not travels_by_name(value.__name__, value)


def _holds_script(value: Any) -> bool:
    items = value.values() if isinstance(value, dict) else value
    return any(_is_script(item) or (type(item) in CONTAINERS and _holds_script(item)) for item in items)


class _Namespace(ModuleType):
    """A module of the caller's, of which only items were sent; the others say so when they are used."""

    def __init__(self, name: str, items: Mapping[str, Packed], unpack: Unpack) -> None:
        super().__init__(name)
        errors: dict[str, Exception] = {}
        self.__dict__["__errors__"] = errors
        for item, packed in items.items():
            try:
                self.__dict__[item] = packed.unpacked(f"{name}.{item}", unpack)
            except Exception as error:
                errors[item] = error

    def __getattr__(self, name: str) -> Any:
        if error := self.__dict__["__errors__"].get(name):
            raise WorkerSetupError(str(error)) from error
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class Absent(ModuleType):
    """What isn't there, and says so when it is used."""

    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(name)
        self.__dict__["__error__"] = error

    def __getattr__(self, name: str) -> Any:
        raise self.__dict__["__error__"]
