"""Modules that are activated after their import and linked with others, as DataJoint Elements are."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import datajoint as dj
import pytest

import djdist
from acceptance.test_handovers import address_of
from lab.watching import SECONDS
from servers import Server

Script = Callable[..., "subprocess.Popen[str]"]

RECORDING = """
import importlib

import datajoint as dj

schema = dj.Schema()
_linking_module = None


def activate(schema_name, *, create_schema=True, create_tables=True, linking_module=None):
    link(importlib.import_module(linking_module) if isinstance(linking_module, str) else linking_module)
    options = {{"create_schema": create_schema, "create_tables": create_tables}}
    schema.activate(schema_name, add_objects=vars(_linking_module), **options)


def link(linking_module):
    global _linking_module
    _linking_module = linking_module


def get_root_dir():
    return _linking_module.get_root_dir()


def get_suffix():
    return _linking_module.get_suffix() if hasattr(_linking_module, "get_suffix") else ""


@schema
class Recording(dj.Imported):
    definition = '''
    -> Session
    ---
    path : varchar(200)
    '''

    class Channel(dj.Part):
        definition = '''
        -> master
        channel : int32
        ---
        place : varchar(200)
        '''

    def make(self, key):
        from {name}_sorting import Method, schema as schema_of_sorting

        self.insert1({{**key, "path": f"{{get_root_dir()}}/{{key['session']}}{{get_suffix()}}"}})
        places = [schema.database, schema_of_sorting.database, *Method.to_arrays("method")]
        self.Channel.insert({{**key, "channel": n, "place": place}} for n, place in enumerate(places))
"""

SORTING = """
import datajoint as dj

from {name}_recording import Recording, get_root_dir


class LabSchema(dj.Schema):
    pass


schema = LabSchema()
finder = sessions = None


def activate(schema_name, linking_module):
    global finder, sessions
    finder, sessions = linking_module, dj.VirtualModule("sessions", "{name}_session")
    schema.activate(schema_name, add_objects=vars(linking_module))


@schema
class Method(dj.Lookup):
    definition = "method : varchar(20)"
    contents = zip(["kilosort"])


@schema
class Units(dj.Computed):
    definition = '''
    -> Recording
    -> Method
    ---
    units : int32
    where : varchar(200)
    '''

    def make(self, key):
        path = finder.path_of(key)
        where = f"{{schema.database}} {{get_root_dir()}} {{path}} of {{len(sessions.Session())}}"
        self.insert1({{**key, "units": len(path), "where": where}})
"""

KEEPING = """
from threading import Lock
from types import SimpleNamespace

import datajoint as dj

SCHEMAS = {{"probe": dj.Schema()}}
SUFFIX = ""
_config = {{}}
_linking = {{"module": None, "of": ["link"]}}
_hooks = []
_made = {{}}
objects = SimpleNamespace(links=None, lock=Lock())


class State:
    root = links = None


class Element:
    def activate(self, schema_name, linking_module):
        self.links = linking_module
        keep(linking_module)
        SCHEMAS["probe"].activate(schema_name, add_objects=vars(linking_module))


element = Element()


def keep(linking_module):
    _config.update(links=[linking_module])
    _linking["module"], _linking["of"][0] = linking_module, "module"
    _hooks.append(linking_module.get_root_dir)
    State.root, State.links = linking_module.get_root_dir(), linking_module
    setattr(objects, "links", linking_module)


@SCHEMAS["probe"]
class Probe(dj.Computed):
    definition = '''
    -> Session
    ---
    kept : varchar(400)
    '''

    def make(self, key):
        links = [_config["links"][0], _linking["module"], State.links, objects.links, element.links]
        kept = [*(each.get_root_dir() for each in links), *(hook() for hook in _hooks), State.root]
        _made[key["session"]] = Lock()
        self.insert1({{**key, "kept": " ".join([*kept, *_linking["of"], SCHEMAS["probe"].database, SUFFIX])}})
"""

LINKS = """
import datajoint as dj

from {name}_recording import Recording

ROOT = "/of/the/lab"
schema = dj.Schema("{name}_session")


@schema
class Session(dj.Manual):
    definition = "session : int32"


Session.insert([{{"session": n}} for n in range(4)], skip_duplicates=True)


def get_root_dir():
    return ROOT


def path_of(key):
    return (Recording & key).fetch1("path")


class Links:
    Session = Session
    get_root_dir = staticmethod(get_root_dir)
    path_of = staticmethod(path_of)
"""

ACTIVATE = """
import sys
import {name}_recording as recording, {name}_sorting as sorting

recording.activate("{name}_recording", linking_module=__name__)
sorting.activate("{name}_sorting", sys.modules[__name__])
"""


@dataclass
class Elements:
    """Two elements and what links them, as files that this process and its workers import."""

    name: str
    folder: Path

    def write(self, kind: str, code: str) -> None:
        (self.folder / f"{self.name}_{kind}.py").write_text(code.format(name=self.name))
        importlib.invalidate_caches()

    def load(self, kind: str) -> ModuleType:
        return importlib.import_module(f"{self.name}_{kind}")

    def activate(self, linking: Any) -> None:
        self.load("recording").activate(f"{self.name}_recording", linking_module=linking)
        self.load("sorting").activate(f"{self.name}_sorting", linking)

    def populate(self, executor: Any) -> None:
        for table in (self.load("recording").Recording, self.load("sorting").Units):
            assert table.populate(reserve_jobs=True, executor=executor) == {
                "success_count": 4,
                "error_list": [],
            }

    def check(self, root: str = "/of/the/lab") -> None:
        recording, sorting = self.load("recording"), self.load("sorting")
        paths = [f"{root}/{n}" for n in range(4)]
        assert recording.Recording.to_arrays("path", order_by="session").tolist() == paths
        places = [f"{self.name}_recording", f"{self.name}_sorting", "kilosort"]
        assert (recording.Recording.Channel & "session = 0").to_arrays("place").tolist() == places
        where = [f"{self.name}_sorting {root} {path} of 4" for path in paths]
        assert sorting.Units.to_arrays("where", order_by="session").tolist() == where


@pytest.fixture
def elements(connection: Any, server: Server, schema_name: str, modules_folder: Path) -> Iterator[Elements]:
    elements = Elements(schema_name, modules_folder)
    elements.write("recording", RECORDING)
    elements.write("sorting", SORTING)
    yield elements
    for module in [name for name in sys.modules if name.startswith(schema_name)]:
        del sys.modules[module]
    for kind in ("own", "probe", "sorting", "recording", "session"):
        server.drop_schema(f"{schema_name}_{kind}")


def linked(elements: Elements, linking: str) -> None:
    """Link and activate the elements."""
    elements.write("links", LINKS + (ACTIVATE if linking == "a module that activates" else ""))
    links = elements.load("links")
    if linking == "a module":
        elements.activate(links)
    elif linking == "a class":
        elements.activate(links.Links)
    elif linking == "a namespace":
        functions = {"get_root_dir": lambda: "/of/the/lab", "path_of": links.path_of}
        elements.activate(SimpleNamespace(Session=links.Session, **functions))


@pytest.mark.parametrize("linking", ["a module that activates", "a module", "a class", "a namespace"])
def test_elements_are_linked_on_workers_as_at_the_caller(
    elements: Elements, executor: Any, linking: str
) -> None:
    linked(elements, linking)
    elements.populate(executor)
    elements.check()


@pytest.mark.long_on("ray")
@pytest.mark.long_on("dask")
@pytest.mark.parametrize("executor", ["processes", "ray", "dask"])
@pytest.mark.long
def test_elements_are_linked_with_a_script(
    elements: Elements, script: Script, request: pytest.FixtureRequest, executor: str
) -> None:
    elements.write("probe", KEEPING)
    cluster = {} if executor == "processes" else address_of(request, executor)
    options = {"processes": 2} if executor == "processes" else {"executor": executor}
    code = (LINKS + ACTIVATE).format(name=elements.name)
    calls = f"recording.Recording.populate(reserve_jobs=True, **{options})\n"
    calls += f"sorting.Units.populate(reserve_jobs=True, **{options})\n"
    code += f"import {elements.name}_probe as probe\n"
    code += f"probe.element.activate('{elements.name}_probe', sys.modules['__main__'])\n"
    calls += f"probe.Probe.populate(reserve_jobs=True, **{options})\n"
    process = script(code + calls, **cluster)
    _, error = process.communicate(timeout=2 * SECONDS)
    assert process.returncode == 0, error
    elements.write("links", LINKS + ACTIVATE)
    elements.load("links")
    elements.check()
    kept = dj.VirtualModule("probe", f"{elements.name}_probe").Probe.to_arrays("kept").tolist()
    assert kept == [" ".join(["/of/the/lab"] * 7 + ["module", f"{elements.name}_probe", ""])] * 4


OWN = """
own = dj.Schema("{name}_own")


@own
class Note(dj.Computed):
    definition = '''
    -> sorting.Units
    ---
    note : varchar(200)
    '''

    def make(self, key):
        self.insert1({{**key, "note": (sorting.Units & key).fetch1("where")}})


@own
class Count(dj.Computed):
    definition = "-> Session\\n---\\nn : int32\\nreadings : int32"

    def make(self, key):
        self.insert1({{**key, "n": len(Note()), "readings": len(recording.Recording())}})
"""
WHOLE = """
main = sys.modules["__main__"]
result = djdist.populate([recording, sorting, main], reserve_jobs=True, {options})
assert (result["success_count"], result["error_list"]) == (16, []), result
assert [*Note.to_arrays("note", order_by="KEY")] == [*sorting.Units.to_arrays("where", order_by="KEY")]
assert {{*Count.to_arrays("n"), *Count.to_arrays("readings")}} == {{4}}
"""


@pytest.mark.long_on("ray")
@pytest.mark.long_on("processes")
@pytest.mark.parametrize("executor", ["processes", "ray", "dask"])
def test_elements_and_tables_of_a_script_are_populated_as_one_pipeline(
    elements: Elements, script: Script, request: pytest.FixtureRequest, executor: str
) -> None:
    options = "processes=2" if executor == "processes" else f"executor={executor!r}"
    environment = {} if executor == "processes" else address_of(request, executor)
    code = LINKS + ACTIVATE + OWN + WHOLE.replace("{options}", options)
    process = script(code.format(name=elements.name), **environment)
    _, error = process.communicate(timeout=2 * SECONDS)
    assert process.returncode == 0, error
    elements.write("links", LINKS + ACTIVATE)
    elements.load("links")
    elements.check()


@pytest.mark.parametrize("linking", ["a module", "a class", "a namespace"])
def test_what_activation_keeps_in_other_ways_is_kept_on_workers(
    elements: Elements, executor: Any, linking: str
) -> None:
    elements.write("probe", KEEPING)
    elements.write("links", LINKS)
    probe, links = elements.load("probe"), elements.load("links")
    functions = {"get_root_dir": lambda: "/of/the/lab"}
    given = {"a module": links, "a class": links.Links}.get(linking)
    probe.element.activate(
        f"{elements.name}_probe", given or SimpleNamespace(Session=links.Session, **functions)
    )
    vars(probe)["SUFFIX"] = "by hand"
    probe.Probe.populate("session = 3", executor="local")  # fills a cache that can't be pickled
    assert probe.Probe.populate(reserve_jobs=True, executor=executor)["success_count"] == 3
    kept = " ".join(["/of/the/lab"] * 7 + ["module", f"{elements.name}_probe", "by hand"])
    assert probe.Probe.to_arrays("kept").tolist() == [kept] * 4


@pytest.mark.on("processes")
def test_each_caller_has_its_own_links(elements: Elements, processes: djdist.LocalExecutor) -> None:
    linked(elements, "a module")
    links, recording = elements.load("links"), elements.load("recording")
    for n, root in enumerate(["/first", "/second", "/first"]):
        functions = {"get_root_dir": lambda root=root: root, "path_of": links.path_of}
        elements.activate(SimpleNamespace(Session=links.Session, **functions))
        recording.Recording.populate(f"session = {n}", executor=processes)
        assert (recording.Recording & f"session = {n}").fetch1("path") == f"{root}/{n}"


@pytest.mark.on("processes")
@pytest.mark.parametrize("lacking", ["a module", "what can be pickled"])
def test_what_keeps_workers_from_activating_is_said_before_a_job_is_touched(
    elements: Elements, processes: djdist.LocalExecutor, lacking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    elements.write("links", LINKS)
    links = elements.load("links")
    elements.write("activating", LINKS + ACTIVATE)
    if lacking == "a module":
        known_here_only = ModuleType(f"{elements.name}_known_here_only")
        vars(known_here_only).update(vars(links.Links))
        monkeypatch.setitem(sys.modules, known_here_only.__name__, known_here_only)
        elements.activate(known_here_only)
        message = "No module named '.*_known_here_only'"
    else:
        elements.activate(SimpleNamespace(**vars(links.Links), lock=threading.Lock()))
        message = "_linking_module can't be sent to workers: .*lock"
    recording = elements.load("recording").Recording
    recording.jobs.refresh()
    before = recording.jobs.to_dicts()
    with pytest.raises(djdist.WorkerSetupError, match=f"recording can't be activated.*{message}"):
        elements.populate(processes)
    assert (len(before), recording.jobs.to_dicts()) == (4, before)
    monkeypatch.setattr(djdist.config, "preload", [f"{elements.name}_activating"])  # the cure that it names
    elements.populate(processes)
    elements.check()
