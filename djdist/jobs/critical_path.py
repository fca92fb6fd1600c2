"""The longest chain of jobs of which each needed the one before: with more workers it would take as long."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from graphlib import TopologicalSorter
from typing import Any

import datajoint as dj
import pandas as pd

from djdist.pipeline.foreign_keys import AttributeMap, Route
from djdist.pipeline.key_sources import tables_read
from djdist.pipeline.plan import loaded_foreign_keys

CLOCK = timedelta(seconds=1)
"""A parent's end and its child's beginning may be noted on different machines."""


@dataclass(frozen=True)
class Relation:
    """What the keys of a table share with those keys of another one that they need.

    ``attributes`` are pairs of names, the child's and the parent's.
    """

    child: str
    parent: str
    attributes: tuple[tuple[str, str], ...] = ()


def critical_path(jobs: pd.DataFrame, relations: Collection[Relation]) -> tuple[int, ...]:
    """Return the chain of made jobs that took longest in sum, by their index, the first one first.

    Parameters
    ----------
    jobs : pandas.DataFrame
        As in :class:`~djdist.jobs.history.History`.
    relations : collection of Relation
        Which tables need which.
    """
    made = jobs[(jobs["status"] == "success") & jobs["seconds"].notna()]
    total, before = made["seconds"].to_dict(), dict[int, int]()
    for child in in_order(made["table"].unique(), relations):
        for relation in relations:
            if relation.child == child:
                _extend(made, relation, total, before)
    return tuple(_chain(max(total, key=total.__getitem__), before)) if total and relations else ()


def in_order(tables: Iterable[str], relations: Iterable[Relation]) -> list[str]:
    """Return tables so that each comes after those that it needs."""
    needed: dict[str, set[str]] = {table: set() for table in tables}
    for relation in relations:
        needed.setdefault(relation.child, set()).add(relation.parent)
    return [*TopologicalSorter(needed).static_order()]


def relations_of(all_jobs: Mapping[str, dj.Job]) -> list[Relation]:
    """Return which tables need which, by foreign keys, also of Part tables, and by key sources."""
    tables = {jobs.target.full_table_name: jobs.target for jobs in all_jobs.values()}
    names = dict(zip(tables, all_jobs, strict=True))
    keys = loaded_foreign_keys([*tables.values()])
    read = {name: tables_read(table._jobs_to_do(()), tables) for name, table in tables.items()}
    for table, others in read.items():
        keys.add(table, others)
    found: dict[tuple[str, str], AttributeMap] = {}
    for table, others in read.items():
        for route in keys.routes([*keys.of(table), *keys.of_parts(table)], tables):
            found[table, route.table] = _shared(route, keys.inherited(route.first.child))
        for other in others:  # attributes of the same name are the same
            found.setdefault((table, other), tuple((name, name) for name in tables[table].primary_key))
    return [
        Relation(names[table], names[other], attributes)
        for (table, other), attributes in found.items()
        if other in keys.ancestors(table)
    ]


def _shared(route: Route, inherited: AttributeMap) -> AttributeMap:
    """Return the shared attributes, those of a Part table by the names that its master has for them."""
    of_master = dict(inherited)
    return tuple(
        (of_master.get(name, name), other)
        for name, other in route.attributes
        if not inherited or name in of_master
    )


def _extend(made: pd.DataFrame, relation: Relation, total: dict[int, float], before: dict[int, int]) -> None:
    """Let chains that end with jobs of the parent go on with those of the child that need them."""
    children, parents = (made[made["table"] == table] for table in (relation.child, relation.parent))
    if not len(children) or not len(parents):
        return
    known = [{*rows["values"].iloc[0]} for rows in (children, parents)]
    shared = [pair for pair in relation.attributes if pair[0] in known[0] and pair[1] in known[1]]
    if not shared:
        return
    of_child, of_parent = [name for name, _ in shared], [name for _, name in shared]
    longest: dict[Any, int] = {}
    for job, key in zip(parents.index, _parts(parents, of_parent), strict=True):
        if key not in longest or total[job] > total[longest[key]]:
            longest[key] = job
    columns = (children[name] for name in ("began", "seconds"))
    for job, key, began, seconds in zip(children.index, _parts(children, of_child), *columns, strict=True):
        parent = longest.get(key)
        # one that ended later was made again since
        if parent is None or parents["ended"][parent] > began + CLOCK:
            continue
        if total[parent] + seconds > total[job]:
            total[job], before[job] = total[parent] + seconds, parent


def _parts(jobs: pd.DataFrame, names: Iterable[str]) -> list[tuple[Any, ...]]:
    return [tuple(values[name] for name in names) for values in jobs["values"]]


def _chain(last: int, before: dict[int, int]) -> list[int]:
    chain = [last]
    while chain[0] in before:
        chain.insert(0, before[chain[0]])
    return chain
