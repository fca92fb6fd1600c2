"""Makes several keys in one transaction; where that fails, each again in a transaction of its own."""

import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from djdist._job import SHARED_SECONDS, Ending, Job, Outcome
from djdist._signals import Signals
from djdist.database.errors import is_duplicate, is_infrastructure, is_lost
from djdist.database.job_statements import Connection
from djdist.worker.make_job import Group, failed, leave_behind, make_job, ready_connection, was_committed
from djdist.worker.make_session import MakeSession

logger = logging.getLogger(__name__)

Limit = Callable[[], AbstractContextManager[None]]
"""What is entered around each ``make()``."""

ENDS_ITS_TRANSACTION = (
    "The make() of %s has ended a transaction that it shared with other keys: for the rest of the run each "
    "has its own in this process. Write keys_per_transaction = 1 in the table."
)


def make_in_shared_transactions(
    group: Group, make_session: MakeSession, signals: Signals, limit: Limit
) -> Iterator[list[Outcome]]:
    """Make the jobs of a group, and give together the outcomes of those that were committed together."""
    return _Sharing(group, make_session, signals, limit).outcomes()


@dataclass
class _Together:
    """What became of jobs that were made in one transaction.

    Those of ``again`` have to be made or finished each by itself, before one that has ``failed`` for itself;
    ``is_torn`` tells that they may be made already.
    """

    committed: Sequence[Job] = ()
    again: Sequence[Job] = ()
    failed: Outcome | None = None
    is_torn: bool = False

    @property
    def count(self) -> int:
        return len(self.committed) + len(self.again) + bool(self.failed)


@dataclass
class _Sharing:
    """Makes the jobs of a group."""

    group: Group
    make_session: MakeSession
    signals: Signals
    limit: Limit

    def outcomes(self) -> Iterator[list[Outcome]]:
        left, pace = self.group.jobs, self.group.context.pace
        while left:
            if pace.shares and self._is_sure(left[: pace.size]):
                together = self._make_together(left[: pace.size])
                yield from self._outcomes_of(together)
                left = left[together.count :]
            else:
                yield [self._make_alone(left[0])]
                left = left[1:]

    def _is_sure(self, jobs: Sequence[Job]) -> bool:
        """Return whether all these jobs are the run's and none of their keys is in the table.

        What is raised here, such as by a lost connection, is raised again by the job that meets it alone.
        """
        group = self.group
        if len(jobs) < 2 or self.make_session.has_populated:
            return False
        try:
            ready_connection(group.context)
            begun = all(map(group.begins, jobs))
            if group.context.statements is None:
                group.all_missing = not group.context.table & [job.key for job in jobs]
        except Exception:
            return False
        return begun and group.all_missing

    def _make_together(self, jobs: Sequence[Job]) -> _Together:
        """Make as many jobs as fit into one transaction, and finish them with it."""
        made, is_torn, started = list[Job](), False, time.monotonic()
        running: Job | None = jobs[0]  # also of what is raised as the transaction begins
        try:
            with self.make_session.sharing() as transaction:
                try:
                    for running in jobs:
                        with self.limit():
                            self.make_session(running.key, _finish_later, is_missing=True)
                        made.append(running)
                        seconds = time.monotonic() - started
                        next_ends_at = seconds * (1 + 1 / len(made))
                        if next_ends_at > SHARED_SECONDS or not transaction.goes_on():
                            break
                    running = None
                    if transaction.look("RELEASE"):
                        self.group.finish(made, seconds)
                    self.make_session.commit_shared()  # if it is torn, what this make() has left open
                finally:
                    is_torn = transaction.is_torn
        except BaseException as error:
            return self._after(error, made, running, is_torn=is_torn, seconds=time.monotonic() - started)
        if is_torn:
            self._note_torn()
            return _Together(again=made, is_torn=True)
        self.group.context.pace.made(len(made), seconds)
        return _Together(made)

    def _after(
        self, error: BaseException, made: Sequence[Job], running: Job | None, *, is_torn: bool, seconds: float
    ) -> _Together:
        """Return what to do with jobs whose transaction was undone, or whose COMMIT got no answer."""
        group, pace, is_conflict = self.group, self.group.context.pace, is_infrastructure(error)
        if self.make_session.committing and is_conflict and not is_torn and was_committed(group, made):
            return _Together(made)
        is_torn = is_torn and not is_conflict  # what the server itself has given up is undone as a whole
        outcome = failed(group, running or made[-1], error, self.make_session, self.signals, seconds)
        leave_behind(group.context)
        pace.undone()
        if outcome.ending is Ending.INTERRUPTED:
            return _Together(failed=outcome)
        if made and (is_torn or (is_conflict and not is_lost(error))):
            pace.in_conflict(f"{type(group.context.table).__name__}: {error}")
        again = [*made, running] if running else made
        is_its_own = not made or is_torn
        if running and is_its_own and not is_duplicate(error):
            return _Together((), made, outcome, is_torn)
        return _Together((), again, None, is_torn)

    def _note_torn(self) -> None:
        logger.warning(ENDS_ITS_TRANSACTION, type(self.group.context.table).__name__)
        self.group.context.pace.end()

    def _outcomes_of(self, together: _Together) -> Iterator[list[Outcome]]:
        if together.committed:
            yield [_made(job) for job in together.committed]
        self.group.all_missing = self.group.all_missing and not together.again
        for job in together.again:
            outcome = self._make_alone(job)
            was_made = together.is_torn and outcome.ending is Ending.ALREADY_MADE
            yield [replace(outcome, ending=Ending.MADE) if was_made else outcome]
        if together.failed:
            yield [together.failed]

    def _make_alone(self, job: Job) -> Outcome:
        started, pace = time.monotonic(), self.group.context.pace
        with self.limit():
            outcome = make_job(self.group, job, self.make_session, self.signals)
        if pace.size == 1:
            pace.made(1, time.monotonic() - started)
        return outcome


def _made(job: Job) -> Outcome:
    return Outcome(job, Ending.MADE, None, platform.node(), os.getpid())


def _finish_later(connection: Connection) -> None:
    """Leave a job to the end of the shared transaction."""
