"""Which tables ``make()`` reads by its code, and by what of its key it restricts them.

A run table after table has all rows of those tables when a ``make()`` looks at them. What it reads is
known for certain only where it runs, so a name that can't be explained counts as one of all rows.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any

import datajoint as dj
from datajoint.expression import QueryExpression

from djdist.pipeline.checks import MAKE
from djdist.pipeline.foreign_keys import AttributeMap
from djdist.pipeline.key_sources import tables_read

CHANGES = frozenset({"clear", "pop", "popitem", "setdefault", "update"})
"""Methods of a dict after which a key is another one."""
NOTHING = object()


@dataclass(frozen=True)
class Reading:
    """A table that is read, by its full name.

    ``attributes`` pairs those of the key that restrict it with those of the table.
    """

    table: str
    attributes: AttributeMap = ()


def rows_read(
    table: Any, classes: Mapping[str, type], parts: Collection[str], key: Collection[str]
) -> set[Reading]:
    """Return what a table's ``make()`` reads of some tables.

    Its functions are followed into methods of the table, and into functions of the packages of these tables,
    and of the program.

    Parameters
    ----------
    table : datajoint.Table
        Whose ``make()`` it is.
    classes : mapping of str to type
        The classes of the tables to look for, by their full names.
    parts : collection of str
        Their Part tables.
    key : collection of str
        The attributes of the key that it gets.
    """
    return {*_Code(table, classes, parts, key).readings()}


class _Code:
    """The functions that a ``make()`` consists of."""

    def __init__(
        self, table: Any, classes: Mapping[str, type], parts: Collection[str], key: Collection[str]
    ) -> None:
        self.kind = type(table)
        self.key = key
        self.same_key = tuple((name, name) for name in key)
        self._names = {name: each.__name__ for name, each in classes.items()}
        self._packages = {"__main__", *map(_package, [self.kind, *classes.values()])}
        self._tables = [*classes, *parts]
        self._texts = {name: _text_of(name) for name in self._tables}
        self.left = [*self.methods(MAKE)]

    def readings(self) -> Iterator[Reading]:
        seen = set[CodeType]()
        while self.left:
            function = inspect.unwrap(self.left.pop())
            code = getattr(function, "__code__", None)
            if code is not None and code not in seen:
                seen.add(code)
                yield from _readings_of(function, self)

    def methods(self, names: Collection[str], *, overridden: bool = False) -> Iterator[Callable[..., Any]]:
        """Yield what these names are in the table's class, and what they override."""
        for name in names:
            kinds = [kind for kind in self.kind.__mro__ if name in vars(kind)]
            own = [kind for kind in kinds if not kind.__module__.startswith(("datajoint.", "djdist."))]
            found = [_function(vars(kind)[name]) for kind in (own if overridden else own[:1])]
            yield from filter(None, found)

    def follow(self, value: Any) -> None:
        """Look into a function of the pipeline, too."""
        if isinstance(value, FunctionType) and _package(value) in self._packages:
            self.left.append(value)

    def named(self, name: str) -> Iterator[str]:
        """Yield the tables that an unexplained name, or a text, may mean."""
        for table, text in self._texts.items():
            if name == self._names.get(table) or text.search(name):
                yield table

    def meant(self, value: Any) -> list[str]:
        """Return the tables that a value reads."""
        is_class = inspect.isclass(value) and issubclass(value, dj.Table)
        if is_class:
            return [name for name in self._tables if name == value.full_table_name]
        return [*tables_read(value, self._tables)] if isinstance(value, QueryExpression) else []


def _readings_of(function: Any, code: _Code) -> Iterator[Reading]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # nobody knows its text, or it is part of a line
        yield from _readings_by_names(function.__code__, code)
        return
    yield from _Function(function, tree, code).visit(tree)


def _readings_by_names(function: CodeType, code: _Code) -> Iterator[Reading]:
    """Yield what the names in compiled code may mean, which says nothing of restrictions."""
    for name in (*function.co_names, *function.co_freevars, *function.co_consts):
        if isinstance(name, CodeType):
            yield from _readings_by_names(name, code)
        elif isinstance(name, str):
            yield from map(Reading, code.named(name))


class _Function:
    """What one function reads."""

    def __init__(self, function: Any, tree: ast.AST, code: _Code) -> None:
        self._names = {**function.__globals__, **_closure(function)}
        self._code = code
        arguments = [argument.arg for argument in _arguments(tree)]
        self._self = arguments[0] if arguments and _is_method(function, code.kind) else ""
        self._has_key = "key" in arguments and not any(map(self._changes_key, ast.walk(tree)))

    def visit(self, node: ast.AST, restricted: AttributeMap = ()) -> Iterator[Reading]:
        """Yield what is read in a part of the code whose rows are restricted so."""
        match node:
            case ast.BinOp(left=left, op=ast.BitAnd(), right=right):
                yield from self.visit(left, self._attributes(right) or restricted)
                yield from self.visit(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                yield from self.visit(left, restricted)
                yield from self.visit(right, restricted)
            case ast.Call(func=ast.Name() | ast.Attribute() as function, args=[], keywords=[]):
                keeps_rows = isinstance(function, ast.Name) or _keeps_rows(function.attr)
                yield from self.visit(function, restricted if keeps_rows else ())
            case ast.Subscript(value=ast.Attribute(attr="upstream")):
                pass  # DataJoint restricts it to what this key comes from
            case ast.Name() | ast.Attribute():
                yield from self._visit_name(node, restricted)
            case ast.Constant(value=str() as text):
                yield from map(Reading, self._code.named(text))
            case ast.alias(name=name):
                yield from map(Reading, self._code.named(name) if node.asname else ())
            case _:
                for child in ast.iter_child_nodes(node):
                    yield from self.visit(child)

    def _visit_name(self, node: ast.Name | ast.Attribute, restricted: AttributeMap) -> Iterator[Reading]:
        value = self._value(node)
        if value is not NOTHING:
            self._code.follow(value)
            yield from (Reading(name, restricted) for name in self._code.meant(value))
            return
        if isinstance(node, ast.Name):
            yield from (Reading(name, restricted) for name in self._code.named(node.id))
            return
        if (overridden := _is_super(node.value)) or self._is_self(node.value):
            self._code.left += self._code.methods([node.attr], overridden=overridden)
        yield from (Reading(name, restricted) for name in self._code.named(node.attr))
        yield from self.visit(node.value, restricted)

    def _value(self, node: ast.AST) -> Any:
        """Return what a name or an attribute of a module or of a table's class is."""
        if isinstance(node, ast.Name):
            return self._code.kind if node.id == self._self else self._names.get(node.id, NOTHING)
        if isinstance(node, ast.Attribute):
            return _attribute(self._value(node.value), node.attr)
        return NOTHING

    def _is_self(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id == self._self

    def _attributes(self, condition: ast.AST) -> AttributeMap:
        """Return which attributes a condition takes from the key."""
        if isinstance(condition, ast.Name):
            return self._code.same_key if self._has_key and condition.id == "key" else ()
        if not isinstance(condition, ast.Dict):
            return ()
        found: dict[str, str] = {}
        for name, value in zip(condition.keys, condition.values, strict=True):
            if name is None:
                found |= dict(self._attributes(value))
            elif isinstance(name, ast.Constant):
                found[str(name.value)] = self._of_key(value)
        return tuple((mine, other) for other, mine in found.items() if mine)

    def _of_key(self, value: ast.AST) -> str:
        """Return which attribute of the key a value is, if it is one."""
        match value:
            case ast.Subscript(value=ast.Name(id="key"), slice=ast.Constant(value=str() as name)):
                return name if self._has_key else ""
        return ""

    def _changes_key(self, node: ast.AST) -> bool:
        match node:
            case ast.Name(id="key", ctx=ast.Store() | ast.Del()):
                return True
            case ast.Subscript(value=ast.Name(id="key"), ctx=ast.Store() | ast.Del(), slice=name):
                return not isinstance(name, ast.Constant) or name.value in self._code.key
            case ast.Attribute(value=ast.Name(id="key"), attr=attribute):
                return attribute in CHANGES
        return False


def _attribute(holder: Any, name: str) -> Any:
    """Return what a module, or a class, has: of tables its Part tables only, not what asks the database."""
    if isinstance(holder, ModuleType):
        return getattr(holder, name, NOTHING)
    if not inspect.isclass(holder):
        return NOTHING
    found = inspect.getattr_static(holder, name, NOTHING)
    if inspect.isclass(found) or issubclass(holder, dj.Table):
        return found if inspect.isclass(found) else NOTHING
    return _function(found) or NOTHING


def _keeps_rows(attribute: str) -> bool:
    """Return whether what is called so, without arguments, makes an instance or renames nothing."""
    return attribute == "proj" or attribute[:1].isupper()


def _text_of(table: str) -> re.Pattern[str]:
    """Return what stands for a table in a text, which may lack its schema."""
    name = re.split(r"[.`\"]", table.rstrip('`"'))[-1]
    return re.compile(rf"(?<!\w){re.escape(name)}(?!\w)")


def _arguments(tree: ast.AST) -> list[ast.arg]:
    found = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return next((node.args.posonlyargs + node.args.args for node in found), [])


def _is_super(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def _is_method(function: Any, kind: type) -> bool:
    return any(_function(value) is function for each in kind.__mro__ for value in vars(each).values())


def _function(value: Any) -> Callable[..., Any] | None:
    """Return the function of a class's attribute."""
    value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    return inspect.unwrap(value) if isinstance(value, FunctionType) else None


def _closure(function: Any) -> dict[str, Any]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    found = {}
    for name, cell in cells:
        try:
            found[name] = cell.cell_contents
        except ValueError:  # it has none yet
            continue
    return found


def _package(value: Any) -> str:
    return str(value.__module__).partition(".")[0]
