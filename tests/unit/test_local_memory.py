"""Whether a process of this machine died for want of memory."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from djdist._needs import Needs
from djdist.executors.local import machine
from djdist.executors.local.memory import MemoryWatch


class Process:
    """Stands for one of a run's processes, which is also what it is killed by."""

    def __init__(self, pid: int = 1, exitcode: int | None = None) -> None:
        self.pid = pid
        self.exitcode = exitcode

    @property
    def was_killed(self) -> bool:
        return self.exitcode == -signal.SIGKILL

    def end(self) -> None:
        self.exitcode = -signal.SIGKILL


class Machine:
    """What the watch is told of a machine."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.kills, self.share, self.resident = 0, 0.5, dict[int, int]()
        patch.setattr(machine, "out_of_memory_kills", lambda: self.kills)
        patch.setattr(machine, "memory_share", lambda: self.share)
        patch.setattr(machine, "resident_bytes", lambda pid: self.resident[pid])


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def explanation(watch: MemoryWatch, exitcode: int) -> str:
    return watch.explanation(Process(exitcode=exitcode))  # type: ignore[arg-type]


def test_what_was_killed_while_the_kernel_ended_one_was_short_of_memory(here: Machine) -> None:
    watch = MemoryWatch(lambda: 0.0)
    assert explanation(watch, -signal.SIGKILL) == ""
    here.kills += 1
    assert "memory was used up" in explanation(watch, -signal.SIGKILL)
    assert explanation(watch, -signal.SIGSEGV) == ""
    assert explanation(watch, 1) == ""


def test_what_was_killed_long_after_was_not(here: Machine) -> None:
    now = 0.0
    watch = MemoryWatch(lambda: now)
    here.kills += 1
    now = 10.0
    watch.look({})
    assert explanation(watch, -signal.SIGKILL) == ""


def test_a_daemon_that_kills_is_known_by_what_was_used(here: Machine) -> None:
    here.share = 0.93
    watch = MemoryWatch(lambda: 0.0)
    watch.look({})
    assert "memory was used up" in explanation(watch, -signal.SIGKILL)


def test_when_little_is_left_the_one_most_above_what_it_asked_for_is_ended(here: Machine) -> None:
    here.resident = {1: 3 * 2**30, 2: 5 * 2**30, 3: 90 * 2**30, 4: 2**30}
    asked: list[Any] = [Needs(memory="2GiB"), Needs(memory="1GiB"), Needs(), Needs(memory="8GiB")]
    running = {Process(pid): needs for pid, needs in enumerate(asked, 1)}
    now = 0.0
    watch = MemoryWatch(lambda: now)
    watch.look(running)  # type: ignore[arg-type]
    assert not any(process.was_killed for process in running)
    here.share, now = 0.96, 2.0
    watch.look(running)  # type: ignore[arg-type]
    (ended,) = [process for process in running if process.was_killed]
    assert ended.pid == 2
    assert "asked for 1 GiB and has 5 GiB" in watch.explanation(ended)  # type: ignore[arg-type]


def cgroup(folder: Path, names: tuple[str, ...], limit: str, used: int, kills: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    texts = (limit, f"{used}", "inactive_file 1000\nactive_file 5\n", f"low 0\noom 3\noom_kill {kills}\n")
    for name, text in zip(names, texts, strict=True):
        (folder / name).write_text(text)


@pytest.mark.parametrize("version", [1, 2])
def test_the_limits_of_all_control_groups_hold(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = machine.VERSION_1 if version == 1 else machine.VERSION_2
    mounted = tmp_path / "memory" if version == 1 else tmp_path
    unlimited = "9223372036854771712" if version == 1 else "max"
    cgroup(mounted, names, unlimited, 70_000_000, 0)
    cgroup(mounted / "job", names, "100000000", 61_000, 7)
    cgroup(mounted / "job" / "step", names, unlimited, 51_000, 2)
    own = {1: "5:cpu:/job\n4:memory:/job/step\n", 2: "0::/job/step\n"}[version]
    read_text = Path.read_text

    def read(path: Path, *arguments: Any, **options: Any) -> str:
        return own if path == Path("/proc/self/cgroup") else read_text(path, *arguments, **options)

    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(Path, "read_text", read)
    assert machine.memory_bytes() == 100_000_000
    assert (100_000_000, 60_000) in machine._budgets()
    assert machine.out_of_memory_kills() >= 9


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        ("0,1", ("0", "1")),
        ("GPU-8932f937, MIG-6a1", ("GPU-8932f937", "MIG-6a1")),
        ("2,-1,3", ("2",)),
        ("", ()),
        ("NoDevFiles", ()),
    ],
)
def test_gpus_are_those_that_cuda_would_see(
    visible: str, found: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.gpus() == found


def test_without_that_gpus_are_those_of_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "NVIDIA", tmp_path / "none")
    assert machine.gpus() == ()
    for gpu in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / "gpus" / gpu).mkdir(parents=True)
    monkeypatch.setattr(machine, "NVIDIA", tmp_path / "gpus")
    assert machine.gpus() == ("0", "1")
