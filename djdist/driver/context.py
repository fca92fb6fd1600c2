"""What the parts of one run's driver share."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from djdist._job import Policy, Recipe
from djdist._job_store import JobStore
from djdist._notifier import Notifier
from djdist._task_pool import TaskPool


@dataclass(frozen=True)
class RunContext:
    """Where a run keeps its jobs and makes them, and on which terms.

    Attributes
    ----------
    recipes : mapping of str to Recipe
        How the keys of each table are made.
    name : str
        What the log calls the run: its table.
    notifier : Notifier
        Is told what people want to hear of who don't look at the run.
    clock : callable
        Seconds that pass.
    sleep : callable
        Lets seconds pass, where there is nothing to do but wait.
    """

    store: JobStore
    pool: TaskPool
    recipes: Mapping[str, Recipe]
    policy: Policy
    name: str
    notifier: Notifier = field(default_factory=Notifier)
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
