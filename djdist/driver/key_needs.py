"""What keys need, also those that have run out of memory."""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from djdist._job import Ending, Failure, Identity, Job, Outcome, Policy, Recipe
from djdist._needs import Needs, amounts_text
from djdist.errors import OptionError

logger = logging.getLogger(__package__)

GROWTH = 2
GROWN = "ran out of memory with %s; it runs again with %s"


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
        self._said: dict[Identity, Needs] = {}
        self._grown: dict[Identity, int] = {}
        self.learned: dict[str, int] = {}

    def of_table(self, table: str) -> Needs:
        """Return what a key of a table needs, where each says its own what the last one did."""
        recipe = self._recipes[table]
        return self._with_learned(table, recipe.needs or self._last.get(table, recipe.default_needs))

    def has_to_ask(self, job: Job) -> bool:
        """Return whether it isn't known yet what a key needs, since its table says so of each one."""
        return self._recipes[job.table].needs is None and job.identity not in self._said

    def told(self, needs: Iterable[tuple[Job, Needs]]) -> list[Outcome]:
        """Note what keys need; return the errors of those that no node will hold."""
        refused = list[Outcome]()
        for job, said in needs:
            wanted = said.over(self._recipes[job.table].default_needs)
            try:
                self._check(job.table, wanted)
            except OptionError as error:
                refused.append(Outcome(job, Ending.FAILED, Failure(f"{type(error).__name__}: {error}")))
            else:
                self._said[job.identity] = self._last[job.table] = wanted
        return refused

    def of(self, job: Job) -> Needs:
        """Return what a key needs."""
        said = self._said.get(job.identity) or self.of_table(job.table)
        needs, grown = self._with_learned(job.table, said), self._grown.get(job.identity)
        return needs.with_memory(max(grown, int(needs.memory or 0))) if grown else needs

    def parted(self, jobs: Sequence[Job]) -> Iterator[tuple[Needs, list[Job]]]:
        """Part jobs by what they need."""
        by_needs = defaultdict[Needs, list[Job]](list)
        for job in jobs:
            by_needs[self.of(job)].append(job)
        yield from by_needs.items()

    def grow(self, job: Job, had: Needs, share: int, largest: int) -> str:
        """Note that a key ran out of memory; say what it gets next, nothing where it may have no more.

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
            return ""
        self._grown[job.identity] = memory
        had_text, gets_text = (amounts_text({"memory": amount}) for amount in (before, memory))
        logger.warning("%s(%s) " + GROWN, job.table, job, had_text, gets_text)
        return GROWN % (had_text, gets_text)

    def note_made(self, job: Job) -> None:
        """Note that a key has been made, so that others start from the memory that it needed."""
        memory = self._grown.get(job.identity, 0)
        if memory > self.learned.get(job.table, 0):
            self.learned[job.table] = memory
            logger.info("The next keys of %s start from %s", job.table, amounts_text({"memory": memory}))
        self.forget(job)

    def forget(self, job: Job) -> None:
        """Keep nothing of a key that will not be tried again."""
        if self._grown or self._said:  # mostly neither, for thousands of keys
            self._grown.pop(job.identity, None)
            self._said.pop(job.identity, None)

    def _with_learned(self, table: str, needs: Needs) -> Needs:
        learned = self.learned.get(table, 0)
        return needs.with_memory(learned) if learned > int(needs.memory or 0) else needs
