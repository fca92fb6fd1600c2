"""The server commits, and its answer is lost on the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import lab as pipelines
from lab.relay import Relay, relayed
from servers import Server

RESERVES = b"SET status='reserved'"
FINISHES = b"DELETE FROM"
KEYS = 20


@pytest.fixture
def relay(server: Server) -> Iterator[Relay]:
    with relayed(server.host, server.port) as relay:
        yield relay


@pytest.fixture
def far_lab(
    connection: Any, server: Server, relay: Relay, schema_name: str, modules_folder: Path
) -> Iterator[ModuleType]:
    """A pipeline over the relay."""
    far = replace(server, port=relay.port).configure()
    lab = pipelines.declare(schema_name, modules_folder)
    pipelines.fill(lab, subjects=1, sessions=KEYS)
    yield lab
    pipelines.forget(lab)
    far.close()


@pytest.mark.long_on("processes")
@pytest.mark.long_on("ray")
class TestReserve:
    def test_what_the_run_holds_unknowingly_is_made_before_it_ends(
        self, far_lab: ModuleType, relay: Relay, executor: Any
    ) -> None:
        relay.lose_commits(after=RESERVES, times=3)
        assert far_lab.Square.populate(reserve_jobs=True, executor=executor)["success_count"] == KEYS
        assert relay.has_lost_all
        assert len(far_lab.Square()) == KEYS
        assert len(far_lab.Square.jobs) == 0

    def test_max_calls_holds(self, far_lab: ModuleType, relay: Relay, executor: Any) -> None:
        relay.lose_commits(after=RESERVES, times=3)
        summary = far_lab.Square.populate(reserve_jobs=True, executor=executor, max_calls=12)
        assert relay.has_lost_all
        assert (summary["success_count"], len(far_lab.Square())) == (12, 12)
        assert len(far_lab.Square.jobs.pending) == len(far_lab.Square.jobs) == KEYS - 12


@pytest.mark.long_on("ray")
class TestMake:
    @pytest.mark.parametrize("reserve_jobs", [True, False])
    @pytest.mark.parametrize("together", [1, pytest.param("auto", marks=pytest.mark.long)])
    def test_what_was_committed_is_counted_as_made(
        self, far_lab: ModuleType, relay: Relay, executor: Any, reserve_jobs: bool, together: Any
    ) -> None:
        last = FINISHES if reserve_jobs else b"INSERT INTO" if together == 1 else b"RELEASE"
        relay.lose_commits(after=last, times=1 if together == "auto" else 3)
        summary = far_lab.Square.populate(
            reserve_jobs=reserve_jobs, executor=executor, max_calls=12, keys_per_transaction=together
        )
        assert relay.has_lost_all
        assert (summary["success_count"], len(far_lab.Square())) == (12, 12)
        if reserve_jobs:
            assert len(far_lab.Square.jobs.pending) == len(far_lab.Square.jobs) == KEYS - 12
