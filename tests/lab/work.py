"""What tests send to workers: their jobs say what to do, files tell what was begun and when to go on."""

from __future__ import annotations

import os
import platform
import signal
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from djdist.errors import OptionError
from djdist.executor import Executor
from djdist.job import Ending, Job, Outcome, Report, RunInfo, Status, Summary, Watch

GATE = "gate"


def work(jobs: Sequence[Job]) -> Report:
    return Report(tuple(_made(job) for job in jobs))


def job(folder: Path, n: int, do: str = "make") -> Job:
    """A job that leaves a file when it begins; then it makes, lingers, waits for the gate, raises or dies."""
    return Job({"n": n, "do": do, "folder": str(folder)})


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


def run_here(executor: Executor, watch: Watch) -> Summary:
    """Tell where the run's driver is."""
    return Summary(success_count=os.getpid())


def run_refused(executor: Executor, watch: Watch) -> Summary:
    raise OptionError("the run refuses")


def run_until_stopped(executor: Executor, watch: Watch) -> Summary:
    steps = 0
    while watch(Status(made=steps)):
        steps += 1
        time.sleep(0.01)
    return Summary(success_count=steps)


def run_tasks(executor: Executor, watch: Watch) -> Summary:
    """Run twenty tasks from where the driver is and count those that were made."""
    executor.start(_made_at_once)
    try:
        left, running, made = [Job({"n": n}) for n in range(20)], set[int](), 0
        while left or running:
            while left and executor.free_places() > 0:
                running.add(executor.submit("Table", (left.pop(),)))
            for completion in executor.wait(0.5):
                running.remove(completion.ticket)
                made += len(completion.report.outcomes) if completion.report else 0
            watch(Status(made=made))
        return Summary(success_count=made)
    finally:
        executor.close()


def _made_at_once(jobs: Sequence[Job]) -> Report:
    return Report(tuple(Outcome(job, Ending.MADE) for job in jobs))
