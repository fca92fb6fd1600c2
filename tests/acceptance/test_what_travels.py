"""What make() uses of its caller is on the workers what it is at the caller."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import datajoint as dj
import pytest

import djdist
import lab as pipelines
from lab.watching import SECONDS
from servers import Server

PASSWORD = "of an account for the archive"
Script = Callable[..., "subprocess.Popen[str]"]

INSTANCE = """
import os

import datajoint as dj

instance = dj.Instance(
    {server.host!r}, {server.user!r}, {server.password!r}, {server.port}, False, {server.backend!r},
    database__name={server.database_name!r},
)
schema = instance.Schema({schema!r})


@schema
class Number(dj.Lookup):
    definition = "n : int32"
    contents = [[n] for n in range(3)]


@schema
class Seen(dj.Computed):
    definition = '''
    -> Number
    ---
    other_process : bool
    same : bool
    '''

    def make(self, key, caller, source):
        connections = [instance.connection, schema.connection, Number._connection, source.connection]
        same = all(connection is self.connection for connection in connections)
        assert self.upstream[Number].fetch1("n") in source.to_arrays("n")
        self.insert1({{**key, "other_process": os.getpid() != caller, "same": same}})


def seen(**options):
    kwargs = {{"caller": os.getpid(), "source": Number & "n >= 0"}}
    Seen.populate(reserve_jobs=True, make_kwargs=kwargs, **options)
    return [bool(value) for name in ("other_process", "same") for value in Seen().to_arrays(name)]
"""


def seen(lab: ModuleType, look: Callable[..., Any], schema: Any = None) -> Any:
    """Declare a table, as a script does it, whose make() notes what it sees."""

    class Seen(dj.Computed):
        definition = "-> Session\n---\nvalue : varchar(1000)"

        def make(self, key: dict[str, Any], **kwargs: Any) -> None:
            self.insert1({**key, "value": json.dumps(look(self, key, **kwargs))})

    Seen.__module__ = "__main__"
    return (schema or lab.schema)(Seen, context=vars(lab))


def values(table: Any) -> list[Any]:
    return [json.loads(value) for value in table().to_arrays("value")]


@pytest.fixture
def archive(lab: ModuleType, server: Server) -> Iterator[dj.Instance]:
    """The lab's schema seen by another account, as through an archive's connection."""
    name = f"djdist_{uuid.uuid4().hex[:8]}"
    with server.connect() as admin:
        if server.backend == "mysql":
            account, rights = f"'{name}'@'%%'", [f"ALL ON `{lab.SCHEMA}`.*"]
            admin.query(f"CREATE USER {account} IDENTIFIED BY '{PASSWORD}'")
        else:
            account, everything = name, ("SCHEMA", "ALL TABLES IN SCHEMA")
            rights = [f'ALL ON {what} "{lab.SCHEMA}"' for what in everything]
            admin.query(f"CREATE ROLE {name} LOGIN PASSWORD '{PASSWORD}'")
        for right in rights:
            admin.query(f"GRANT {right} TO {account}")
        settings = {"database__name": server.database_name, "backend": server.backend}
        instance = dj.Instance(server.host, name, PASSWORD, server.port, False, **settings)
        yield instance
        instance.connection.close()
        if server.backend == "postgresql":
            admin.query(f"DROP OWNED BY {name}")
        admin.query(f"DROP {'USER' if server.backend == 'mysql' else 'ROLE'} {account}")


class TestConnections:
    def test_a_further_one_is_its_own_however_make_comes_by_it(
        self, lab: ModuleType, archive: dj.Instance, executor: Any
    ) -> None:
        module = dj.VirtualModule("archived", lab.SCHEMA, connection=archive.connection)
        schema = archive.Schema(lab.SCHEMA, create_schema=False, create_tables=False)
        free = archive.FreeTable(lab.Session.full_table_name)

        def look(table: Any, key: dict[str, Any], source: Any = None) -> Any:
            places = [archive, module.schema, module.Session, schema, free, source]
            return {
                "users": [c.get_user() for c in (archive.connection, dj.conn(), table.connection)],
                "same": [place.connection is archive.connection for place in places],
                "settings": [archive.config is archive.connection._config, dj.config.database.user],
                "rows": [len(rows & "n > 0") for rows in (module.Session, free, source)],
                "schemas": [*archive.connection.schemas],
            }

        pipelines.fill(lab, subjects=1, sessions=4)
        table, source = seen(lab, look), module.Session & "n > 1"
        options: Any = {"make_kwargs": {"source": source}, "reserve_jobs": True}
        table.populate("session_date < '2026-01-03'", executor="local", **options)
        assert table.populate(executor=executor, **options) == {"success_count": 2, "error_list": []}
        native, _, *others = values(table)
        assert native["users"][0] == archive.connection.get_user() != native["users"][1]
        assert native["rows"] == [4, 4, 3]
        assert others == [native, native]

    def test_without_credentials_a_further_one_is_refused_by_name(
        self, lab: ModuleType, archive: dj.Instance, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(djdist.config, "ship_credentials", False)
        pipelines.fill(lab)
        refusal = r"a further (.*@.*:|dj\.Instance).*ship_credentials"
        for further in (archive.connection, archive):
            table = seen(lab, lambda table, key, further=further: str(further))
            with pytest.raises(djdist.OptionError, match=refusal):
                table.populate(reserve_jobs=True, processes=2)
            assert len(table.jobs) == 0

    def test_a_table_of_a_module_has_its_own(
        self,
        connection: Any,
        schema_name: str,
        server: Server,
        modules_folder: Path,
        remote_executor: Any,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        name = f"own_{schema_name}"
        (modules_folder / f"{name}.py").write_text(INSTANCE.format(server=server, schema=schema_name))
        importlib.invalidate_caches()
        monkeypatch.setitem(sys.modules, name, importlib.import_module(name))
        assert sys.modules[name].seen(executor=remote_executor) == 6 * [True]

    @pytest.mark.long_on("ray")
    @pytest.mark.long_on("dask")
    @pytest.mark.parametrize("executor", ["processes=2", "executor='ray'", "executor='dask'"])
    def test_a_script_in_thread_safe_mode(
        self, script: Script, connection: Any, server: Server, schema_name: str, executor: str
    ) -> None:
        code = "import os\nos.environ['DJ_THREAD_SAFE'] = 'true'\n"
        code += INSTANCE.format(server=server, schema=schema_name)
        process = script(f"{code}\nprint(seen({executor}) == 6 * [True])")
        output, error = process.communicate(timeout=2 * SECONDS)
        assert process.returncode == 0, error
        assert output.splitlines()[-1] == "True"
