"""What djdist uses of DataJoint's private parts: these fail when an upgrade moves one of them."""

from __future__ import annotations

import inspect
from typing import Any

import datajoint as dj
import pytest

import djdist

ADAPTERS = ["mysql", "postgresql"]


def source_of(function: Any) -> str:
    return inspect.getsource(function)


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


def test_populate1_commits_itself_so_that_the_fence_knows_its_commit() -> None:
    code = dj.AutoPopulate._populate1.__code__
    assert "commit_transaction" in code.co_names
    assert source_of(dj.AutoPopulate._populate1).count("self.connection.commit_transaction()") == 1


def test_populate1_imports_what_workers_have_loaded_by_then() -> None:
    assert source_of(dj.AutoPopulate._populate1).count("import deepdiff") == 1


def test_populate1_touches_no_job_when_it_is_given_none() -> None:
    source = source_of(dj.AutoPopulate._populate1)
    verbs = sum(source.count(f" jobs.{verb}(") for verb in ("reserve", "complete", "error"))
    assert verbs == source.count("if jobs is not None") == 4


def test_populate1_asks_once_whether_its_own_key_is_there_and_gives_make_a_copy() -> None:
    source = source_of(dj.AutoPopulate._populate1)
    assert source.count("key in self") == source.count("if key in self:") == 1
    assert source.count("make(dict(key)") == 3


def test_populate1_looks_the_version_up_when_it_runs() -> None:
    source = source_of(dj.AutoPopulate._populate1)
    assert "from .jobs import _get_job_version" in source
    assert list(inspect.signature(dj.jobs._get_job_version).parameters) == ["config"]


@pytest.mark.parametrize("name", ["start_transaction", "commit_transaction", "close"])
def test_what_is_patched_on_a_connection_is_an_ordinary_method(name: str) -> None:
    assert inspect.isfunction(vars(dj.Connection)[name])
    assert "__slots__" not in vars(dj.Connection)


def test_a_connection_knows_of_its_transaction_by_a_flag() -> None:
    for name, state in {"start_transaction": True, "commit_transaction": False}.items():
        body = source_of(vars(dj.Connection)[name]).split('"""')[-1]
        assert body.count("self.query(") == 1
        assert f"self._in_transaction = {state}" in body


def test_populate1_looks_for_a_generator_and_for_metadata_as_making_does() -> None:
    source = source_of(dj.AutoPopulate._populate1)
    assert 'make = self._make_tuples if hasattr(self, "_make_tuples") else self.make' in source
    assert "inspect.isgeneratorfunction(make)" in source
    assert "if self._has_job_metadata_attrs():" in source


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


def test_the_jobs_table_asks_for_its_key_where_djdist_answers() -> None:
    assert "self._get_fk_derived_pk_attrs()" in source_of(dj.Job._generate_definition)
    assert list(inspect.signature(dj.Job.refresh).parameters) == [
        "self", "restrictions", "delay", "priority", "stale_timeout", "orphan_timeout",
    ]  # fmt: skip


def test_the_jobs_table_has_the_columns_that_the_store_writes() -> None:
    from djdist.job_stores.jobs_table.conditions import COLUMNS
    from djdist.job_stores.jobs_table.store import ERROR_MESSAGE_LENGTH, TRUNCATED

    definition = source_of(dj.Job._generate_definition)
    after = definition[definition.rindex("---") :].splitlines()
    declared = [line.split(":")[0].split("=")[0].strip() for line in after if " : " in line]
    assert tuple(declared) == COLUMNS
    assert (dj.jobs.ERROR_MESSAGE_LENGTH, dj.jobs.TRUNCATION_APPENDIX) == (ERROR_MESSAGE_LENGTH, TRUNCATED)


@pytest.mark.parametrize("use_tls", [None, True, False, {"ca": "a file"}])
def test_a_connection_keeps_its_login(use_tls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dj.Connection, "connect", lambda self: None)
    monkeypatch.setattr(dj.Connection, "is_connected", True)
    monkeypatch.setattr(dj.Connection, "query", lambda *args, **kwargs: FakeCursor())
    adapter = type(dj.adapters.get_adapter("mysql"))
    monkeypatch.setattr(adapter, "get_connection_id", lambda self, connection: 1)
    info = dj.Connection("a.host", "me", "secret", 3307, use_tls, backend="mysql").conn_info
    expected = {"host": "a.host", "port": 3307, "user": "me", "passwd": "secret", "database_name": None}
    assert {name: info[name] for name in expected} == expected
    assert info["ssl_input"] == use_tls
    assert "ssl" in inspect.getsource(dj.Connection._build_connect_kwargs)


class FakeCursor:
    def fetchone(self) -> list[str]:
        return ["8.0.0"]


def test_a_connection_reads_its_own_configuration() -> None:
    assert "config_override" in inspect.signature(dj.Connection).parameters
    assert "self._config =" in source_of(dj.Connection.__init__)


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


def test_a_schema_gives_its_tables_the_context_of_their_declaration() -> None:
    assert "table_class.declaration_context = context" in source_of(dj.schemas)
    assert dj.Table.declaration_context is None
    parameters = inspect.signature(dj.Schema).parameters
    assert {"create_schema", "create_tables"} <= parameters.keys()
    assert "context" in inspect.signature(dj.Schema.__call__).parameters


def test_blobs_hold_texts() -> None:
    assert dj.blob.unpack(dj.blob.pack("Traceback …")) == "Traceback …"


def test_lost_connections_have_a_name() -> None:
    assert issubclass(dj.errors.LostConnectionError, dj.DataJointError)
