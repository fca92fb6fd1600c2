"""A watched pipeline into which another process inserts keys: `make soak ARGS="--watch --minutes 60"`.

It asks whether a service stays as it was: the driver's memory after a garbage collection, the connections to
the database and the statements per minute, while keys come and while none do.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path

import servers
from lab import whole
from lab.calling import Caller
from lab.invariants import ask, connections
from lab.watching import wait_until

RAW, RESULTS = "djdist_soak_raw", "djdist_soak_results"
LOOK_SECONDS = 60
WORK_SECONDS, IDLE_SECONDS = 300, 300
"""In turns keys come and none do, each for so long that a look sees a minute of nothing else."""
KEY_SECONDS = 4
POLL_SECONDS = 10
FLAT = 1.05
"""A figure that grows by less from the first third of its looks to the last one is as good as flat."""

WATCH = f"""
import gc, json, threading
import psutil
import sqlalchemy as sa

asked = []
sa.event.listen(sa.Engine, "before_cursor_execute", lambda *_: asked.append(None))

def look():
    process = psutil.Process()
    while True:
        time.sleep({LOOK_SECONDS})
        gc.collect()
        processes = [process, *process.children(recursive=True)]
        driver, *workers = [each.memory_info().rss / 1e6 for each in processes]
        objects = len(gc.get_objects()) / 1000
        seen = {{"driver's MB": driver, "its thousands of objects": objects, "its statements": len(asked),
                "its workers' MB": sum(workers)}}
        asked.clear()
        with open("looks", "a") as looks:
            print(json.dumps(seen), file=looks)

threading.Thread(target=look, daemon=True).start()
populate(watch=True, poll_seconds={POLL_SECONDS}, processes=2)
"""
INSERT = f"""
import itertools

sessions = itertools.count(1)
while True:
    until = time.monotonic() + {WORK_SECONDS}
    while time.monotonic() < until:
        n = next(sessions)
        whole.Subject.insert1({{"subject_id": n // 20}}, skip_duplicates=True)
        whole.Session.insert1({{"subject_id": n // 20, "session": n, "n": n}})
        done = (whole.Recording & {{"session": n - 5}}).proj()
        whole.Checked.insert(done, ignore_extra_fields=True, skip_duplicates=True)
        time.sleep({KEY_SECONDS})
    time.sleep({IDLE_SECONDS})
"""
SETTLED = """
def is_settled():
    ended = len(whole.Recording()) + whole.Recording.jobs.progress()["error"]
    return ended == len(whole.Session()) and not jobs("pending", "reserved")

while not is_settled():
    time.sleep(1)
print("sessions", len(whole.Session()), "errors", jobs("error"))
"""

Look = dict[str, float]


def soak(minutes: float) -> int:
    """Watch a pipeline for so long; return whether anything grew, or was left undone."""
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as name,
        servers.restartable("mysql") as daemon,
        calling(Path(name), daemon.server) as caller,
    ):
        service, inserting = caller.start(WATCH), caller.start(INSERT)
        looks = list[Look]()
        for look in looks_of(caller, lambda: service.poll() is None, round(60 * minutes / LOOK_SECONDS)):
            looks.append(look)
            print(
                time.strftime("%X"),
                *(f"{value:.1f} {name}" for name, value in look.items()),
                sep="  ",
                flush=True,
            )
        inserting.kill()
        caller.do(SETTLED)
        service.send_signal(signal.SIGTERM)
        service.wait(60)
        print(caller.log())
    grown = [line for works in (True, False) for line in figures(looks, works=works)]
    print(*grown, sep="\n")
    return any("GROWS" in line for line in grown)


@contextmanager
def calling(folder: Path, server: servers.Server) -> Iterator[Caller]:
    """Give what calls for a pipeline in two new schemas."""
    paths = [str(folder), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    sys.path.insert(0, str(folder))
    with server.configure():
        module = whole.declare(RAW, RESULTS, folder)
    environment = {"PYTHONPATH": os.pathsep.join(paths)}
    caller = Caller(server, module.__name__, folder, whole.MAKE_KWARGS, environment, "", whole.TABLES)
    try:
        yield caller
    finally:
        caller.close()


def looks_of(caller: Caller, is_alive: Callable[[], bool], count: int) -> Iterator[Look]:
    """Tell what each minute was like: of the driver by itself, of the server from here."""
    before = 0, 0
    for number in range(count):
        line = wait_until(partial(line_of, caller, is_alive, number), "a look", 3 * LOOK_SECONDS)
        now = questions(caller.server), sessions(caller.server)
        asked, inserted = now[0] - before[0], now[1] - before[1]
        before = now
        server = {
            "all statements": asked,
            "connections": connections(caller.server),
            "new sessions": inserted,
        }
        yield json.loads(line) | server


def line_of(caller: Caller, is_alive: Callable[[], bool], number: int) -> str:
    assert is_alive(), caller.log()
    file = caller.folder / "looks"
    lines = file.read_text().splitlines() if file.exists() else []
    return lines[number] if number < len(lines) else ""


def questions(server: servers.Server) -> int:
    ((_, count),) = ask(server, "", "SHOW GLOBAL STATUS LIKE 'Questions'")
    return int(count)


def sessions(server: servers.Server) -> int:
    ((count,),) = ask(server, RAW, "SELECT count(*) FROM {session}")
    return int(count)


def figures(looks: Sequence[Look], *, works: bool) -> Iterator[str]:
    """Set the first third of the minutes in which keys came, or in which none did, beside the last one."""
    chosen = [
        look
        for before, look in pairwise(looks)
        if works == bool(before["new sessions"]) == bool(look["new sessions"])
    ]
    third, when = len(chosen) // 3, "at work" if works else "at rest"
    yield f"{len(chosen)} minutes {when}: medians of the first and the last third, and the most"
    for name in chosen[0] if third else ():
        values = [look[name] for look in chosen]
        first, last = statistics.median(values[:third]), statistics.median(values[-third:])
        grows = "  GROWS" if last > FLAT * first + 1 else ""
        yield f"  {name}: {first:.1f}, {last:.1f}, {max(values):.1f}{grows}"
