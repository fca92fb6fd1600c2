from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import datajoint as dj
import pytest

from lab import fill
from servers import Server

SIMPLE = ["Square", "Reading", "Stats", "Tripartite", "TripartiteGenerator", "Logged", "Renamed", "Kwargs"]


def names_of_schemas(server: Server) -> set[str]:
    with server.connect() as connection:
        return set(dj.list_schemas(connection=connection))


@pytest.mark.parametrize("table", SIMPLE)
def test_native_populate_fills_every_kind_of_table(lab: ModuleType, table: str) -> None:
    fill(lab, subjects=2, sessions=3)
    done = getattr(lab, table).populate(reserve_jobs=True)
    assert done == {"success_count": 6, "error_list": []}
    assert len(getattr(lab, table)()) == 6


def test_fragile_keys_fail_until_they_are_fixed(lab: ModuleType) -> None:
    fill(lab, subjects=2, sessions=5)
    failed = lab.Fragile.populate(suppress_errors=True)
    assert [error for _, error in failed["error_list"]] == ["ValueError: bad n 5", "ValueError: bad n 10"]
    lab.Fix.insert((lab.Session & "n in (5, 10)").keys())
    assert lab.Fragile.populate()["success_count"] == 2


def test_own_key_source_and_upstream(lab: ModuleType) -> None:
    fill(lab, subjects=2, sessions=3)
    lab.Square.populate()
    assert lab.Filtered.populate()["success_count"] == 4
    assert lab.Upstream.populate()["success_count"] == 6


def test_keys_of_every_type(lab: ModuleType) -> None:
    lab.AnyKey.insert(lab.AnyKey.rows)
    assert lab.FromAnyKey.populate()["success_count"] == 2


def test_native_jobs_with_keys_of_every_type(
    request: pytest.FixtureRequest, server: Server, lab: ModuleType
) -> None:
    if server.backend == "postgresql":
        refused = "DataJoint 2.3 declares no jobs table for bool, datetime, enum and float64 keys there"
        request.applymarker(pytest.mark.xfail(raises=dj.DataJointError, reason=refused, strict=False))
    lab.AnyKey.insert(lab.AnyKey.rows)
    assert lab.FromAnyKey.populate(reserve_jobs=True)["success_count"] == 2


def test_schemas_are_dropped(server: Server, new_schema_name: Callable[[], str], connection: Any) -> None:
    name = new_schema_name()
    dj.Schema(name)
    assert name in names_of_schemas(server)
    server.drop_schema(name)
    assert name not in names_of_schemas(server)


def test_a_wrong_password_is_refused(server: Server) -> None:
    with pytest.raises(Exception, match=r"(?i)access denied|authentication failed"):
        dj.Connection(
            server.host,
            server.user,
            "wrong",
            server.port,
            False,
            database_name=server.database_name,
            backend=server.backend,
        )


def test_ray_workers_import_the_pipeline(ray_cluster: Any, lab: ModuleType) -> None:
    pid, module = ray_cluster.get(ray_cluster.remote(imported_on_worker).remote(lab.__name__))
    assert (pid != os.getpid(), module) == (True, lab.__name__)


def test_dask_workers_import_the_pipeline(dask_client: Any, lab: ModuleType) -> None:
    pid, module = dask_client.submit(imported_on_worker, lab.__name__).result()
    assert (pid != os.getpid(), module) == (True, lab.__name__)


def imported_on_worker(name: str) -> tuple[int, str]:
    import importlib.util

    spec = importlib.util.find_spec(name)
    return os.getpid(), spec.name if spec else "not found"
