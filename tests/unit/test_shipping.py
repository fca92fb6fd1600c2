from __future__ import annotations

import functools
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import datajoint as dj
import pytest

from djdist.database.dbapi import ConnectionSettings
from djdist.database.job_statements import JobStatements, Statement
from djdist.errors import WorkerSetupError
from djdist.job_stores.jobs_table.store import JobsTable, Owner
from djdist.pipeline.jobs_table_spec import JobsTableSpec
from djdist.shipping import packing as shipping
from djdist.shipping.packing import apply_settings, pack, settings_of, unpack
from djdist.shipping.pickled_task import PickledTask
from djdist.shipping.pickling import Pickler, Unpickler
from djdist.worker import WorkerTask

PASSWORD = "p4ssw0rd of the lab"
STORE_SECRET = "s3cret of the store"
DRIVERS_PROCESS = """
import pickle, sys
import djdist.driver, djdist.executors.ray
pickle.load(sys.stdin.buffer)
assert not {"datajoint", "pandas", "networkx"} & {*sys.modules}
"""


class FakeConnection(dj.Connection):
    """A connection to nowhere that counts how often it connects."""

    def __init__(self, config: Any = None, **info: Any) -> None:
        self._config = config or dj.settings.Config()
        self.adapter = dj.adapters.get_adapter("mysql")
        self.conn_info = {
            "host": "db.lab",
            "port": 3306,
            "user": "me",
            "passwd": PASSWORD,
            "database_name": None,
            "ssl_input": None,
            "ssl": True,
            **info,
        }
        self.schemas: dict[str, Any] = {}
        self.connected = 0
        self.is_open = True

    def query(self, *arguments: Any, **options: Any) -> None:
        if not self.is_open:
            raise dj.errors.LostConnectionError

    def connect(self) -> None:
        self.connected += 1
        self.is_open = True


def lab_config() -> Any:
    config = dj.settings.Config()
    config.database.host, config.database.user, config.database.password = "db.lab", "me", PASSWORD
    config.stores = {"raw": {"protocol": "s3", "secret_key": STORE_SECRET}}
    config.jobs.keep_completed = True
    config.jobs.default_priority = 3
    config.display.limit = 5
    return config


@pytest.fixture
def settings() -> ConnectionSettings:
    return settings_of(FakeConnection(lab_config()))


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeConnection]:
    """What DataJoint connects to in this process, with the settings put back afterwards."""
    connection = FakeConnection()
    connection.adapter = dj.adapters.get_adapter("mysql")
    monkeypatch.setattr(dj, "conn", lambda *args, **kwargs: connection)
    monkeypatch.setattr(dj.instance, "_singleton_connection", None)
    monkeypatch.setattr(shipping, "_own", shipping._Own())
    names = ("database", "jobs", "stores", "display")
    with dj.config.override(**{name: getattr(dj.config, name) for name in names}):
        before = {name: getattr(dj.config, name).model_copy() for name in names if name != "stores"}
        yield connection
        for name, group in before.items():
            setattr(dj.config, name, group)


class TestSettings:
    def test_a_worker_gets_the_callers(self, settings: ConnectionSettings) -> None:
        config = dj.settings.Config()
        apply_settings(pickle.loads(pickle.dumps(settings)), config)
        assert config.model_dump() == lab_config().model_dump()

    def test_a_worker_gets_the_connections_own_login(self) -> None:
        connection = FakeConnection(lab_config(), host="other.lab", port=3307, user="you", passwd="else")
        config = dj.settings.Config()
        apply_settings(settings_of(connection), config)
        database = config.database
        assert (database.host, database.port, database.user) == ("other.lab", 3307, "you")
        assert database.model_dump()["password"] == config.database.password
        assert "else" in str(getattr(database.password, "get_secret_value", lambda: database.password)())

    @pytest.mark.parametrize("use_tls", [None, True, False])
    def test_tls_travels(self, use_tls: bool | None) -> None:
        config = dj.settings.Config()
        apply_settings(settings_of(FakeConnection(ssl_input=use_tls)), config)
        assert config.database.use_tls is use_tls

    def test_credentials_stay_where_they_are_wanted_to(self) -> None:
        settings = settings_of(FakeConnection(lab_config()), ship_credentials=False)
        packed = pickle.dumps(settings)
        assert PASSWORD.encode() not in packed
        assert STORE_SECRET.encode() not in packed
        assert settings.login is None
        assert not {"database", "stores"} & settings.config.keys()

    def test_without_credentials_a_worker_keeps_its_own_and_gets_the_rest(self) -> None:
        config = dj.settings.Config()
        config.database.user = config.database.password = "the worker's"
        config.stores = {"own": {"protocol": "file"}}
        before = config.model_dump()
        apply_settings(settings_of(FakeConnection(lab_config()), ship_credentials=False), config)
        assert config.model_dump()["database"] == before["database"]
        assert config.stores == {"own": {"protocol": "file"}}
        assert (config.jobs.keep_completed, config.display.limit) == (True, 5)


class TestSecrets:
    """What is printed, logged or shown on a dashboard holds no secret."""

    @pytest.fixture
    def shipped(self, settings: ConnectionSettings) -> list[Any]:
        statement = Statement("DELETE", ())
        statements = JobStatements(1, statement, "(id)", *[statement] * 5)
        task = WorkerTask("Table", settings, PASSWORD.encode(), "v", statements, shared=settings)
        names = "Table", "schema", "~~table", "__table"
        key, sql = ("id",), "SELECT 1"
        spec = JobsTableSpec(settings, *names, key, frozenset(), False, key, sql, None, sql)
        table = JobsTable(spec, Owner(1))
        loop = functools.partial(print, store=table, work=PickledTask(pickle.dumps(task)))
        return [settings, task, spec, table, loop]

    def test_no_repr_shows_one(self, shipped: list[Any]) -> None:
        for thing in [*shipped, *pickle.loads(pickle.dumps(shipped))]:
            for text in (repr(thing), str(thing), f"{thing}", repr([thing]), repr({"thing": thing})):
                assert PASSWORD not in text
                assert STORE_SECRET not in text

    def test_a_driver_unpickles_its_part_without_datajoint(self, shipped: list[Any]) -> None:
        pytest.importorskip("ray")
        *_, loop = shipped
        subprocess.run([sys.executable, "-c", DRIVERS_PROCESS], input=pickle.dumps(loop), check=True)

    def test_all_of_it_travels(self, shipped: list[Any]) -> None:
        settings, task, spec, *_ = pickle.loads(pickle.dumps(shipped))
        assert [settings, task, spec] == shipped[:3]
        assert settings.login["password"] == PASSWORD


def made_of(connection: dj.Connection, context: dict[str, Any]) -> type[dj.Manual]:
    """A table as a notebook's cell defines it: no module holds it."""

    class Typed(dj.Manual):
        definition = "id : int32"
        declaration_context = context

        def doubled(self, value: int) -> int:
            return 2 * value

    Typed.__module__ = "__main__"
    Typed._connection = connection
    Typed.database = "a_schema"
    return Typed


def pack_table(table_class: Any) -> bytes:
    """Pack a table that is connected as the caller is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dj.instance, "_singleton_connection", table_class.connection)
        return pack(table_class(), {})


def unpack_table(packed: bytes, settings: ConnectionSettings, preload: tuple[str, ...] = ()) -> dj.Table:
    return unpack(packed, settings, preload=preload)[0]


class TestTables:
    def test_a_table_of_a_module_travels_by_name(
        self, worker: FakeConnection, settings: ConnectionSettings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        table_class = made_of(FakeConnection(), {})
        table_class.__module__, table_class.__qualname__ = __name__, "Typed"
        monkeypatch.setitem(globals(), "Typed", table_class)
        packed = pack_table(table_class)
        assert b"doubled" not in packed
        table_class._connection = worker
        assert type(unpack_table(packed, settings)) is table_class

    def test_a_typed_table_travels_with_its_code_and_connects_there(
        self, worker: FakeConnection, settings: ConnectionSettings
    ) -> None:
        context = {"lock": threading.Lock(), "numbers": (n for n in range(3)), "connection": FakeConnection()}
        packed = pack_table(made_of(FakeConnection(), context))
        table: Any = unpack_table(packed, settings)
        assert type(table).__name__ == "Typed"
        assert table.doubled(4) == 8
        assert table.connection is worker
        assert PASSWORD.encode() not in packed

    def test_the_settings_that_code_uses_are_the_workers(self) -> None:
        pickler = Pickler(FakeConnection(), ship_credentials=False)
        pickler.dump((dj.config, dj.instance._global_config))
        loaded = Unpickler(pickler.pickled, dj.conn).load()
        assert loaded[0] is dj.config
        assert loaded[1] is dj.instance._global_config

    def test_a_worker_has_the_callers_settings_before_the_table_is_loaded(
        self, worker: FakeConnection, settings: ConnectionSettings
    ) -> None:
        unpack_table(pack_table(made_of(FakeConnection(), {})), settings)
        assert dj.config.jobs.keep_completed
        assert dj.config.database.user == "me"

    def test_preloaded_modules_come_first(self, worker: FakeConnection, settings: ConnectionSettings) -> None:
        packed = pack_table(made_of(FakeConnection(), {}))
        with pytest.raises(ModuleNotFoundError, match="no_such_pipeline"):
            unpack_table(packed, settings, ("json", "no_such_pipeline"))

    def test_a_lost_connection_is_opened_again(
        self, worker: FakeConnection, settings: ConnectionSettings
    ) -> None:
        packed = pack_table(made_of(FakeConnection(), {}))
        unpack_table(packed, settings)
        assert worker.connected == 0
        worker.is_open = False
        unpack_table(packed, settings)
        assert worker.connected == 1

    def test_another_user_logs_in_anew(self, worker: FakeConnection, settings: ConnectionSettings) -> None:
        worker.conn_info |= {"user": "somebody else", "passwd": "old"}
        unpack_table(pack_table(made_of(FakeConnection(), {})), settings)
        assert (worker.conn_info["user"], worker.conn_info["passwd"]) == ("me", PASSWORD)
        assert worker.connected == 1

    def test_without_credentials_those_sent_earlier_serve_no_longer(
        self, worker: FakeConnection, settings: ConnectionSettings, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(dj.instance, "_singleton_connection", worker)
        packed = pack_table(made_of(FakeConnection(), {}))
        dj.config.database.user, dj.config.database.password = "the worker's", "own"
        dj.config.database.host, dj.config.stores = "db.lab", {"own": {"protocol": "file"}}
        unpack_table(packed, settings)
        assert (worker.conn_info["user"], "raw" in dj.config.stores) == ("me", True)
        without = settings_of(FakeConnection(), ship_credentials=False)
        for _ in range(2):
            unpack_table(packed, without)
            assert (worker.conn_info["user"], worker.conn_info["passwd"]) == ("the worker's", "own")
            assert dj.config.database.user == "the worker's"
            assert dj.config.stores == {"own": {"protocol": "file"}}

    @pytest.mark.parametrize("use_tls", [None, True, False, {"ca": "a file"}])
    def test_tls_is_the_callers(self, worker: FakeConnection, use_tls: Any) -> None:
        worker.conn_info |= {"user": "somebody else"}
        caller = FakeConnection(ssl_input=use_tls)
        unpack_table(pack_table(made_of(FakeConnection(), {})), settings_of(caller))
        assert worker.conn_info["ssl_input"] == use_tls
        assert worker.conn_info["ssl"] == (use_tls if isinstance(use_tls, dict) else use_tls is not False)

    def test_a_connection_to_another_server_is_refused(
        self, worker: FakeConnection, settings: ConnectionSettings
    ) -> None:
        worker.conn_info |= {"host": "elsewhere"}
        with pytest.raises(WorkerSetupError, match="elsewhere") as caught:
            unpack_table(pack_table(made_of(FakeConnection(), {})), settings)
        assert PASSWORD not in str(caught.value)

    def test_failing_leaves_datajoints_messages_as_they_were(
        self, worker: FakeConnection, settings: ConnectionSettings
    ) -> None:
        level = dj.logger.level
        worker.conn_info |= {"host": "elsewhere"}
        with pytest.raises(WorkerSetupError):
            unpack_table(pack_table(made_of(FakeConnection(), {})), settings)
        assert dj.logger.level == level


class TestDriversConnection:
    def test_without_credentials_it_is_the_processes_own(
        self, worker: FakeConnection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        worker.conn_info["user"] = "the worker's"
        monkeypatch.setattr(dj.instance, "_singleton_connection", worker)
        settings = settings_of(FakeConnection(), ship_credentials=False)
        self.connect_by_user(monkeypatch)
        assert shipping.open_dbapi_connection(settings) == "the worker's"

    def test_without_credentials_and_a_connection_it_is_the_configured_one(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(dj.instance, "_singleton_connection", None)
        settings = settings_of(FakeConnection(), ship_credentials=False)
        self.connect_by_user(monkeypatch)
        with dj.config.override(database__user="configured", database__password="secret"):
            assert shipping.open_dbapi_connection(settings) == "configured"
        with dj.config.override(database__user=None), pytest.raises(WorkerSetupError, match="DJ_USER"):
            shipping.open_dbapi_connection(settings)

    def connect_by_user(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shipping, "connect", lambda backend, login, charset: login["user"])
