"""The processes and GPUs of this machine that runs share."""

import threading
import time
from collections.abc import Callable, Collection, Sequence

from djdist._executor import default_slots
from djdist._needs import Needs
from djdist.executors.local.process import Process

ROUNDING = 1e-6
LINGER_SECONDS = 1.0
"""So long a process keeps its GPU, though it has no work and others have: its next key may be on the way."""


class Processes:
    """Keeps idle processes for the keys that follow, and says which process has which GPU.

    Parameters
    ----------
    slots : int
        How many a run uses at once.
    gpus : sequence of str
        As ``CUDA_VISIBLE_DEVICES`` names them.
    """

    def __init__(self, slots: int, gpus: Sequence[str]) -> None:
        self._slots = slots
        self._free = dict.fromkeys(gpus, 1.0)
        self._idle: list[Process] = []
        self._lock = threading.RLock()  # each run has a thread of its own

    def take(self, run: object, table: str, needs: Needs) -> Process | None:
        """Return the process that made this table last, else an idle or a new one; None while GPUs lack."""
        with self._lock:
            process = self._idle_for(run, table, needs) or self._new(needs)
            if process:
                process.run, process.table = run, table
            return process

    def is_warm(self, run: object, table: str, needs: Needs) -> bool:
        """Return whether an idle process has a GPU for these keys, and what they load there."""
        return any(process.gpus and _serves(process, run, table, needs) for process in self._idle)

    def give_back(self, process: Process) -> None:
        """Keep a process that has become idle."""
        process.idle_since = time.monotonic()
        with self._lock:
            self._idle.append(process)

    def end(self, process: Process) -> None:
        """End a process, so that others can have its GPUs."""
        process.end()
        with self._lock:
            for name in process.gpus:
                self._free[name] += process.gpu_share

    def end_idle(self, chosen: Callable[[Process], bool] = lambda process: True) -> None:
        """End idle processes."""
        with self._lock:
            ended = [process for process in self._idle if chosen(process)]
            self._idle = [process for process in self._idle if process not in ended]
        for process in ended:
            self.end(process)

    def _idle_for(self, run: object, table: str, needs: Needs) -> Process | None:
        able = [process for process in self._idle if _serves(process, run, table, needs)]
        able = [process for process in able if process.gpus or process.threads == self._threads(needs)]
        if not able:
            return None
        best = max(able, key=lambda process: (process.table == table, process.idle_since))
        self._idle.remove(best)
        return best

    def _new(self, needs: Needs) -> Process | None:
        if not needs.gpus:
            plain = [process for process in self._idle if not process.gpus]
            self.end_idle(plain[: max(0, len(plain) + 1 - self._slots)].__contains__)
            return Process(self._threads(needs))
        share, count = (needs.gpus, 1) if needs.gpus < 1 else (1.0, round(needs.gpus))
        names = self._gpus(share, count)
        if names is None:
            return None
        for name in names:
            self._free[name] -= share
        return Process(self._threads(needs), names, share)

    def _gpus(self, share: float, count: int) -> Sequence[str] | None:
        """Free GPUs and name them, the fullest that will do first, and end what is idle on them."""
        lately = time.monotonic() - LINGER_SECONDS
        idle = [process for process in self._idle if process.gpus and process.idle_since < lately]
        free = {
            name: left + sum(process.gpu_share for process in idle if name in process.gpus)
            for name, left in self._free.items()
        }
        able = [name for name, left in free.items() if left > share - ROUNDING]
        names = sorted(able, key=lambda name: (self._free[name] < share - ROUNDING, self._free[name]))[:count]
        if len(names) < count:
            return None
        for name in names:
            self._free_one(name, share, [process for process in idle if name in process.gpus])
        return names

    def _free_one(self, name: str, share: float, idle: Collection[Process]) -> None:
        for process in sorted(idle, key=lambda process: process.idle_since):
            if self._free[name] < share - ROUNDING:
                self.end_idle(lambda other, ended=process: other is ended)  # type: ignore[misc]

    def _threads(self, needs: Needs) -> int:
        """Share the processors out among the processes, but for what a key needs."""
        return max(threads_of(self._slots), int(needs.cpus))


def threads_of(processes: int) -> int:
    """Return how many threads each of so many processes may use."""
    return max(1, default_slots() // processes)


def _serves(process: Process, run: object, table: str, needs: Needs) -> bool:
    """Return whether a process may make these keys; one with a GPU keeps to its table and its model."""
    if not process.gpus:
        return not needs.gpus
    gpus = process.gpu_share * len(process.gpus)
    return abs(gpus - needs.gpus) < ROUNDING and (process.run, process.table) == (run, table)
