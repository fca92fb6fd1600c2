"""Which worker of a Dask cluster makes which keys."""

from collections.abc import Collection
from typing import Any

from djdist._needs import Needs, Node
from djdist.executors.dask.workers import GPU, Workers

OWN_NAMES = ("cpus", "memory")
ROUNDING = 1e-6


class Placing:
    """Chooses workers for tasks where that matters; else Dask does, and has the next task ready there.

    Dask may give the only worker with a GPU what needs none, and knows nothing of threads and memory.
    So workers are chosen where only some have a GPU, or once keys came that need one, or more than some have.
    A worker with a GPU is restarted before keys of another table get it, for what was loaded into it.

    Parameters
    ----------
    workers : Workers
        Those that are there.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._on: dict[int, str] = {}
        self._loaded: dict[str, str] = {}
        self._chooses = False

    def place(
        self, ticket: int, table: str, needs: Needs, *, yields_to: Collection[str] = ()
    ) -> dict[str, Any] | None:
        """Return how to tell Dask where a task goes, None if it has to wait.

        It ``yields_to`` tables that still have tasks for the GPU into which they have loaded something.
        """
        fit = self._workers.fit()
        able = [address for address, node in fit.items() if holds(node, needs)]
        have_gpu = {node.amounts.get("gpus", 0) > 0 for node in fit.values()}
        self._chooses = self._chooses or needs.gpus > 0 or len(able) < len(fit) or len(have_gpu) > 1
        if not self._chooses or not (fit or self._workers.restarting):
            return self._workers.aim()
        taken = set(self._on.values())
        free = [address for address in able if address not in taken]
        if not free:
            return None
        best = min(free, key=lambda a: (self._is_loaded_with_other(a, table, needs), _spare(fit[a])))
        if self._is_loaded_with_other(best, table, needs) and (
            self._loaded[best] in yields_to or self._restarts(best)
        ):
            return None
        self._on[ticket] = best
        if needs.gpus:
            self._loaded[best] = table
        return {"workers": [best], "allow_other_workers": False}

    def _is_loaded_with_other(self, address: str, table: str, needs: Needs) -> bool:
        return needs.gpus > 0 and self._loaded.get(address, table) != table

    def _restarts(self, address: str) -> bool:
        """Restart a worker for what is loaded there, if that can be done; what waits for it gets it later."""
        del self._loaded[address]
        can = self._workers.can_be_restarted(address)
        if can:
            self._workers.restart_beside(address)
        return can

    def leave(self, ticket: int) -> None:
        """Note that a task has ended."""
        self._on.pop(ticket, None)

    def lost(self) -> dict[int, str]:
        """Return the tasks whose worker is gone, and which it was."""
        gone = self._workers.are_gone(self._on.values()) if self._on else ()
        return {ticket: worker for ticket, worker in self._on.items() if worker in gone}


def holds(node: Node, needs: Needs) -> bool:
    """Return whether a worker has what a key needs."""
    return all(node.amounts.get(name, 0) > amount - ROUNDING for name, amount in needs.amounts.items())


def resources_of(needs: Needs) -> dict[str, Any]:
    """Return what a key needs as Dask's option of a task."""
    resources = {**needs.custom, **({GPU: needs.gpus} if needs.gpus else {})}
    return {"resources": resources} if resources else {}


def _spare(node: Node) -> list[float]:
    """Return what others may seek there: the least of it is taken first."""
    rare = sum(amount for name, amount in node.amounts.items() if name not in OWN_NAMES)
    return [rare, node.amounts["cpus"], node.amounts["memory"]]
