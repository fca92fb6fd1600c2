"""The one loop: reserve, submit, collect, record."""

import logging
import os
import platform
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from djdist.attempts import Attempts, Obstacles
from djdist.errors import DatabaseError, WorkerSetupError
from djdist.executor import Executor
from djdist.grouping import Grouping, Waiting
from djdist.job import (
    Completion,
    Ending,
    Failure,
    Handover,
    Job,
    Key,
    Outcome,
    Policy,
    Report,
    RunInfo,
    Status,
    Summary,
    Watch,
    Work,
)
from djdist.job_store import JobStore
from djdist.lease import Lease
from djdist.logs import log_here
from djdist.overdue import Overdue

logger = logging.getLogger(__name__)

WAIT_SECONDS = 0.5
MOST_AT_ONCE = 1000
"""So many jobs at most are reserved by one statement, unless there are more places."""
RECOUNT_SECONDS = 2.0
TELL_SECONDS = 1.0
SHOWN_RECOUNT_SECONDS = 15.0
CLOCKS_DIFFER_SECONDS = 0.1
UNKNOWN = Failure("unknown")
NOT_OURS = "and maybe more are left alone: they are not this run's any more, but done, or its lease had ended"
UNFINISHED = (
    "the worker that had begun it is gone: killed, out of memory, or with its node "
    "(or make() has changed the key's own row in the jobs table)"
)
WITH_DRIVER = "the worker died that also held the run's driver"
CONNECTION_LOST = "LostConnectionError"
TOO_LARGE = "The server may close a connection over a value that is larger than its max_allowed_packet."


def drive(
    executor: Executor, watch: Watch, *, store: JobStore, work: Work, policy: Policy, info: RunInfo
) -> Summary:
    """Do one run from its start to its summary."""
    if not info.is_here:
        log_here()
    executor.start(work)
    if executor.predecessor:
        store.assume_reached()
    driver = Driver(store, executor, policy, info.table)
    try:
        with _logged(info, executor, driver):
            return driver.run(watch)
    finally:
        executor.close()
        store.close()


@contextmanager
def _logged(info: RunInfo, executor: Executor, driver: "Driver") -> Iterator[None]:
    """Say in the log who begins what and where, and how it ended."""
    caller, here = f"{info.user} on {info.host} (pid {info.pid})", f"{platform.node()} (pid {os.getpid()})"
    logger.info("%s begins on %r, called by %s, driven on %s", info, executor, caller, here)
    try:
        yield
    except BaseException as error:
        logger.warning("%s was ended by %r: %s", info, error, driver.last_status)
        raise
    logger.info("%s is over: %s", info, driver.last_status)


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
        Seconds that pass.
    sleep : callable
        Lets so many seconds pass, where there is nothing to do but to wait.
    """

    def __init__(
        self,
        store: JobStore,
        executor: Executor,
        policy: Policy,
        table: str = "",
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._executor = executor
        self._policy = policy
        self._table = table
        self._clock = clock
        self._sleep = sleep
        self._attempts = Attempts(policy)
        self._obstacles = Obstacles(clock)
        self._overdue = Overdue(policy.timeout_seconds, clock, sees_beginnings=store.sees_beginnings)
        self._lease = Lease(store, self._jobs_in_flight, policy.lease_seconds)
        self._grouping = Grouping()
        self._waiting_jobs = Waiting(clock)
        self._in_flight: dict[int, tuple[Job, ...]] = {}
        self._errors: list[tuple[Key, Failure]] = []
        self._made = 0
        self._failed = 0
        self._calls = 0
        self._disowned = False
        self._stopping = False
        self._stop_by: float | None = None
        self._wait_by: float | None = None
        self._supply = _Supply(clock)
        self._pending = 0
        self._counted_at: float | None = None
        self._places = 0
        self._told_at = float("-inf")
        self._make_seconds: list[float] = []
        self._waits_for_database = False

    def run(self, watch: Watch) -> Summary:
        """Do all steps and return the summary; whatever happens, give back what is left.

        A run that goes on after its driver died frees first what that one held.

        Raises
        ------
        WorkerSetupError
            No worker can make this table's keys, from the start or since a while; they are pending.
        """
        self._store.wait_while(self._waiting(watch))
        try:
            if self._executor.predecessor:
                self._succeed(self._executor.predecessor, watch)
            else:
                self._try_workers(watch)
            self._store.release_all()
            self._store.refresh()
            with self._lease:
                self._do_all_steps(watch)
        finally:
            self._give_back_all()
            self._show()
        watch(self.status())
        return self.summary()

    def step(self) -> bool:
        """Fill the free places and collect what has ended; False when nothing is left to do."""
        self._tell()
        self._fill()
        completions = self._executor.wait(self._wait_seconds())
        for completion in completions:
            self._collect(completion)
        self._end_overdue()
        self._end_disowned()
        self._take_back_waiting()
        if not completions and not self._in_flight and self._pauses() and self._expects_more():
            self._sleep(WAIT_SECONDS)
        return bool(self._in_flight) or self._expects_more()

    def stop(self, grace_seconds: float | None = None) -> None:
        """Reserve no more and give back what has not begun; what runs may finish, within the grace."""
        if grace_seconds is not None and self._stop_by is None:
            self._stop_by = self._clock() + grace_seconds
        if self._stopping:
            return
        self._stopping = True
        logger.info("%s reserves no more keys", self._table)
        cancelled = [ticket for ticket in self._in_flight if self._executor.cancel(ticket)]
        self._store.release([job for ticket in cancelled for job in self._in_flight.pop(ticket)])
        self._release_waiting()

    def _release_waiting(self) -> None:
        before = self._store.renew(self._jobs_in_flight())
        self._store.release(before, only_waiting=True)
        after = self._store.renew(before)
        released = {job.identity for job in before} - {job.identity for job in after}
        for ticket, jobs in list(self._in_flight.items()):
            self._in_flight[ticket] = tuple(job for job in jobs if job.identity not in released)
            if not self._in_flight[ticket]:
                del self._in_flight[ticket]

    def status(self) -> Status:
        """Count what is done, what runs and, if the policy asks for it, what is left."""
        return self._status(self._count_pending(RECOUNT_SECONDS) if self._policy.count_pending else 0)

    @property
    def last_status(self) -> Status:
        """What is done, what runs, and what was left when it was last counted."""
        return self._status(self._pending)

    def summary(self) -> Summary:
        """Give the run's result so far."""
        return Summary(self._made, tuple(self._errors))

    def _status(self, pending: int) -> Status:
        errors = () if self._policy.suppress_errors else tuple(self._errors[:1])
        losses = tuple(self._attempts.losses.items())
        handover = Handover(stopping=self._stopping, losses=losses, errors=errors)
        running = sum(map(len, self._in_flight.values()))
        return Status(self._made, self._failed, running, pending, handover)

    def _succeed(self, lost: Status, watch: Watch) -> None:
        """Go on where a driver was lost, which is a loss for keys in its process, and say so first."""
        legacy = lost.handover
        self._made, self._failed, self._errors = lost.made, lost.failed, list(legacy.errors)
        self._attempts.losses.update(dict(legacy.losses))
        beside = self._store.begun_by(legacy.host, legacy.pid)
        self._calls = lost.made + lost.failed + len(beside)
        self._grouping.isolate(beside)
        if len(beside) == 1:
            self._record_lost(beside[0], Failure(WITH_DRIVER))
        else:
            self._give_back(beside)
        if legacy.stopping or not watch(self._status(lost.pending)):
            self.stop(self._policy.grace_seconds)

    def _do_all_steps(self, watch: Watch) -> None:
        try:
            self._go_on(watch)
        except (KeyboardInterrupt, SystemExit):
            with self._without_database():
                self.stop(0 if self._executor.in_process else self._policy.grace_seconds)
                self._go_on(watch)
            raise

    def _go_on(self, watch: Watch) -> None:
        while self.step():
            if not watch(self.status()):
                self.stop(self._policy.grace_seconds)
            if self._stop_by is not None and self._clock() >= self._stop_by:
                return

    def _waiting(self, watch: Watch) -> Callable[[], bool]:
        """Let the store ask, while it waits for its database, whether somebody has stopped the run."""
        me = threading.current_thread()

        def is_wanted() -> bool:
            if threading.current_thread() is me:
                goes_on = watch(self.last_status) and not self._stopping
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

    def _jobs_in_flight(self) -> list[Job]:
        return [job for jobs in list(self._in_flight.values()) for job in jobs]

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
        if idle and self._obstacles.hopeless:
            raise WorkerSetupError(f"No worker begins a key of {self._table}. {self._obstacles.last}")
        if self._stopping or self._obstacles.pause_seconds or not self._supply.asks(idle=idle):
            return
        places = self._executor.free_places()
        most = max(places, MOST_AT_ONCE)
        limit = self._free_calls(min(places * self._grouping.size, most))
        if limit <= 0:
            return
        jobs = self._store.reserve(limit)
        self._supply.note(asked=limit, given=len(jobs), idle=idle)
        self._calls += len(jobs)
        self._pending = max(0, self._pending - len(jobs))
        self._submit(deque(self._grouping.split(jobs, 1 if len(jobs) == most else places)))

    def _submit(self, groups: deque[tuple[Job, ...]]) -> None:
        try:
            while groups:
                ticket = self._executor.submit(_name(self._table, groups[0]), groups[0])
                self._in_flight[ticket] = groups.popleft()
                self._overdue.note(ticket)
        finally:
            self._store.release([job for jobs in groups for job in jobs])

    def _pauses(self) -> bool:
        return self._supply.pauses or self._obstacles.pause_seconds > 0

    def _expects_more(self) -> bool:
        return not self._stopping and not self._supply.empty and self._free_calls(1) > 0

    def _free_calls(self, places: int) -> int:
        if self._policy.max_calls is None:
            return places
        return min(places, self._policy.max_calls - self._calls)

    def _wait_seconds(self) -> float:
        left = WAIT_SECONDS if self._stop_by is None else self._stop_by - self._clock()
        return max(0.0, min(WAIT_SECONDS, left, self._overdue.period_seconds))

    def _end_overdue(self) -> None:
        if not self._overdue.asks():
            return
        running = self._running(self._in_flight)
        for ticket in self._overdue.among(running):
            jobs = self._in_flight.pop(ticket)
            waiting = self._record_until(jobs, Outcome(running[ticket], Ending.FAILED, self._overdue.failure))
            self._end(ticket)
            self._give_back(waiting)

    def _end_disowned(self) -> None:
        if not self._lease.any_gone:
            return
        for ticket, jobs in list(self._in_flight.items()):
            if all(map(self._lease.is_gone, jobs)):
                for job in self._in_flight.pop(ticket):
                    self._let_go(job)
                self._end(ticket)

    def _take_back_waiting(self) -> None:
        """Let others make what waits behind a key that takes long."""
        if groups := self._waiting_jobs.suspects(self._in_flight):
            for ticket, waiting in self._waiting_jobs.behind(groups, self._running(groups)).items():
                self._in_flight[ticket] = tuple(job for job in groups[ticket] if job not in waiting)
                self._give_back(waiting)

    def _running(self, tasks: Mapping[int, Sequence[Job]]) -> dict[int, Job]:
        """Tell which job of each task runs: a worker makes them in order, and what it has made is gone."""
        begun = {job.identity for job in self._store.begun([job for jobs in tasks.values() for job in jobs])}
        return {
            ticket: next(job for job in jobs if job.identity in begun)
            for ticket, jobs in tasks.items()
            if any(job.identity in begun for job in jobs)
        }

    def _end(self, ticket: int) -> None:
        self._overdue.forget(ticket)
        self._executor.kill(ticket)

    def _collect(self, completion: Completion) -> None:
        jobs = self._in_flight.pop(completion.ticket, ())
        overdue = self._overdue.explains(completion.ticket)
        self._overdue.forget(completion.ticket)
        if not jobs:
            return
        if completion.report and completion.report.trouble:
            self._give_back(jobs)
            self._meet_obstacle(completion.report.trouble)
        elif completion.report:
            self._record_report(jobs, completion.report)
        elif (job := self._made_when_broken(jobs)) is None:
            self._record_unbegun(jobs, _trouble(completion))
        elif overdue:
            self._give_back(self._record_until(jobs, Outcome(job, Ending.FAILED, self._overdue.failure)))
        else:
            lost = Outcome(job, Ending.LOST, Failure(_trouble(completion)))
            self._give_back(self._record_until(jobs, lost))

    def _record_unbegun(self, jobs: Sequence[Job], breakage: str) -> None:
        """Give back what a worker left that was told to go, or that was unable to begin it."""
        left, told_to_go = self._store.renew(jobs), self._store.forgone(jobs)
        for job in [job for job in jobs if job not in left]:
            self._let_go(job)
        self._give_back(left)
        if left and not told_to_go:
            self._grouping.isolate(left)
            self._meet_obstacle(breakage)

    def _record_report(self, jobs: Sequence[Job], report: Report) -> None:
        still = {job.identity for job in jobs}
        outcomes = [outcome for outcome in report.outcomes if outcome.job.identity in still]
        left = [outcome.job for outcome in outcomes if outcome.ending is Ending.LEFT]
        ended = outcomes[: len(outcomes) - len(left)]
        cut = bool(left) and ended[-1].ending not in (Ending.MADE, Ending.PRESENT)
        self._grouping.note(len(ended), report.seconds, cut=cut)
        if self._executor.shows and ended:
            self._make_seconds.append(report.seconds / len(ended))
        self._give_back(left)
        for outcome in ended:
            self._record(outcome)

    def _made_when_broken(self, jobs: Sequence[Job]) -> Job | None:
        """Tell which job a worker was making when it died, if that is known."""
        if not self._store.sees_beginnings:
            return jobs[0] if len(jobs) == 1 else None
        begun = {job.identity for job in self._store.begun(jobs)}
        return next((job for job in jobs if job.identity in begun), None)

    def _record_until(self, jobs: tuple[Job, ...], outcome: Outcome) -> Sequence[Job]:
        """Record how a job ended with its worker, and that those before it are made; give those after it."""
        position = jobs.index(outcome.job)
        for job in jobs[:position]:
            self._record(Outcome(job, Ending.MADE))
        self._record(outcome)
        return jobs[position + 1 :]

    def _record(self, outcome: Outcome) -> None:
        if outcome.ending not in (Ending.LOST, Ending.DEFERRED):
            self._note_progress()
        match outcome.ending:
            case Ending.MADE:
                self._made += 1
                self._finish(outcome.job)
            case Ending.PRESENT:
                self._finish(outcome.job)
            case Ending.FAILED:
                self._record_failed(outcome)
            case Ending.INTERRUPTED | Ending.LEFT:
                self._give_back([outcome.job])
            case Ending.LOST:
                self._record_lost(outcome.job, outcome.failure or UNKNOWN)
            case Ending.DEFERRED:
                self._record_deferred(outcome)
            case Ending.DISOWNED:
                self._record_disowned(outcome.job)

    def _finish(self, job: Job) -> None:
        self._attempts.forget(job)
        self._store.finish(job)

    def _record_failed(self, outcome: Outcome) -> None:
        failure = outcome.failure or UNKNOWN
        pause_seconds = None if self._stopping else self._attempts.after_failure(outcome.job, failure)
        if pause_seconds is not None:
            self._log("failed and is tried again in %.1f s: %s", outcome.job, pause_seconds, failure.message)
            self._give_back([outcome.job], pause_seconds)
            return
        self._fail(outcome.job, failure, outcome.host, outcome.pid)

    def _fail(self, job: Job, failure: Failure, host: str = "", pid: int = 0) -> None:
        self._attempts.forget(job)
        if not self._store.fail(job, failure, host, pid):
            self._let_go(job)
            return
        self._failed += 1
        if len(self._errors) < self._policy.max_errors_listed:
            self._errors.append((job.key, failure))
        if not self._policy.suppress_errors:
            self.stop()

    def _record_lost(self, job: Job, cause: Failure) -> None:
        self._obstacles.forget()
        pause_seconds = self._attempts.after_loss(job)
        losses = self._attempts.losses[job.identity]
        self._log("was lost, %d of %d: %s", job, losses, self._policy.max_losses, cause.message)
        if pause_seconds is not None:
            self._give_back([job], pause_seconds)
            return
        self._fail(job, Failure(f"lost {losses} times, last: {cause.message}", cause.traceback))

    def _record_deferred(self, outcome: Outcome) -> None:
        failure = outcome.failure or UNKNOWN
        begun = bool(self._store.begun([outcome.job]))
        connection_lost = CONNECTION_LOST in failure.kinds
        pause_seconds = self._attempts.after_deferral(
            outcome.job, begun=begun, connection_lost=connection_lost
        )
        if pause_seconds is None:
            hint = f" {TOO_LARGE}" if connection_lost else ""
            failure = replace(failure, message=f"tried again and again, last: {failure.message}{hint}")
            self._fail(outcome.job, failure, outcome.host, outcome.pid)
            return
        if pause_seconds >= 1 and not self._waits_for_database:
            self._waits_for_database = True
            logger.warning("%s waits for the database: %s", self._table, failure.message)
        self._give_back([outcome.job], pause_seconds)

    def _note_progress(self) -> None:
        self._obstacles.forget()
        if self._waits_for_database:
            self._waits_for_database = False
            logger.info("%s waits no more for the database", self._table)

    def _record_disowned(self, job: Job) -> None:
        if self._store.renew([job]):
            self._record_lost(job, Failure(UNFINISHED))
        else:
            self._let_go(job)

    def _let_go(self, job: Job) -> None:
        self._calls -= 1
        if not self._disowned and not self._stopping:
            self._log(NOT_OURS, job)
            self._disowned = True

    def _log(self, message: str, job: Job, *arguments: object) -> None:
        logger.warning("%s(%s) " + message, self._table, job, *arguments)

    def _give_back(self, jobs: Sequence[Job], pause_seconds: float = 0) -> None:
        if jobs:
            self._store.release(jobs, delay_seconds=pause_seconds)
            self._calls -= len(jobs)
            self._supply.refill(pause_seconds)

    def _meet_obstacle(self, what: str) -> None:
        if self._obstacles.meet(what):
            logger.warning("A worker could not begin a key of %s: %s", self._table, what)

    def _give_back_all(self) -> None:
        """End what runs, only then give it back: nobody else shall make it meanwhile."""
        try:
            if self._in_flight:
                self._executor.close()
        finally:
            self._in_flight.clear()
            with self._without_database():
                self._store.release_all()

    def _tell(self) -> None:
        """Let the log and the executor's dashboard know how the run stands, once a second."""
        if self._clock() - self._told_at < TELL_SECONDS:
            return
        self._told_at = self._clock()
        self._tell_places(self._executor.places())
        if self._executor.shows:
            self._count_pending(SHOWN_RECOUNT_SECONDS)
        self._show()

    def _tell_places(self, places: int) -> None:
        if places != self._places and logger.isEnabledFor(logging.INFO):
            pending = self._count_pending(RECOUNT_SECONDS)
            logger.info(
                "%s has %d places, %d before; %d keys are pending", self._table, places, self._places, pending
            )
        self._places = places

    def _show(self) -> None:
        self._executor.show(self._table, self.last_status, tuple(self._make_seconds))
        self._make_seconds.clear()

    def _count_pending(self, age_seconds: float) -> int:
        """Count what is left, unless that was done so shortly ago."""
        now = self._clock()
        if self._counted_at is None or now - self._counted_at >= age_seconds:
            self._pending, self._counted_at = self._store.pending(), now
        return self._pending


class _Supply:
    """Remembers how the store's supply looked when last asked, to spare it vain questions.

    It counts as empty only if it was so when nothing ran any more, and nothing that the
    run itself has put back is due later.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._due_at = clock()
        self.refill()

    def refill(self, pause_seconds: float = 0) -> None:
        self.empty = False
        self._short = False
        self._asked_at = self._clock()
        if pause_seconds:
            self._due_at = max(self._due_at, self._asked_at + pause_seconds + CLOCKS_DIFFER_SECONDS)

    @property
    def pauses(self) -> bool:
        """Whether it was empty but for what is due later."""
        return self._short

    def note(self, *, asked: int, given: int, idle: bool) -> None:
        self.empty = idle and given == 0 and self._clock() >= self._due_at
        self._short = given < asked
        self._asked_at = self._clock()

    def asks(self, *, idle: bool) -> bool:
        if not self._short:
            return True
        return idle or self._clock() - self._asked_at >= WAIT_SECONDS


def _name(table: str, jobs: Sequence[Job]) -> str:
    more = f", +{len(jobs) - 1} more" if len(jobs) > 1 else ""
    return f"{table}({jobs[0]}{more})"


def _trouble(completion: Completion) -> str:
    return completion.report.trouble if completion.report else completion.breakage or "no answer"
