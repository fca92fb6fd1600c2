"""Whether processes of this machine die for want of memory, and which go before the kernel chooses one."""

import time
from collections.abc import Callable, Mapping

from djdist._needs import Needs
from djdist.executors.local import machine
from djdist.executors.local.process import Process

LOOK_SECONDS = 1.0
NEARLY_USED_UP = 0.9
"""A process that is killed while so much of the memory is used was probably killed for it."""
USED_UP = 0.95
"""From here on the kernel, or a daemon, may end any process, also the database's or the caller's."""
KILLED = "The worker process was killed while this machine's memory was used up."
ENDED = (
    "The worker process was ended, because this machine's memory is nearly used up: "
    "it asked for {asked:.3g} GiB and has {has:.3g} GiB."
)


class MemoryWatch:
    """Knows why processes of a run died, and ends one before the kernel chooses one.

    As long as there is enough, a process may have more than it asked for: natively nobody would mind, and
    a limit of its address space breaks CUDA, which reserves much more than it uses. When memory is nearly
    used up, the one goes that has most above what it asked for; the kernel might take the database.

    Parameters
    ----------
    clock : callable
        Seconds that pass.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looks_at = float("-inf")
        self._kills, self._share = machine.out_of_memory_kills(), 0.0
        self._ended: dict[Process, str] = {}

    def look(self, running: Mapping[Process, Needs]) -> None:
        """Look how much memory is used, about once per second; each key has its process."""
        if self._clock() < self._looks_at:
            return
        self._kills, self._share = machine.out_of_memory_kills(), machine.memory_share()
        if self._share > USED_UP:
            self._end_greediest(running)
        self._looks_at = self._clock() + LOOK_SECONDS

    def explanation(self, process: Process) -> str:
        """Return what memory had to do with the death of a process, nothing if it had not."""
        if process in self._ended:
            return self._ended.pop(process)
        used_up = self._share > NEARLY_USED_UP or machine.out_of_memory_kills() > self._kills
        return KILLED if process.was_killed and used_up else ""

    def _end_greediest(self, running: Mapping[Process, Needs]) -> None:
        asking = {
            process: needs.memory for process, needs in running.items() if isinstance(needs.memory, int)
        }
        excess = {process: machine.resident_bytes(process.pid) - asked for process, asked in asking.items()}
        process = max(excess, key=excess.__getitem__, default=None)
        if process and excess[process] > 0:
            asked, has = asking[process] / 2**30, (asking[process] + excess[process]) / 2**30
            self._ended[process] = ENDED.format(asked=asked, has=has)
            process.end()
