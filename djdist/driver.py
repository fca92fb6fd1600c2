"""The one loop: reserve, submit, collect, record."""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable

from djdist.errors import WorkerSetupError
from djdist.executor import Executor
from djdist.job import Completion, Ending, Failure, Job, Key, Outcome, Policy, Status, Summary, Watch, Work
from djdist.job_store import JobStore
from djdist.lease import Lease

logger = logging.getLogger(__name__)

WAIT_SECONDS = 0.5
RECOUNT_SECONDS = 2.0
UNFINISHED = "a worker had begun it and is gone, or make() changed its own row in the jobs table"
MAX_SPARES = 10
"""So often a key may be lost before it begins; then it counts as lost, or the run might never end."""


def drive(
    executor: Executor, watch: Watch, *, store: JobStore, work: Work, policy: Policy, table: str
) -> Summary:
    """Do one run from its start to its summary."""
    executor.start(work)
    try:
        return Driver(store, executor, policy, table).run(watch)
    finally:
        executor.close()
        store.close()


class Driver:
    """Makes the jobs of a store on an executor.

    Parameters
    ----------
    store : JobStore
        Keeps the jobs.
    executor : Executor
        Runs them; it has been started.
    policy : Policy
        How many calls, what to do on errors, how many losses.
    table : str
        Name of the table, for the tasks' names.
    clock : callable
        Seconds that pass, for when to ask the store again.
    """

    def __init__(
        self,
        store: JobStore,
        executor: Executor,
        policy: Policy,
        table: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._executor = executor
        self._policy = policy
        self._table = table
        self._clock = clock
        self._in_flight: dict[int, Job] = {}
        self._losses: Counter[Hashable] = Counter()
        self._spares: Counter[Hashable] = Counter()
        self._errors: list[tuple[Key, Failure]] = []
        self._made = 0
        self._calls = 0
        self._stopping = False
        self._supply = _Supply(clock)
        self._pending = 0
        self._counted_at: float | None = None

    def run(self, watch: Watch) -> Summary:
        """Do all steps and return the summary; whatever happens, give back what is left.

        Raises
        ------
        WorkerSetupError
            No worker can make this table's keys; no job was reserved.
        """
        try:
            self._try_workers(watch)
            self._store.refresh()
            with Lease(self._store, self._jobs_in_flight, self._policy.lease_seconds):
                while self.step():
                    if not watch(self.status()):
                        self.stop()
        finally:
            self._give_back_all()
        watch(self.status())
        return self.summary()

    def step(self) -> bool:
        """Fill the free places and collect what has ended; False when nothing is left to do."""
        self._fill()
        if self._in_flight:
            for completion in self._executor.wait(WAIT_SECONDS):
                self._collect(completion)
        return bool(self._in_flight) or self._expects_more()

    def stop(self) -> None:
        """Reserve no more and give back what has not begun; what runs may finish."""
        if self._stopping:
            return
        self._stopping = True
        cancelled = [ticket for ticket in self._in_flight if self._executor.cancel(ticket)]
        self._store.release([self._in_flight.pop(ticket) for ticket in cancelled])
        self._store.release(self._jobs_in_flight(), only_waiting=True)

    def status(self) -> Status:
        """Count what is done, what runs and, if the policy asks for it, what is left."""
        pending = self._count_pending() if self._policy.count_pending else 0
        return Status(self._made, len(self._errors), len(self._in_flight), pending)

    def summary(self) -> Summary:
        """Give the run's result so far."""
        return Summary(self._made, tuple(self._errors))

    def _jobs_in_flight(self) -> list[Job]:
        return list(self._in_flight.values())

    def _try_workers(self, watch: Watch) -> None:
        self._executor.submit(f"{self._table} (set-up)", ())
        while not (completions := self._executor.wait(WAIT_SECONDS)):
            if not watch(self.status()):
                self.stop()
                return
        if trouble := _trouble(completions[0]):
            raise WorkerSetupError(trouble)

    def _fill(self) -> None:
        idle = not self._in_flight
        if self._stopping or not self._supply.asks(idle=idle):
            return
        limit = self._free_calls(self._executor.free_places())
        if limit <= 0:
            return
        jobs = self._store.reserve(limit)
        self._supply.note(asked=limit, given=len(jobs), idle=idle)
        self._calls += len(jobs)
        self._pending = max(0, self._pending - len(jobs))
        self._submit(deque(jobs))

    def _submit(self, jobs: deque[Job]) -> None:
        try:
            while jobs:
                ticket = self._executor.submit(f"{self._table}({jobs[0]})", (jobs[0],))
                self._in_flight[ticket] = jobs.popleft()
        finally:
            self._store.release(list(jobs))

    def _expects_more(self) -> bool:
        return not self._stopping and not self._supply.empty and self._free_calls(1) > 0

    def _free_calls(self, places: int) -> int:
        if self._policy.max_calls is None:
            return places
        return min(places, self._policy.max_calls - self._calls)

    def _collect(self, completion: Completion) -> None:
        job = self._in_flight.pop(completion.ticket, None)
        if job is None:
            return
        if trouble := _trouble(completion):
            self._record(Outcome(job, Ending.LOST, Failure(trouble)))
        elif completion.report:
            for outcome in completion.report.outcomes:
                self._record(outcome)

    def _record(self, outcome: Outcome) -> None:
        match outcome.ending:
            case Ending.MADE:
                self._made += 1
                self._store.finish(outcome.job)
            case Ending.PRESENT:
                self._store.finish(outcome.job)
            case Ending.FAILED:
                self._record_failed(outcome)
            case Ending.INTERRUPTED:
                self._give_back(outcome.job)
            case Ending.LOST:
                self._record_lost(outcome)
            case Ending.DISOWNED:
                self._record_disowned(outcome.job)

    def _record_failed(self, outcome: Outcome) -> None:
        failure = outcome.failure or Failure("unknown")
        self._errors.append((outcome.job.key, failure))
        self._store.fail(outcome.job, failure, outcome.host, outcome.pid)
        if not self._policy.suppress_errors:
            self.stop()

    def _record_lost(self, outcome: Outcome) -> None:
        job, cause = outcome.job, outcome.failure or Failure("unknown")
        if self._spared(job):
            return
        self._losses[job.identity] += 1
        losses = self._losses[job.identity]
        most = self._policy.max_losses
        logger.warning("%s(%s) was lost, %d of %d: %s", self._table, job, losses, most, cause.message)
        if losses < most:
            self._give_back(job)
            return
        message = f"lost {losses} times, last: {cause.message}"
        self._record_failed(Outcome(job, Ending.FAILED, Failure(message, cause.traceback, cause.exception)))

    def _spared(self, job: Job) -> bool:
        """Give back at no cost a job that had not begun when its worker was lost."""
        spent = self._spares[job.identity] >= MAX_SPARES
        if spent or not self._store.release([job], only_waiting=True):
            return False
        self._spares[job.identity] += 1
        self._recall()
        return True

    def _record_disowned(self, job: Job) -> None:
        if self._store.renew([job]):
            self._record_lost(Outcome(job, Ending.LOST, Failure(UNFINISHED)))
            return
        self._calls -= 1
        if not self._stopping:
            logger.warning("%s(%s) was not this run's any more; nothing was changed", self._table, job)

    def _give_back(self, job: Job) -> None:
        self._store.release([job])
        self._recall()

    def _recall(self) -> None:
        self._calls -= 1
        self._supply.refill()

    def _give_back_all(self) -> None:
        if self._in_flight:
            self._executor.close()
        self._store.release_all()

    def _count_pending(self) -> int:
        now = self._clock()
        if self._counted_at is None or now - self._counted_at >= RECOUNT_SECONDS:
            self._pending, self._counted_at = self._store.pending(), now
        return self._pending


class _Supply:
    """Remembers how the store's supply looked when last asked, to spare it vain questions.

    It counts as empty only if it was so when nothing ran any more.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.refill()

    def refill(self) -> None:
        self.empty = False
        self._short = False
        self._asked_at = self._clock()

    def note(self, *, asked: int, given: int, idle: bool) -> None:
        self.empty = idle and given == 0
        self._short = given < asked
        self._asked_at = self._clock()

    def asks(self, *, idle: bool) -> bool:
        if not self._short:
            return True
        return idle or self._clock() - self._asked_at >= WAIT_SECONDS


def _trouble(completion: Completion) -> str:
    return completion.report.trouble if completion.report else completion.breakage or "no answer"
