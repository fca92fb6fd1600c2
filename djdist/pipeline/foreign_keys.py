"""The foreign keys between tables, and where they lead."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

AttributeMap = tuple[tuple[str, str], ...]
"""Pairs of an attribute and the name that it has in another table."""


@dataclass(frozen=True)
class ForeignKey:
    """A reference of one table to another, both by their full names.

    ``attributes`` pairs those of the child with those of the parent; a ``primary`` one is part of the
    child's primary key.
    """

    child: str
    parent: str
    attributes: AttributeMap = ()
    primary: bool = True


@dataclass(frozen=True)
class Route:
    """How foreign keys lead from a table up to another one.

    ``first`` is the foreign key by which the table is left, ``attributes`` pairs the table's attributes with
    those of the other one, as far as they are handed down.
    """

    first: ForeignKey
    table: str
    attributes: AttributeMap


class ForeignKeys:
    """All foreign keys of some schemas.

    A Part table counts as its master: the rows of both come from one ``make()``. So what a Part refers to
    comes before its master, unless it depends on that master itself.

    Parameters
    ----------
    keys : iterable of ForeignKey
        The foreign keys.
    masters : mapping of str to str, optional
        The master of each Part table.
    """

    def __init__(self, keys: Iterable[ForeignKey], masters: Mapping[str, str] | None = None) -> None:
        self._masters = dict(masters or {})
        self._of_table: defaultdict[str, list[ForeignKey]] = defaultdict(list)
        self._parents: defaultdict[str, set[str]] = defaultdict(set)
        for key in keys:
            self._of_table[key.child].append(key)
            if key.child not in self._masters:
                self._parents[key.child].add(self.whole(key.parent))
        of_parts = [
            (self.whole(part), self.whole(key.parent)) for part in self._masters for key in self.of(part)
        ]
        forward = [pair for pair in of_parts if pair[0] not in {pair[1], *self.ancestors(pair[1])}]
        for master, parent in forward:
            self._parents[master].add(parent)

    def whole(self, table: str) -> str:
        """Return the master of a Part table, and any other table itself."""
        return self._masters.get(table, table)

    def of(self, table: str) -> list[ForeignKey]:
        """Return the foreign keys of one table, without those of its Part tables."""
        return self._of_table.get(table, [])

    def parts(self, master: str) -> list[str]:
        """Return the Part tables of a table."""
        return [part for part, whole in self._masters.items() if whole == master]

    def of_parts(self, master: str) -> list[ForeignKey]:
        """Return the foreign keys of a table's Part tables that lead to other tables."""
        keys = [key for part in self.parts(master) for key in self.of(part)]
        return [key for key in keys if self.whole(key.parent) != master]

    def inherited(self, part: str) -> AttributeMap:
        """Return which attributes of a Part table are which of its master's."""
        return next((key.attributes for key in self.of(part) if key.parent == self._masters.get(part)), ())

    def add(self, child: str, parents: Iterable[str]) -> None:
        """Let a table come after others to which no foreign key leads, but for those that depend on it."""
        wholes = {self.whole(parent) for parent in parents}
        self._parents[child] |= {
            parent for parent in wholes if child not in {parent, *self.ancestors(parent)}
        }

    def ancestors(self, table: str) -> set[str]:
        """Return all tables on which a table depends, Part tables as their masters."""
        found: set[str] = set()
        left = [*self._parents.get(table, ())]
        while left:
            if (parent := left.pop()) not in found:
                found.add(parent)
                left += self._parents.get(parent, ())
        return found

    def descendants(self, table: str) -> set[str]:
        """Return all tables that depend on a table, Part tables as their masters."""
        return {child for child in [*self._parents] if table in self.ancestors(child)}

    def routes(
        self, keys: Iterable[ForeignKey], to: Collection[str], *, beyond: bool = False
    ) -> Iterator[Route]:
        """Yield how foreign keys lead to the closest of some tables, or also beyond these."""
        left = [Route(key, key.parent, key.attributes) for key in keys]
        seen: set[Route] = set()
        while left:
            route = left.pop(0)
            if route in seen:
                continue
            seen.add(route)
            if route.table in to:
                yield route
            onward = self._onward(route.table, to, beyond)
            left += [Route(route.first, k.parent, joined(route.attributes, k.attributes)) for k in onward]

    def _onward(self, table: str, to: Collection[str], beyond: bool) -> list[ForeignKey]:
        """Return the foreign keys to follow: from a Part table of what is looked for, to its master only."""
        whole = self.whole(table)
        if beyond or whole not in to:
            return self.of(table)
        return [key for key in self.of(table) if key.parent == whole != table]


def joined(first: AttributeMap, second: AttributeMap) -> AttributeMap:
    """Return what the attributes of a first table are called in a third one."""
    names = dict(second)
    return tuple((name, names[between]) for name, between in first if between in names)


def foreign_keys_of(dependencies: Any) -> Iterator[ForeignKey]:
    """Yield the foreign keys of DataJoint's graph, in which a number may stand between child and parent."""
    for parent, child, properties in dependencies.edges(data=True):
        if child.isdigit():
            continue  # DataJoint before 2.3.5 has a node between the two where attributes are renamed
        if parent.isdigit():
            ((parent, _),) = dependencies.in_edges(parent)
        yield ForeignKey(child, parent, tuple(properties["attr_map"].items()), properties["primary"])
