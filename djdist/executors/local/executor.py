"""This machine as an executor."""

from collections.abc import Mapping, Sequence

from djdist._executor import Executor, default_slots
from djdist._job import TaskFunction
from djdist._needs import Needs, Node
from djdist._task_pool import TaskPool
from djdist.errors import OptionError
from djdist.executors.local import machine
from djdist.executors.local.forks import start_server
from djdist.executors.local.pools import InCaller, InProcesses
from djdist.executors.local.process import environment
from djdist.executors.local.processes import Processes, threads_of

UNKNOWN_BYTES = 2**63


class LocalExecutor(Executor):
    """Runs tasks on this machine.

    Parameters
    ----------
    processes : int, optional
        1 (the default) makes the keys in the caller's own process; more, in so many
        processes per run, each with its own connection, and none a fork of the caller. None or 0: as many as
        there are processors. Fewer at once, where all that their keys need would not fit.
    gpus : int or sequence of str, optional
        How many GPUs keys may have, or which, as ``CUDA_VISIBLE_DEVICES`` names them. Default:
        those that it names for this process, else all that NVIDIA's driver knows.
    """

    def __init__(self, processes: int | None = 1, gpus: int | Sequence[str] | None = None) -> None:
        if processes is not None and processes < 0:
            raise OptionError(f"processes={processes} must be at least 1, or None for all processors.")
        self.processes = int(processes or default_slots())
        self.runs_in_caller = self.processes == 1
        self.can_kill = not self.runs_in_caller
        self._gpus = _named(gpus)

    def __repr__(self) -> str:
        return f"LocalExecutor(processes={self.processes})"

    def prepare(self, table: str) -> None:
        if not self.runs_in_caller:
            start_server(environment(threads_of(self.processes)))

    def connect(self) -> None:
        self._processes = Processes(self.processes, self._gpus)

    def disconnect(self) -> None:
        self._processes.end_idle()

    def with_kill(self) -> "LocalExecutor":
        beside = LocalExecutor(self.processes, self._gpus)
        beside.runs_in_caller, beside.can_kill = False, True
        return beside if self.runs_in_caller else self

    def check_needs(self, table: str, needs: Needs) -> None:
        node = self._node()
        if any(amount > node.amounts.get(name, 0) for name, amount in needs.amounts.items()):
            raise OptionError(
                f"A key of {table} needs {needs}, which this machine doesn't have: it has {node}. Run it on "
                "a cluster, or name GPUs that weren't found: djdist.LocalExecutor(gpus=…)."
            )

    def open(self, tasks: Mapping[str, TaskFunction]) -> TaskPool:
        if self.runs_in_caller:
            return InCaller(self._node(), tasks)
        return InProcesses(self._node(), self._processes, tasks)

    def _node(self) -> Node:
        """Return what this machine has; there are as many slots as processes, however few processors."""
        cpus = max(self.processes, default_slots())
        memory = machine.memory_bytes() or UNKNOWN_BYTES
        return Node({"cpus": cpus, "gpus": len(self._gpus), "memory": memory}, self.processes)


def _named(gpus: int | Sequence[str] | None) -> tuple[str, ...]:
    if gpus is None:
        return machine.gpus()
    return tuple(map(str, range(gpus) if isinstance(gpus, int) else gpus))
