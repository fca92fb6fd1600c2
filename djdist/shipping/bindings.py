"""What a pipeline's modules have become since they were imported: bound to schemas, activated, linked."""

import dis
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from types import CodeType, FunctionType, ModuleType
from typing import Any
from weakref import WeakSet

import datajoint as dj

from djdist.errors import WorkerSetupError
from djdist.shipping.assignments import Assignment
from djdist.shipping.module_state import Given, given, modules_beside, owners
from djdist.shipping.packed import Absent, Pack, Packed, Packer, Unpack, travels_by_name

Path = tuple[Any, ...]

_activated_for_runs = WeakSet[Any]()
"""Schemas that were not activated by this process's own code."""

LONGEST_SEARCHED = 1000
"""Longer containers are not searched for schemas."""

OTHER_SCHEMA = (
    "{module}.{name} belongs to the schema {here!r} here, and to {there!r} at the caller. If its module "
    "takes the name from an environment variable or a file, give workers the caller's before they import it "
    '(Ray: RayExecutor(runtime_env={{"env_vars": {{...}}}}), else: start them with it). If they have worked '
    "for another pipeline, restart them."
)
PRELOAD = "Or let djdist.config.preload name a module that activates it when it is imported."


@dataclass(frozen=True)
class BoundTable:
    """A table of a module and the name of its schema."""

    module: str
    name: str
    database: str

    def bind(self, unpack: Unpack) -> None:
        """Bind it, if importing its module didn't."""
        if self._class is not None and self._class.database is None:
            schema = dj.Schema(self.database, create_schema=False, create_tables=False)
            schema(self._class, context=vars(sys.modules[self.module]))

    def check(self) -> None:
        """Raise WorkerSetupError where it belongs to another schema in this process."""
        here = getattr(self._class, "database", None)
        if here not in (None, self.database):
            raise WorkerSetupError(
                OTHER_SCHEMA.format(module=self.module, name=self.name, here=here, there=self.database)
            )

    @property
    def _class(self) -> type[dj.Table] | None:
        return getattr(sys.modules.get(self.module), self.name, None)


@dataclass(frozen=True)
class ActivatedSchema:
    """A schema object of a module, at a path of names and keys.

    Attributes
    ----------
    linked : str
        A module by whose tables its own are declared.
    """

    module: str
    path: Path
    database: str
    connection: Packed
    create_schema: bool
    create_tables: bool | None
    linked: str = ""

    def bind(self, unpack: Unpack) -> None:
        """Activate it, if importing its module or the one it is linked with didn't."""
        schema = _at(sys.modules.get(self.module), self.path)
        if isinstance(schema, dj.schemas._Schema) and schema.database is None:
            objects = vars(sys.modules[self.linked]) if self.linked in sys.modules else None
            # the tables are there, and workers often may not create any
            schema.activate(
                self.database,
                connection=self.connection.unpacked(f"the connection of {self.path[0]}", unpack),
                create_schema=False,
                create_tables=False,
                add_objects=objects,
            )
            _activated_for_runs.add(schema)
            schema.create_schema, schema.create_tables = self.create_schema, self.create_tables


@dataclass(frozen=True)
class LateModule:
    """A module whose schema was activated after its import, as those of DataJoint Elements are.

    Attributes
    ----------
    linked : tuple of str
        Modules that its schemas were given objects of; as a rule they activate it when they are imported.
    links : dict
        Globals that were set by its activation. Of modules that workers can't import, the items.
    """

    name: str
    linked: tuple[str, ...]
    links: Mapping[str, Packed]

    def link(self, unpack: Unpack) -> list[Assignment]:
        """Import what it is linked with, and return what its globals hold at the caller."""
        module = sys.modules[self.name]
        try:
            for name in self.linked:
                import_module(name)
            links = [(module, name, value.unpacked(name, unpack)) for name, value in self.links.items()]
        except Exception as error:
            if self.is_activated_here:
                return []
            raise WorkerSetupError(
                f"{self.name} can't be activated as at the caller: {type(error).__name__}: {error}. {PRELOAD}"
            ) from error
        # what is no module, this process may have worked out in its own way when it activated it
        return [
            link for link in links if isinstance(link[2], ModuleType) or vars(link[0]).get(link[1]) is None
        ]

    def link_if_there(self, unpack: Unpack) -> list[Assignment]:
        """Do the same for a module that may not be needed: what isn't there says so when it is used."""
        try:
            module = import_module(self.name)
        except Exception:  # whoever needs it will import it, and see why it can't be
            return []
        try:
            return self.link(unpack)
        except WorkerSetupError as error:
            return [(module, name, Absent(name, error)) for name in self.links]

    @property
    def is_activated_here(self) -> bool:
        """Whether this process has activated it by itself, as a module does that is preloaded."""
        module = sys.modules.get(self.name)
        if module is None:
            return False
        schemas = [schema for _, schema in _schemas_in(module)]
        is_own = all(s.database and s not in _activated_for_runs for s in schemas)
        return is_own and all(vars(module).get(n) is not None for n in self.links)


@dataclass(frozen=True)
class Bindings:
    """All that workers have to know of the caller's modules.

    Attributes
    ----------
    origin : tuple
        The caller's process, which has them already, also where its own threads are workers.
    needed : set of str
        Modules that the table's module can reach. Others may be imported by ``make()``, or by none.
    """

    origin: tuple[str, int]
    tables: tuple[BoundTable, ...]
    schemas: tuple[ActivatedSchema, ...]
    late: tuple[LateModule, ...]
    given: tuple[Given, ...]
    needed: set[str]

    def apply(self, unpack: Unpack) -> list[Assignment]:
        """Bind modules as they are at the caller, and return what their globals have to hold.

        Raises
        ------
        WorkerSetupError
            What a module is linked with that is needed isn't there, or a table belongs to another schema.
        """
        if self.origin == _this_process():
            return []
        needed = self.needed & {*sys.modules}
        first = sorted(self.late, key=lambda module: module.name not in needed)
        found = (m.link(unpack) if m.name in needed else m.link_if_there(unpack) for m in first)
        links = [*chain.from_iterable(found)]
        activated = {module.name for module in self.late if module.is_activated_here}
        links += chain.from_iterable(each.assignments(activated, needed, unpack) for each in self.given)
        bound: tuple[ActivatedSchema | BoundTable, ...] = (*self.schemas, *self.tables)
        for each in bound:
            with suppress(*(() if each.module in needed else (Exception,))):
                each.bind(unpack)
        for table in self.tables:
            table.check()
        return links


def bindings(table: type[dj.Table], pickle: Pack) -> Bindings:
    """Return what the modules that this process has imported have become."""
    bound = [BoundTable(t.__module__, t.__qualname__, t.database) for t in bound_tables()]
    found = [*_schemas({each.module for each in bound})]
    late = dict[str, list[Any]]()
    for module, _, schema in found:
        if schema.declare_list:
            late.setdefault(module, []).append(schema)
    beside = modules_beside({*(each.module for each in bound), *(module for module, *_ in found)})
    codes = chain.from_iterable(map(_codes, beside if late else ()))
    packer = Packer(pickle, {name for code in codes for name in _named(code)})
    schemas = [
        ActivatedSchema(
            *(module, path, schema.database, packer.pack(schema.connection)),
            *(schema.create_schema, schema.create_tables, _linked(schema)),
        )
        for module, path, schema in found
    ]
    of_pipeline = {*late, *(each.module for each in bound), *(each.module for each in schemas)}
    needed = of_pipeline & (_reached(table.__module__) if late else set())
    modules = tuple(_late_modules(late, packer))
    known = {(module.name, name) for module in modules for name in module.links}
    state = tuple(given(beside, packer, known))
    return Bindings(_this_process(), tuple(bound), tuple(schemas), modules, state, needed)


def register(connection: dj.Connection, schemas: list[str]) -> None:
    """Register the schemas that the caller's connection knows, so that ``self.upstream`` finds them."""
    for name in schemas:
        if name not in connection.schemas:
            schema = dj.Schema(connection=connection)
            schema.database = name
            connection.register(schema)


def tables(base: type[dj.Table]) -> Iterator[type[dj.Table]]:
    """Return all classes of tables below one."""
    return _subclasses(base)


def _subclasses(base: type[Any]) -> Iterator[type[Any]]:
    for kind in base.__subclasses__():
        yield kind
        yield from _subclasses(kind)


def bound_tables(connection: dj.Connection | None = None) -> Iterator[type[dj.Table]]:
    """Return the tables of modules that belong to a schema, on a connection or on all."""
    for table in tables(dj.Table):
        if _is_bound_master(table) and (connection is None or table._connection is connection):
            yield table


def _this_process() -> tuple[str, int]:
    return platform.node(), os.getpid()


def _is_bound_master(table: type[dj.Table]) -> bool:
    importable = getattr(sys.modules.get(table.__module__), table.__name__, None) is table
    return importable and table.__module__ != "__main__" and isinstance(table.__dict__.get("database"), str)


def _modules() -> Iterator[tuple[str, ModuleType]]:
    return ((name, module) for name, module in [*sys.modules.items()] if isinstance(module, ModuleType))


def _reached(name: str) -> set[str]:
    """Return the names of the modules that a module's code can reach."""
    reached, to_see = set[str](), {name}
    while to_see:
        reached |= to_see
        modules = [module for name in to_see if isinstance(module := sys.modules.get(name), ModuleType)]
        to_see = {name for module in modules for name in _imported_by(module)} - reached
    return reached


def _imported_by(module: ModuleType) -> Iterator[str]:
    for value in [*vars(module).values()]:
        if isinstance(value, ModuleType):
            yield value.__name__
        elif isinstance(value, (type, FunctionType)) and isinstance(value.__module__, str):
            yield value.__module__


def _schemas(of_pipeline: set[str]) -> Iterator[tuple[str, Path, Any]]:
    """Yield the schemas that are globals of modules, and in the pipeline's also those within globals."""
    kinds = {dj.schemas._Schema, *_subclasses(dj.schemas._Schema)}
    for name, module in _modules():
        is_global = not kinds.isdisjoint(map(type, [*vars(module).values()]))
        if module is not sys.modules["__main__"] and (is_global or name in of_pipeline):
            yield from ((name, path, schema) for path, schema in _schemas_in(module) if schema.database)


def _schemas_in(module: ModuleType) -> Iterator[tuple[Path, Any]]:
    for name, owner in owners(module):
        for attribute, value in [*vars(owner).items()]:
            path = (name, attribute) if name else (attribute,)
            items = (((*path, key), item) for key, item in _items(value))
            yield from ((p, v) for p, v in ((path, value), *items) if isinstance(v, dj.schemas._Schema))


def _items(value: Any) -> list[tuple[Any, Any]]:
    if not isinstance(value, dict | list | tuple) or len(value) > LONGEST_SEARCHED:
        return []
    return [*value.items()] if isinstance(value, dict) else [*enumerate(value)]


def _at(module: ModuleType | None, path: Path) -> Any:
    """Return what is found at a path in a module; None where there is nothing."""
    thing: Any = module
    with suppress(LookupError, TypeError):
        for step in path:
            thing = thing[step] if isinstance(thing, dict | list | tuple) else vars(thing)[step]
        return thing
    return None


def _linked(schema: Any) -> str:
    """Return the name of the module whose objects a schema was given, if workers can import it."""
    given = ((name, module) for name, module in _modules() if vars(module) is schema.add_objects)
    return next((name for name, module in given if travels_by_name(name, module)), "")


def _late_modules(late: Mapping[str, list[Any]], packer: Packer) -> Iterator[LateModule]:
    for module, schemas in late.items():
        objects = {id(schema.add_objects) for schema in schemas if schema.add_objects}
        set_names = _set_by_activation([*_codes(sys.modules[module])])
        links = {
            name: packer.pack(value)
            for name, value in [*vars(sys.modules[module]).items()]
            if (name in set_names and value is not None)
            or (isinstance(value, ModuleType) and id(vars(value)) in objects)
        }
        yield LateModule(module, tuple(filter(None, map(_linked, schemas))), links)


def _named(code: CodeType) -> Iterator[Any]:
    yield from code.co_names
    yield from (constant for constant in code.co_consts if isinstance(constant, str))


def _codes(module: ModuleType) -> Iterator[CodeType]:
    """Yield the code of all functions of a module, the decorated ones too, as its file has it."""
    loader: Any = getattr(module.__spec__, "loader", None)
    return _codes_within(loader.get_code(module.__name__)) if hasattr(loader, "get_code") else iter(())


def _codes_within(code: CodeType) -> Iterator[CodeType]:
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield inner
            yield from _codes_within(inner)


def _set_by_activation(codes: Sequence[CodeType]) -> set[str]:
    """Return the names of globals that functions set which activate schemas, or that these call."""
    activating = [code for code in codes if "activate" in code.co_names]
    called = {name for code in activating for name in code.co_names}
    setting = [*activating, *(code for code in codes if code.co_name in called)]
    return {i.argval for code in setting for i in dis.get_instructions(code) if i.opname == "STORE_GLOBAL"}
