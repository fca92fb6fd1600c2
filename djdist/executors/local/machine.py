"""What this machine, or the container or job that this process is in, has for keys."""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
NVIDIA = Path("/proc/driver/nvidia/gpus")
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "memory.oom_control")
VERSION_2 = ("memory.max", "memory.current", "memory.stat", "memory.events")
CACHE = ("inactive_file", "total_inactive_file")
"""What counts as used, and is given up before anything else."""


def gpus() -> tuple[str, ...]:
    """Return the GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them.

    Neither CUDA nor a library of it is loaded for it: a process that has can't give its GPUs back.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        with suppress(OSError):
            return tuple(str(n) for n in range(len(list(NVIDIA.iterdir()))))
        return ()
    named = [name.strip() for name in visible.split(",")]
    hidden = next((n for n, name in enumerate(named) if name in ("", "-1", "NoDevFiles")), len(named))
    return tuple(named[:hidden])  # CUDA sees no device behind one that isn't there


def memory_bytes() -> int:
    """Return how much memory keys may have; 0 where that can't be told."""
    limits = [limit for limit, _ in _budgets()]
    return min(limits, default=0)


def memory_share() -> float:
    """Return how much of it is used, of the scarcest where several limits hold."""
    return max((used / limit for limit, used in _budgets()), default=0.0)


def out_of_memory_kills() -> int:
    """Return how many processes the kernel has ended for want of memory, as far as it tells."""
    files = [Path("/proc/vmstat"), *(folder / names[3] for folder, names in _cgroups())]
    return sum(_number("oom_kill", file) for file in files)


def resident_bytes(pid: int) -> int:
    """Return the memory of a process and of those that it has started, 0 where that can't be told."""
    with suppress(OSError, ValueError, IndexError):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return pages * os.sysconf("SC_PAGE_SIZE") + sum(resident_bytes(int(child)) for child in children)
    return 0


def _budgets() -> list[tuple[int, int]]:
    """Return the limits of memory that hold here, and what of each is used."""
    meminfo = Path("/proc/meminfo")
    total, free = _number("MemTotal:", meminfo) * 1024, _number("MemAvailable:", meminfo) * 1024
    whole = [(total, total - free)] if total else _total_elsewhere()
    machine = whole[0][0] if whole else 0
    limited = [_budget(folder, *names) for folder, names in _cgroups()]
    return whole + [(limit, used) for limit, used in limited if 0 < limit < machine]


def _budget(folder: Path, limit: str, used: str, stat: str, _: str) -> tuple[int, int]:
    cache = max(_number(name, folder / stat) for name in CACHE)
    return _number("", folder / limit), max(0, _number("", folder / used) - cache)


def _total_elsewhere() -> list[tuple[int, int]]:
    with suppress(ValueError, OSError):
        return [(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), 0)]
    return []


def _cgroups() -> Iterator[tuple[Path, tuple[str, str, str, str]]]:
    """Find the folders of this process's control group and of those above it, whose limits hold as well."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                mounted, names = CGROUPS, VERSION_2
            elif "memory" in controllers.split(","):
                mounted, names = CGROUPS / "memory", VERSION_1
            else:
                continue
            group = mounted / path.lstrip("/")
            # in a container the path may be the host's, which isn't there, and its own group is at the top
            yield from (
                (folder, names) for folder in (group, *group.parents) if mounted in (folder, *folder.parents)
            )


def _number(name: str, file: Path) -> int:
    """Return the number behind a name in a file, 0 without one."""
    with suppress(OSError):
        found = re.search(rf"^{re.escape(name)}\s*(\d+)", file.read_text(), re.MULTILINE)
        return int(found[1]) if found else 0
    return 0
