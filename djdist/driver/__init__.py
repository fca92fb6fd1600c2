"""The driver: reserve, submit, collect, record, until nothing is left."""

import logging
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager

from djdist._executor import Executor
from djdist._job import Policy, Recipe, RunInfo, Status, Summary, Watch
from djdist._job_store import JobStore
from djdist.driver.backlog import WAIT_SECONDS
from djdist.driver.context import RunContext
from djdist.driver.logs import log_here
from djdist.driver.loop import Driver

__all__ = ["WAIT_SECONDS", "Driver", "RunContext", "drive"]

logger = logging.getLogger(__name__)


def drive(
    executor: Executor,
    watch: Watch,
    predecessor: Status | None,
    *,
    store: JobStore,
    recipes: Mapping[str, Recipe],
    policy: Policy,
    info: RunInfo,
) -> Summary:
    """Do one run from its start to its summary, or go on where its lost driver had got to."""
    if not info.is_here:
        log_here()
    tasks = {table: recipe.task for table, recipe in recipes.items()}
    with closing(store), executor.open(tasks) as pool:
        if predecessor:
            store.assume_reached()
        driver = Driver(RunContext(store, pool, recipes, policy, info.table))
        with _logged(info, executor, driver):
            return driver.run(watch, predecessor)


@contextmanager
def _logged(info: RunInfo, executor: Executor, driver: Driver) -> Iterator[None]:
    """Say in the log who begins what and where, and how it ended."""
    caller, here = f"{info.user} on {info.host} (pid {info.pid})", f"{platform.node()} (pid {os.getpid()})"
    logger.info("%s begins on %r, called by %s, driven on %s", info, executor, caller, here)
    try:
        yield
    except BaseException as error:
        logger.warning("%s was ended by %r: %s", info, error, driver.last_status.counts)
        raise
    logger.info("%s is over: %s", info, driver.last_status)
