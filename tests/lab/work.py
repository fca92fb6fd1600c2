"""What tests send to workers: their jobs say what to do, files tell what was begun and when to go on."""

from __future__ import annotations

import os
import pickle
import platform
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from djdist._executor import Executor
from djdist._job import Ending, Job, Outcome, Report, RunInfo, Status, Summary, TaskFunction, Watch
from djdist.driver.room import Room
from djdist.errors import OptionError
from djdist.shipping.pickled_task import LARGE_BYTES, PickledTask

GATE = "gate"


def work(jobs: Sequence[Job]) -> Report:
    return Report(tuple(_made(job) for job in jobs))


def job(folder: Path, n: int, do: str = "make") -> Job:
    """A job that leaves a file when it begins; then it makes, lingers, waits for the gate, raises or dies."""
    return Job("Table", {"n": n, "do": do, "folder": str(folder)})


def begun(folder: Path) -> list[int]:
    """Give the jobs that have begun, as often as they have."""
    return sorted(int(file.name.split("-")[0]) for file in folder.glob("*-begun-*"))


def open_gate(folder: Path) -> None:
    (folder / GATE).touch()


def _made(job: Job) -> Outcome:
    folder, do = Path(job.key["folder"]), job.key["do"]
    (folder / f"{job.key['n']}-begun-{os.getpid()}-{time.monotonic_ns()}").touch()
    if do == "raise":
        raise ValueError("work should not raise")
    if do == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if do == "linger":
        time.sleep(0.5)
    while do == "wait" and not (folder / GATE).exists():
        time.sleep(0.01)
    return Outcome(job, Ending.MADE, host=platform.node(), pid=os.getpid())


def info(run: str = "a run", *, detached: bool = False) -> RunInfo:
    """What is known of a run of no table."""
    now = datetime.now(timezone.utc)
    return RunInfo(run, "Table", "lab", "me", platform.node(), os.getpid(), now, detached)


def run_here(executor: Executor, watch: Watch, predecessor: Status | None) -> Summary:
    """Tell where the run's driver is."""
    return Summary(success_count=os.getpid())


def run_refused(executor: Executor, watch: Watch, predecessor: Status | None) -> Summary:
    raise OptionError("the run refuses")


def run_until_stopped(executor: Executor, watch: Watch, predecessor: Status | None) -> Summary:
    steps = 0
    while watch(Status(made=steps)):
        steps += 1
        time.sleep(0.01)
    return Summary(success_count=steps)


def run_tasks(
    executor: Executor,
    watch: Watch,
    predecessor: Status | None,
    work: TaskFunction | None = None,
    jobs: Sequence[Job] | None = None,
) -> Summary:
    """Run tasks, twenty by default, from where the driver is and count those that were made."""
    with executor.open({"Table": work or _made_at_once}) as pool:
        left, running, made = list(jobs or [Job("Table", {"n": n}) for n in range(20)]), set[int](), 0
        room, needs = Room(pool), executor.needs
        while left or running:
            while left and room.free(needs) > 0:
                running.add(ticket := pool.submit("Table", (left.pop(),), needs))
                room.take(ticket, needs, "Table")
            for completion in pool.wait(0.5):
                running.remove(completion.ticket)
                room.leave(completion.ticket)
                made += len(completion.report.outcomes) if completion.report else 0
            watch(Status(made=made))
        return Summary(success_count=made)


@dataclass(frozen=True)
class LargeTask(PickledTask):
    """Leaves a file where it comes, and another one where what is in it is unpickled."""

    folder: Path = Path()

    def __reduce__(self) -> tuple[Any, ...]:
        return _come, (self.pickled, self.name, self.folder)


def large_work(folder: Path) -> LargeTask:
    return LargeTask(pickle.dumps(_Unpickled(folder, bytes(2 * LARGE_BYTES))), folder=folder)


@dataclass(frozen=True)
class _Unpickled:
    folder: Path
    load: bytes

    def __call__(self, jobs: Sequence[Job]) -> Report:
        return work(jobs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _note(self.folder, "unpickled")


def _come(pickled: bytes, name: str, folder: Path) -> LargeTask:
    _note(folder, "sent")
    return LargeTask(pickled, name, folder)


def _note(folder: Path, what: str) -> None:
    (folder / f"{what}-{os.getpid()}-{time.monotonic_ns()}").touch()


def noted(folder: Path, what: str) -> list[int]:
    """Give the processes where something happened, as often as it did."""
    return sorted(int(file.name.split("-")[1]) for file in folder.glob(f"{what}-*"))


def _made_at_once(jobs: Sequence[Job]) -> Report:
    return Report(tuple(Outcome(job, Ending.MADE) for job in jobs))
