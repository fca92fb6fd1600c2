"""The jobs of a whole pipeline, which may be one table."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from djdist._job import Failure, Job
from djdist._job_store import JobStore


@dataclass
class PipelineStore(JobStore):
    """Hands each job on to the store of its table.

    Parameters
    ----------
    stores : dict of str to JobStore
        The store of each table, those upstream first.
    """

    stores: dict[str, JobStore]

    def __post_init__(self) -> None:
        self.sees_beginnings = all(store.sees_beginnings for store in self.stores.values())

    def refresh(self) -> dict[str, int]:
        changes = Counter[str]()
        for store in self.stores.values():
            changes.update(store.refresh())
        return changes

    def reserve(self, limit: int) -> list[Job]:
        """Reserve the deepest table's jobs first, so that what was begun gets to its end."""
        jobs: list[Job] = []
        for store in reversed(self.stores.values()):
            jobs += store.reserve(limit - len(jobs)) if len(jobs) < limit else []
        return jobs

    def reserved(self) -> list[Job]:
        return [job for store in self.stores.values() for job in store.reserved()]

    def release(self, jobs: Sequence[Job], *, delay_seconds: float = 0) -> int:
        return sum(store.release(mine, delay_seconds=delay_seconds) for store, mine in self._parted(jobs))

    def release_waiting(self, jobs: Sequence[Job]) -> list[Job]:
        return [job for store, mine in self._parted(jobs) for job in store.release_waiting(mine)]

    def release_all(self) -> None:
        for store in self.stores.values():
            store.release_all()

    def fail(self, job: Job, failure: Failure, host: str = "", pid: int = 0) -> bool:
        return self.stores[job.table].fail(job, failure, host, pid)

    def forget(self, job: Job) -> None:
        self.stores[job.table].forget(job)

    def renew(self, jobs: Sequence[Job]) -> list[Job]:
        return [job for store, mine in self._parted(jobs) for job in store.renew(mine)]

    def rescue(self) -> int:
        return sum(store.rescue() for store in self.stores.values())

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

    def assume_reached(self) -> None:
        for store in self.stores.values():
            store.assume_reached()

    def wait_while(self, wanted: Callable[[], bool]) -> None:
        for store in self.stores.values():
            store.wait_while(wanted)

    def close(self) -> None:
        for store in self.stores.values():
            store.close()

    def _parted(self, jobs: Sequence[Job]) -> Iterator[tuple[JobStore, list[Job]]]:
        """Part jobs by their table, and leave out the tables of none."""
        for table, store in self.stores.items():
            if mine := [job for job in jobs if job.table == table]:
                yield store, mine
