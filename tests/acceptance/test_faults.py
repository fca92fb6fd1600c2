"""Real processes die at random moments: each key is made once all the same, wholly, never twice at a time."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest

import lab as pipelines
import servers
from conftest import unavailable
from lab import clusters, notes
from lab.calling import FINISH, Caller
from lab.faults import Fault, Scene, faults_of, may_overlap
from lab.invariants import counts, pending, violations
from lab.watching import wait_until

SESSIONS = 60
OF_TINY_KEYS = 300
"""So many sessions has the pipeline whose keys share transactions."""
LEASE = {"DJDIST_LEASE_SECONDS": "2", "DJDIST_GRACE_SECONDS": "1"}
IN_SHORT_RUN = {
    ("kill_a_worker", "processes", "mysql"),
}


def cases() -> Iterator[Any]:
    """Give each fault on each executor that can have it, with each database."""
    for executor in ("local", "processes", "ray", "dask"):
        for backend in ("mysql", "postgresql"):
            for fault in faults_of(executor):
                short = (fault.__name__, executor, backend) in IN_SHORT_RUN
                name = f"{fault.__name__}-{executor}-{backend}"
                marks = [] if short else [pytest.mark.long]
                yield pytest.param(fault, executor, backend, SESSIONS, marks=marks, id=name)
                if (fault.__name__, executor) == ("stop_the_driver_for_a_while", "local"):
                    continue  # stopped in a shared transaction, it locks what the other run is to make
                sharing = f"{name}-sharing"
                yield pytest.param(fault, executor, backend, OF_TINY_KEYS, marks=pytest.mark.long, id=sharing)


@pytest.mark.parametrize(("fault", "place", "daemon", "sessions"), [*cases()], indirect=["place", "daemon"])
@pytest.mark.timeout(280)
def test_each_key_is_made_once(
    scene: Scene, fault: Fault, lab: ModuleType, server: servers.Server, executor: str, sessions: int
) -> None:
    pipelines.fill(lab, subjects=6, sessions=sessions // 6)
    folder = scene.caller.folder
    if sessions == OF_TINY_KEYS:
        scene.caller.make_kwargs["longest_seconds"] = 0.02
        scene.caller.environment["DJDIST_KEYS_PER_TRANSACTION"] = "auto"
    scene.start()
    moments = sorted(scene.chance.sample(range(1, sessions * 3 // 4), 2))
    hits = [fault(scene) for moment in moments if wait_until(partial(has_come, scene, moment), "the moment")]
    scene.caller.wait(scene.call)
    assert pending(server, lab.SCHEMA) == 0, f"the call ended before its work did:\n{scene.caller.log()}"
    scene.caller.do(FINISH)
    forgiving = may_overlap(fault, executor)
    assert violations(server, lab.SCHEMA, folder, overlaps=not forgiving) == [], scene.caller.log()
    assert counts(server, lab.SCHEMA) == (sessions * 9 // 10, sessions // 10, 0), scene.caller.log()
    assert any(hits), "the run was over before it could be hit"


def has_come(scene: Scene, moment: int) -> bool:
    """Tell whether the run is so far, or over."""
    return notes.begun(scene.caller.folder) >= moment or scene.ended()


@pytest.fixture
def chance() -> random.Random:
    """What decides when and whom a fault hits; a failed test prints it."""
    seed = int(os.environ.get("DJDIST_TEST_SEED") or random.randrange(10**6))
    print(f"replay with DJDIST_TEST_SEED={seed}")
    return random.Random(seed)


@pytest.fixture
def scene(
    place: clusters.Place,
    daemon: servers.Daemon,
    lab: ModuleType,
    chance: random.Random,
    tmp_path: Path,
) -> Iterator[Scene]:
    make_kwargs = {"folder": str(tmp_path), "longest_seconds": 0.1}
    environment = {**LEASE, **place.environment}
    caller = Caller(daemon.server, lab.__name__, tmp_path, make_kwargs, environment, place.options)
    yield Scene(caller, place, daemon, chance)
    caller.close()


@pytest.fixture
def executor(place: clusters.Place) -> str:
    return place.name


@pytest.fixture
def server(daemon: servers.Daemon) -> servers.Server:
    return daemon.server


@pytest.fixture(scope="module")
def place(request: pytest.FixtureRequest, modules_folder: Path) -> Iterator[clusters.Place]:
    """A cluster of this module's own."""
    for library in {"ray": ["ray"], "dask": ["distributed"]}.get(request.param, []):
        try:
            __import__(library)
        except ImportError as error:
            unavailable(f"{error}: pip install 'djdist[{request.param}]'")
    with clusters.place(request.param) as place:
        yield place


@pytest.fixture(scope="module")
def daemon(request: pytest.FixtureRequest) -> Iterator[servers.Daemon]:
    """A database server of this module's own, which may die."""
    with ExitStack() as stack:
        try:
            started = stack.enter_context(servers.restartable(cast("servers.Backend", request.param)))
        except servers.UnavailableError as reason:
            unavailable(str(reason))
        yield started
