"""The jobs of a whole pipeline, which may be one table."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

from djdist._job import Failure, Job
from djdist._job_store import JobStore
from djdist.database.errors import is_infrastructure
from djdist.errors import DatabaseError

Result = TypeVar("Result")


@dataclass
class PipelineStore(JobStore):
    """Hands each job on to the store of its table.

    A table may be dropped or altered while a run goes on. What keeps the run alive (to refresh, renew, rescue
    and release) is done for the others before its error is raised; all else can be asked of
    each table by itself.

    Parameters
    ----------
    stores : dict of str to JobStore
        The store of each table, those upstream first.
    """

    stores: dict[str, JobStore]

    def __post_init__(self) -> None:
        self.sees_beginnings = all(store.sees_beginnings for store in self.stores.values())
        self.keeps_errors = all(store.keeps_errors for store in self.stores.values())

    def of(self, table: str) -> JobStore:
        return self.stores[table]

    def refresh(self) -> dict[str, int]:
        return sum(map(Counter, self._from_each(lambda store: store.refresh())), Counter[str]())

    def add_new(self, parents: Sequence[Job]) -> int | None:
        counts = [store.add_new(parents) for store in self.stores.values()]
        return None if None in counts else sum(count or 0 for count in counts)

    def reserve(self, limit: int, max_priority: int | None = None) -> list[Job]:
        """Reserve the most urgent jobs first, then the deepest, so that results are finished early."""
        if len(self.stores) == 1:
            return next(iter(self.stores.values())).reserve(limit, max_priority)
        jobs: list[Job] = []
        while len(jobs) < limit and (found := self._most_urgent(limit - len(jobs), max_priority)):
            jobs += found
        return jobs

    def _most_urgent(self, limit: int, max_priority: int | None) -> list[Job]:
        """Reserve jobs of the smallest priority that there is."""
        priorities = self.next_priorities()
        priority = min(priorities.values(), default=None)
        if priority is None or (max_priority is not None and priority > max_priority):
            return []
        jobs: list[Job] = []
        for table in reversed([table for table, next_one in priorities.items() if next_one == priority]):
            jobs += self.stores[table].reserve(limit - len(jobs), priority) if len(jobs) < limit else []
        return jobs

    def next_priority(self) -> int | None:
        return min(self.next_priorities().values(), default=None)

    def next_priorities(self) -> dict[str, int]:
        priorities = {table: store.next_priority() for table, store in self.stores.items()}
        return {table: priority for table, priority in priorities.items() if priority is not None}

    def reserved(self) -> list[Job]:
        return [job for store in self.stores.values() for job in store.reserved()]

    def release(self, jobs: Sequence[Job], *, delay_seconds: float = 0) -> int:
        return sum(store.release(mine, delay_seconds=delay_seconds) for store, mine in self._parted(jobs))

    def release_waiting(self, jobs: Sequence[Job]) -> list[Job]:
        return [job for store, mine in self._parted(jobs) for job in store.release_waiting(mine)]

    def release_all(self) -> None:
        self._from_each(lambda store: store.release_all())

    def fail(self, job: Job, failure: Failure, host: str = "", pid: int = 0) -> bool:
        return self.stores[job.table].fail(job, failure, host, pid)

    def leave_out(self, failed: Sequence[Job]) -> None:
        for store, mine in self._parted(failed):
            store.leave_out(mine)

    def note(self, jobs: Sequence[Job], text: str) -> None:
        for store, mine in self._parted(jobs):
            store.note(mine, text)

    def forget(self, job: Job) -> None:
        self.stores[job.table].forget(job)

    def renew(self, jobs: Sequence[Job]) -> list[Job]:
        mine = dict(self._parted(jobs))
        return [*chain.from_iterable(self._from_each(lambda store: store.renew(mine[store]), mine))]

    def rescue(self) -> int:
        return sum(self._from_each(lambda store: store.rescue()))

    def begun(self, jobs: Sequence[Job]) -> list[Job]:
        return [job for store, mine in self._parted(jobs) for job in store.begun(mine)]

    def handed_back(self, jobs: Sequence[Job]) -> bool:
        return any(store.handed_back(mine) for store, mine in self._parted(jobs))

    def begun_by(self, host: str, pid: int) -> list[Job]:
        return [job for store in self.stores.values() for job in store.begun_by(host, pid)]

    def end_sessions(self, jobs: Sequence[Job]) -> None:
        for store, mine in self._parted(jobs):
            store.end_sessions(mine)

    def pending(self, most: int | None = None) -> int:
        count = 0
        for store in self.stores.values():
            if most is None or count < most:
                count += store.pending(None if most is None else most - count)
        return count

    def held_by_others(self) -> int:
        return sum(store.held_by_others() for store in self.stores.values())

    def held_back(self) -> dict[str, int]:
        counts = Counter[str]()
        for store in self.stores.values():
            counts.update(store.held_back())
        return counts

    def assume_reached(self) -> None:
        for store in self.stores.values():
            store.assume_reached()

    def wait_while(self, wanted: Callable[[], bool]) -> None:
        for store in self.stores.values():
            store.wait_while(wanted)

    def close(self) -> None:
        for store in self.stores.values():
            store.close()

    def _from_each(
        self, act: Callable[[JobStore], Result], stores: Iterable[JobStore] | None = None
    ) -> list[Result]:
        """Do it for each table, then raise what went wrong for one, but wait for the database only once."""
        results, errors = list[Result](), list[DatabaseError]()
        for store in self.stores.values() if stores is None else stores:
            try:
                results.append(act(store))
            except DatabaseError as error:
                errors.append(error)
                if not is_of_one_table(error):
                    break
        if errors:
            raise errors[0]
        return results

    def _parted(self, jobs: Sequence[Job]) -> Iterator[tuple[JobStore, list[Job]]]:
        """Part jobs by their table, and leave out the tables of none."""
        by_table = defaultdict[str, list[Job]](list)
        for job in jobs:  # thousands, of dozens of tables
            by_table[job.table].append(job)
        yield from ((store, by_table[table]) for table, store in self.stores.items() if table in by_table)


def is_of_one_table(error: DatabaseError) -> bool:
    """Return whether the server is there, and refuses only what was asked of it."""
    refusal = getattr(error.__cause__, "orig", None)
    return refusal is not None and not is_infrastructure(refusal)
