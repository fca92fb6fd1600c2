"""What modules of a pipeline were given after their import, as ``activate()`` keeps a linking module.

Workers import a pipeline's modules themselves. What such a module, a class in it, or an object that
``activate()`` changes holds otherwise than the source says, they are sent for the time of a run:

* what functions that activate schemas set, by whatever statement. It has to travel, or the run is refused;
* what was assigned from outside, as by a script. What can't be pickled or is large stays, with a warning.

Each process is left what functions set that a ``make()`` calls, such as caches, and what the source works
out in ways that may take time, such as reading a file.
"""

import ast
import inspect
import logging
import os
import sys
from abc import ABCMeta
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import FunctionType, GetSetDescriptorType, MemberDescriptorType, ModuleType, SimpleNamespace
from typing import Any

import cloudpickle
import datajoint as dj

from djdist.shipping.assignments import (
    Assignment,
    Written,
    is_of_other_module,
    parsed,
    worked_out,
    written_by,
)
from djdist.shipping.packed import Absent, Packed, Packer, Pickled, Refused, Unpack, travels_by_name

logger = logging.getLogger(__name__)

MAKES = {"make", "make_fetch", "make_compute", "make_insert", "_make_tuples", "key_source"}
MUTATORS = {"add", "append", "clear", "extend", "insert", "pop", "remove", "setdefault", "update"}
SIMPLE = {bool, bytes, float, int, str, type(None)}
LARGE_BYTES = 10_000_000

DATAJOINT = os.path.dirname(dj.__file__)
NOT_DATA = (ModuleType, type, MemberDescriptorType, GetSetDescriptorType)
Place = tuple[str, str]
"""A global of a module, and an attribute of it or an empty string."""


@dataclass(frozen=True)
class Given:
    """A value that a module, or a class or an object of it, was given.

    Attributes
    ----------
    owner : str
        The name of the class or object; empty for the module itself.
    """

    module: str
    owner: str
    name: str
    value: Packed

    def assignments(self, activated: set[str], needed: set[str], unpack: Unpack) -> list[Assignment]:
        """Return what gives it to this process, too, unless that has worked it out in its own way."""
        try:
            module = import_module(self.module)
            owner = vars(module)[self.owner] if self.owner else module
        except Exception:  # whoever needs it will import it, and see why it can't be
            return []
        if self._is_own(owner, is_activated=self.module in activated):
            return []
        try:
            return [(owner, self.name, self.value.unpacked(f"{self.module}.{self.name}", unpack))]
        except Exception as error:
            if self.module in needed:
                raise
            return [(owner, self.name, Absent(self.name, error))]

    def _is_own(self, owner: Any, *, is_activated: bool) -> bool:
        if self.name not in vars(owner):
            return False
        differs = _differs(owner, _written(owner), self.name, vars(owner)[self.name], cloudpickle.dumps)
        return is_activated if differs is None else differs


@dataclass(frozen=True)
class _Function:
    """A function of a module: the names in its code, and the places that it sets or changes."""

    name: str
    names: frozenset[str]
    sets: frozenset[Place]


def modules_beside(names: Iterable[str]) -> list[ModuleType]:
    """Return the modules in the folders of a pipeline's, if workers import them."""
    folders = {folder for name in names if (folder := _folder(sys.modules.get(name)))}
    modules = [(name, module) for name, module in [*sys.modules.items()] if _folder(module) in folders]
    return [module for name, module in modules if travels_by_name(name, module)]


def owners(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Yield a module, with an empty name, and its plain classes and objects."""
    yield "", module
    for name, value in [*vars(module).items()]:
        if not name.startswith("__") and (_is_class_of(value, module) or _is_object(value)):
            yield name, value


def given(modules: Iterable[ModuleType], packer: Packer, known: set[tuple[str, str]]) -> Iterator[Given]:
    """Yield what modules were given since their import, but the globals that are known already."""
    modules = [*modules]
    functions = [function for module in modules for function in _functions_of(module)]
    linked, left = _set_by_activation(functions), _set_by_make(functions)
    for module in modules:
        for owner_name, owner in owners(module):
            written = _written(owner)
            for name, value in [*vars(owner).items()]:
                places = _places(module, owner_name, owner, name)
                is_linked = not linked.isdisjoint(places)
                is_left = (
                    not (is_linked or left.isdisjoint(places))
                    or (module.__name__, owner_name or name) in known
                )
                if not is_left and _is_given(owner, written, name, value, packer, is_linked=is_linked):
                    found = Given(module.__name__, owner_name, name, packer.pack(value))
                    if is_linked or _travels(found):
                        yield found


def _is_given(
    owner: Any, written: Written | None, name: str, value: Any, packer: Packer, *, is_linked: bool
) -> bool:
    if name.startswith("__") or _is_or_holds_schema(value):
        return False
    differs = _differs(owner, written, name, value, packer.pickle)
    return is_linked if differs is None else differs


def _differs(owner: Any, written: Written | None, name: str, value: Any, dumps: Any) -> bool | None:
    """Return whether an attribute isn't what the source says; None where it takes more to know."""
    if written is None:
        return None
    function = getattr(value, "__func__", value)
    if isinstance(function, FunctionType | type) and function.__module__ == "__main__":
        return True
    if name not in written:
        return None if "*" in written or name.startswith("_") or isinstance(value, NOT_DATA) else True
    expression = written[name]
    if expression is None:
        if isinstance(function, ModuleType | type) or (
            isinstance(function, FunctionType) and _is_imported(owner, name)
        ):
            return False
        return is_of_other_module(function, owner) if isinstance(function, FunctionType) else None
    try:
        before = worked_out(expression, owner)
        if type(before) is type(value) and type(value) in SIMPLE:
            return bool(before != value)
        pickled = dumps(before)
    except Exception:
        return None
    try:
        return bool(dumps(value) != pickled)
    except Exception:
        return True


def _is_imported(owner: Any, name: str) -> bool:
    return isinstance(owner, ModuleType) and all(name != each.name for each in _functions_of(owner))


def _travels(found: Given) -> bool:
    """Return whether what was assigned from outside can be sent; say so where it can't."""
    if isinstance(found.value, Refused):
        reason = f"it can't be pickled: {found.value.reason}"
    elif isinstance(found.value, Pickled) and len(found.value.pickled) > LARGE_BYTES:
        reason = f"it takes {len(found.value.pickled) / 1e6:.0f} MB"
    else:
        return True
    name = ".".join(filter(None, (found.module, found.owner, found.name)))
    logger.warning("%s was assigned after the import and stays here, since %s", name, reason)
    return False


def _places(module: ModuleType, owner_name: str, owner: Any, name: str) -> set[Place]:
    """Return how code may call an attribute."""
    if isinstance(owner, ModuleType):
        return {(name, ""), (module.__name__.rpartition(".")[2], name)}
    return {(owner_name, name), (type(owner).__name__, name)}


def _written(owner: Any) -> Written | None:
    return written_by(owner) if isinstance(owner, ModuleType | type) else None


def _folder(module: Any) -> str:
    file = getattr(module, "__file__", None) if isinstance(module, ModuleType) else None
    # each call asks of every module that there is, and pathlib takes ten times as long
    return os.path.dirname(file) or os.curdir if isinstance(file, str) else ""


def _is_class_of(value: Any, module: ModuleType) -> bool:
    is_plain = type(value) in (type, ABCMeta) and value.__module__ == module.__name__
    return is_plain and not issubclass(value, dj.Table)


def _is_object(value: Any) -> bool:
    """Return whether a value is an object whose attributes a pipeline may set, so none of DataJoint's own."""
    kind = type(value)
    module = sys.modules.get(kind.__module__)
    if isinstance(value, type | ModuleType) or not kind.__dictoffset__ or _folder(module) in ("", DATAJOINT):
        return False
    return kind is SimpleNamespace or (module is not None and _is_class_of(kind, module))


def _is_or_holds_schema(value: Any) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return any(isinstance(each, dj.schemas._Schema) for each in (value, *items))


def _set_by_activation(functions: list[_Function]) -> set[Place]:
    activating = [function for function in functions if "activate" in function.names]
    called = {name for function in activating for name in function.names}
    return {place for f in functions if f in activating or f.name in called for place in f.sets}


def _set_by_make(functions: list[_Function]) -> set[Place]:
    names, size = {*MAKES}, 0
    while len(names) > size:
        size = len(names)
        names |= {name for function in functions if function.name in names for name in function.names}
    return {place for function in functions if function.name in names for place in function.sets}


def _functions_of(module: ModuleType) -> tuple[_Function, ...]:
    try:
        return _functions_in(inspect.getsource(module))
    except (OSError, TypeError, SyntaxError):
        return ()


@cache
def _functions_in(source: str) -> tuple[_Function, ...]:
    return tuple(_functions(parsed(source), ""))


def _functions(block: ast.AST, owner: str) -> Iterator[_Function]:
    for node in ast.iter_child_nodes(block):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            nodes = [each for statement in node.body for each in ast.walk(statement)]
            names = (getattr(each, "id", getattr(each, "attr", None)) for each in nodes)
            yield _Function(node.name, frozenset(filter(None, names)), frozenset(_sets(nodes, owner)))
        else:
            yield from _functions(node, node.name if isinstance(node, ast.ClassDef) else owner)


def _sets(nodes: list[ast.AST], owner: str) -> Iterator[Place]:
    of_module = {name for node in nodes if isinstance(node, ast.Global) for name in node.names}
    for node in nodes:
        for changed in _changed(node, of_module):
            name, attribute = _place(changed)
            yield (owner if name in {"self", "cls"} else name), attribute


def _changed(node: ast.AST, of_module: set[str]) -> Iterator[ast.AST]:
    if isinstance(node, ast.Name | ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load):
        if not isinstance(node, ast.Name) or node.id in of_module:
            yield node
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr in MUTATORS:
            yield node.func.value
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
        yield ast.Attribute(node.args[0], getattr(node.args[1], "value", ""))


def _place(node: ast.AST) -> Place:
    """Return what ``state.links["a"]`` is part of: the attribute ``links`` of ``state``."""
    attribute = ""
    while isinstance(node, ast.Attribute | ast.Subscript):
        attribute = node.attr if isinstance(node, ast.Attribute) else attribute
        node = node.value
    return getattr(node, "id", ""), attribute
