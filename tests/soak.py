"""Many jobs and a random fault every few seconds; `make soak` runs it, no continuous integration does."""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import psutil

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import lab as pipelines  # noqa: E402
import servers  # noqa: E402
import soak_watched  # noqa: E402
from lab import clusters  # noqa: E402
from lab.calling import FINISH, Caller  # noqa: E402
from lab.faults import Fault, Scene, faults_of, may_overlap  # noqa: E402
from lab.invariants import connections, counts, pending, violations  # noqa: E402

SCHEMA = "djdist_soak"
LEASE_SECONDS = 3
PATIENCE_SECONDS = 1200
MEGABYTE = 1e6


@dataclass
class Growth:
    """What must stay flat, seen at the first and at the last look at one driver, and the most of it."""

    seen: list[float] = field(default_factory=list)

    def note(self, value: float) -> None:
        self.seen.append(value)

    def __str__(self) -> str:
        if not self.seen:
            return "not seen"
        return (
            f"{self.seen[0]:.0f} at the start, {self.seen[-1]:.0f} at the end, {max(self.seen):.0f} at most"
        )


@dataclass
class Soak:
    """A long run, what hits it, and what is seen of it."""

    scene: Scene
    faults: Sequence[Fault]
    most_seconds_between: float
    hit: Counter[str] = field(default_factory=Counter)
    calls: int = 0
    gave_up: int = 0
    memory: dict[int, Growth] = field(default_factory=dict)
    connections: Growth = field(default_factory=Growth)

    def run(self, seconds: float) -> None:
        """Hit the run for so long; then let it end in peace."""
        self._call_again()
        until = time.monotonic() + seconds
        while not self._is_done():
            self._look(self.scene.chance.uniform(1, self.most_seconds_between))
            if self.scene.ended() and not self._is_done():
                self._call_again()
            elif not self.scene.ended() and self.faults and time.monotonic() < until:
                self._hit(self.scene.chance.choice(self.faults))

    def verdict(self, executor: str) -> list[str]:
        """Say what is wrong in the end."""
        caller = self.scene.caller
        left = pending(caller.server, SCHEMA)
        caller.wait(caller.start(FINISH), PATIENCE_SECONDS)
        forgiving = any(may_overlap(fault, executor) for fault in self.faults)
        wrong = violations(caller.server, SCHEMA, caller.folder, overlaps=not forgiving)
        return wrong + ([f"the last call left {left} jobs pending"] if left else [])

    def _hit(self, fault: Fault) -> None:
        name, started = fault.__name__.replace("_", " "), time.monotonic()
        print(f"{time.strftime('%X')} {name}", end="", flush=True)
        found = fault(self.scene)
        self.hit[name] += found
        print(f", {time.monotonic() - started:.1f} s" if found else ": found nobody", flush=True)

    def _look(self, seconds: float) -> None:
        """Let time pass, and see how the run does."""
        time.sleep(seconds)
        if self.scene.ended():
            return
        with suppress(psutil.NoSuchProcess):
            if driver := self.scene.driver():
                rss = psutil.Process(driver).memory_info().rss
                self.memory.setdefault(driver, Growth()).note(rss / MEGABYTE)
        self.connections.note(connections(self.scene.caller.server))

    def _is_done(self) -> bool:
        return self.scene.ended() and self.scene.call.returncode == 0

    def _call_again(self) -> None:
        """Call as the documented worker loop would, also where the last call gave up."""
        if self.calls:
            self.gave_up += 1
            print(f"  gave up: {self.scene.caller.why(self.scene.call)[:200]}", flush=True)
        self.calls += 1
        self.scene.start()


def main() -> int:
    faulthandler.register(signal.SIGUSR1)  # says where it hangs
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to end"))
    options = parsed()
    if options.watch:
        return soak_watched.soak(options.minutes)
    print(f"seed {options.seed}", flush=True)
    started = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as name,
        world(name, options) as soak,
    ):
        soak.run(60 * options.minutes)
        wrong = soak.verdict(options.executor)
        print(summary(soak, options, time.monotonic() - started))
        print("\n".join(wrong) or "nothing lost, nothing made twice, nothing left")
        return bool(wrong)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--executor", choices=["local", "processes", "ray", "dask"], default="ray")
    parser.add_argument("--database", choices=["mysql", "postgresql"], default="postgresql")
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--minutes", type=float, default=10, help="how long faults go on")
    parser.add_argument("--seconds-between", type=float, default=6, help="longest pause between faults")
    parser.add_argument("--longest-seconds", type=float, default=0.05, help="the longest make()")
    parser.add_argument(
        "--faults", nargs="*", help="names of the faults; default: all that the executor can have"
    )
    parser.add_argument(
        "--watch", action="store_true", help="no faults: watch a pipeline, and see it stay flat"
    )
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    return parser.parse_args()


@contextmanager
def world(name: str, options: argparse.Namespace) -> Iterator[Soak]:
    """Start a database and a cluster, and fill a pipeline."""
    folder = Path(name)
    paths = [name, str(TESTS), str(TESTS.parent)]
    sys.path.insert(0, name)
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    with servers.restartable(options.database) as daemon, clusters.place(options.executor) as place:
        lab = filled(daemon.server, folder, options.jobs)
        make_kwargs = {"folder": name, "longest_seconds": options.longest_seconds}
        environment = {**place.environment, "DJDIST_LEASE_SECONDS": str(LEASE_SECONDS)}
        caller = Caller(daemon.server, lab.__name__, folder, make_kwargs, environment, place.options)
        scene = Scene(caller, place, daemon, random.Random(options.seed))
        faults = [
            fault
            for fault in faults_of(options.executor)
            if options.faults is None or fault.__name__ in options.faults
        ]
        try:
            yield Soak(scene, faults, options.seconds_between)
        finally:
            caller.close()


def filled(server: servers.Server, folder: Path, jobs: int) -> ModuleType:
    with server.configure():
        lab = pipelines.declare(SCHEMA, folder)
        pipelines.fill(lab, subjects=max(1, jobs // 1000), sessions=min(jobs, 1000))
        return lab


def summary(soak: Soak, options: argparse.Namespace, seconds: float) -> str:
    made, errors, lost = counts(soak.scene.caller.server, SCHEMA)
    hits = ", ".join(f"{count} x {name}" for name, count in soak.hit.most_common())
    longest = max(soak.memory.values(), key=lambda growth: len(growth.seen), default=Growth())
    return f"""
{options.executor} on {options.database}, {seconds:.0f} s, seed {options.seed}
faults survived: {sum(soak.hit.values())} ({hits})
made {made}, errors of make() {errors - lost}, given up after several losses {lost}
calls {soak.calls}, of which {soak.gave_up} gave up; drivers seen {len(soak.memory)}
memory of the driver that lived longest, in MB: {longest}
connections to the database: {soak.connections}"""


if __name__ == "__main__":
    sys.exit(main())
