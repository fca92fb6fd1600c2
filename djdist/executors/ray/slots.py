"""How many keys the cluster's nodes can hold, and a warning where none can."""

import logging
import re
import time
from collections import Counter
from contextlib import suppress
from typing import Any

import ray

from djdist._job import Status, Watch
from djdist._needs import Node

logger = logging.getLogger(__name__)

SLOTS_AGE_SECONDS = 1.0
UNMET_SECONDS = 10.0
ROUNDING = 1e-6
NAMES = {"CPU": "cpus", "GPU": "gpus"}
INTERNAL = re.compile("node:|object_store_memory$").match


class Nodes:
    """The nodes of the cluster and what they have, looked up at most once per second."""

    def __init__(self) -> None:
        self._seen: list[Node] = []
        self._looked_at = float("-inf")

    def seen(self) -> list[Node]:
        now = time.monotonic()
        if now - self._looked_at >= SLOTS_AGE_SECONDS:
            self._looked_at = now
            found = [Node(_amounts_of(node["Resources"])) for node in _nodes() if node["Alive"]]
            self._seen = self._seen if found == self._seen else found
        return self._seen


def _amounts_of(resources: dict[str, float]) -> dict[str, float]:
    return {NAMES.get(name, name): amount for name, amount in resources.items() if not INTERNAL(name)}


class Slots:
    """Counts the tasks that can run at the same time, node by node, at most once per second."""

    def __init__(self, needs: dict[str, float]) -> None:
        self.needs = {name: need for name, need in needs.items() if need}
        self.nodes: list[dict[str, float]] = []
        self._count = 0
        self._counted_at = float("-inf")

    def count(self) -> int:
        now = time.monotonic()
        if now - self._counted_at >= SLOTS_AGE_SECONDS:
            self.nodes = [node["Resources"] for node in _nodes() if node["Alive"]]
            self._count = sum(map(self._on, self.nodes))
            self._counted_at = now
        return self._count

    def _on(self, node: dict[str, float]) -> int:
        fitting = [node.get(name, 0) / need for name, need in self.needs.items()]
        return int(min(fitting, default=node.get("CPU", 0)) + ROUNDING)


class WarningOfUnmetNeeds:
    """Lets a watching caller say once if for some seconds no node can hold a key, for Ray says nothing."""

    def __init__(self, needs: dict[str, float], watch: Watch, table: str) -> None:
        self._slots = Slots(needs)
        self._watch = watch
        self._table = table
        self._held_at = time.monotonic()
        self._told = False

    def __call__(self, status: Status) -> bool:
        with suppress(Exception):  # the cluster's head may be away
            self._held_at = time.monotonic() if self._slots.count() else self._held_at
        if not self._told and time.monotonic() - self._held_at > UNMET_SECONDS:
            self._told = True
            self._warn()
        return self._watch(status)

    def _warn(self) -> None:
        needs = self._slots.needs
        kinds = Counter(_amounts({name: node.get(name, 0) for name in needs}) for node in self._slots.nodes)
        logger.warning(
            "A key of %s needs %s, which no node of the Ray cluster has: there are %s. "
            "The run waits for a node that has it.",
            self._table,
            _amounts(needs),
            "; ".join(f"{count} with {amounts}" for amounts, count in kinds.items()) or "none",
        )


def _nodes() -> list[dict[str, Any]]:
    return ray.nodes()  # type: ignore[no-any-return, no-untyped-call]


def _amounts(resources: dict[str, float]) -> str:
    return ", ".join(
        f"{amount / 1e9:.3g} GB memory" if name == "memory" else f"{amount:g} {name}"
        for name, amount in resources.items()
    )
