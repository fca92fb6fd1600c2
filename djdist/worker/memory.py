"""How much memory this process has at most while it makes a group of keys."""

import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

RESET_PEAK = "5"
"""What Linux takes for it, see proc(5)."""
UNIT_BYTES = 1 if sys.platform == "darwin" else 1024
_measuring = threading.Lock()


@dataclass
class Peak:
    """The most memory that was resident at a time, in bytes; 0 where that can't be told."""

    bytes: int = 0


@contextmanager
def measured() -> Iterator[Peak]:
    """Measure what is done in a ``with``; what a ``make()`` populates itself belongs to its own key.

    The kernel counts all the time, so that this costs two looks. Where it doesn't let its count be
    reset, only what exceeds all that was before can be told.
    """
    peak = Peak()
    if not _measuring.acquire(blocking=False):
        yield peak
        return
    try:
        before = 0 if _reset() else _highest()
        yield peak
        highest = _highest()
        peak.bytes = highest if highest > before else 0
    finally:
        _measuring.release()


def _reset() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    except OSError:
        return False
    return True


def _highest() -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT_BYTES
