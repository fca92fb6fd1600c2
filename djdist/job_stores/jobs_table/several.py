"""The jobs tables of one run, which are asked together where that spares dozens of statements."""

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from djdist.errors import DatabaseError
from djdist.job_stores.jobs_table.changes import discouraging
from djdist.job_stores.jobs_table.store import JobsTable
from djdist.job_stores.jobs_table.transactions import Transactions, TransactionsOn
from djdist.job_stores.pipeline import PipelineStore, is_of_one_table


class JobsTables(PipelineStore):
    """Asks by one statement which tables have jobs that are due, or whose lease is over.

    Parameters
    ----------
    stores : mapping of str to JobsTable
        The jobs of each table, those upstream first.
    transactions : Transactions
        Those of the run, which its tables share.
    """

    def __init__(self, stores: Mapping[str, JobsTable], transactions: Transactions) -> None:
        super().__init__({**stores})
        self._jobs_tables = stores
        self._transactions = TransactionsOn(transactions, "The jobs tables can't be reached or changed")

    def next_priorities(self) -> dict[str, int]:
        restricted = {name: store for name, store in self._jobs_tables.items() if store.spec.restricted_sql}
        by_index = {name: store for name, store in self._jobs_tables.items() if name not in restricted}
        return self._next_priorities(by_index, "sort") | self._next_priorities(restricted)

    def _next_priorities(self, stores: Mapping[str, JobsTable], *bad_steps: str) -> dict[str, int]:
        return self._found({name: store.next_due_priority for name, store in stores.items()}, *bad_steps)

    def rescue(self) -> int:
        """Look at all tables first, of which mostly none has anything to rescue."""
        try:
            found = self._found({name: store.any_expired for name, store in self._jobs_tables.items()})
        except DatabaseError as error:
            if not is_of_one_table(error):
                raise
            return super().rescue()
        for name, store in self._jobs_tables.items():
            if name not in found:
                store.note_rescued()
        return PipelineStore({name: self._jobs_tables[name] for name in found}).rescue()

    def _found(self, queries: Mapping[str, sa.Select[Any]], *bad_steps: str) -> dict[str, int]:
        """Return the one number that each query gives, where it gives one."""
        if not queries:
            return {}
        each = [query.subquery() for query in queries.values()]
        numbered = [sa.select(sa.literal_column(str(n)), *one.c) for n, one in enumerate(each)]
        names, backend = list(queries), next(iter(self._jobs_tables.values())).spec.settings.backend

        query = discouraging(sa.union_all(*numbered), backend, *bad_steps)
        rows = self._transactions.run_one(lambda connection: list(connection.execute(query)))
        return {names[number]: found for number, found in rows}
