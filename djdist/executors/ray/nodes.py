"""What the nodes of a Ray cluster have for keys."""

import time
from collections.abc import Sequence
from typing import Any

import ray

from djdist._needs import Needs, Node

NODES_AGE_SECONDS = 1.0
OWN_NAMES = {"CPU": "cpus", "GPU": "gpus", "memory": "memory"}
OF_RAY = ("node:", "object_store_memory", "accelerator_type:")
"""Resources that Ray makes up itself."""


class Nodes:
    """Returns the living nodes, looked up at most once per second; the same object while none has changed."""

    def __init__(self) -> None:
        self._nodes: tuple[Node, ...] = ()
        self._asked_at = float("-inf")

    def __call__(self) -> Sequence[Node]:
        now = time.monotonic()
        if now - self._asked_at >= NODES_AGE_SECONDS:
            nodes = tuple(_node(node["Resources"]) for node in _nodes() if node["Alive"])
            self._nodes = self._nodes if nodes == self._nodes else nodes
            self._asked_at = now
        return self._nodes


def _node(resources: dict[str, float]) -> Node:
    return Node(
        {OWN_NAMES.get(name, name): n for name, n in resources.items() if not name.startswith(OF_RAY)}
    )


def _nodes() -> list[dict[str, Any]]:
    return ray.nodes()  # type: ignore[no-any-return, no-untyped-call]


def ray_options(needs: Needs) -> dict[str, Any]:
    """Return what a key needs as Ray's options of a task or an actor."""
    options = {"num_cpus": needs.cpus, "num_gpus": needs.gpus, "memory": needs.memory}
    return {name: n for name, n in options.items() if n is not None} | {"resources": dict(needs.custom)}
