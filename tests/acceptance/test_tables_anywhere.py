"""Tables of modules, scripts and notebooks, and where executors come from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import datajoint as dj
import pytest

import djdist
import lab as pipelines
from lab.watching import SECONDS, wait_until
from servers import Server

Script = Callable[..., "subprocess.Popen[str]"]

PIPELINE = """
import os, threading, numpy
from pathlib import Path

import datajoint as dj

schema = dj.Schema("{schema}")
lock, log = threading.Lock(), open(os.devnull, "w")  # what can't be pickled, and no make() needs


class NegativeError(Exception):
    pass


def squared(n):
    return int(numpy.square(n))


@schema
class Number(dj.Manual):
    definition = "n : int32"


@schema
class Squared(dj.Computed):
    definition = '''
    -> Number
    ---
    result : int64
    pid : int64
    '''

    class Digit(dj.Part):
        definition = '''
        -> master
        place : int32
        ---
        digit : int32
        '''

    def make(self, key):
        if key["n"] < 0:
            raise NegativeError(key["n"])
        n = int(self.upstream[Number].fetch1("n"))
        self.insert1({{**key, "result": squared(n), "pid": os.getpid()}})
        digits = enumerate(str(squared(n)))
        self.Digit.insert({{**key, "place": place, "digit": int(digit)}} for place, digit in digits)


Number.insert([{{"n": n}} for n in range(-1, 6)], skip_duplicates=True)
"""

CALL = """
try:
    Squared.populate("n < 0", reserve_jobs=True{options})
except NegativeError as error:
    print("raised", error)
summary = Squared.populate(reserve_jobs=True, suppress_errors=True{options})
print("made", summary["success_count"], "in other processes", os.getpid() not in Squared().to_arrays("pid"))
print(Squared().to_arrays("result", order_by="n").tolist(), len(Squared.Digit()))
"""

EXPECTED = ["raised -1", "made 6 in other processes True", "[0, 1, 4, 9, 16, 25] 8"]


def said(output: str) -> list[str]:
    return [line for line in output.splitlines() if line and not line.startswith("[2")]


@pytest.mark.long_on("ray")
@pytest.mark.long_on("dask")
@pytest.mark.parametrize("executor", ["processes=2", "executor='ray'", "executor='dask'"])
def test_tables_of_a_script_without_a_guard(
    script: Script, schema_name: str, connection: Any, executor: str
) -> None:
    code = PIPELINE.format(schema=schema_name) + CALL.format(options=f", {executor}")
    process = script(code)
    output, error = process.communicate(timeout=2 * SECONDS)
    assert process.returncode == 0, error
    assert said(output) == EXPECTED


@pytest.mark.long
def test_tables_of_notebook_cells(schema_name: str, connection: Any, server: Server, tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    from acceptance.conftest import PREAMBLE

    define, use = PIPELINE.format(schema=schema_name), CALL.format(options=", processes=2")
    cells = [PREAMBLE.format(server=server), define, use]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    kernel = {
        "kernel_name": "python3",
        "timeout": SECONDS,
        "resources": {"metadata": {"path": str(tmp_path)}},
    }
    nbclient.NotebookClient(notebook, **kernel).execute()
    output = "".join(o["text"] for o in notebook.cells[-1].outputs if o.get("name") == "stdout")
    assert said(output) == EXPECTED


LARGE = """
import os
from pathlib import Path

import datajoint as dj

schema = dj.Schema("{schema}")


class Model:
    def __init__(self, weights):
        self.weights = weights

    def __reduce__(self):
        return load, (self.weights,)


def load(weights):
    with open(LOADED, "a") as file:
        file.write(f"{{os.getpid()}}\\n")
    return Model(weights)


LOADED = str(Path("loaded").absolute())
MODEL = Model(bytes(12_000_000))


@schema
class Number(dj.Manual):
    definition = "n : int32"


@schema
class Weighed(dj.Computed):
    definition = '''
    -> Number
    ---
    weight : int64
    pid : int64
    '''

    def make(self, key):
        self.insert1({{**key, "weight": len(MODEL.weights), "pid": os.getpid()}})


Number.insert([{{"n": n}} for n in range(24)])
Weighed.populate(reserve_jobs=True, {options})
workers = set(Weighed().to_arrays("pid").tolist())
print(sorted(map(int, Path("loaded").read_text().split())) == sorted(workers))
print(set(Weighed().to_arrays("weight").tolist()))
"""


@pytest.mark.long
@pytest.mark.parametrize("executor", ["processes=2", "executor='ray'", "executor='dask'"])
def test_a_large_global_of_a_script_is_unpickled_once_per_worker_and_named(
    script: Script, schema_name: str, connection: Any, executor: str
) -> None:
    process = script(LARGE.format(schema=schema_name, options=executor))
    output, error = process.communicate(timeout=2 * SECONDS)
    assert process.returncode == 0, error
    assert said(output) == ["True", "{12000000}"]
    assert "Each worker of Weighed is sent 12 MB: MODEL (12 MB)." in error


LAZY = """
import datajoint as dj

schema = dj.Schema()


@schema
class Number(dj.Manual):
    definition = "n : int32"


@schema
class Doubled(dj.Computed):
    definition = '''
    -> Number
    ---
    result : int64
    bound_to : varchar(64)
    '''

    class Half(dj.Part):
        definition = '''
        -> master
        ---
        half : int64
        '''

    def make(self, key):
        n = int((Number & key).fetch1("n"))
        self.insert1({**key, "result": 2 * n, "bound_to": schema.database})
        self.Half.insert1({**key, "half": n})
"""


def test_tables_that_are_bound_to_a_schema_after_the_import(
    connection: Any,
    schema_name: str,
    modules_folder: Path,
    remote_executor: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import importlib

    name = f"lazy_{schema_name}"
    (modules_folder / f"{name}.py").write_text(LAZY)
    importlib.invalidate_caches()
    lazy = importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, name, lazy)
    lazy.schema.activate(schema_name)
    lazy.Number.insert([{"n": n} for n in range(4)])
    summary = lazy.Doubled.populate(reserve_jobs=True, executor=remote_executor)
    assert summary == {"success_count": 4, "error_list": []}
    assert lazy.Doubled().to_arrays("result", order_by="n").tolist() == [0, 2, 4, 6]
    assert lazy.Doubled.Half().to_arrays("half", order_by="n").tolist() == [0, 1, 2, 3]
    assert set(lazy.Doubled().to_arrays("bound_to")) == {schema_name}


ELSEWHERE = """
import os

import datajoint as dj

NUMBERS, DOUBLES = {schemas!r} if {is_as_at_the_caller} else {others!r}
schema, schema_of_doubles = dj.Schema(NUMBERS), dj.Schema(DOUBLES)


@schema
class Number(dj.Manual):
    definition = "n : int32"


@schema_of_doubles
class Doubled(dj.Computed):
    definition = '''
    -> Number
    ---
    pid : int64
    '''

    def make(self, key):
        self.insert1({{**key, "pid": os.getpid()}})


Number.insert([{{"n": n}} for n in range(12)], skip_duplicates=True)
"""
"""As if the schemas' names came from an environment variable that not every process has."""


class TestOtherSchemas:
    @pytest.fixture
    def pipeline(
        self, connection: Any, new_schema_name: Callable[[], str], modules_folder: Path
    ) -> Iterator[Callable[..., Any]]:
        import importlib

        names = [new_schema_name() for _ in range(4)]
        module = f"elsewhere_{names[0]}"

        def load(*, others: Sequence[int], is_as_at_the_caller: str = f"os.getpid() == {os.getpid()}") -> Any:
            code = ELSEWHERE.format(
                schemas=names[::2][::-1],
                others=[names[n] for n in others],
                is_as_at_the_caller=is_as_at_the_caller,
            )
            (modules_folder / f"{module}.py").write_text(code)
            importlib.invalidate_caches()
            return importlib.import_module(module)

        yield load
        sys.modules.pop(module, None)

    @pytest.mark.parametrize("others", [(2, 1), (3, 0)], ids=["of the table", "of what it is made from"])
    def test_on_workers_are_refused_before_a_job_is_touched(
        self, pipeline: Callable[..., Any], remote_executor: Any, others: Sequence[int]
    ) -> None:
        module = pipeline(others=others)
        module.Doubled.jobs.refresh()
        before = module.Doubled.jobs.to_dicts()
        there = module.DOUBLES if others[0] == 2 else module.NUMBERS
        with pytest.raises(
            djdist.WorkerSetupError, match=f"belongs to the schema '.*' here, and to '{there}'"
        ):
            module.Doubled.populate(reserve_jobs=True, executor=remote_executor)
        assert (len(before), module.Doubled.jobs.to_dicts()) == (12, before)
        with pytest.raises(djdist.WorkerSetupError, match="env_vars"):
            module.Doubled.populate(executor=remote_executor)
        assert len(module.Doubled()) == 0

    @pytest.mark.long
    @pytest.mark.on("ray")
    def test_are_the_callers_with_the_cure_that_is_named(
        self, pipeline: Callable[..., Any], ray_cluster: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("LAB", "ours")
        module = pipeline(others=(3, 1), is_as_at_the_caller="os.environ.get('LAB') == 'ours'")
        with pytest.raises(djdist.WorkerSetupError, match="belongs to the schema"):
            module.Doubled.populate(reserve_jobs=True, executor="ray")
        executor = djdist.RayExecutor(runtime_env={"env_vars": {"LAB": "ours"}})
        assert module.Doubled.populate(reserve_jobs=True, executor=executor)["success_count"] == 12

    @pytest.mark.long
    @pytest.mark.on("processes")
    def test_on_a_worker_that_joins_later_cost_no_key(
        self, pipeline: Callable[..., Any], tmp_path: Path
    ) -> None:
        right = f"os.getpid() == {os.getpid()} or not os.path.exists({str(tmp_path / 'one')!r})"
        module = pipeline(
            others=(3, 1), is_as_at_the_caller=f"{right} and not os.mkdir({str(tmp_path / 'one')!r})"
        )
        with djdist.LocalExecutor(processes=2) as executor:
            summary = module.Doubled.populate(reserve_jobs=True, executor=executor)
        assert summary == {"success_count": 12, "error_list": []}
        assert len(set(module.Doubled().to_arrays("pid"))) == 1


class TestActivation:
    def test_twice_is_as_good_as_once(self, lab: ModuleType) -> None:
        djdist.enable()
        djdist.enable()
        pipelines.fill(lab)
        assert lab.Square.populate(executor="local", reserve_jobs=True)["success_count"] == 6
        djdist.disable()
        djdist.disable()
        with pytest.raises(TypeError, match="executor"):
            lab.Square.populate(executor="local")
        assert type(lab.Square.jobs) is dj.Job

    def test_tables_that_were_imported_before_are_included(self, lab: ModuleType) -> None:
        djdist.disable()
        pipelines.fill(lab)
        table, jobs = lab.Square(), lab.Square.jobs
        djdist.enable()
        assert table.populate(executor="local", reserve_jobs=True)["success_count"] == 6
        assert type(table.jobs) is not type(jobs)
        assert type(lab.Square.jobs) is not type(jobs)

    def test_instances_and_classes_are_populated_alike(self, lab: ModuleType) -> None:
        pipelines.fill(lab)
        assert lab.Square().populate(max_calls=2)["success_count"] == 2
        assert lab.Square.populate()["success_count"] == 4


class TestDefaultExecutor:
    def test_comes_from_the_settings(self, lab: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        pipelines.fill(lab)
        monkeypatch.setattr(djdist.config, "executor", "nowhere")
        with pytest.raises(djdist.OptionError, match="no executor 'nowhere'"):
            lab.Square.populate()
        assert lab.Square.populate(executor="local")["success_count"] == 6

    @pytest.mark.long
    def test_may_be_an_object(
        self, lab: ModuleType, processes: djdist.LocalExecutor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pipelines.fill(lab)
        monkeypatch.setattr(djdist.config, "executor", processes)
        lab.Logged.populate()
        assert os.getpid() not in lab.Logged().to_arrays("pid")

    def test_comes_from_the_environment(self, lab: ModuleType, script: Script, dask_client: Any) -> None:
        pipelines.fill(lab)
        call = "Logged.populate(reserve_jobs=True)"
        code = f"import os\nfrom {lab.__name__} import Logged\n{call}\nprint(os.getpid())"
        address = {"DASK_SCHEDULER_ADDRESS": dask_client.scheduler.address}
        process = script(code, DJDIST_EXECUTOR="dask", **address)
        output, error = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, error
        workers = set(dask_client.run(os.getpid).values())
        assert int(output.split()[-1]) not in workers
        assert set(lab.Logged().to_arrays("pid")) <= workers

    def test_processes_go_with_the_default_that_is_local(self, lab: ModuleType) -> None:
        pipelines.fill(lab)
        lab.Logged.populate(processes=2)
        assert os.getpid() not in lab.Logged().to_arrays("pid")


def test_importing_djdist_loads_no_optional_library() -> None:
    optional = ("ray", "dask", "distributed", "psutil", "matplotlib")
    code = f"import sys, json, djdist; print(json.dumps([m for m in {optional} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []


@pytest.mark.on("ray")
@pytest.mark.parametrize(
    "imports",
    ["end the worker", *(pytest.param(how, marks=pytest.mark.long) for how in ("fail", "never end"))],
)
def test_on_ray_no_run_depends_on_what_a_worker_imports_ahead(
    lab: ModuleType, ray_cluster: Any, imports: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get_ready() -> None:
        if imports == "fail":
            raise ImportError("nothing to import here")
        if imports == "end the worker":
            os._exit(1)
        wait_until((tmp_path / "over").exists, "the end of the test")

    pipelines.fill(lab)
    monkeypatch.setattr("djdist.executors.ray.executor.get_ready", get_ready)
    try:
        assert lab.Square.populate(reserve_jobs=True, executor="ray")["success_count"] == 6
    finally:
        (tmp_path / "over").touch()
