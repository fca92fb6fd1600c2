"""The driver: reserve, submit, collect, record, until nothing is left."""

import logging
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager

from djdist._executor import Executor
from djdist._job import Counts, Policy, Recipe, RunInfo, Status, Summary, Watch
from djdist._job_store import JobStore
from djdist._needs import Needs
from djdist._notifier import Notifier
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
    notifier: Notifier | None = None,
) -> Summary:
    """Do one run from its start to its summary, or go on where its lost driver had got to."""
    if not info.is_here:
        log_here()
    for table, recipe in recipes.items():
        if isinstance(recipe.needs, Needs):  # what keys say of themselves is checked key by key
            executor.check_needs(table, recipe.needs)
    tasks = {table: recipe.task for table, recipe in recipes.items()}
    with closing(store), executor.open(tasks) as pool:
        if predecessor:
            store.assume_reached()
        notifier = notifier or Notifier()
        driver = Driver(RunContext(store, pool, recipes, policy, info.table, notifier))
        with _logged(info, executor, driver), _told(notifier, driver):
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


@contextmanager
def _told(notifier: Notifier, driver: Driver) -> Iterator[None]:
    """Tell people how a run ended, unless there was nothing to do."""
    try:
        yield
    except BaseException as error:
        notifier.ended(f"Ended by {error!r}: {_done(driver.last_status)}")
        raise
    if (status := driver.last_status).made or status.failed:
        tables = status.tables if len(status.tables) > 1 else {}
        notifier.ended(
            "\n".join([_done(status), *(f"{name}: {_done(each)}" for name, each in tables.items())])
        )


def _done(counts: Counts) -> str:
    return f"{counts.made:,} made, {counts.failed:,} failed"
