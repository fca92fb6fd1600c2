"""What was assigned to a table and its class after the import, which workers would not know."""

import ast
import inspect
import logging
import sys
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
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
Assignment = tuple[type | ModuleType, str, Any]
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
"""What an expression may hold, and the names of what it may call, to be worked out a second time."""

Dumps = Callable[[Any], bytes]


def of_instance(table: dj.Table, dumps: Dumps) -> dict[str, Any]:
    """Give the attributes of an instance, without those that a new one has."""
    attributes = {n: v for n, v in vars(table).items() if not (n.startswith("_") and n in OF_DATAJOINT)}
    new = vars(type(table)()) if attributes else {}
    return {n: v for n, v in attributes.items() if n not in new or _differ(v, new[n], dumps)}


def of_classes(kind: type[dj.Table], dumps: Dumps, others: Iterable[type[dj.Table]] = ()) -> list[Assignment]:
    """Give the data of a table's class, its bases and parts that their modules don't give them.

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
    """Let classes and modules have the caller's data for a ``with``: another run may have other data."""
    before = [(owner, name, vars(owner).get(name, assigned)) for owner, name, _ in assignments]
    try:
        for owner, name, value in assignments:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            delattr(owner, name) if value is assigned else setattr(owner, name, value)


def _differ(one: Any, other: Any, dumps: Dumps) -> bool:
    """Tell whether two objects differ; what can't be pickled is left to ``__init__()`` on the worker."""
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
    """Tell whether a class has an attribute from elsewhere than its module.

    What the module works out, such as a folder of this machine, every worker works out itself.
    """
    function = getattr(value, "__func__", value)
    if isinstance(function, FunctionType) and function.__module__ == "__main__":
        return True
    if name.startswith("__") or name in OF_DATAJOINT or isinstance(value, ModuleType):
        return False
    written = _written(owner)
    if written is None or name not in written:
        return written is not None
    expression = written[name]
    if expression is None:
        return _is_of_other_module(function, owner)
    try:
        before = dumps(_worked_out(expression, owner))
    except Exception:  # it takes more to know it
        return False
    try:
        return dumps(value) != before
    except Exception:
        return True


def _is_of_other_module(function: Any, owner: type) -> bool:
    if not isinstance(function, FunctionType) or function.__module__ == owner.__module__:
        return False
    module = sys.modules.get(function.__module__)
    return getattr(module, function.__qualname__, None) is function


def _worked_out(expression: ast.expr, owner: type) -> Any:
    """Work out once more what a class's body says, if this does nothing else and takes no time.

    Raises
    ------
    Exception
        It isn't as simple as that.
    """
    names = ChainMap({**vars(owner)}, vars(sys.modules[owner.__module__]))
    for node in ast.walk(expression):
        if isinstance(node, ast.Call) and _value(node.func, names).__name__ not in HARMLESS_CALLS:
            raise ValueError(ast.unparse(node))
        if not isinstance(node, HARMLESS):
            raise ValueError(ast.unparse(node))
    return _value(expression, names)


def _value(expression: ast.expr, names: Mapping[str, Any]) -> Any:
    return eval(compile(ast.Expression(expression), "<class>", "eval"), {}, names)


def _written(owner: type) -> Written | None:
    """Give what a class's module assigns to it, in its body or below; None where the source isn't known."""
    try:
        return _written_in(inspect.getsource(sys.modules[owner.__module__]), owner.__qualname__)
    except (OSError, TypeError, KeyError, SyntaxError):
        return None


@cache
def _parsed(source: str) -> ast.Module:
    return ast.parse(source)


@cache
def _written_in(source: str, qualname: str) -> Written | None:
    module = _parsed(source)
    body: ast.Module | ast.ClassDef = module
    for name in qualname.split("."):
        classes = (node for node in ast.walk(body) if isinstance(node, ast.ClassDef) and node.name == name)
        if (found := next(classes, None)) is None:
            return None
        body = found
    return _stored(body, _name_stored) | _stored(module, partial(_attribute_stored, name))


def _stored(block: ast.Module | ast.ClassDef, name_of: Callable[[ast.AST], str | None]) -> Written:
    """Give what a block stores by name; what depends on a condition counts as worked out."""
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
    """Give all that runs with a block, so not what is in its functions and classes."""
    yield node
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
        for child in ast.iter_child_nodes(node):
            yield from _nodes(child)


def _name_stored(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name):
        return node.id if isinstance(node.ctx, ast.Store) else None
    return getattr(node, "name", None)  # of a function, a class, an import


def _attribute_stored(owner: str, node: ast.AST) -> str | None:
    if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Store):
        return None
    return node.attr if isinstance(node.value, ast.Name) and node.value.id == owner else None
