"""The jobs tables of one run, which are asked together where that spares dozens of statements."""

from collections.abc import Mapping

import sqlalchemy as sa

from djdist.job_stores.jobs_table.changes import discourage
from djdist.job_stores.jobs_table.store import JobsTable
from djdist.job_stores.jobs_table.transactions import Transactions, TransactionsOn
from djdist.job_stores.pipeline import PipelineStore


class JobsTables(PipelineStore):
    """Asks by one statement which tables have jobs that are due, as a run does every second.

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
        if not stores:
            return {}
        each = [store.next_due_priority.subquery() for store in stores.values()]
        numbered = [sa.select(sa.literal_column(str(n)), one.c.priority) for n, one in enumerate(each)]
        names, backend = list(stores), next(iter(stores.values())).spec.settings.backend

        def read(connection: sa.Connection) -> dict[str, int]:
            discourage(connection, backend, *bad_steps)
            found = connection.execute(sa.union_all(*numbered))
            return {names[number]: priority for number, priority in found}

        return self._transactions.run(read)
