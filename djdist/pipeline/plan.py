"""Which tables a run is about, in which order, and what waits for what."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import datajoint as dj
from datajoint.dependencies import extract_master

from djdist.errors import OptionError
from djdist.pipeline.checks import check_populates, has_make
from djdist.pipeline.connection import reachable
from djdist.pipeline.foreign_keys import ForeignKey, ForeignKeys, foreign_keys_of
from djdist.pipeline.key_sources import is_default, is_row_by_row, query_of, tables_read
from djdist.pipeline.restrictions import applicable, check_applied
from djdist.pipeline.rows_read import Reading, rows_read
from djdist.pipeline.targets import class_of, is_automatic, names_of, tables_meant, unknown_class
from djdist.pipeline.waits import Follow, KeySource, waits_of


@dataclass(frozen=True)
class PlannedTable:
    """A table of a run, and what its keys wait for; other tables are given by their names in the run.

    ``upstream`` are those whose new rows may add keys at any time, ``follows`` tells how to find these where
    the key source is DataJoint's own. Those of ``after`` have to be done before a key is begun: any of their
    rows may be what it is made from, as in runs table after table.
    """

    name: str
    table: Any
    restrictions: tuple[Any, ...] = ()
    upstream: tuple[str, ...] = ()
    follows: tuple[Follow, ...] = ()
    after: tuple[str, ...] = ()

    @property
    def followed(self) -> frozenset[str]:
        """The tables upstream after whose keys new ones are found by a restriction."""
        return frozenset(follow.table for follow in self.follows)


@dataclass(frozen=True)
class Plan:
    """The tables of a run, those upstream first."""

    tables: tuple[PlannedTable, ...]
    foreign_keys: ForeignKeys = field(repr=False)
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    """The attributes that the jobs of each table have, by its full name."""

    def __getitem__(self, name: str) -> PlannedTable:
        return next(planned for planned in self.tables if planned.name == name)


def plan_of_one(table: Any, restrictions: Sequence[Any] = ()) -> Plan:
    """Return the plan of a run of one table, which takes restrictions as DataJoint does."""
    check_populates(table)
    return Plan((PlannedTable(type(table).__name__, table, tuple(restrictions)),), ForeignKeys(()))


def plan_of(
    targets: Any, restrictions: Sequence[Any] = (), *, upstream: bool = False, downstream: bool = False
) -> Plan:
    """Return the tables of a run in dependency order, and what each waits for.

    Parameters
    ----------
    targets
        A module, a ``dj.Schema``, a table, or a list of these.
    restrictions : sequence, optional
        Conditions, each of which applies to the tables that have its attributes.
    upstream, downstream : bool, optional
        Add all auto-populated tables that those need, or that depend on them.

    Raises
    ------
    OptionError
        There is nothing to populate, a table can't be, nothing can fill it, or no table has what a
        restriction names.
    """
    meant = {table.full_table_name: table for table in tables_meant(targets)}
    _check_any(meant, targets)
    _check_one_server([*meant.values()])
    with reachable(next(iter(meant.values())).connection):
        foreign_keys = loaded_foreign_keys([*meant.values()], downstream=downstream)
        chosen = _with_relatives(meant, foreign_keys, upstream=upstream, downstream=downstream)
        _check_any(chosen, targets)
        for table in chosen.values():
            check_populates(table)
        _check_filled(chosen, foreign_keys)
        return _Planning(chosen, foreign_keys, restrictions).plan()


def in_order(tables: Sequence[str], foreign_keys: ForeignKeys) -> list[str]:
    """Return tables in dependency order, else as they came.

    Raises
    ------
    OptionError
        Some of them depend on each other.
    """
    needed = {table: foreign_keys.ancestors(table) & {*tables} for table in tables}
    ordered: list[str] = []
    while left := [table for table in tables if table not in ordered]:
        ready = next((table for table in left if needed[table] <= {*ordered}), None)
        if ready is None:
            around = [table for table in left if table in needed[table]]
            raise OptionError(f"{' and '.join(around)} depend on each other, so none of them can be first.")
        ordered.append(ready)
    return ordered


def loaded_foreign_keys(tables: Sequence[Any], *, downstream: bool = False) -> ForeignKeys:
    """Load DataJoint's graph of the schemas that are activated, and of all that these refer to."""
    keys: dict[ForeignKey, None] = {}
    masters: dict[str, str] = {}
    for connection in {id(table.connection): table.connection for table in tables}.values():
        dependencies = connection.dependencies
        dependencies.clear()  # tables may have been declared since it was loaded
        if downstream:
            dependencies.load_all_downstream()
            keys |= dict.fromkeys(foreign_keys_of(dependencies))
        dependencies.load_all_upstream()
        keys |= dict.fromkeys(foreign_keys_of(dependencies))
        masters |= {part: master for part in dependencies if (master := extract_master(part)) in dependencies}
    return ForeignKeys(keys, masters)


def _with_relatives(
    meant: Mapping[str, Any], foreign_keys: ForeignKeys, *, upstream: bool, downstream: bool
) -> dict[str, Any]:
    """Add what tables need and what depends on them; one that is filled by hand is only where to begin."""
    chosen = dict(meant)
    for name, table in meant.items():
        below = foreign_keys.descendants(name) if downstream else set()
        above = foreign_keys.ancestors(name) if upstream else set()
        for other in sorted(_automatic(above | below, table.connection) - {*chosen}):
            found = class_of(table.connection, other)
            if found is not None and has_make(found()):
                chosen[other] = found()
            elif other in below:
                raise OptionError(unknown_class(other))
    if not (upstream or downstream):
        return chosen
    return {name: table for name, table in chosen.items() if name in _automatic([name], table.connection)}


def _automatic(names: Iterable[str], connection: dj.Connection) -> set[str]:
    split = connection.adapter.split_full_table_name
    return {name for name in names if is_automatic(split(name)[1])}


def _check_any(tables: Collection[str], targets: Any) -> None:
    if not tables:
        named = targets if isinstance(targets, list | tuple) else [targets]
        names = ", ".join(getattr(target, "__name__", None) or str(target) for target in named)
        raise OptionError(
            f"There is nothing to populate in {names or 'an empty list'}: name a module or schema with "
            "dj.Computed or dj.Imported tables, whose schema is activated."
        )


def _check_one_server(tables: Sequence[Any]) -> None:
    places = {
        f"{table.connection.conn_info['host']}:{table.connection.conn_info['port']}": type(table).__name__
        for table in tables
    }
    if len(places) > 1:
        (here, one), (there, other) = [*places.items()][:2]
        raise OptionError(
            f"{one} is on {here}, {other} on {there}: one run has one database, so populate them one by one."
        )


def _check_filled(chosen: Mapping[str, Any], foreign_keys: ForeignKeys) -> None:
    """Raise OptionError for a table that needs an empty one for which there is no make()."""
    for name, table in chosen.items():
        for needed in _automatic(foreign_keys.ancestors(name), table.connection) - {*chosen}:
            found = class_of(table.connection, needed)
            if (found is None or not has_make(found())) and not dj.FreeTable(table.connection, needed):
                raise OptionError(
                    f"Nothing can fill {type(table).__name__}: it depends on {needed}, which is empty and of "
                    "which no class with a make() is known here. Import the module that defines it."
                )


class _Planning:
    """The tables of a run by their full names, and what their key sources are made of."""

    def __init__(
        self, chosen: Mapping[str, Any], foreign_keys: ForeignKeys, restrictions: Sequence[Any]
    ) -> None:
        sources = {name: query_of(table) for name, table in chosen.items()}
        self._restrictions = {name: applicable(restrictions, source) for name, source in sources.items()}
        names = [name for source in sources.values() for name in source.heading.names]
        check_applied(restrictions, self._restrictions.values(), names)
        self._tables = chosen
        self._foreign_keys = foreign_keys
        self._names = dict(zip(chosen, names_of([*chosen.values()]), strict=True))
        parts = [part for name in chosen for part in foreign_keys.parts(name)]
        self._with_parts = [*chosen, *parts]
        self._sources = {name: self._source(name) for name in chosen}
        self._readings = {name: self._read_in_make(name) for name in chosen}
        for name in chosen:
            foreign_keys.add(name, self._sources[name].reads)
            foreign_keys.add(name, {reading.table for reading in self._readings[name]} - {name})

    def plan(self) -> Plan:
        ordered = in_order([*self._tables], self._foreign_keys)
        return Plan(tuple(map(self._planned, ordered)), self._foreign_keys, self._keys)

    def _source(self, name: str) -> KeySource:
        table = self._tables[name]
        todo = table._jobs_to_do(self._restrictions[name])
        reads = self._read_by(todo) - {name} - self._foreign_keys.descendants(name)
        default = is_default(table) and reads == self._read_by(table._jobs_to_do(()))
        return KeySource(default, reads, is_row_by_row(todo, self._with_parts))

    def _read_by(self, todo: Any) -> frozenset[str]:
        return frozenset(map(self._foreign_keys.whole, tables_read(todo, self._with_parts)))

    def _read_in_make(self, name: str) -> list[Reading]:
        classes = {each: type(table) for each, table in self._tables.items()}
        found = rows_read(self._tables[name], classes, self._with_parts[len(classes) :], self._keys[name])
        return [replace(reading, table=self._foreign_keys.whole(reading.table)) for reading in found]

    def _planned(self, name: str) -> PlannedTable:
        first = self._foreign_keys.ancestors(name)  # of two that read each other only one
        readings = [reading for reading in self._readings[name] if reading.table in first]
        source = replace(self._sources[name], reads=self._sources[name].reads & first)
        waits = waits_of(name, source, self._keys, self._foreign_keys, readings)
        return PlannedTable(
            self._names[name],
            self._tables[name],
            self._restrictions[name],
            upstream=self._called(waits.upstream),
            follows=tuple(replace(follow, table=self._names[follow.table]) for follow in waits.follows),
            after=self._called(waits.after),
        )

    def _called(self, tables: Collection[str]) -> tuple[str, ...]:
        return tuple(self._names[table] for table in self._tables if table in tables)

    @cached_property
    def _keys(self) -> dict[str, tuple[str, ...]]:
        return {name: _job_key(table, self._foreign_keys) for name, table in self._tables.items()}


def _job_key(table: Any, foreign_keys: ForeignKeys) -> tuple[str, ...]:
    """Return the attributes that a table's jobs have, whether they are in a jobs table or not."""
    handed_down = {
        name for k in foreign_keys.of(table.full_table_name) if k.primary for name, _ in k.attributes
    }
    key_source = table._jobs_to_do(()).primary_key
    return tuple(name for name in table.primary_key if name in handed_down and name in key_source)
