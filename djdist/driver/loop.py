"""The one loop: reserve, submit, collect, record."""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

from djdist._job import Completion, Ending, Failure, Job, Outcome, Policy, Report, Status, Summary, Watch
from djdist._job_store import JobStore
from djdist._signals import signal_behind
from djdist._task_pool import TaskPool
from djdist.driver.dashboard import RECOUNT_SECONDS, Dashboard
from djdist.driver.flight import Flight
from djdist.driver.grouping import Grouping
from djdist.driver.ledger import Ledger
from djdist.driver.supply import WAIT_SECONDS, Supply
from djdist.errors import DatabaseError, WorkerSetupError

logger = logging.getLogger(__package__)

MOST_AT_ONCE = 1000
"""So many jobs at most are reserved by one statement, unless there are more slots."""
WITH_DRIVER = "the worker died that also held the run's driver"


class Driver:
    """Makes the jobs of a store in a pool of tasks.

    Parameters
    ----------
    store : JobStore
        Keeps the jobs.
    pool : TaskPool
        Runs them.
    policy : Policy
        How many calls, what to do on errors, how many losses.
    table : str
        Name of the table, for the tasks' names.
    clock : callable
        Seconds that pass.
    sleep : callable
        Lets so many seconds pass, where there is nothing to do but to wait.
    """

    def __init__(
        self,
        store: JobStore,
        pool: TaskPool,
        policy: Policy,
        table: str = "",
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._pool = pool
        self._policy = policy
        self._table = table
        self._clock = clock
        self._sleep = sleep
        self._grouping = Grouping(policy.task_seconds)
        self._supply = Supply(store, clock)
        self._flight = Flight(store, pool, policy, table, clock)
        self._ledger = Ledger(store, self._supply, policy, table, clock, self.stop)
        self._dashboard = Dashboard(pool, self._supply, table, clock, lambda: self.last_status)
        self._begun = False
        self._stop_by: float | None = None
        self._wait_by: float | None = None

    def run(self, watch: Watch, predecessor: Status | None = None) -> Summary:
        """Do all steps and return the summary; whatever happens, give back what is left.

        A run that goes on after its driver died, its ``predecessor``, frees first what that one held.

        Raises
        ------
        WorkerSetupError
            No worker can make this table's keys, from the start or since a while; they are pending.
        """
        self._store.wait_while(self._wanted_by(watch))
        try:
            if predecessor:
                self._succeed(predecessor, watch)
            else:
                self._try_workers(watch)
            self._store.release_all()
            self._store.refresh()
            self._begun = True
            with self._flight.lease:
                self._do_all_steps(watch)
        except DatabaseError:
            self._wait_by = self._clock()  # it has been waited for long enough
            raise
        finally:
            self._give_back_all()
            self._dashboard.show()
        if self._policy.count_pending or logger.isEnabledFor(logging.INFO):
            with suppress(DatabaseError):  # all else is done
                self._supply.count_in_the_end()
        watch(self.last_status)
        return self.summary()

    def step(self) -> bool:
        """Fill the free slots and collect what has ended; False when nothing is left to do."""
        self._dashboard.tell()
        self._fill()
        completions = self._pool.wait(self._wait_seconds())
        for completion in completions:
            self._collect(completion)
        self._end_disowned()
        self._end_overdue()
        self._ledger.give_back(self._flight.take_waiting())
        if not completions and not self._flight and self._pauses() and self._expects_more():
            self._sleep(WAIT_SECONDS)
        return bool(self._flight) or self._expects_more()

    def stop(self, grace_seconds: float | None = None) -> None:
        """Reserve no more and give back what has not begun; what runs may finish, within the grace."""
        if grace_seconds is not None and self._stop_by is None:
            self._stop_by = self._clock() + grace_seconds
        if self._ledger.stopping:
            return
        self._ledger.stopping = True
        logger.info("%s reserves no more keys", self._table)
        self._flight.recall()

    def status(self) -> Status:
        """Count what is done, what runs and, if the policy asks for it, what is left."""
        if self._policy.count_pending:
            self._supply.count(RECOUNT_SECONDS)
        return self.last_status

    @property
    def last_status(self) -> Status:
        """What is done, what runs, and what was left when it was last counted."""
        return self._status(self._supply.pending)

    def summary(self) -> Summary:
        """Give the run's result so far."""
        return self._ledger.summary()

    def _status(self, pending: int) -> Status:
        tasks = self._flight.tasks
        running = min(tasks, self._pool.slots()) if tasks else 0  # a task makes one key at a time
        queued = len(self._flight) - running
        return self._ledger.status(running=running, queued=queued, pending=pending, begun=self._begun)

    def _succeed(self, lost: Status, watch: Watch) -> None:
        """Go on where a driver was lost, which is a loss for keys in its process, and say so first."""
        self._begun = lost.begun
        self._pool.show(self._table, lost, ())
        self._ledger.inherit(lost)
        if lost.handover.stopping:
            self.stop(self._policy.grace_seconds)
        beside = self._store.begun_by(lost.handover.host, lost.handover.pid)
        self._ledger.note_calls(len(beside))
        self._grouping.isolate(beside)
        if len(beside) == 1:
            self._ledger.record(Outcome(beside[0], Ending.LOST, Failure(WITH_DRIVER)))
        else:
            self._ledger.give_back(beside)
        if not watch(self._status(lost.pending)):
            self.stop(self._policy.grace_seconds)

    def _do_all_steps(self, watch: Watch) -> None:
        try:
            self._go_on(watch)
        except (KeyboardInterrupt, SystemExit):
            with self._without_database():
                self.stop(0 if self._pool.runs_in_caller else self._policy.grace_seconds)
                self._go_on(watch)
            raise

    def _go_on(self, watch: Watch) -> None:
        while self.step():
            if not watch(self.status()):
                self.stop(self._policy.grace_seconds)
            if self._stop_by is not None and self._clock() >= self._stop_by:
                return

    def _wanted_by(self, watch: Watch) -> Callable[[], bool]:
        """Let the store ask, while it waits for its database, whether somebody has stopped the run."""
        me = threading.current_thread()

        def is_wanted() -> bool:
            if threading.current_thread() is not me:
                return not self._flight.lease.is_over
            is_ended = self._ledger.stopping or signal_behind(sys.exc_info()[1]) is not None
            goes_on = watch(self.last_status) and not is_ended
            if not goes_on and self._wait_by is None:
                self._wait_by = self._clock() + self._policy.grace_seconds
            return self._wait_by is None or self._clock() < self._wait_by

        return is_wanted

    @contextmanager
    def _without_database(self) -> Iterator[None]:
        """Let a run end although its database is away, as its lease does then."""
        try:
            yield
        except DatabaseError as error:
            logger.warning(
                "What %s has reserved is free again after %g seconds: %s",
                self._table,
                self._policy.lease_seconds,
                error,
            )

    def _try_workers(self, watch: Watch) -> None:
        self._pool.submit(self._table, ())
        while not (completions := self._pool.wait(WAIT_SECONDS)):
            if not watch(self.status()):
                self.stop()
                return
        if error := _error(completions[0]):
            raise WorkerSetupError(error)

    def _fill(self) -> None:
        idle, obstacles = not self._flight, self._ledger.obstacles
        if idle and obstacles.hopeless:
            raise WorkerSetupError(f"No worker begins a key of {self._table}. {obstacles.last}")
        if self._ledger.stopping or obstacles.pause_seconds or not self._supply.asks(idle=idle):
            return
        slots = self._pool.free_slots()
        if slots <= 0 or self._ledger.free_calls(1) <= 0:
            return
        size = self._grouping.size_of_shares(self._left, self._pool.slots())
        most = max(slots, MOST_AT_ONCE)
        limit = self._ledger.free_calls(min(slots * size, most))
        jobs = self._supply.reserve(limit, idle=idle)
        self._ledger.note_calls(len(jobs))
        self._flight.submit(self._grouping.split(jobs, size, 1 if len(jobs) == most else slots))

    def _left(self, enough: int) -> int:
        """Count what is left for this run, no further than to what is enough."""
        return self._ledger.free_calls(self._supply.left(enough))

    def _pauses(self) -> bool:
        return self._supply.pauses or self._ledger.obstacles.pause_seconds > 0

    def _expects_more(self) -> bool:
        return not self._ledger.stopping and not self._supply.empty and self._ledger.free_calls(1) > 0

    def _wait_seconds(self) -> float:
        left = WAIT_SECONDS if self._stop_by is None else self._stop_by - self._clock()
        return max(0.0, min(WAIT_SECONDS, left, self._flight.overdue.period_seconds))

    def _end_disowned(self) -> None:
        if self._flight.disowned():  # maybe made, while a driver that waited for its database collected none
            for completion in self._pool.wait(0):
                self._collect(completion)
        disowned = self._flight.disowned()
        for job in [job for ticket in disowned for job in self._flight.land(ticket)]:
            self._ledger.let_go(job)
        self._kill(disowned)

    def _end_overdue(self) -> None:
        too_long, waiting = self._flight.too_long(), list[Job]()
        for ticket, job in too_long.items():
            timed_out = Outcome(job, Ending.FAILED, self._flight.overdue.failure)
            waiting += self._ledger.record_until(self._flight.land(ticket), timed_out)
        self._kill(too_long)
        self._ledger.give_back(waiting)

    def _kill(self, tickets: Iterable[int]) -> None:
        """End tasks once all is recorded: on Dask it takes seconds, in which others end."""
        for ticket in tickets:
            self._pool.kill(ticket)

    def _collect(self, completion: Completion) -> None:
        overdue = self._flight.overdue.explains(completion.ticket)
        jobs, report = self._flight.land(completion.ticket), completion.report
        if not jobs:
            return
        if report and report.setup_error:
            self._ledger.give_back(jobs)
            self._ledger.meet_obstacle(report.setup_error)
        elif report:
            self._record_report(jobs, report)
        elif (job := self._flight.being_made(jobs)) is None:
            self._record_unbegun(jobs, _error(completion))
        else:
            lost = Outcome(job, Ending.LOST, Failure(_error(completion)))
            timed_out = Outcome(job, Ending.FAILED, self._flight.overdue.failure)
            self._store.end_sessions(jobs)  # first: they may have locked what is recorded next
            self._ledger.give_back(self._ledger.record_until(jobs, timed_out if overdue else lost))

    def _record_unbegun(self, jobs: Sequence[Job], error: str) -> None:
        """Give back what a worker left that was told to go, or that was unable to begin it."""
        left, told_to_go = self._store.renew(jobs), self._store.forgone(jobs)
        for job in [job for job in jobs if job not in left]:
            self._ledger.let_go(job)
        self._ledger.give_back(left)
        if left and not told_to_go:
            self._grouping.isolate(left)
            self._ledger.meet_obstacle(error)

    def _record_report(self, jobs: Sequence[Job], report: Report) -> None:
        still = {job.identity for job in jobs}
        outcomes = [outcome for outcome in report.outcomes if outcome.job.identity in still]
        left = [outcome.job for outcome in outcomes if outcome.ending is Ending.LEFT]
        ended = outcomes[: len(outcomes) - len(left)]
        cut = bool(left and ended) and ended[-1].ending not in (Ending.MADE, Ending.PRESENT)
        self._grouping.note(len(ended), report.seconds, cut=cut)
        if ended:
            self._dashboard.note(report.seconds / len(ended))
        self._ledger.give_back(left)
        for outcome in ended:
            self._ledger.record(outcome)

    def _give_back_all(self) -> None:
        """End what runs, only then give it back: nobody else shall make it meanwhile."""
        try:
            if self._flight:
                self._pool.close()
        finally:
            self._flight.clear()
            with self._without_database():
                self._store.release_all()


def _error(completion: Completion) -> str:
    if completion.report:
        return completion.report.setup_error
    return completion.error.message if completion.error else "no answer"
