"""A pipeline of many tables with forks and joins, in the middle of being made: keys are to be had in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import datajoint as dj

from benchmarks.many_keys import add_numbers, update_statistics
from djdist._job import Recipe
from djdist.job_stores.jobs_table.lease import new_token
from djdist.job_stores.jobs_table.refreshing import Refreshing
from djdist.job_stores.jobs_table.several import JobsTables
from djdist.job_stores.jobs_table.store import JobsTable, Owner
from djdist.job_stores.jobs_table.transactions import Transactions
from djdist.jobs.table import jobs_of
from djdist.pipeline.jobs_table import jobs_table_spec_of
from djdist.pipeline.jobs_table_spec import JobsTableSpec
from djdist.pipeline.plan import plan_of

TABLES = 30
STAGE = 3


@dataclass(frozen=True)
class Pipeline:
    """What a process of its own needs to know to drive a pipeline's run."""

    specs: dict[str, JobsTableSpec]
    recipes: dict[str, Recipe]
    targets: dict[str, str]
    """The full names of the tables that are filled."""

    def stores(self, lease_seconds: int = 60) -> dict[str, JobsTable]:
        owner, refreshing = Owner(new_token(lease_seconds)), Refreshing(priority=5)
        transactions = Transactions(next(iter(self.specs.values())).settings, 60)
        return {
            name: JobsTable(spec, owner, refreshing=refreshing, transactions=transactions)
            for name, spec in self.specs.items()
        }


def store_of(stores: dict[str, JobsTable]) -> JobsTables:
    first = next(iter(stores.values()))
    assert first.transactions
    return JobsTables(stores, first.transactions)


def fill(lab: ModuleType, numbers: int) -> Pipeline:
    """Declare the tables and make of each number what comes before a table of its own, all tables alike."""
    add_numbers(lab, numbers)
    tables = list[Any]()
    for number in range(TABLES):
        tables.append(_declared(lab, number, tables))
        made_until = numbers * (number + 1) // (TABLES + 1)
        lab.Number.connection.query(
            f"INSERT INTO {tables[-1]().full_table_name} (n) "
            f"SELECT n FROM {lab.Number().full_table_name} WHERE n >= {made_until}"
        )
        update_statistics(tables[-1]())
    plan = plan_of(tables)
    specs = {each.name: jobs_table_spec_of(plan, each, jobs_of(each.table)) for each in plan.tables}
    recipes = {
        each.name: Recipe(each.name, upstream=each.upstream, follows=each.followed, after=each.after)
        for each in plan.tables
    }
    return Pipeline(specs, recipes, {each.name: each.table.full_table_name for each in plan.tables})


def _declared(lab: ModuleType, number: int, above: Sequence[Any]) -> Any:
    """Declare the next table: in turns one, two that come of it, and one that comes of both."""
    first = number - number % STAGE
    parents = [above[first]] if number > first else above[first - 2 :] or [lab.Number]
    definition = "\n".join(f"-> {parent.__name__}" for parent in parents)
    members = {"definition": definition, "make": lambda table, key: table.insert1(key)}
    table = type(f"Step{number}", (dj.Computed,), members)
    setattr(lab, table.__name__, lab.schema(table, context=vars(lab)))
    return getattr(lab, table.__name__)
