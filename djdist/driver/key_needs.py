"""What keys need, also those that have run out of memory."""

import logging
import traceback
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from djdist._job import Ending, Failure, Identity, Job, Outcome, Policy, Recipe
from djdist._needs import ONE_CPU, Needs, amounts_text

logger = logging.getLogger(__package__)

GROWTH = 2


class KeyNeeds:
    """Says what each key needs: as its table says, and what memory has been found to be enough.

    A key that is lost to out-of-memory runs again with twice the memory. Once it is made, its
    table's next keys start from there.

    Parameters
    ----------
    recipes : mapping of str to Recipe
        What tables say.
    policy : Policy
        How much memory a key may get at most.
    check : callable
        Raises an error where what a key says that it needs will never be there.

    Attributes
    ----------
    learned : dict of str to int
        What memory the keys of a table start from, in bytes.
    """

    def __init__(
        self,
        recipes: Mapping[str, Recipe],
        policy: Policy,
        check: Callable[[str, Needs], None] = lambda table, needs: None,
    ) -> None:
        self._check = check
        self._recipes = recipes
        self._memory_max = policy.memory_max
        self._last: dict[str, Needs] = {}
        self._grown: dict[Identity, int] = {}
        self.learned: dict[str, int] = {}

    def of_table(self, table: str) -> Needs:
        """Return what a key of a table needs, where each says its own what the last one did."""
        needs = self._recipes[table].needs
        last = needs if isinstance(needs, Needs) else self._last.get(table, ONE_CPU)
        return self._with_learned(table, last)

    def of(self, job: Job) -> Needs:
        """Return what a key needs; what its table raises over it is raised."""
        needs = self._recipes[job.table].needs
        if not isinstance(needs, Needs):
            needs = needs(job.key)
            self._check(job.table, needs)
            self._last[job.table] = needs
        needs, grown = self._with_learned(job.table, needs), self._grown.get(job.identity)
        return needs.with_memory(max(grown, int(needs.memory or 0))) if grown else needs

    def parted(self, jobs: Sequence[Job], record: Callable[[Outcome], None]) -> dict[Needs, list[Job]]:
        """Part jobs by what they need; record the error of those whose table raises instead of saying it."""
        by_needs = defaultdict[Needs, list[Job]](list)
        for job in jobs:
            try:
                by_needs[self.of(job)].append(job)
            except Exception as error:
                record(Outcome(job, Ending.FAILED, _failure(error)))
        return by_needs

    def grow(self, job: Job, had: Needs, share: int, largest: int) -> bool:
        """Note that a key ran out of memory; return whether it may have more.

        Parameters
        ----------
        job : Job
            The key.
        had : Needs
            What it was given.
        share : int
            The memory that it had in fact, in bytes, where it didn't ask for any.
        largest : int
            The memory of the largest node that holds such a key, in bytes.
        """
        before, most = int(had.memory or share), min(largest, self._memory_max or largest)
        memory = min(GROWTH * before, most)
        if memory <= before:
            return False
        self._grown[job.identity] = memory
        logger.warning(
            "%s(%s) ran out of memory with %s; it runs again with %s",
            job.table, job, amounts_text({"memory": before}), amounts_text({"memory": memory}),
        )  # fmt: skip
        return True

    def note_made(self, job: Job) -> None:
        """Note that a key has been made, so that others start from the memory that it needed."""
        memory = self._grown.pop(job.identity, 0)
        if memory > self.learned.get(job.table, 0):
            self.learned[job.table] = memory

    def forget(self, job: Job) -> None:
        """Keep nothing of a key that will not be tried again."""
        self._grown.pop(job.identity, None)

    def _with_learned(self, table: str, needs: Needs) -> Needs:
        learned = self.learned.get(table, 0)
        return needs.with_memory(learned) if learned > int(needs.memory or 0) else needs


def _failure(error: Exception) -> Failure:
    kinds = tuple(kind.__name__ for kind in type(error).__mro__)
    stack = "".join(traceback.format_exception(error))
    return Failure(f"{type(error).__name__}: {error}", stack, error, kinds)
