"""What dies, goes away or is told to go while it works: nothing is lost, nothing is half there."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

import djdist
import lab as pipelines
from lab import clusters, doing
from lab.relay import Relay, relayed
from lab.watching import SECONDS, counts, meanwhile, pid_of_ray_actor, wait_until
from servers import Server

pytestmark = pytest.mark.long_on("dask")

Script = Callable[..., Any]

CALL = """
from {lab} import Scripted
from lab import doing

make_kwargs = {{"do": doing.wait_at_gate, "folder": {folder!r}}}
Scripted.populate(reserve_jobs=True, make_kwargs=make_kwargs, {options})
"""


def call(lab: ModuleType, folder: Path, options: str) -> str:
    return CALL.format(lab=lab.__name__, folder=str(folder), options=options)


def options_for(executor: Any) -> tuple[str, dict[str, str]]:
    """Say how a script joins the executor of a test."""
    if executor == "ray":
        import ray

        return "executor='ray'", {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    if isinstance(executor, djdist.LocalExecutor):
        return "processes=2", {}
    return "executor='dask'", {"DASK_SCHEDULER_ADDRESS": executor.scheduler.address}


class TestGrace:
    @pytest.mark.long_on("ray")
    def test_what_still_runs_after_the_grace_is_ended_and_given_back(
        self, lab: ModuleType, script: Script, remote_executor: Any, tmp_path: Path
    ) -> None:
        pipelines.fill(lab)
        options, environment = options_for(remote_executor)
        process = script(call(lab, tmp_path, options), DJDIST_GRACE_SECONDS="0.5", **environment)
        wait_until(lambda: len(doing.begun(tmp_path)) == 2, "two jobs")
        workers = pids_of(tmp_path)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=SECONDS)
        assert "SIGTERM" in error
        assert counts(lab.Scripted) == {"pending": 6}
        wait_until(lambda: not any(map(alive, workers)), "the end of the workers")
        assert len(lab.Scripted()) == 0

    @pytest.mark.long
    def test_a_second_ctrl_c_cuts_the_grace(
        self, lab: ModuleType, script: Script, remote_executor: Any, tmp_path: Path
    ) -> None:
        pipelines.fill(lab)
        options, environment = options_for(remote_executor)
        process = script(call(lab, tmp_path, options), DJDIST_GRACE_SECONDS="600", **environment)
        wait_until(lambda: len(doing.begun(tmp_path)) == 2, "two jobs")
        process.send_signal(signal.SIGINT)
        wait_until(lambda: counts(lab.Scripted) == {"reserved": 2, "pending": 4}, "the rest to be given back")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=SECONDS)
        wait_until(lambda: counts(lab.Scripted) == {"pending": 6}, "all to be given back")
        doing.open_gate(tmp_path)
        assert lab.Square.populate(reserve_jobs=True)["success_count"] == 6


class TestWorkerToldToGo:
    @pytest.mark.long_on("ray")
    @pytest.mark.parametrize("executor", ["processes", "ray"])
    def test_a_key_that_was_interrupted_so_is_made_however_often_that_was(
        self, request: pytest.FixtureRequest, lab: ModuleType, tmp_path: Path, executor: str
    ) -> None:
        pipelines.fill(lab, subjects=1, sessions=1)
        request.getfixturevalue("ray_cluster" if executor == "ray" else "processes")
        times = djdist.config.max_worker_losses + 1

        def tell_each_to_go() -> None:
            told: set[int] = set()
            while len(told) < times:
                (worker,) = wait_until(lambda: pids_of(tmp_path) - told, "a worker")
                os.kill(worker, signal.SIGTERM)
                told.add(worker)
            doing.open_gate(tmp_path)

        arguments = {"do": doing.wait_at_gate, "folder": str(tmp_path)}
        where = "ray" if executor == "ray" else request.getfixturevalue("processes")
        with meanwhile(tell_each_to_go):
            summary = lab.Scripted.populate(reserve_jobs=True, executor=where, make_kwargs=arguments)
        assert summary == {"success_count": 1, "error_list": []}
        assert counts(lab.Scripted) == {}

    @pytest.mark.long
    @pytest.mark.parametrize("executor", ["processes", "ray"])
    def test_keys_that_shared_a_transaction_are_made_uncharged(
        self,
        request: pytest.FixtureRequest,
        lab: ModuleType,
        tmp_path: Path,
        executor: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        pipelines.fill(lab, subjects=1, sessions=60)
        monkeypatch.setattr(djdist.config, "max_worker_losses", 1)
        request.getfixturevalue("ray_cluster" if executor == "ray" else "processes")

        def tell_some_to_go() -> None:
            told: set[int] = set()
            while len(told) < 3:
                worker = wait_until(lambda: pids_of(tmp_path) - told, "a shared transaction").pop()
                os.kill(worker, signal.SIGTERM)
                told.add(worker)
                wait_until(partial(is_gone, worker), "it to go")
            doing.open_gate(tmp_path)

        arguments = {"do": doing.wait_at_gate_in_a_shared_transaction, "folder": str(tmp_path)}
        where = "ray" if executor == "ray" else request.getfixturevalue("processes")
        with meanwhile(tell_some_to_go):
            summary = lab.Scripted.populate(
                reserve_jobs=True, executor=where, make_kwargs=arguments, keys_per_transaction="auto"
            )
        assert summary == {"success_count": 60, "error_list": []}
        assert len(lab.Scripted()) == 60
        assert counts(lab.Scripted) == {}

    @pytest.mark.on("dask")
    def test_a_dask_worker_gives_its_key_back_uncharged(
        self, lab: ModuleType, tmp_path: Path, modules_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pipelines.fill(lab, subjects=1, sessions=1)
        monkeypatch.setattr(djdist.config, "max_worker_losses", 1)

        def tell_it_to_go() -> None:
            wait_until(lambda: doing.begun(tmp_path), "the key to begin")
            (worker,) = pids_of(tmp_path)
            os.kill(psutil.Process(worker).ppid(), signal.SIGTERM)  # its nanny, as a batch system does
            wait_until(lambda: len(doing.begun(tmp_path)) == 2, "it to begin elsewhere")
            assert not alive(worker)
            doing.open_gate(tmp_path)

        arguments = {"do": doing.wait_at_gate, "folder": str(tmp_path)}
        with clusters.place("dask") as cluster:
            where = djdist.DaskExecutor(cluster.environment["DASK_SCHEDULER_ADDRESS"])
            with meanwhile(tell_it_to_go):
                summary = lab.Scripted.populate(reserve_jobs=True, executor=where, make_kwargs=arguments)
        assert summary["error_list"] == []  # the driver may have gone, too: nobody counts before the next one
        assert len(lab.Scripted()) == 1
        assert counts(lab.Scripted) == {}


def test_a_key_whose_transaction_is_given_up_for_another_is_made_later(
    lab: ModuleType, executor: Any, server: Server, tmp_path: Path
) -> None:
    pipelines.fill(lab, subjects=1, sessions=1)
    other = server.connect()
    other.start_transaction()
    other.query(f"UPDATE {lab.Session().full_table_name} SET n = n")

    def let_go() -> None:
        wait_until(lambda: len(doing.begun(tmp_path)) == 2, "the second attempt")
        other.cancel_transaction()

    arguments = {"do": doing.change_its_session, "folder": str(tmp_path)}
    with meanwhile(let_go):
        summary = lab.Scripted.populate(reserve_jobs=True, executor=executor, make_kwargs=arguments)
    other.close()
    assert summary == {"success_count": 1, "error_list": []}
    assert counts(lab.Scripted) == {}


@pytest.mark.long
class TestCallerKilled:
    def test_its_run_stops_and_the_next_one_makes_what_it_held(
        self, lab: ModuleType, script: Script, remote_executor: Any, tmp_path: Path
    ) -> None:
        pipelines.fill(lab)
        options, environment = options_for(remote_executor)
        lease = {"DJDIST_LEASE_SECONDS": "2", "DJDIST_GRACE_SECONDS": "1"}
        process = script(call(lab, tmp_path, options), **lease, **environment)
        wait_until(lambda: len(doing.begun(tmp_path)) == 2, "two jobs")
        workers = pids_of(tmp_path)
        process.kill()
        wait_until(lambda: not any(map(alive, workers)), "the end of the workers")

        def made_all() -> bool:
            lab.Scripted.populate(reserve_jobs=True, make_kwargs={"do": doing.nothing})
            return len(lab.Scripted()) == 6

        wait_until(made_all, "the lease to end")
        assert counts(lab.Scripted) == {}


class TestDriverKilled:
    def test_another_one_adopts_the_run(
        self, lab: ModuleType, tmp_path: Path, cluster_with_driver: tuple[Any, Callable[[], int]]
    ) -> None:
        executor, find_driver = cluster_with_driver
        pipelines.fill(lab)

        def kill_the_driver() -> None:
            wait_until(lambda: len(doing.begun(tmp_path)) == 2, "two jobs")
            os.kill(find_driver(), signal.SIGKILL)
            wait_until(lambda: len(doing.begun(tmp_path)) >= 4, "the next driver's jobs")
            doing.open_gate(tmp_path)

        arguments = {"do": doing.wait_at_gate, "folder": str(tmp_path)}
        with meanwhile(kill_the_driver):
            lab.Scripted.populate(reserve_jobs=True, executor=executor, make_kwargs=arguments)
        assert len(lab.Scripted()) == 6
        assert counts(lab.Scripted) == {}

    @pytest.fixture(params=["ray", "dask"])
    def cluster_with_driver(self, request: pytest.FixtureRequest) -> tuple[Any, Callable[[], int]]:
        """A cluster, and how to find the process of its driver."""
        if request.param == "ray":
            request.getfixturevalue("ray_cluster")
            return "ray", lambda: pid_of_ray_actor("DriverHost")
        client = request.getfixturevalue("dask_client")
        return client, lambda: dask_driver(client)


def dask_driver(client: Any) -> int:
    (address,) = {
        workers[0] for key, workers in client.who_has().items() if workers and "djdist driver" in str(key)
    }
    pid: int = client.run(os.getpid, workers=[address])[address]
    return pid


def pids_of(folder: Path) -> set[int]:
    return {int(file.name.split("-")[2]) for file in folder.glob("*-begun-*")}


def is_gone(pid: int) -> bool:
    return not alive(pid)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


class TestDatabaseAway:
    @pytest.fixture
    def relay(self, server: Server) -> Iterator[Relay]:
        with relayed(server.host, server.port) as relay:
            yield relay

    @pytest.fixture
    def far_lab(
        self, connection: Any, server: Server, relay: Relay, schema_name: str, modules_folder: Path
    ) -> Iterator[ModuleType]:
        """A pipeline over a connection that can go away."""
        far = replace(server, port=relay.port).configure()
        lab = pipelines.declare(schema_name, modules_folder)
        pipelines.fill(lab)
        yield lab
        pipelines.forget(lab)
        far.close()

    @pytest.mark.long_on("ray")
    def test_the_run_waits_and_goes_on(
        self, far_lab: ModuleType, relay: Relay, executor: Any, tmp_path: Path
    ) -> None:
        def go_out_for_a_while() -> None:
            wait_until(lambda: doing.begun(tmp_path), "a job")
            relay.go_out()
            doing.open_gate(tmp_path)
            wait_until(lambda: relay.refused >= 6, "some attempts to connect")
            relay.come_back()

        arguments = {"do": doing.wait_at_gate, "folder": str(tmp_path)}
        options = {"reserve_jobs": True, "executor": executor, "make_kwargs": arguments}
        with meanwhile(go_out_for_a_while):
            summary = far_lab.Scripted.populate(**options)
        assert summary["error_list"] == []
        far_lab.schema.connection.connect()
        assert len(far_lab.Scripted()) == 6
        assert counts(far_lab.Scripted) == {}
