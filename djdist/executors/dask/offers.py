"""How workers get from a driver what is too large to travel with each task."""

from weakref import WeakValueDictionary

import distributed
from distributed.protocol.serialize import Serialize

from djdist.shipping.pickled_task import PickledTask

offered: WeakValueDictionary[str, PickledTask] = WeakValueDictionary()
"""The works of this process's drivers, not scattered, for then they would be lost with their last holder."""


async def offer(name: str) -> Serialize:
    """Hand a driver's work to a worker that asks for it."""
    return Serialize(offered[name])


def fetch(address: str, name: str) -> PickledTask:
    """Ask the worker of a driver for its work."""
    worker = distributed.get_worker()
    if worker.address == address:
        return offered[name]
    ask = getattr(worker.rpc(address), fetch.__name__)
    work: PickledTask = distributed.utils.sync(worker.loop, ask, name=name)
    return work
