"""What became of a run's jobs: counted here, recorded in the job store."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from djdist._job import Counts, Ending, Failure, Handover, Job, Outcome, Status, Summary
from djdist._needs import Needs, amounts_text, memory_text
from djdist.driver.context import RunContext
from djdist.driver.key_needs import KeyNeeds
from djdist.driver.retries import CircuitBreaker, Retries
from djdist.driver.shutdown import Shutdown
from djdist.driver.streaming import Streaming
from djdist.driver.tables import Tables

logger = logging.getLogger(__package__)

UNKNOWN = Failure("unknown")
NOT_OURS = "and maybe more are left alone: they are not this run's any more, but done, or its lease had ended"
UNFINISHED = (
    "the worker that had begun it is gone: killed, out of memory, or with its node "
    "(or make() has changed the key's own row in the jobs table)"
)
CONNECTION_LOST = "LostConnectionError"
BLOCKED = "A key waits for what another session has locked in the database"
TOO_LARGE = "The server may close a connection over a value that is larger than its max_allowed_packet."

IDLING = {
    "idle_in_transaction_session_timeout",
    "transaction_timeout",
    "idle_session_timeout",
    "wait_timeout",
}
"""What ends a session whose make() computes for long between two queries."""


class Results:
    """Decides by its ending whether a job is done, an error or tried again, and says so to the store.

    Parameters
    ----------
    run : RunContext
        Where its jobs are kept, and on which terms they are made.
    tables : Tables
        Are told what is put back.
    streaming : Streaming
        Is told what is made.
    needs : KeyNeeds
        Is told what is done.
    shutdown : Shutdown
        Tells whether anything is still tried again.
    stop : callable
        Is called at the first error of a run that ends with it.

    Attributes
    ----------
    breaker : CircuitBreaker
        Whether workers begin what they get.
    """

    def __init__(
        self,
        run: RunContext,
        tables: Tables,
        streaming: Streaming,
        needs: KeyNeeds,
        shutdown: Shutdown,
        stop: Callable[[], None],
    ) -> None:
        self._store, self._policy, self._name = run.store, run.policy, run.name
        self._notifier = run.notifier
        self._tables = tables
        self._streaming = streaming
        self._needs = needs
        self._shutdown = shutdown
        self._stop = stop
        self._retries = Retries(run.recipes, run.policy)
        self.breaker = CircuitBreaker(run.clock)
        self._made, self._failed, self._calls = Counter[str](), Counter[str](), 0
        self._peak_memory: dict[str, int] = {}
        self._errors: list[tuple[Job, Failure]] = []
        self._lease_lost = self._waits_for_database = False

    def status(self, running: Mapping[str, int], queued: Mapping[str, int], *, begun: bool) -> Status:
        """Return the run's counts, and what a successor would have to know."""
        tables = {
            table.name: Counts(
                self._made[table.name],
                self._failed[table.name],
                running.get(table.name, 0),
                queued.get(table.name, 0),
                table.backlog.pending,
            )
            for table in self._tables
        }
        handover = Handover(
            stopping=self._shutdown.is_stopping,
            losses=tuple(self._retries.losses.items()),
            errors=self._errors_to_hand_over,
            memory=tuple(self._needs.learned.items()),
        )
        return Status.of(tables, handover, begun=begun)

    @property
    def _errors_to_hand_over(self) -> tuple[tuple[Job, Failure], ...]:
        """The error that ends the run, or all that nobody else keeps."""
        if not self._policy.suppress_errors:
            return tuple(self._errors[:1])
        return () if self._store.keeps_errors else tuple(self._errors)

    def summary(self) -> Summary:
        """Return the run's result so far."""
        counts = self.status({}, {}, begun=True)
        return Summary(
            counts.made, tuple(self._errors), counts.failed, counts.tables, {}, dict(self._peak_memory)
        )

    def inherit(self, lost: Status) -> None:
        """Count on where a driver was lost."""
        self._errors = list(lost.handover.errors)
        self._store.leave_out([job for job, _ in self._errors])
        for name, counts in lost.tables.items():
            self._made[name], self._failed[name] = counts.made, counts.failed
            self._tables[name].backlog.found(counts.pending)
        self._retries.losses.update(dict(lost.handover.losses))
        self._needs.learned.update(dict(lost.handover.memory))
        self._calls = lost.made + lost.failed

    def note_memory(self, ended: Sequence[Outcome], needs: Needs, peak_memory: int) -> None:
        """Note how much memory a process had while it made keys, with their jobs where these are kept."""
        table, made = ended[0].job.table, [end.job for end in ended if end.ending is Ending.MADE]
        self._peak_memory[table] = max(peak_memory, self._peak_memory.get(table, 0))
        if made and peak_memory and needs.memory and self._store.of(table).keeps_made:
            self._store.note(made, memory_text(peak_memory, int(needs.memory)))

    def log_memory(self) -> None:
        """Say what the processes had that made keys, beside what keys ask for by now."""
        for table, peak in self._peak_memory.items():
            asked = int(self._needs.of_table(table).memory or 0)
            if peak and asked:
                had, asks = (amounts_text({"memory": amount}) for amount in (peak, asked))
                logger.info(
                    "Processes that made keys of %s had at most %s; a key asks for %s", table, had, asks
                )

    def count_reserved(self, count: int) -> None:
        """Count the jobs that were reserved."""
        self._calls += count

    def free_calls(self, wanted: int) -> int:
        """Return how many of these jobs the run may still reserve."""
        if self._policy.max_calls is None:
            return wanted
        return min(wanted, self._policy.max_calls - self._calls)

    def record_until(self, jobs: Sequence[Job], outcome: Outcome) -> Sequence[Job]:
        """Record how a job ended with its worker, and those before it as made; return those after it."""
        if outcome.job not in jobs:  # a stop has given it back
            return jobs
        position = jobs.index(outcome.job)
        for job in jobs[:position]:
            self.record(Outcome(job, Ending.MADE))
        self.record(outcome)
        return jobs[position + 1 :]

    def record(self, outcome: Outcome) -> None:
        """Record how a job ended."""
        if outcome.ending not in (Ending.LOST, Ending.TRANSIENT):
            self._note_progress()
        match outcome.ending:
            case Ending.MADE:
                self._made[outcome.job.table] += 1
                self._finish(outcome.job)
            case Ending.ALREADY_MADE:
                self._finish(outcome.job)
            case Ending.FAILED:
                self._record_failed(outcome)
            case Ending.INTERRUPTED | Ending.NOT_STARTED:
                self.give_back([outcome.job])
            case Ending.LOST:
                self._record_lost(outcome.job, outcome.failure or UNKNOWN)
            case Ending.TRANSIENT:
                self._record_transient(outcome)
            case Ending.LEASE_LOST:
                self._record_lease_lost(outcome.job)

    def give_back(self, jobs: Sequence[Job], pause_seconds: float = 0) -> None:
        """Put jobs back to pending, due after a pause."""
        if jobs:
            self._store.release(jobs, delay_seconds=pause_seconds)
            self._calls -= len(jobs)
            for name, count in Counter(job.table for job in jobs).items():
                self._tables[name].backlog.returned(count, pause_seconds)

    def drop(self, job: Job) -> None:
        """Leave a job alone that is not the run's any more."""
        self._retries.forget(job)
        self._needs.forget(job)
        self._calls -= 1
        if not self._lease_lost and not self._shutdown.is_stopping:
            self._log(NOT_OURS, job)
            self._lease_lost = True

    def worker_failed(self, error: str) -> None:
        """Note what kept a worker from beginning."""
        if self.breaker.note(error):
            logger.warning("A worker could not begin a key of %s: %s", self._name, error)

    def _finish(self, job: Job) -> None:
        self._retries.forget(job)
        self._needs.note_made(job)
        self._store.forget(job)
        self._streaming.note_made(job)

    def _record_failed(self, outcome: Outcome) -> None:
        failure = outcome.failure or UNKNOWN
        pause_seconds = (
            None if self._shutdown.is_stopping else self._retries.after_failure(outcome.job, failure)
        )
        if pause_seconds is not None:
            failure.clear_frames()
            self._log("failed and is tried again in %.1f s: %s", outcome.job, pause_seconds, failure.message)
            self.give_back([outcome.job], pause_seconds)
            return
        self._fail(outcome.job, failure, outcome.host, outcome.pid)

    def _fail(self, job: Job, failure: Failure, host: str = "", pid: int = 0) -> None:
        self._retries.forget(job)
        self._needs.forget(job)
        if not self._store.fail(job, failure, host, pid):
            self.drop(job)
            return
        self._failed[job.table] += 1
        self._streaming.note_failed(job)
        self._notifier.failed(job.table, job.key, failure.message)
        kept = self._kept(failure)
        if len(self._errors) < self._policy.max_errors_listed:
            self._errors.append((job, kept))
        if not self._policy.suppress_errors:
            self._stop()

    def _kept(self, failure: Failure) -> Failure:
        """Keep of an error what the caller gets: with its frames it may hold all that a make() had."""
        if not self._policy.suppress_errors:
            return failure
        failure.clear_frames()
        return failure if self._policy.return_exception_objects else Failure(failure.message)

    def _record_lost(self, job: Job, cause: Failure) -> None:
        self.breaker.reset()
        pause_seconds = self._retries.after_loss(job)
        losses = self._retries.losses[job.identity]
        self._log("was lost, %d of %d: %s", job, losses, self._policy.max_worker_losses, cause.message)
        if pause_seconds is not None:
            self.give_back([job], pause_seconds)
            return
        self._fail(job, Failure(f"lost {losses} times, last: {cause.message}", cause.traceback))

    def _record_transient(self, outcome: Outcome) -> None:
        failure = outcome.failure or UNKNOWN
        begun = bool(self._store.begun([outcome.job]))
        connection_lost = CONNECTION_LOST in failure.kinds
        hopeless = connection_lost or bool(failure.limit)
        pause_seconds = self._retries.after_transient_error(
            outcome.job, begun=begun, hopeless=hopeless, blocked=failure.blocked
        )
        if pause_seconds is None:
            hint = _limit_hint(failure.limit) if failure.limit else TOO_LARGE if connection_lost else ""
            message = f"tried again and again, last: {failure.message.strip()} {hint}".strip()
            failure = replace(failure, message=message)
            self._fail(outcome.job, failure, outcome.host, outcome.pid)
            return
        if (pause_seconds >= 1 or failure.blocked) and not self._waits_for_database:
            self._waits_for_database = True
            logger.warning("%s waits for the database: %s", self._name, failure.message)
            self._notifier.unreachable(failure.message, *[BLOCKED] * failure.blocked)
        failure.clear_frames()
        self.give_back([outcome.job], pause_seconds)

    def _note_progress(self) -> None:
        self.breaker.reset()
        if self._waits_for_database:
            self._waits_for_database = False
            logger.info("%s waits no more for the database", self._name)

    def _record_lease_lost(self, job: Job) -> None:
        if self._store.renew([job]):
            self._record_lost(job, Failure(UNFINISHED))
        else:
            self.drop(job)

    def _log(self, message: str, job: Job, *arguments: object) -> None:
        logger.warning("%s(%s) " + message, job.table, job, *arguments)


def _limit_hint(limit: str) -> str:
    if limit not in IDLING:
        return (
            f"The server's {limit} ended a statement: raise it for this account, or ask for less at a time."
        )
    return (
        f"The server's {limit} ended the session in the middle of make(): raise it for this account, or "
        "split make() into make_fetch, make_compute and make_insert."
    )
