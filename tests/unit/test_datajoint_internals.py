"""What djdist uses of DataJoint's private parts: these fail when an upgrade moves one of them."""

from __future__ import annotations

import copy
import inspect
import sys
from types import SimpleNamespace
from typing import Any

import datajoint as dj
import pytest

import djdist

ADAPTERS = ["mysql", "postgresql"]


class Table:
    """What `_populate1` needs of a table and of its connection; notes what is done to it."""

    full_table_name = "a_table"
    has_metadata = False

    def __init__(self, *made: dict[str, int]) -> None:
        self.made = made
        self.done: list[Any] = []
        self.connection = self
        self._config = dj.config

    def __contains__(self, key: dict[str, int]) -> bool:
        self.done.append("look")
        return key in self.made

    def make(self, key: dict[str, int], **arguments: Any) -> None:
        self.done.append(("make", key, arguments))

    def start_transaction(self) -> None:
        self.done.append("start")

    def commit_transaction(self) -> None:
        self.done.append("commit")

    def cancel_transaction(self) -> None:
        self.done.append("cancel")

    def _has_job_metadata_attrs(self) -> bool:
        return self.has_metadata

    def _update_job_metadata(self, key: dict[str, int], **metadata: Any) -> None:
        self.done.append(("metadata", metadata["version"]))


class InThreeParts(Table):
    def make(self, key: dict[str, int], **arguments: Any) -> Any:
        self.done.append("fetch")
        if not (yield "fetched"):
            self.done.append("compute")
            yield "computed"
        self.done.append("insert")
        yield


KEY = {"n": 1}


def populate1(table: Any, **arguments: Any) -> Any:
    return dj.AutoPopulate._populate1(table, KEY, None, False, False, make_kwargs=arguments)


def test_populate1_takes_what_a_worker_gives_it() -> None:
    parameters = inspect.signature(dj.AutoPopulate._populate1).parameters
    assert list(parameters) == [
        "self",
        "key",
        "jobs",
        "suppress_errors",
        "return_exception_objects",
        "make_kwargs",
    ]
    inspect.signature(dj.AutoPopulate._populate1).bind(None, {}, None, False, False, make_kwargs={})


def test_populate1_commits_once_itself_so_that_the_fence_knows_its_commit() -> None:
    table = Table()
    assert populate1(table, factor=2) is True
    assert table.done == ["start", "look", ("make", KEY, {"factor": 2}), "commit"]


def test_populate1_asks_once_whether_its_own_key_is_there() -> None:
    table = Table(KEY)
    assert populate1(table) is False
    assert table.done == ["start", "look", "cancel"]


def test_populate1_gives_make_a_copy_of_the_key() -> None:
    table = Table()
    populate1(table)
    assert table.done[2][1] is not KEY


def test_populate1_opens_its_transaction_late_where_make_is_a_generator() -> None:
    table = InThreeParts()
    assert populate1(table) is True
    assert table.done == ["look", "fetch", "compute", "start", "fetch", "insert", "commit"]


def test_populate1_prefers_the_make_of_old() -> None:
    class Old(Table):
        _make_tuples = Table.make
        make = None  # type: ignore[assignment]

    assert populate1(Old()) is True


def test_populate1_imports_what_workers_have_loaded_by_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepdiff", None)
    with pytest.raises(ImportError, match="deepdiff"):
        populate1(Table())


def test_populate1_looks_the_version_up_when_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dj.jobs, "_get_job_version", lambda config: "v7")
    table = Table()
    table.has_metadata = True
    populate1(table)
    assert table.done[-1] == ("metadata", "v7")
    assert list(inspect.signature(dj.jobs._get_job_version).parameters) == ["config"]


@pytest.mark.parametrize("name", ["start_transaction", "commit_transaction", "close"])
def test_what_is_patched_on_a_connection_is_an_ordinary_method(name: str) -> None:
    assert inspect.isfunction(vars(dj.Connection)[name])
    assert "__slots__" not in vars(dj.Connection)


def test_a_connection_knows_of_its_transaction_by_a_flag() -> None:
    asked: list[str] = []
    adapter = dj.adapters.get_adapter("mysql")
    connection = SimpleNamespace(adapter=adapter, query=asked.append, in_transaction=False)
    dj.Connection.start_transaction(connection)
    assert (connection._in_transaction, len(asked)) == (True, 1)
    dj.Connection.commit_transaction(connection)
    assert (connection._in_transaction, len(asked)) == (False, 2)


def test_a_tables_name_is_worked_out_of_that_of_its_class_alone() -> None:
    assert list(inspect.signature(dj.user_tables.from_camel_case).parameters) == ["s"]


def test_auto_populate_holds_what_enable_replaces() -> None:
    assert {"populate", "jobs", "make", "_jobs_to_do", "_populate1"} <= vars(dj.AutoPopulate).keys()
    for table in (dj.Computed, dj.Imported):
        assert issubclass(table, dj.AutoPopulate)
        assert not {"populate", "jobs", "_populate1"} & vars(table).keys()


def test_populate_takes_what_djdists_takes() -> None:
    native = inspect.signature(dj.AutoPopulate.populate).parameters
    ours = inspect.signature(djdist.populate).parameters
    for name, parameter in native.items():
        if name in ("self", "restrictions"):
            continue
        assert ours[name].kind == parameter.kind
        assert ours[name].default == parameter.default


def test_jobs_to_do_takes_the_restrictions() -> None:
    assert list(inspect.signature(dj.AutoPopulate._jobs_to_do).parameters) == ["self", "restrictions"]


def jobs_definition() -> str:
    target = SimpleNamespace(full_table_name="a_table")
    jobs = SimpleNamespace(_target=target, _get_fk_derived_pk_attrs=lambda: [("a_key", "int32")])
    definition: str = dj.Job._generate_definition(jobs)
    return definition


def test_the_jobs_table_asks_for_its_key_where_djdist_answers() -> None:
    assert "a_key : int32" in jobs_definition()
    assert list(inspect.signature(dj.Job.refresh).parameters) == [
        "self", "restrictions", "delay", "priority", "stale_timeout", "orphan_timeout",
    ]  # fmt: skip


def test_the_jobs_table_has_the_columns_that_the_store_writes() -> None:
    from djdist.job_stores.jobs_table.conditions import COLUMNS
    from djdist.job_stores.jobs_table.store import ERROR_MESSAGE_LENGTH, TRUNCATED

    after = jobs_definition().split("---")[1].splitlines()
    declared = [line.split(":")[0].split("=")[0].strip() for line in after if " : " in line]
    assert tuple(declared) == COLUMNS
    assert (dj.jobs.ERROR_MESSAGE_LENGTH, dj.jobs.TRUNCATION_APPENDIX) == (ERROR_MESSAGE_LENGTH, TRUNCATED)


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let connections be made without one."""
    monkeypatch.setattr(dj.Connection, "connect", lambda self: None)
    monkeypatch.setattr(dj.Connection, "is_connected", True)
    monkeypatch.setattr(dj.Connection, "query", lambda *args, **kwargs: FakeCursor())
    adapter = type(dj.adapters.get_adapter("mysql"))
    monkeypatch.setattr(adapter, "get_connection_id", lambda self, connection: 1)


@pytest.mark.usefixtures("no_server")
@pytest.mark.parametrize("use_tls", [None, True, False, {"ca": "a file"}])
def test_a_connection_keeps_its_login(use_tls: Any) -> None:
    connection = dj.Connection("a.host", "me", "secret", 3307, use_tls, backend="mysql")
    info = connection.conn_info
    expected = {"host": "a.host", "port": 3307, "user": "me", "passwd": "secret", "database_name": None}
    assert {name: info[name] for name in expected} == expected
    assert info["ssl_input"] == use_tls
    assert connection._build_connect_kwargs()["use_tls"] == info.get("ssl")


class FakeCursor:
    rowcount = 1

    def fetchone(self) -> list[str]:
        return ["8.0.0"]


@pytest.mark.usefixtures("no_server")
def test_a_connection_reads_its_own_configuration() -> None:
    own = copy.deepcopy(dj.config)
    assert dj.Connection("a.host", "me", "secret", 3307, config_override=own)._config is own


def test_the_processes_connection_can_be_looked_at_without_opening_it() -> None:
    assert hasattr(dj.instance, "_singleton_connection")


def test_the_configuration_has_the_parts_that_travel() -> None:
    parts = dj.config.model_dump()
    assert {"database", "connection", "jobs", "stores"} <= parts.keys()
    assert {"host", "port", "user", "password", "name", "use_tls"} <= parts["database"].keys()
    assert {
        "auto_refresh",
        "keep_completed",
        "stale_timeout",
        "default_priority",
        "version_method",
        "add_job_metadata",
    } <= parts["jobs"].keys()
    assert "charset" in parts["connection"]


@pytest.mark.parametrize("backend", ADAPTERS)
def test_adapters_connect_name_themselves_and_tables(backend: str) -> None:
    if backend == "postgresql":
        pytest.importorskip("psycopg2")
    adapter = dj.adapters.get_adapter(backend)
    assert adapter.backend == backend
    assert list(inspect.signature(adapter.connect).parameters) == [
        "host",
        "port",
        "user",
        "password",
        "kwargs",
    ]
    assert "a_schema" in adapter.make_full_table_name("a_schema", "a_table")


def test_attributes_tell_where_they_come_from() -> None:
    assert {"uuid", "original_type", "lineage", "type"} <= {*dj.heading.Attribute._fields}


@pytest.mark.usefixtures("no_server")
def test_a_schema_gives_its_tables_the_context_of_their_declaration() -> None:
    class Subject(dj.Manual):
        definition = "subject_id : int32"

    connection = dj.Connection("a.host", "me", "secret", 3307)
    schema = dj.Schema("a_schema", connection=connection, create_schema=False, create_tables=False)
    schema(Subject, context={"Other": int})
    assert Subject.declaration_context["Other"] is int
    assert dj.Table.declaration_context is None
    parameters = inspect.signature(dj.Schema).parameters
    assert {"create_schema", "create_tables"} <= parameters.keys()
    assert "context" in inspect.signature(dj.Schema.__call__).parameters


def test_blobs_hold_texts() -> None:
    assert dj.blob.unpack(dj.blob.pack("Traceback …")) == "Traceback …"


def test_lost_connections_have_a_name() -> None:
    assert issubclass(dj.errors.LostConnectionError, dj.DataJointError)
