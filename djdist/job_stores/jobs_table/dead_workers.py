"""Ends what the server still has of dead workers: a machine that has lost power says no goodbye to it."""

import logging
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from djdist.database.marks import BEARERS, END, worker_mark
from djdist.job_stores.jobs_table.conditions import Conditions, Where
from djdist.job_stores.jobs_table.transactions import TransactionsOn

logger = logging.getLogger(__name__)


class DeadWorkers:
    """Finds the workers that have begun jobs, and ends their sessions with their locks.

    Parameters
    ----------
    where : Conditions
        Those on the jobs table.
    transactions : TransactionsOn
        Where it is done.
    """

    def __init__(self, where: Conditions, transactions: TransactionsOn) -> None:
        self._where = where
        self._transactions = transactions

    def that_begun(self, conditions: Where) -> list[Any]:
        """Return the workers that have begun such jobs, each as its run's token, its host and its pid."""
        jobs = self._where.columns
        begun = sa.select(jobs.connection_id, jobs.host, jobs.pid).where(jobs.pid != 0, *conditions)
        rows = self._transactions.run(lambda connection: list(connection.execute(begun)))
        return list(dict.fromkeys(rows))  # DISTINCT might make PostgreSQL sort them

    def end_unless_alive(self, workers: Sequence[Any]) -> None:
        """End the sessions of workers of dead runs, but of none that still holds a job."""
        jobs = self._where.columns
        for worker in workers:
            same = [jobs[name] == value for name, value in worker._mapping.items()]
            if not self.that_begun([jobs.status == "reserved", *same]):
                self.end(worker)

    def end(self, worker: Any) -> None:
        """End the sessions that bear a worker's mark."""
        backend, mark = self._where.spec.settings.backend, worker_mark(*worker)

        def end_sessions(connection: sa.Connection) -> None:
            for (session,) in connection.exec_driver_sql(BEARERS[backend].format(mark)).fetchall():
                if session is not None:
                    _end(connection, END[backend].format(session), session, worker)

        self._transactions.run(end_sessions)


def _end(connection: sa.Connection, statement: str, session: int, worker: Any) -> None:
    of_whom = f"{worker.host} (pid {worker.pid})"
    try:
        with connection.begin_nested():  # a refusal would else end the transaction in which others are ended
            connection.exec_driver_sql(statement)
    except sa.exc.DBAPIError as error:
        if error.connection_invalidated:
            raise
        message = "Session %s of a dead worker on %s keeps its locks until somebody ends it by %s: %s"
        logger.warning(message, session, of_whom, statement, error.orig)
    else:
        logger.warning("Ended session %s of a dead worker on %s, with its locks", session, of_whom)
