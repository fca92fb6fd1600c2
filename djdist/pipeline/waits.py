"""What a table's keys wait for in a run of several tables."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from djdist.pipeline.foreign_keys import AttributeMap, ForeignKey, ForeignKeys, Route
from djdist.pipeline.rows_read import Reading


@dataclass(frozen=True)
class KeySource:
    """What a key source is made of.

    ``reads`` are the tables of the run that stand in it; ``row_by_row`` tells that each of its keys comes
    from rows of these by itself. DataJoint's ``default`` is the join of what the primary key refers to.
    """

    default: bool = True
    reads: frozenset[str] = frozenset()
    row_by_row: bool = True


@dataclass(frozen=True)
class Follow:
    """How new keys are found by those of a table upstream that have just been made.

    ``key`` is the foreign key of the key source that leads there, ``attributes`` pairs those of its parent
    with those of the upstream table's key.
    """

    table: str
    key: ForeignKey
    attributes: AttributeMap


@dataclass(frozen=True)
class Waits:
    """What a table's keys wait for.

    ``upstream`` are the tables whose new rows may add keys at any time, ``follows`` tells how to find these.
    Those of ``after`` have to be done before a key is begun: any of their rows may be what it is made from,
    and natively, table after table, all of them would be there.
    """

    upstream: frozenset[str]
    follows: tuple[Follow, ...]
    after: frozenset[str]


def waits_of(
    table: str,
    source: KeySource,
    keys: Mapping[str, Collection[str]],
    foreign_keys: ForeignKeys,
    readings: Iterable[Reading] = (),
) -> Waits:
    """Return what a table waits for, among the tables of a run with the key of each one's jobs.

    What its ``make()`` reads is waited for, unless it reads no more than the row that a foreign key leads to.
    """
    others = {name: {*key} for name, key in keys.items() if name != table}
    primary = [key for key in foreign_keys.of(table) if key.primary]
    closest = [*foreign_keys.routes(primary, others)]
    needed = {route.table for route in closest} | source.reads
    streams = {route.table for route in closest} if source.default else set(source.reads)
    streams = streams if source.row_by_row else set()
    known = {
        _rows(route.table, route.attributes, others)
        for route in foreign_keys.routes(primary, others, beyond=True)
        if source.default or route.table in streams
    } - {None}
    loose = {
        reading.table
        for reading in (*_filled_in(table, foreign_keys, others), *readings)
        if _rows(reading.table, reading.attributes, others) not in known
    }
    after = loose | (needed - streams)
    followed = closest if source.default and source.row_by_row else []
    return Waits(
        upstream=frozenset(streams - after),
        follows=_follows([route for route in followed if route.table not in after], others),
        after=frozenset(after),
    )


def _filled_in(table: str, foreign_keys: ForeignKeys, others: Collection[str]) -> Iterable[Reading]:
    """Yield where the references lead that ``make()`` fills in: secondary ones, and those of Part tables."""
    for route in foreign_keys.routes([key for key in foreign_keys.of(table) if not key.primary], others):
        yield Reading(route.table, route.attributes)
    for route in foreign_keys.routes(foreign_keys.of_parts(table), others):
        inherited = dict(foreign_keys.inherited(route.first.child))
        attributes = [(inherited[name], other) for name, other in route.attributes if name in inherited]
        yield Reading(route.table, tuple(attributes))


def _rows(table: str, attributes: AttributeMap, keys: Mapping[str, Collection[str]]) -> object:
    """Return which rows attributes lead to: of one job by what it has of their key, or None for any."""
    named = frozenset(pair for pair in attributes if pair[1] in keys[table])
    return (table, named) if {name for _, name in named} == keys[table] else None


def _follows(routes: Iterable[Route], keys: Mapping[str, Collection[str]]) -> tuple[Follow, ...]:
    found: dict[Follow, None] = {}
    lost = set()
    for route in routes:
        parents = dict(route.first.attributes)
        attributes = [(parents[n], other) for n, other in route.attributes if other in keys[route.table]]
        if attributes:
            found[Follow(route.table, route.first, tuple(attributes))] = None
        else:
            lost.add(route.table)
    return tuple(follow for follow in found if follow.table not in lost)
