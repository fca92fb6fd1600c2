"""What make() uses of its caller is on the workers what it is at the caller."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import threading
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
    @pytest.mark.long
    def test_a_script_in_thread_safe_mode(
        self, script: Script, connection: Any, server: Server, schema_name: str, executor: str
    ) -> None:
        code = "import os\nos.environ['DJ_THREAD_SAFE'] = 'true'\n"
        code += INSTANCE.format(server=server, schema=schema_name)
        process = script(f"{code}\nprint(seen({executor}) == 6 * [True])")
        output, error = process.communicate(timeout=2 * SECONDS)
        assert process.returncode == 0, error
        assert output.splitlines()[-1] == "True"


ASSIGNED = """
import os

import datajoint as dj

schema = dj.Schema({schema!r})


@schema
class Number(dj.Lookup):
    definition = "n : int32"
    contents = [[n] for n in range(3)]
    unit = 1


class Mixin:
    gain = 1.0


@schema
class Detect(Mixin, dj.Computed):
    definition = '''
    -> Number
    ---
    value : varchar(255)
    '''
    threshold = 0.5
    scale: int = 1
    options = {{"a": 1}}
    process = os.getpid()

    class Peak(dj.Part):
        definition = "-> master"
        width = 1

    def make(self, key):
        rest = [getattr(self, "note", None), getattr(self, "twice", lambda n: n)(key["n"])]
        value = [self.threshold, self.scale, self.gain, self.options, self.Peak.width, Number.unit, *rest]
        self.insert1({{**key, "value": repr((value, self.process == os.getpid()))}})
"""


def doubled(self: Any, n: int) -> int:
    return 2 * n


class TestAssignments:
    def test_what_is_set_on_an_instance_or_a_class_is_set_on_workers_for_this_run(
        self,
        connection: Any,
        schema_name: str,
        modules_folder: Path,
        executor: Any,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        name = f"assigned_{schema_name}"
        (modules_folder / f"{name}.py").write_text(ASSIGNED.format(schema=schema_name))
        importlib.invalidate_caches()
        monkeypatch.setitem(sys.modules, name, importlib.import_module(name))
        detect = sys.modules[name].Detect
        monkeypatch.setattr(doubled, "__module__", "__main__")
        with monkeypatch.context() as patch:
            for owner, attribute, value in (
                (detect, "scale", 5),
                (sys.modules[name].Mixin, "gain", 2.5),
                (detect.Peak, "width", 7),
                (sys.modules[name].Number, "unit", 8),
                (detect, "note", "new"),
                (detect, "twice", doubled),
            ):
                patch.setattr(owner, attribute, value, raising=False)
            patch.setitem(detect.options, "b", [2])
            table = detect()
            table.threshold = 0.9
            table.populate("n = 2", executor=executor, reserve_jobs=True)
        detect.populate(executor=executor, reserve_jobs=True)
        assert detect().to_arrays("value", order_by="n DESC").tolist() == [
            repr(([0.9, 5, 2.5, {"a": 1, "b": [2]}, 7, 8, "new", 4], True)),
            *(repr(([0.5, 1, 1.0, {"a": 1}, 1, 1, None, n], True)) for n in (1, 0)),
        ]

    @pytest.mark.long
    def test_what_can_not_be_sent_is_named(
        self, lab: ModuleType, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pipelines.fill(lab)
        table = lab.Square()
        table.lock = threading.Lock()
        with pytest.raises(djdist.OptionError, match=r"lock, an attribute of the instance, can't be sent .*"):
            table.populate(reserve_jobs=True, processes=2)
        assert len(table.jobs) == 0
        monkeypatch.setattr(lab.Square, "cache", threading.Lock(), raising=False)
        lab.Square.populate(reserve_jobs=True, processes=2)
        assert "Square.cache was assigned after the import and stays here" in caplog.text


CODEC = """
import datajoint as dj


class Halves(dj.Codec):
    name = {codec!r}

    def get_dtype(self, is_store):
        return "json"

    def encode(self, value, *, key=None, context=None, store_name=None):
        return {{"halves": 2 * value}}

    def decode(self, stored, *, key=None, context=None):
        return stored["halves"] / 2


class OfHalves(Halves, register=False):
    pass
"""

HALF = """
import datajoint as dj

schema = dj.Schema({schema!r})


@schema
class Number(dj.Manual):
    definition = '''
    n : int32
    ---
    half : <{codec}>
    '''


@schema
class Quarter(dj.Computed):
    definition = '''
    -> Number
    ---
    quarter : <{codec}>
    '''

    def make(self, key):
        half = float((Number & key).fetch1("half"))
        rows = dj.FreeTable(self.connection, Number.full_table_name) & key
        assert rows.fetch1("half") == half
        self.insert1({{**key, "quarter": half / 2}})
"""


class TestCodecs:
    @pytest.fixture
    def names(self, connection: Any, schema_name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
        monkeypatch.setattr(dj.codecs, "_codec_registry", dj.codecs._codec_registry.copy())
        return {"schema": schema_name, "codec": f"halves_{schema_name}"}

    @pytest.fixture(params=["module", "script"])
    def pipeline(
        self,
        request: pytest.FixtureRequest,
        names: dict[str, str],
        modules_folder: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> dict[str, Any]:
        """A pipeline whose codec is in the script, or in a module that only the script imports."""
        if request.param == "script":
            script: dict[str, Any] = {"__name__": "__main__"}
            exec((CODEC + HALF).format(**names), script)
            return script
        for name, code in ((names["codec"], CODEC), (f"half_{names['schema']}", HALF)):
            (modules_folder / f"{name}.py").write_text(code.format(**names))
            importlib.invalidate_caches()
            monkeypatch.setitem(sys.modules, name, importlib.import_module(name))
        return vars(sys.modules[name])

    def test_of_the_caller_are_known_to_workers(self, pipeline: dict[str, Any], remote_executor: Any) -> None:
        pipeline["Number"].insert({"n": n, "half": n / 2} for n in range(3))
        summary = pipeline["Quarter"].populate(executor=remote_executor, reserve_jobs=True)
        assert summary == {"success_count": 3, "error_list": []}
        assert pipeline["Quarter"]().to_arrays("quarter", order_by="n").tolist() == [0, 0.25, 0.5]

    @pytest.mark.on("processes")
    @pytest.mark.long
    def test_that_can_not_be_had_are_a_clear_error_where_they_are_needed(
        self, names: dict[str, str], lab: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module = ModuleType("only_here")
        monkeypatch.setitem(sys.modules, "only_here", module)
        exec(CODEC.format(**names), vars(module))
        pipelines.fill(lab)
        assert lab.Square.populate(processes=2, reserve_jobs=True)["success_count"] == 6
        script: dict[str, Any] = {"__name__": "__main__"}
        exec(HALF.format(**names), script)
        script["Number"].insert1({"n": 1, "half": 0.5})
        with pytest.raises(djdist.WorkerSetupError, match="No module named 'only_here'"):
            script["Quarter"].populate(processes=2, reserve_jobs=True)
        assert len(script["Quarter"].jobs) == 0
