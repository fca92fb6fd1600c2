"""What was assigned to a table and its class after the import, which workers would not know."""

import ast
import inspect
import logging
import sys
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from itertools import chain
from types import FunctionType, ModuleType
from typing import Any

import datajoint as dj

from djdist.errors import OptionError

logger = logging.getLogger(__name__)

OF_DATAJOINT = {
    name
    for tier in (dj.Manual, dj.Lookup, dj.Imported, dj.Computed, dj.Part)
    for base in tier.__mro__
    for name in vars(base)
}
Assignment = tuple[Any, str, Any]
"""A class or module, the name of an attribute, and its value."""
Owner = type | ModuleType
Written = dict[str, ast.expr | None]
"""Expressions by the name they are assigned to; None where it takes more to know the value."""

HARMLESS = (
    *(ast.expr_context, ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.keyword, ast.Constant),
    *(ast.Name, ast.Attribute, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.UnaryOp, ast.BinOp, ast.BoolOp),
    *(ast.Compare, ast.IfExp, ast.Subscript, ast.Slice, ast.JoinedStr, ast.FormattedValue, ast.Call),
)
HARMLESS_CALLS = {
    *(
        "bool",
        "int",
        "float",
        "complex",
        "str",
        "bytes",
        "dict",
        "list",
        "tuple",
        "set",
        "frozenset",
        "range",
    ),
    *("len", "min", "max", "sum", "abs", "round", "sorted", "staticmethod", "classmethod", "partial", "join"),
    *("getenv", "get", "Path", "PosixPath", "timedelta", "date", "time", "datetime", "Decimal", "Fraction"),
    *("array", "zeros", "ones", "full", "arange", "linspace", "int8", "int16", "int32", "int64"),
    *("uint8", "uint16", "uint32", "uint64", "float32", "float64"),
}
"""What an expression may hold, and the names of what it may call, to be evaluated a second time."""

FILLED = {dict, list, set}
"""Containers that keep their identity where a module's are given the caller's content."""
Dumps = Callable[[Any], bytes]


def of_instance(table: dj.Table, dumps: Dumps) -> dict[str, Any]:
    """Return the attributes of an instance, without those that a new one has."""
    attributes = {n: v for n, v in vars(table).items() if not (n.startswith("_") and n in OF_DATAJOINT)}
    new = vars(type(table)()) if attributes else {}
    return {n: v for n, v in attributes.items() if n not in new or _differ(v, new[n], dumps)}


def of_classes(kind: type[dj.Table], dumps: Dumps, others: Iterable[type[dj.Table]] = ()) -> list[Assignment]:
    """Return the data of a table's class, its bases and parts that their modules don't give them.

    ``others`` are tables that its ``make()`` may use; what can't be pickled of those is passed over.
    """
    own = dict.fromkeys(_classes_by_name(kind))
    owners = dict.fromkeys(chain(own, *map(_classes_by_name, others)))
    found = [
        (owner, name, value)
        for owner in owners
        for name, value in vars(owner).items()
        if _is_assigned(owner, name, value, dumps)
    ]
    return [assignment for assignment in found if _travels(*assignment, dumps, warns=assignment[0] in own)]


@contextmanager
def assigned(assignments: list[Assignment]) -> Iterator[None]:
    """Assign the caller's data to classes and modules for a ``with``: another run may have other data."""
    with ExitStack() as undo:
        for owner, name, value in assignments:
            before = vars(owner).get(name, assigned)
            if isinstance(owner, ModuleType) and type(before) is type(value) and type(value) in FILLED:
                _swap(before, value)  # other modules may have imported it
                undo.callback(_swap, before, value)
            else:
                setattr(owner, name, value)
                undo.callback(_restore, owner, name, before)
        yield


def _restore(owner: Any, name: str, before: Any) -> None:
    delattr(owner, name) if before is assigned else setattr(owner, name, before)


def _swap(one: Any, other: Any) -> None:
    """Exchange what two containers hold."""
    contents = [*one.items()] if isinstance(one, dict) else [*one]
    for container, new in ((one, other.copy()), (other, contents)):
        container.clear()
        container.extend(new) if isinstance(container, list) else container.update(new)


def _differ(one: Any, other: Any, dumps: Dumps) -> bool:
    """Return whether two objects differ; what can't be pickled is left to ``__init__()`` on the worker."""
    with suppress(Exception):
        return dumps(one) != dumps(other)
    return False


def _travels(owner: type, name: str, value: Any, dumps: Dumps, *, warns: bool) -> bool:
    try:
        dumps(value)
    except Exception as error:
        if warns and isinstance(error, OptionError):
            raise
        logger.log(
            logging.WARNING if warns else logging.DEBUG,
            "%s.%s was assigned after the import and stays here, since it can't be pickled: %s: %s",
            owner.__name__,
            name,
            type(error).__name__,
            error,
        )
        return False
    return True


def _classes_by_name(kind: type[dj.Table]) -> Iterator[type]:
    for owner in kind.__mro__:
        if owner.__module__.partition(".")[0] not in {"__main__", "builtins", "datajoint"}:
            yield owner
            yield from (
                part for part in vars(owner).values() if inspect.isclass(part) and issubclass(part, dj.Part)
            )


def _is_assigned(owner: type, name: str, value: Any, dumps: Dumps) -> bool:
    """Return whether a class has an attribute from elsewhere than its module.

    What the module works out, such as a folder of this machine, every worker works out itself.
    """
    function = getattr(value, "__func__", value)
    if isinstance(function, FunctionType) and function.__module__ == "__main__":
        return True
    if name.startswith("__") or name in OF_DATAJOINT or isinstance(value, ModuleType):
        return False
    written = written_by(owner)
    if written is None or name not in written:
        return written is not None
    expression = written[name]
    if expression is None:
        return is_of_other_module(function, owner)
    try:
        before = dumps(worked_out(expression, owner))
    except Exception:  # it takes more to know it
        return False
    try:
        return dumps(value) != before
    except Exception:
        return True


def is_of_other_module(function: Any, owner: Owner) -> bool:
    """Return whether a function was taken from another module than a class or module it stands in."""
    if not isinstance(function, FunctionType) or function.__module__ == _module_of(owner).__name__:
        return False
    module = sys.modules.get(function.__module__)
    return getattr(module, function.__qualname__, None) is function


def worked_out(expression: ast.expr, owner: Owner) -> Any:
    """Evaluate again what a class's body or a module says, if this does nothing else and takes no time.

    Raises
    ------
    Exception
        It isn't as simple as that.
    """
    names = ChainMap({**vars(owner)}, vars(_module_of(owner)))
    for node in ast.walk(expression):
        if isinstance(node, ast.Call) and _value(node.func, names).__name__ not in HARMLESS_CALLS:
            raise ValueError(ast.unparse(node))
        if not isinstance(node, HARMLESS):
            raise ValueError(ast.unparse(node))
    return _value(expression, names)


def _value(expression: ast.expr, names: Mapping[str, Any]) -> Any:
    return eval(compile(ast.Expression(expression), "<class>", "eval"), {}, names)


def written_by(owner: Owner) -> Written | None:
    """Return what a module assigns, or assigns to a class of it; None where the source isn't known."""
    try:
        source = inspect.getsource(_module_of(owner))
        return _written_in(source, "" if isinstance(owner, ModuleType) else owner.__qualname__)
    except (OSError, TypeError, KeyError, SyntaxError):
        return None


def _module_of(owner: Owner) -> ModuleType:
    return owner if isinstance(owner, ModuleType) else sys.modules[owner.__module__]


@cache
def parsed(source: str) -> ast.Module:
    """Return the syntax tree of a source."""
    return ast.parse(source)


@cache
def _written_in(source: str, qualname: str) -> Written | None:
    module = parsed(source)
    if not qualname:
        return _stored(module, _name_stored)
    body: ast.Module | ast.ClassDef = module
    for name in qualname.split("."):
        classes = (node for node in ast.walk(body) if isinstance(node, ast.ClassDef) and node.name == name)
        if (found := next(classes, None)) is None:
            return None
        body = found
    return _stored(body, _name_stored) | _stored(module, partial(_attribute_stored, name))


def _stored(block: ast.Module | ast.ClassDef, name_of: Callable[[ast.AST], str | None]) -> Written:
    """Return what a block stores by name; what depends on a condition counts as worked out."""
    written: Written = {}
    for statement in block.body:
        targets, value = _assignment(statement)
        for node in _nodes(statement):
            if name := name_of(node):
                written[name] = value if node in targets else None
    return written


def _assignment(statement: ast.stmt) -> tuple[list[ast.expr], ast.expr | None]:
    if isinstance(statement, ast.Assign):
        return statement.targets, statement.value
    return ([statement.target], statement.value) if isinstance(statement, ast.AnnAssign) else ([], None)


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Return all that runs with a block, so not what is in its functions and classes."""
    yield node
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
        for child in ast.iter_child_nodes(node):
            yield from _nodes(child)


def _name_stored(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name):
        return node.id if isinstance(node.ctx, ast.Store) else None
    if isinstance(node, ast.alias):
        return node.asname or node.name.partition(".")[0]
    return getattr(node, "name", None)  # of a function or a class


def _attribute_stored(owner: str, node: ast.AST) -> str | None:
    if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Store):
        return None
    return node.attr if isinstance(node.value, ast.Name) and node.value.id == owner else None
