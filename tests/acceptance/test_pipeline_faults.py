"""Real processes die while a whole pipeline is made: it makes the same rows as native runs, each key once."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import servers
from acceptance.test_faults import LEASE, chance, daemon, executor, has_come, place, server
from acceptance.test_pipeline_equality import assert_equal, declared, native
from lab import clusters, whole
from lab.calling import FINISH, Caller
from lab.faults import (
    Fault,
    Scene,
    faults_of,
    kill_a_worker,
    kill_the_caller,
    kill_the_driver,
    restart_the_database,
)
from lab.notes import made_twice_at_once
from lab.watching import wait_until

__all__ = ["chance", "daemon", "declared", "executor", "native", "place", "server"]

FAULTS = (kill_a_worker, kill_the_driver, kill_the_caller, restart_the_database)


def cases() -> Iterator[Any]:
    """Give each fault on each executor that can have it, with each database."""
    for where in ("processes", "ray", "dask"):
        for backend in ("mysql", "postgresql"):
            for fault in (each for each in faults_of(where) if each in FAULTS):
                name = f"{fault.__name__}-{where}-{backend}"
                yield pytest.param(fault, where, backend, 3, id=name)
                yield pytest.param(fault, where, backend, whole.SESSIONS_TO_SHARE, id=f"{name}-sharing")


@pytest.fixture
def pipeline(declared: Callable[..., ModuleType], tmp_path: Path, sessions: int) -> ModuleType:
    longest_seconds = 0.02 if sessions == whole.SESSIONS_TO_SHARE else 0.05
    pipeline = declared(notes=str(tmp_path), longest_seconds=longest_seconds)
    whole.fill(pipeline, sessions=sessions)
    return pipeline


@pytest.fixture
def scene(
    place: clusters.Place,
    daemon: servers.Daemon,
    pipeline: ModuleType,
    chance: random.Random,
    tmp_path: Path,
    sessions: int,
) -> Iterator[Scene]:
    environment = {**LEASE, **place.environment}
    if sessions == whole.SESSIONS_TO_SHARE:
        environment["DJDIST_KEYS_PER_TRANSACTION"] = "auto"
    caller = Caller(
        daemon.server,
        pipeline.__name__,
        tmp_path,
        whole.MAKE_KWARGS,
        environment,
        place.options,
        whole.TABLES,
    )
    yield Scene(caller, place, daemon, chance)
    caller.close()


@pytest.mark.long
@pytest.mark.parametrize(("fault", "place", "daemon", "sessions"), [*cases()], indirect=["place", "daemon"])
@pytest.mark.timeout(280)
def test_a_pipeline_is_made_as_if_nothing_had_happened(
    scene: Scene, fault: Fault, pipeline: ModuleType, native: ModuleType, sessions: int
) -> None:
    scene.start()
    moments = sorted(scene.chance.sample(range(3, 20 * sessions), 2))
    hits = [fault(scene) for moment in moments if wait_until(partial(has_come, scene, moment), "the moment")]
    scene.caller.wait(scene.call)
    scene.caller.do(FINISH)
    pipeline.raw.connection.connect()  # the test's own connection may have been lost, too
    assert_equal(pipeline, native)
    assert made_twice_at_once(scene.caller.folder) == [], scene.caller.log()
    assert any(hits), "the run was over before it could be hit"
