"""What no node can hold: the driver tells it, and whoever watches the run says it once, by name."""

import logging
from collections.abc import Callable

from djdist._job import Status, Watch
from djdist._needs import ONE_CPU
from djdist.driver.key_needs import KeyNeeds
from djdist.driver.room import Room, unmet_text
from djdist.driver.tables import Tables

logger = logging.getLogger(__package__)

PLAIN_UNMET_SECONDS = 10.0
"""A cluster that starts from nothing has no processor for a while, which is no news."""


class UnmetNeeds:
    """Tells which tables wait for nodes that the cluster doesn't have.

    Parameters
    ----------
    tables : Tables
        Those of the run.
    needs : KeyNeeds
        What their keys need.
    room : Room
        What nodes hold.
    clock : callable
        Seconds that pass.
    """

    def __init__(self, tables: Tables, needs: KeyNeeds, room: Room, clock: Callable[[], float]) -> None:
        self._tables = tables
        self._needs = needs
        self._room = room
        self._clock = clock
        self._plain_since: float | None = None

    def texts(self) -> dict[str, str]:
        """Return by table what its keys need that no node has."""
        left = [
            (table.name, self._needs.of_table(table.name))
            for table in self._tables
            if not table.backlog.empty
        ]
        nowhere = {needs for needs in {needs for _, needs in left} if not self._room.slots(needs)}
        unmet = {table: needs for table, needs in left if needs in nowhere}
        unmet |= self._room.unmet()  # of a table that says it of each key
        if ONE_CPU not in unmet.values():
            self._plain_since = None
        elif self._plain_since is None:
            self._plain_since = self._clock()
        is_late = self._plain_since is not None and self._clock() - self._plain_since > PLAIN_UNMET_SECONDS
        nodes = self._room.nodes
        return {t: unmet_text(t, needs, nodes) for t, needs in unmet.items() if is_late or needs != ONE_CPU}


def warning_of_unmet(watch: Watch) -> Watch:
    """Say to who watches, once per table, what the run waits for: clusters say nothing."""
    told: set[str] = set()

    def watched(status: Status) -> bool:
        for table in status.unmet.keys() - told:
            logger.warning("%s. It waits for a node that has it.", status.unmet[table])
            told.add(table)
        return watch(status)

    return watched
