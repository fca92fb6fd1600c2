"""What can't work is said at the caller, with the cure, before any job is touched."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import datajoint as dj
import numpy as np
import pytest

import djdist
import lab as pipelines
from djdist.cli.app import may_pass
from lab.relay import Relay, relayed
from servers import Server


@pytest.fixture
def untouched(lab: ModuleType) -> Iterator[Any]:
    """A table with three pending jobs that a refused call leaves as they are."""
    pipelines.fill(lab, subjects=1, sessions=4)
    lab.Kwargs.jobs.refresh(lab.Session & "n < 4", priority=3)
    before = lab.Kwargs.jobs.to_dicts()
    assert len(before) == 3
    yield lab.Kwargs
    assert lab.Kwargs.jobs.to_dicts() == before
    assert len(lab.Kwargs()) == 0


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"executor": "slurm"}, r"no executor 'slurm'; there are 'local', 'ray', 'dask', or give an object"),
    ({"executor": "Ray"}, r"no executor 'Ray'"),
    ({"executor": ""}, r"no executor ''"),
    ({"executor": 5}, r"5 is no executor: give a name"),
    ({"executor": threading.Thread}, r"is no executor: give a name"),
    ({"max_calls": -1}, r"max_calls=-1 must be a whole number from 0"),
    ({"max_calls": 1.5}, r"max_calls=1.5 must be a whole number"),
    ({"processes": -2}, r"processes=-2 must be at least 1"),
    ({"processes": 2, "executor": "ray"}, r"processes=2 goes with the local executor only"),
    ({"processes": 2, "executor": "dask"}, r"processes=2 goes with the local executor only"),
    ({"priority": 40_000}, r"priority=40000 does not fit .* smaller, the more urgent"),
    ({"priority": -40_000}, r"priority=-40000 does not fit"),
    ({"priority": "urgent"}, r"priority='urgent' does not fit .* whole number"),
    ({"priority": 2.5}, r"priority=2.5 does not fit"),
]


class TestOptions:
    def test_are_refused_with_their_cure(self, untouched: Any) -> None:
        for refresh in (True, False):
            for options, message in BAD_OPTIONS:
                with pytest.raises(djdist.OptionError, match=message):
                    untouched.populate(reserve_jobs=True, refresh=refresh, **options)

    def test_a_priority_beyond_the_column_is_refused_on_each_database(
        self, untouched: Any, server: Server
    ) -> None:
        too_large = {"mysql": 128, "postgresql": 32_768}[server.backend]
        for priority in (too_large, -too_large - 1):
            with pytest.raises(djdist.OptionError, match=f"from {-too_large} to {too_large - 1}"):
                untouched.populate(reserve_jobs=True, priority=priority)
            with pytest.raises(djdist.OptionError, match="does not fit"):
                untouched.jobs.refresh(priority=priority)

    def test_a_default_priority_beyond_the_column_names_the_setting(
        self, untouched: Any, server: Server
    ) -> None:
        if server.backend == "postgresql":
            pytest.skip("all that the setting accepts fits there")
        with (
            dj.config.override(jobs__default_priority=200),
            pytest.raises(djdist.OptionError, match=r"dj\.config\.jobs\.default_priority"),
        ):
            untouched.populate(reserve_jobs=True)

    @pytest.mark.long_on("dask")
    @pytest.mark.long_on("processes")
    def test_numbers_may_be_those_of_numpy(self, lab: ModuleType, executor: Any) -> None:
        pipelines.fill(lab, subjects=1, sessions=4)
        options: dict[str, Any] = {"max_calls": np.int64(3), "retries": np.uint8(1)}
        if executor != "local":
            options["timeout_seconds"] = np.float32(60)
        made = lab.Square.populate(reserve_jobs=True, priority=np.int16(3), executor=executor, **options)
        assert made["success_count"] == 3
        made = lab.Square.populate(max_calls=np.int32(1), executor=executor)
        assert made["success_count"] == 1

    def test_processes_and_settings_may_be_numbers_of_numpy(
        self, lab: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert repr(djdist.LocalExecutor(np.int64(2))) == "LocalExecutor(processes=2)"
        settings = {"lease_seconds": 30, "grace_seconds": 1, "retries": 2, "max_worker_losses": 2}
        for name, value in settings.items():
            monkeypatch.setattr(djdist.config, name, np.int64(value))
            assert type(getattr(djdist.config, name)) in (int, float)

    def test_a_wrong_name_is_seen_by_editors_too(self, untouched: Any) -> None:
        with pytest.raises(djdist.OptionError, match="no executor 'slurm'"):
            djdist.populate(untouched, reserve_jobs=True, executor="slurm")  # type: ignore[call-overload]

    def test_make_kwargs_that_can_not_be_pickled_are_named(
        self, untouched: Any, remote_executor: Any
    ) -> None:
        kwargs = {"factor": threading.Lock()}
        with pytest.raises(djdist.OptionError, match=r"make_kwargs\['factor'\] can't be sent .* locks"):
            untouched.populate(reserve_jobs=True, executor=remote_executor, make_kwargs=kwargs)

    def test_make_kwargs_that_the_workers_can_not_load_are_a_clear_error(
        self, untouched: Any, remote_executor: Any, module_of_the_caller: Callable[[str], ModuleType]
    ) -> None:
        module = module_of_the_caller("class Factor:\n    pass\n")
        with pytest.raises(djdist.WorkerSetupError, match=f"No module named '{module.__name__}'"):
            untouched.populate(
                reserve_jobs=True, executor=remote_executor, make_kwargs={"factor": module.Factor()}
            )


class TestTables:
    def test_a_manual_table_has_no_populate(self, lab: ModuleType) -> None:
        with pytest.raises(djdist.OptionError, match=r"Session is not a dj\.Computed or dj\.Imported table"):
            djdist.populate(lab.Session())

    @pytest.mark.parametrize("part", ["make", "make_compute"])
    def test_a_make_that_nobody_awaits_is_refused(
        self, untouched: Any, part: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def asynchronous(self: Any, key: dict[str, Any]) -> None:
            self.insert1({**key, "result": 0})

        monkeypatch.setattr(untouched, part, asynchronous, raising=False)
        for reserve_jobs in (True, False):
            with pytest.raises(djdist.OptionError, match=rf"Kwargs\.{part} is asynchronous.*asyncio\.run"):
                untouched.populate(reserve_jobs=reserve_jobs)

    def test_a_table_of_no_schema_is_told_so(self, lab: ModuleType) -> None:
        class Loose(dj.Computed):
            definition = "-> Session"

            def make(self, key: dict[str, Any]) -> None:
                self.insert1(key)

        @dj.Schema()
        class Waiting(Loose):
            pass

        for table in (Loose, Waiting):
            for act in (
                table.populate,
                partial(table.populate, reserve_jobs=True),
                partial(djdist.progress, table),
            ):
                with pytest.raises(djdist.OptionError, match="belongs to no schema yet: put @schema above"):
                    act()

    def test_a_table_without_make_is_told_so(self, lab: ModuleType, remote_executor: Any) -> None:
        class Unmade(dj.Computed):
            definition = "-> Session"

        lab.schema(Unmade, context=vars(lab))
        pipelines.fill(lab)
        with pytest.raises(djdist.OptionError, match=r"Unmade has no make\(\): define make\(self, key\)"):
            Unmade.populate(reserve_jobs=True, executor=remote_executor)
        assert len(Unmade.jobs) == 0

    @pytest.mark.parametrize("reserve_jobs", [True, False])
    def test_a_restricted_table_is_refused(self, untouched: Any, reserve_jobs: bool) -> None:
        with pytest.raises(dj.DataJointError, match="pass conditions to populate"):
            (untouched & "subject_id = 1").populate(reserve_jobs=reserve_jobs)

    def test_the_jobs_of_a_restricted_table_spoil_nothing(self, lab: ModuleType) -> None:
        pipelines.fill(lab)
        assert len((lab.Square & "subject_id = 1").jobs) == 0
        assert lab.Square.populate(reserve_jobs=True)["success_count"] == 6

    def test_an_open_transaction_is_refused(self, untouched: Any, connection: Any) -> None:
        with (
            connection.transaction,
            pytest.raises(dj.DataJointError, match="cannot be called during a transaction"),
        ):
            untouched.populate(reserve_jobs=True)

    def test_a_key_source_that_lacks_part_of_the_key_is_named(self, lab: ModuleType, executor: Any) -> None:
        class Coarse(dj.Computed):
            definition = "-> Session"
            key_source = lab.Subject

            def make(self, key: dict[str, Any]) -> None:
                raise AssertionError

        lab.schema(Coarse, context=vars(lab))
        pipelines.fill(lab)
        with pytest.raises(djdist.OptionError, match="key_source of Coarse lacks session_date"):
            Coarse.populate(reserve_jobs=True, executor=executor)

    def test_a_bad_restriction_is_datajoints_error(self, untouched: Any, executor: Any) -> None:
        with pytest.raises((dj.DataJointError, djdist.DatabaseError), match="nonsense"):
            untouched.populate("nonsense = 1", reserve_jobs=True, executor=executor)


@pytest.fixture
def module_of_the_caller(tmp_path: Path) -> Iterator[Callable[[str], ModuleType]]:
    """Loads a module that no other process can import."""
    loaded: list[str] = []

    def load(code: str) -> ModuleType:
        name = f"of_the_caller_{tmp_path.name}"
        (tmp_path / "code.py").write_text(code)
        spec = importlib.util.spec_from_file_location(name, tmp_path / "code.py")
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        loaded.append(name)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in loaded:
        del sys.modules[name]


def test_a_module_that_the_workers_can_not_import_is_named_with_the_cures(
    lab: ModuleType, remote_executor: Any, module_of_the_caller: Callable[[str], ModuleType]
) -> None:
    module = module_of_the_caller(f'SCHEMA = "{lab.SCHEMA}"\n' + pipelines.TEMPLATE.read_text())
    pipelines.fill(lab)
    lab.Square.jobs.refresh()
    before = lab.Square.jobs.to_dicts()
    with pytest.raises(djdist.WorkerSetupError) as refused:
        module.Square.populate(reserve_jobs=True, executor=remote_executor)
    for cure in ("No module named", "Square", "every node", "runtime_env", "register_pickle_by_value"):
        assert cure in str(refused.value)
    assert lab.Square.jobs.to_dicts() == before


@pytest.mark.parametrize("needed", ["os.environ['OF_THE_CALLER']", "open('of_the_caller.txt')"])
def test_what_a_module_needs_beside_code_is_named(
    untouched: Any, lab: ModuleType, processes: Any, modules_folder: Path, needed: str
) -> None:
    name = f"needy_{lab.SCHEMA}"
    code = f"import os\nos.getpid() == {os.getpid()} or {needed}\nSCHEMA = '{lab.SCHEMA}'\n"
    (modules_folder / f"{name}.py").write_text(code + pipelines.TEMPLATE.read_text())
    importlib.invalidate_caches()
    module = importlib.import_module(name)
    with pytest.raises(
        djdist.WorkerSetupError, match=r"(?i)of_the_caller(.|\n)*environment variables and files"
    ):
        module.Kwargs.populate(reserve_jobs=True, executor=processes)
    pipelines.forget(module)


@pytest.fixture
def relay(server: Server) -> Iterator[Relay]:
    with relayed(server.host, server.port) as relay:
        yield relay


@pytest.fixture
def far_lab(
    connection: Any, server: Server, relay: Relay, schema_name: str, modules_folder: Path
) -> Iterator[ModuleType]:
    """A pipeline of six pending jobs over a connection that can be cut."""
    far = replace(server, port=relay.port).configure()
    lab = pipelines.declare(schema_name, modules_folder)
    pipelines.fill(lab)
    lab.Square.jobs.refresh()
    yield lab
    pipelines.forget(lab)
    far.close()


def statuses(server: Server, schema: str) -> set[str]:
    """Look into the jobs table by a way of its own."""
    with server.connect() as connection:
        name = connection.adapter.make_full_table_name(schema, "~~square")
        return set(dj.FreeTable(connection, name).to_arrays("status"))


@pytest.mark.parametrize("how", ["refuse", "cut"])
def test_an_unreachable_database_is_a_clear_error(
    far_lab: ModuleType, relay: Relay, server: Server, executor: Any, how: str
) -> None:
    getattr(relay, how)()
    with pytest.raises(djdist.DjdistError, match=r"(?i)refused|lost connection") as met:
        far_lab.Square.populate(reserve_jobs=True, executor=executor)
    assert may_pass(met.value)
    assert statuses(server, far_lab.SCHEMA) == {"pending"}


def test_a_password_that_is_refused_is_a_clear_error(
    far_lab: ModuleType, server: Server, executor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = far_lab.schema.connection.conn_info
    monkeypatch.setitem(info, "passwd", "not the password")
    with pytest.raises(djdist.DjdistError, match=r"(?i)access denied|authentication failed") as refused:
        far_lab.Square.populate(reserve_jobs=True, executor=executor)
    assert isinstance(refused.value, (djdist.DatabaseError, djdist.WorkerSetupError))
    assert not may_pass(refused.value)
    assert "not the password" not in str(refused.value)
    assert statuses(server, far_lab.SCHEMA) == {"pending"}


@pytest.mark.parametrize(
    ("executor", "message"),
    [
        (
            lambda: djdist.DaskExecutor("tcp://127.0.0.1:1"),
            "Can't reach the Dask scheduler at tcp://127.0.0.1:1",
        ),
        (lambda: djdist.DaskExecutor("nonsense://"), "Can't reach the Dask scheduler at nonsense://"),
    ],
    ids=["nobody there", "no address"],
)
def test_a_cluster_that_is_not_there_is_a_clear_error(
    untouched: Any, executor: Callable[[], Any], message: str
) -> None:
    import dask
    import distributed  # noqa: F401 - as it is imported it would put its own time limit back

    with (
        dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
        pytest.raises(djdist.ClusterError, match=message),
    ):
        untouched.populate(reserve_jobs=True, executor=executor())


@pytest.mark.on("dask")
class TestDaskClients:
    def test_an_asynchronous_one_is_refused(self, untouched: Any, dask_client: Any) -> None:
        import distributed

        async def populate() -> None:
            async with distributed.Client(dask_client.scheduler.address, asynchronous=True) as client:
                with pytest.raises(djdist.OptionError, match="make a client without asynchronous=True"):
                    untouched.populate(reserve_jobs=True, executor=client)

        asyncio.run(populate())

    def test_a_timeout_that_would_end_the_callers_process_is_refused(self, untouched: Any) -> None:
        import distributed

        options = {"processes": False, "dashboard_address": None, "set_as_default": False}
        with (
            distributed.Client(**options) as client,
            pytest.raises(djdist.OptionError, match="leave timeout_seconds out"),
        ):
            untouched.populate(reserve_jobs=True, executor=client, timeout_seconds=1)
