"""The one loop: reserve, submit, collect, record."""

import logging
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

from djdist._job import (
    Breakage,
    BreakageKind,
    Completion,
    Ending,
    Failure,
    Job,
    Outcome,
    Report,
    Status,
    Summary,
    Watch,
)
from djdist._needs import Needs
from djdist._signals import signal_behind
from djdist.driver.backlog import WAIT_SECONDS
from djdist.driver.context import RunContext
from djdist.driver.dashboard import RECOUNT_SECONDS, Dashboard
from djdist.driver.filling import Filling
from djdist.driver.key_needs import KeyNeeds
from djdist.driver.lease import Lease
from djdist.driver.overdue import BlockedJobs, Overdue
from djdist.driver.results import Results
from djdist.driver.room import Room
from djdist.driver.shutdown import Shutdown
from djdist.driver.streaming import Streaming
from djdist.driver.tables import Tables
from djdist.driver.tasks import InFlight, Task
from djdist.driver.tolerance import Tolerance
from djdist.driver.unmet import UnmetNeeds
from djdist.errors import DatabaseError, WorkerSetupError

logger = logging.getLogger(__package__)

NO_ANSWER = Breakage(BreakageKind.OTHER, "no answer")
WITH_DRIVER = "the worker died that also held the run's driver"


class Driver:
    """Makes the jobs of a run.

    Parameters
    ----------
    run : RunContext
        Where it keeps its jobs and makes them, and on which terms.
    """

    def __init__(self, run: RunContext) -> None:
        self._run = run
        self._store, self._pool, self._policy = run.store, run.pool, run.policy
        self._shutdown = Shutdown(run.clock)
        self._tables = Tables(run.recipes, run.store, run.policy, run.clock)
        self._tolerance = Tolerance(run.policy, self._shutdown, run.notifier)
        self._streaming = Streaming(self._tables, run.policy, self._tolerance, run.clock)
        self._room = Room(run.pool)
        self._needs = KeyNeeds(run.recipes, run.policy, self._room.check)
        self._unmet = UnmetNeeds(self._tables, self._needs, self._room, run.clock)
        sharing = {name: recipe.most_per_transaction for name, recipe in run.recipes.items()}
        self._tasks = InFlight(run.store, run.pool, self._room, run.clock, sharing)
        self._lease = Lease(
            run.store, self._tasks, run.policy.lease_seconds, self._shutdown.over, run.notifier
        )
        self._overdue = Overdue(run.recipes, run.clock, sees_beginnings=run.store.sees_beginnings)
        self._blocked = BlockedJobs(run.clock)
        self._results = Results(run, self._tables, self._streaming, self._needs, self._shutdown, self.stop)
        self._filling = Filling(
            self._tables, self._tasks, self._room, self._needs, self._results, self._tolerance
        )
        self._dashboard = Dashboard(run, self._tables, self._filling.slots, lambda: self.last_status)
        self._begun = False
        self._held_back: dict[str, dict[str, int]] = {}
        self._busy_at = run.clock()

    def run(self, watch: Watch, predecessor: Status | None = None) -> Summary:
        """Do all steps and return the summary; whatever happens, give back what is left.

        A run that goes on after its driver died, its ``predecessor``, frees first what that one held.

        Raises
        ------
        WorkerSetupError
            No worker can make this table's keys, from the start or since a while; they are pending.
        """
        self._store.wait_while(self._wanted_by(watch))
        with self._giving_back_all():
            self._begin(watch, predecessor)
            with self._lease, self._finishing_what_runs(watch):
                while self.step() and self._goes_on(watch):
                    pass
        if self._policy.count_pending or logger.isEnabledFor(logging.INFO):
            with suppress(DatabaseError):  # all else is done
                self._tables.count_in_the_end()
        if len(self._tables) > 1:
            with suppress(DatabaseError):
                self._held_back = self._tables.held_back()
        self._results.log_memory()
        watch(self.last_status)
        return self.summary()

    def step(self) -> bool:
        """Fill the free slots and collect what has ended; False when nothing is left to do."""
        self._dashboard.tell()
        if not self._shutdown.is_stopping:
            self._streaming.add(self._tasks.job_counts, has_room=self._has_room)
        self._fill()
        completions = self._pool.wait(self._wait_seconds())
        for completion in completions:
            self._collect(completion)
        self._end_lost()
        self._look_at_long_ones()
        if self._tasks:
            self._busy_at = self._run.clock()
            return True
        if not self._expects_more():
            return False
        pause_seconds = min(WAIT_SECONDS, self._streaming.due_in_seconds(has_room=True))
        if not completions and self._pauses() and not self._streaming.wait(pause_seconds):
            self._run.sleep(max(0.0, pause_seconds))
        return True

    def stop(self, grace_seconds: float | None = None) -> None:
        """Reserve no more and give back what has not begun; what runs may finish, within the grace."""
        if self._shutdown.stop(grace_seconds):
            logger.info("%s reserves no more keys", self._run.name)
            self._tasks.withdraw_queued()
            with self._lease.held_off():  # what is locked would be taken for begun
                self._tasks.withdraw_unstarted()

    def status(self) -> Status:
        """Count what is done, what runs and, if it is asked for, what is left, and what has no node."""
        if self._policy.count_pending:
            self._tables.count(RECOUNT_SECONDS)
        return replace(self.last_status, unmet=self._unmet.texts())

    @property
    def last_status(self) -> Status:
        """What is done, what runs, and what was left when it was last counted."""
        return self._results.status(self._tasks.running(), self._tasks.queued(), begun=self._begun)

    def summary(self) -> Summary:
        """Return the run's result so far."""
        return replace(self._results.summary(), held_back=self._held_back)

    def _begin(self, watch: Watch, predecessor: Status | None) -> None:
        if predecessor:
            self._succeed(predecessor, watch)
        else:
            self._try_workers(watch)
        self._store.release_all()  # what a lost driver of this run held
        self._streaming.begin()
        self._begun = True

    def _succeed(self, lost: Status, watch: Watch) -> None:
        """Go on where a driver was lost, which is a loss for keys in its process, and say so first."""
        self._begun = lost.begun
        self._results.inherit(lost)
        self._dashboard.show()
        if lost.handover.stopping:
            self.stop(self._policy.grace_seconds)
        beside = self._store.begun_by(lost.handover.host, lost.handover.pid)
        self._results.count_reserved(len(beside))
        self._filling.isolate(beside)
        if len(beside) == 1:
            self._results.record(Outcome(beside[0], Ending.LOST, Failure(WITH_DRIVER)))
        else:
            self._results.give_back(beside)
        if not watch(self.last_status):
            self.stop(self._policy.grace_seconds)

    def _try_workers(self, watch: Watch) -> None:
        tried = {self._pool.submit(table, (), needs) for table, needs in self._trials().items()}
        while tried:
            completions = self._pool.wait(WAIT_SECONDS)
            for completion in completions:
                if error := _error(completion):
                    raise error
                tried.discard(completion.ticket)
            if not completions and not watch(self.status()):
                self.stop()
                return

    def _trials(self) -> dict[str, Needs]:
        """Return what trials need by table: of several, none waits for what is scarce or for a whole node."""
        needs = {table.name: self._needs.of_table(table.name) for table in self._tables}
        if len(needs) == 1:
            return needs
        common = {name: each for name, each in needs.items() if not each.gpus and not each.custom}
        return {name: replace(each, cpus=min(1, each.cpus), memory=None) for name, each in common.items()}

    @contextmanager
    def _finishing_what_runs(self, watch: Watch) -> Iterator[None]:
        """Finish what runs, within the grace, where the run is interrupted."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            with self._without_database():
                self.stop(0 if self._pool.runs_in_caller else self._policy.grace_seconds)
                while self.step() and self._goes_on(watch):
                    pass
            raise

    def _goes_on(self, watch: Watch) -> bool:
        if not watch(self.status()):
            self.stop(self._policy.grace_seconds)
        return not self._shutdown.is_cut

    def _wanted_by(self, watch: Watch) -> Callable[[], bool]:
        """Return what the store asks, while it waits for its database: whether the run is still wanted.

        The run's own thread shows its status at the same time; others wait until the run is over.
        """
        me = threading.current_thread()

        def is_wanted() -> bool:
            if threading.current_thread() is not me:
                return not self._shutdown.over.is_set()
            is_ended = self._shutdown.is_stopping or signal_behind(sys.exc_info()[1]) is not None
            if not watch(self.last_status) or is_ended:
                self._shutdown.end_patience(self._policy.grace_seconds)
            return self._shutdown.is_patient

        return is_wanted

    @contextmanager
    def _without_database(self) -> Iterator[None]:
        """End a run although its database is away: its lease ends by itself then."""
        try:
            yield
        except DatabaseError as error:
            logger.warning(
                "What %s has reserved is free again after %g seconds: %s",
                self._run.name,
                self._policy.lease_seconds,
                error,
            )

    def _fill(self) -> None:
        breaker = self._results.breaker
        if breaker.tripped and not self._tasks and not self._policy.watches:
            raise WorkerSetupError(
                f"No worker begins a key of {self._run.name}. {breaker.last}", may_pass=True
            )
        if not self._shutdown.is_stopping and not breaker.retry_after_seconds:
            self._filling.fill()

    @property
    def _has_room(self) -> bool:
        """Whether slots may be idle for want of keys."""
        return not self._tasks or self._tables.run_short

    def _pauses(self) -> bool:
        return self._tables.run_short or self._results.breaker.retry_after_seconds > 0

    def _expects_more(self) -> bool:
        """Return whether anything may still come, now that nothing is in flight."""
        if self._shutdown.is_stopping or self._results.free_calls(1) <= 0:
            return False
        if not self._tables.empty or self._streaming.may_add():
            return True
        return self._policy.watches and not self._has_been_idle

    @property
    def _has_been_idle(self) -> bool:
        """Whether a run that watches has had nothing to do for as long as it was told to wait."""
        longest = self._policy.idle_exit_seconds
        return longest is not None and self._run.clock() - self._busy_at >= longest

    def _wait_seconds(self) -> float:
        ends = min(WAIT_SECONDS, self._shutdown.seconds_left, self._overdue.period_seconds)
        if not self._shutdown.is_stopping:
            ends = min(ends, self._streaming.due_in_seconds(has_room=self._has_room))
        return max(0.0, ends)

    def _end_lost(self) -> None:
        """End the tasks of which no job is the run's any more."""
        if not self._lease.has_lost or not self._tasks.lost():
            return
        for completion in self._pool.wait(0):  # maybe made, while the database was waited for
            self._collect(completion)
        lost = self._tasks.lost()
        for task in lost:
            self._tasks.pop(task.ticket)
            for job in task.jobs:
                self._results.drop(job)
        self._kill(lost)

    def _look_at_long_ones(self) -> None:
        """Ask once which jobs run: for those that take too long, and for those that wait behind one."""
        found = [*self._overdue.suspects(self._tasks), *self._blocked.suspects(self._tasks)]
        for table in self._tables if found else ():
            with self._tolerance.of(table):
                self._look_at([task for task in dict.fromkeys(found) if task.table == table.name])

    def _look_at(self, suspects: Sequence[Task]) -> None:
        if suspects:
            self._tasks.look(suspects)
            self._results.give_back(self._tasks.pop_blocked(self._blocked.among(suspects)))
            self._end_overdue(self._overdue.among(suspects))

    def _end_overdue(self, tasks: Collection[Task]) -> None:
        waiting = list[Job]()
        for task in tasks:
            self._tasks.pop(task.ticket)
            if len(task.suspects) > 1:
                waiting += self._suspect(task)
            else:
                waiting += self._results.record_until(task.jobs, self._overdue.outcome(task))
        self._kill(tasks)
        self._results.give_back(waiting)

    def _kill(self, tasks: Collection[Task]) -> None:
        """End tasks once all is recorded: on Dask it takes seconds, in which others end."""
        for task in tasks:
            self._pool.kill(task.ticket)

    def _collect(self, completion: Completion) -> None:
        if task := self._tasks.pop(completion.ticket):
            with self._tolerance.of(self._tables[task.table]):
                self._record(task, completion)

    def _record(self, task: Task, completion: Completion) -> None:
        report = completion.report
        if report is None:
            self._record_broken(task, completion.error or NO_ANSWER)
        elif report.setup_error:
            self._results.give_back(task.jobs)
            self._results.worker_failed(report.setup_error)
        elif task.asks:
            self._record_needs(task.jobs, report)
        else:
            self._record_report(task, report)

    def _record_needs(self, jobs: Sequence[Job], report: Report) -> None:
        """Submit the keys of which it is known now what they need."""
        still = {job.identity: job for job in jobs}
        for outcome in (*report.outcomes, *self._needs.told(report.needs)):
            if still.pop(outcome.job.identity, None):
                self._results.record(outcome)
        known = [job for job in still.values() if not self._needs.has_to_ask(job)]
        begins = [] if self._shutdown.is_stopping else known
        self._filling.submit(begins)
        self._results.give_back([job for job in still.values() if job not in begins])

    def _record_broken(self, task: Task, error: Breakage) -> None:
        """Record what became of the jobs of a worker that died; it may have ended itself over a timeout."""
        timed_out = self._overdue.explains(task)
        if (job := self._tasks.running_in(task)) is None and not task.suspects:
            self._record_unbegun(task.jobs, error.message)
            return
        self._store.end_sessions(task.jobs)  # first: they may have locked what is recorded next
        if job is None:
            self._results.give_back(self._suspect(task))
            return
        if error.kind is BreakageKind.OUT_OF_MEMORY and (note := self._grow(task, job)):
            self._store.note([job], note)
            outcome = Outcome(job, Ending.INTERRUPTED)
        elif timed_out:
            outcome = self._overdue.outcome(task)
        else:
            outcome = Outcome(job, Ending.LOST, Failure(error.message))
        self._results.give_back(self._results.record_until(task.jobs, outcome))

    def _suspect(self, task: Task) -> Sequence[Job]:
        """Have each job of a dead worker's shared transaction made alone, so that it shows which it was.

        Returns
        -------
        sequence of Job
            What is to be given back, at no cost; what comes before was made.
        """
        first, last = task.jobs.index(task.suspects[0]), task.suspects[-1]
        for job in task.jobs[:first]:
            self._results.record(Outcome(job, Ending.MADE))
        logger.info(
            "%s(%s) to (%s) shared a worker's last transaction; each is made alone",
            task.table,
            task.jobs[first],
            last,
        )
        self._filling.isolate(task.suspects)
        return task.jobs[first:]

    def _grow(self, task: Task, job: Job) -> str:
        return self._needs.grow(job, task.needs, *self._room.memory(task.needs))

    def _record_unbegun(self, jobs: Sequence[Job], error: str) -> None:
        """Give back what a worker left that was preempted, or that was unable to begin it."""
        left, preempted = self._store.renew(jobs), self._store.handed_back(jobs)
        for job in [job for job in jobs if job not in left]:
            self._results.drop(job)
        self._results.give_back(left)
        if left and not preempted:
            self._filling.isolate(left)
            self._results.worker_failed(error)

    def _record_report(self, task: Task, report: Report) -> None:
        still = {job.identity for job in task.jobs}
        outcomes = [outcome for outcome in report.outcomes if outcome.job.identity in still]
        left = [outcome.job for outcome in outcomes if outcome.ending is Ending.NOT_STARTED]
        ended = outcomes[: len(outcomes) - len(left)]
        cut = bool(left and ended) and ended[-1].ending not in (Ending.MADE, Ending.ALREADY_MADE)
        name = task.table
        self._tables[name].grouping.note(len(ended), report.seconds, cut=cut)
        if ended:
            self._dashboard.note(name, report.seconds / len(ended))
            self._results.note_memory(ended, task.needs, report.peak_memory)
        self._results.give_back(left)
        for outcome in ended:
            self._results.record(outcome)

    @contextmanager
    def _giving_back_all(self) -> Iterator[None]:
        """End what runs, only then give it back: or somebody else could make it at the same time."""
        try:
            yield
        except DatabaseError:
            self._shutdown.end_patience(0)  # it has been waited for long enough
            raise
        finally:
            self._close()
            self._dashboard.show()

    def _close(self) -> None:
        try:
            if self._tasks:
                self._pool.close()
        finally:
            self._tasks.clear()
            with self._without_database():
                self._store.release_all()


def _error(completion: Completion) -> WorkerSetupError | None:
    report, error = completion.report, completion.error or NO_ANSWER
    if report is None:
        return WorkerSetupError(error.message, may_pass=error.kind is not BreakageKind.REFUSED)
    return WorkerSetupError(report.setup_error, may_pass=report.may_pass) if report.setup_error else None
