"""What a pipeline's modules have become since they were imported: bound to schemas, activated, linked."""

import dis
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import accumulate, chain
from types import CodeType, FunctionType, ModuleType
from typing import Any

import cloudpickle
import datajoint as dj

from djdist.errors import WorkerSetupError

Pack = Callable[[Any], bytes]
Unpack = Callable[[bytes], Any]
Packed = bytes | str
"""A pickled value, or why it can't be pickled."""
Link = tuple[ModuleType, str, Any]
"""A global of a module and what it holds while keys are made."""

OTHER_SCHEMA = (
    "{module}.{name} belongs to the schema {here!r} here, and to {there!r} at the caller. If its module "
    "takes the name from an environment variable or a file, give workers the caller's before they import it "
    '(Ray: RayExecutor(runtime_env={{"env_vars": {{...}}}}), else: start them with it). If they have worked '
    "for another pipeline, restart them."
)
PRELOAD = "Or let djdist.config.preload name a module that activates it when it is imported."
NOT_NAMED = "workers get only what the modules name that are linked with it"


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
    """A schema object of a module, ``linked`` with another module, by whose tables its own are declared."""

    module: str
    name: str
    database: str
    connection: Packed
    create_schema: bool
    create_tables: bool | None
    linked: str = ""

    def bind(self, unpack: Unpack) -> None:
        """Activate it, if importing its module or the one it is linked with didn't."""
        schema = getattr(sys.modules.get(self.module), self.name, None)
        if isinstance(schema, dj.schemas._Schema) and schema.database is None:
            objects = vars(sys.modules[self.linked]) if self.linked in sys.modules else None
            # the tables are there, and workers often may not create any
            schema.activate(
                self.database,
                connection=_unpacked(f"the connection of {self.name}", self.connection, unpack),
                create_schema=False,
                create_tables=False,
                add_objects=objects,
            )
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
    links: Mapping[str, Packed | Mapping[str, Packed]]

    def link(self, unpack: Unpack) -> list[Link]:
        """Import what it is linked with, and give what its globals hold at the caller."""
        module = sys.modules[self.name]
        try:
            for name in self.linked:
                import_module(name)
            links = [(module, name, _unpacked(name, value, unpack)) for name, value in self.links.items()]
        except Exception as error:
            if self._is_activated_here:
                return []
            raise WorkerSetupError(
                f"{self.name} can't be activated as at the caller: {type(error).__name__}: {error}. {PRELOAD}"
            ) from error
        # what is no module, this process may have worked out in its own way when it activated it
        return [
            link for link in links if isinstance(link[2], ModuleType) or vars(link[0]).get(link[1]) is None
        ]

    def link_if_there(self, unpack: Unpack) -> list[Link]:
        """Do the same for a module that may not be needed: what isn't there says so when it is used."""
        try:
            module = import_module(self.name)
        except Exception:  # whoever needs it will import it, and see why it can't be
            return []
        try:
            return self.link(unpack)
        except WorkerSetupError as error:
            return [(module, name, _Absent(name, error)) for name in self.links]

    @property
    def _is_activated_here(self) -> bool:
        """Whether this process has activated it by itself, as a module does that is preloaded."""
        module = sys.modules[self.name]
        schemas = [value for value in vars(module).values() if isinstance(value, dj.schemas._Schema)]
        return all(s.database for s in schemas) and all(vars(module).get(n) is not None for n in self.links)


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
    needed: set[str]

    def apply(self, unpack: Unpack) -> list[Link]:
        """Let modules become what they are at the caller, and give what their globals have to hold.

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
        bound: tuple[ActivatedSchema | BoundTable, ...] = (*self.schemas, *self.tables)
        for each in bound:
            with suppress(*(() if each.module in needed else (Exception,))):
                each.bind(unpack)
        for table in self.tables:
            table.check()
        return links


def bindings(table: type[dj.Table], pack: Pack) -> Bindings:
    """Look at all modules that this process has imported."""
    bound = [BoundTable(t.__module__, t.__qualname__, t.database) for t in bound_tables()]
    schemas, late = list[ActivatedSchema](), dict[str, list[Any]]()
    for module, name, schema in _schemas():
        values = schema.database, _packed(schema.connection, pack), schema.create_schema, schema.create_tables
        schemas.append(ActivatedSchema(module, name, *values, linked=_linked(schema)))
        if schema.declare_list:
            late.setdefault(module, []).append(schema)
    of_pipeline = {*late, *(each.module for each in bound), *(each.module for each in schemas)}
    needed = of_pipeline & (_reached(table.__module__) if late else set())
    return Bindings(_this_process(), tuple(bound), tuple(schemas), tuple(_late_modules(late, pack)), needed)


def register(connection: dj.Connection, schemas: list[str]) -> None:
    """Let ``self.upstream`` find the schemas that the caller's connection knows."""
    for name in schemas:
        if name not in connection.schemas:
            schema = dj.Schema(connection=connection)
            schema.database = name
            connection.register(schema)


def tables(base: type[dj.Table]) -> Iterator[type[dj.Table]]:
    """Give all classes of tables below one."""
    return _subclasses(base)


def _subclasses(base: type[Any]) -> Iterator[type[Any]]:
    for kind in base.__subclasses__():
        yield kind
        yield from _subclasses(kind)


def bound_tables(connection: dj.Connection | None = None) -> Iterator[type[dj.Table]]:
    """Give the tables of modules that belong to a schema, on a connection or on all."""
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


def _travels_by_name(name: str, module: ModuleType) -> bool:
    by_value = cloudpickle.list_registry_pickle_by_value()
    parents = accumulate(name.split("."), "{}.{}".format)
    is_script = module is sys.modules["__main__"]  # multiprocessing gives it a second name
    return not is_script and sys.modules.get(name) is module and by_value.isdisjoint(parents)


def _reached(name: str) -> set[str]:
    """Name the modules that a module's code can reach, through those that it has imported."""
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


def _schemas() -> Iterator[tuple[str, str, Any]]:
    kinds = {dj.schemas._Schema, *_subclasses(dj.schemas._Schema)}
    for module_name, module in _modules():
        if module is sys.modules["__main__"] or kinds.isdisjoint(map(type, [*vars(module).values()])):
            continue
        for name, value in [*vars(module).items()]:
            if type(value) in kinds and value.database:
                yield module_name, name, value


def _linked(schema: Any) -> str:
    """Name the module whose objects a schema was given, if workers can import it."""
    given = ((name, module) for name, module in _modules() if vars(module) is schema.add_objects)
    return next((name for name, module in given if _travels_by_name(name, module)), "")


def _late_modules(late: Mapping[str, list[Any]], pack: Pack) -> Iterator[LateModule]:
    codes = {name: [*_codes(name)] for name in late}
    named = {name for code in chain(*codes.values()) for name in (*code.co_names, *code.co_consts)}
    for module, schemas in late.items():
        given = {id(schema.add_objects) for schema in schemas if schema.add_objects}
        set_names = _set_by_activation(codes[module])
        links = {
            name: _link(value, named, pack)
            for name, value in [*vars(sys.modules[module]).items()]
            if (name in set_names and value is not None)
            or (isinstance(value, ModuleType) and id(vars(value)) in given)
        }
        yield LateModule(module, tuple(filter(None, map(_linked, schemas))), links)


def _codes(module: str) -> Iterator[CodeType]:
    """Give the code of all functions of a module, the decorated ones too, as its file has it."""
    loader: Any = getattr(sys.modules[module].__spec__, "loader", None)
    return _codes_within(loader.get_code(module)) if hasattr(loader, "get_code") else iter(())


def _codes_within(code: CodeType) -> Iterator[CodeType]:
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield inner
            yield from _codes_within(inner)


def _set_by_activation(codes: Sequence[CodeType]) -> set[str]:
    """Name the globals that are set by functions which activate schemas, and by what these call."""
    activating = [code for code in codes if "activate" in code.co_names]
    called = {name for code in activating for name in code.co_names}
    setting = [*activating, *(code for code in codes if code.co_name in called)]
    return {i.argval for code in setting for i in dis.get_instructions(code) if i.opname == "STORE_GLOBAL"}


def _link(value: Any, named: set[Any], pack: Pack) -> Packed | Mapping[str, Packed]:
    if not isinstance(value, ModuleType) or isinstance(value, dj.VirtualModule):
        return _packed(value, pack)
    if _travels_by_name(value.__name__, value):
        return _packed(value, pack)
    items = {name: item for name, item in vars(value).items() if name != "__builtins__"}
    return {name: _packed(item, pack) if name in named else NOT_NAMED for name, item in items.items()}


def _packed(value: Any, pack: Pack) -> Packed:
    try:
        return pack(value)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _unpacked(name: str, packed: Packed | Mapping[str, Packed], unpack: Unpack) -> Any:
    if isinstance(packed, str):
        raise WorkerSetupError(f"{name} can't be sent to workers: {packed}")
    return unpack(packed) if isinstance(packed, bytes) else _Namespace(name, packed, unpack)


class _Namespace(ModuleType):
    """A module of the caller's, of which only items were sent; the others say so when they are used."""

    def __init__(self, name: str, items: Mapping[str, Packed], unpack: Unpack) -> None:
        super().__init__(name)
        errors: dict[str, Exception] = {}
        self.__dict__["__errors__"] = errors
        for item, packed in items.items():
            try:
                self.__dict__[item] = _unpacked(f"{name}.{item}", packed, unpack)
            except Exception as error:
                errors[item] = error

    def __getattr__(self, name: str) -> Any:
        if error := self.__dict__["__errors__"].get(name):
            raise WorkerSetupError(str(error)) from error
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class _Absent(ModuleType):
    """A module that isn't there, which says so when it is used."""

    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(name)
        self.__dict__["__error__"] = error

    def __getattr__(self, name: str) -> Any:
        raise self.__dict__["__error__"]
