"""The keys that a table lacks, for runs without a jobs table."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy as sa

from djdist._job import Failure, Job
from djdist.job_stores.jobs_table.changes import discourage
from djdist.job_stores.jobs_table.following import coming_of, parents_in
from djdist.job_stores.jobs_table.functions import BinaryUuid, verbatim
from djdist.job_stores.jobs_table.transactions import Transactions, TransactionsOn
from djdist.job_stores.memory import MemoryStore
from djdist.pipeline.jobs_table_spec import Following, KeysSpec

KeyValues = tuple[Any, ...]


class MissingKeys(MemoryStore):
    """Keeps the keys that a table lacks and the run has not tried yet.

    Parameters
    ----------
    spec : KeysSpec
        Whose keys they are and how they are found.
    transactions : Transactions
        Those of the run, which its tables share.
    failed : dict of str to list of Job
        What has failed of each table of the run, which its tables share.
    """

    def __init__(self, spec: KeysSpec, transactions: Transactions, failed: dict[str, list[Job]]) -> None:
        super().__init__(spec.table)
        self.spec = spec
        self._known: set[KeyValues] = set()
        self._failed = failed
        self._shared = transactions
        self._transactions = TransactionsOn(transactions, f"The key source of {spec} can't be read")

    def refresh(self) -> dict[str, int]:
        """Let in all keys that are missing now; forget those that are not, such as what is made."""
        known = {*self._known}
        with self._shared.one_slow():
            missing = self._found(verbatim(self.spec.missing_keys_sql))
        return {"added": self._let_in(missing), "removed": self._drop(known.difference(missing))}

    def add_new(self, parents: Sequence[Job]) -> int:
        return sum(
            self._let_in(self._found(coming_of(batch, following), "hashjoin", "mergejoin"))
            for following in self.spec.follows
            for batch in parents_in(parents, following)
        )

    def fail(self, job: Job, failure: Failure, host: str = "", pid: int = 0) -> bool:
        has_failed = super().fail(job, failure, host, pid)
        if has_failed:
            with self._changing:
                self._failed.setdefault(job.table, []).append(job)
        return has_failed

    def leave_out(self, failed: Sequence[Job]) -> None:
        with self._changing:
            self._known.update(map(_values, failed))
            self._failed.setdefault(self.spec.table, []).extend(failed)

    def held_back(self) -> dict[str, int]:
        counts = {following.parent: self._count(following) for following in self.spec.held_back}
        return {table: count for table, count in counts.items() if count}

    def assume_reached(self) -> None:
        self._shared.assume_reached()

    def wait_while(self, wanted: Callable[[], bool]) -> None:
        self._shared.wait_while(wanted)

    def close(self) -> None:
        self._shared.close()

    def _count(self, following: Following) -> int:
        """Count what is to come of failed keys upstream."""
        failed = parents_in(self._failed.get(following.parent, ()), following)
        return sum(self._transactions.number(coming_of(batch, following)) for batch in failed)

    def _found(self, query: sa.TextClause, *bad_steps: str) -> list[KeyValues]:
        """Return the keys that a query finds, with the values that DataJoint gives."""
        uuids = self.spec.uuids
        columns = [sa.column(name, BinaryUuid() if name in uuids else None) for name in self.spec.key]

        def read(connection: sa.Connection) -> list[KeyValues]:
            if bad_steps:
                discourage(connection, self.spec.settings.backend, *bad_steps)
            return [tuple(row) for row in connection.execute(query.columns(*columns))]

        return self._transactions.run(read)

    def _let_in(self, found: Sequence[KeyValues]) -> int:
        """Let in keys that the run doesn't know, not even as made or failed; return how many."""
        with self._changing:
            new = [values for values in dict.fromkeys(found) if values not in self._known]
            self._known.update(new)
            self._pending += [Job(self.spec.table, dict(zip(self.spec.key, key, strict=True))) for key in new]
        return len(new)

    def _drop(self, vanished: set[KeyValues]) -> int:
        """Forget keys but for those in flight, and return how many of them waited."""
        with self._changing:
            self._known -= vanished.difference(map(_values, self._reserved.values()))
            failed = self._failed.get(self.spec.table, [])
            failed[:] = [job for job in failed if _values(job) in self._known]
            count = len(self._pending) + len(self._later)
            self._pending = deque(job for job in self._pending if _values(job) in self._known)
            self._later = [(due, job) for due, job in self._later if _values(job) in self._known]
            return count - len(self._pending) - len(self._later)


def _values(job: Job) -> KeyValues:
    return tuple(job.key.values())
