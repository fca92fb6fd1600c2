from __future__ import annotations

import concurrent.futures as cf
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import cloudpickle
import loky
import pytest

import djdist
from djdist._executor import default_slots
from djdist._libraries import explained
from djdist.errors import DjdistError, MissingLibraryError, OptionError
from djdist.executors import NAMES, executor_class, resolve
from djdist.executors.futures import FuturesExecutor
from djdist.executors.local import LocalExecutor

LIBRARIES = [("ray", "ray", "RayExecutor"), ("dask", "distributed", "DaskExecutor")]


@pytest.fixture
def pool() -> Iterator[cf.Executor]:
    with cf.ThreadPoolExecutor(1) as pool:
        yield pool


def test_local_runs_in_this_process_or_in_so_many() -> None:
    one, three = resolve("local"), resolve("local", 3)
    assert isinstance(one, LocalExecutor)
    assert isinstance(three, LocalExecutor)
    assert (one.runs_in_caller, one.processes) == (True, 1)
    assert (three.runs_in_caller, three.processes) == (False, 3)


@pytest.mark.parametrize("processes", [None, 0])
def test_no_number_means_all_processors(processes: int | None) -> None:
    everywhere = resolve("local", processes)
    assert isinstance(everywhere, LocalExecutor)
    assert everywhere.processes == default_slots()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system ties no process to processors")
def test_all_processors_are_those_that_this_process_may_use() -> None:
    code = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); import djdist; "
        "print(djdist.LocalExecutor(processes=None).processes)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "1\n"


@pytest.mark.parametrize("processes", [-1, -100])
def test_negative_processes_are_refused(processes: int) -> None:
    with pytest.raises(OptionError, match=f"processes={processes}"):
        resolve("local", processes)


@pytest.mark.parametrize(("name", "library", "attribute"), LIBRARIES)
def test_names_of_clusters(name: str, library: str, attribute: str) -> None:
    pytest.importorskip(library)
    assert type(resolve(name)).__name__ == attribute
    assert executor_class(name) is getattr(djdist, attribute)


@pytest.mark.parametrize("name", ["rey", "", "Local", "LOCAL"])
def test_an_unknown_name_is_told_the_names(name: str) -> None:
    with pytest.raises(OptionError) as caught:
        resolve(name)
    for known in ("'local'", "'ray'", "'dask'"):
        assert known in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_futures_is_no_name_because_a_pool_has_to_be_given() -> None:
    with pytest.raises(OptionError):
        resolve("futures")
    with pytest.raises(OptionError) as caught:
        resolve("rey")
    assert "'futures'" not in str(caught.value)


@pytest.mark.parametrize(("name", "library", "attribute"), LIBRARIES)
def test_a_missing_library_is_told_how_to_install_it(
    name: str, library: str, attribute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    for module in [module for module in sys.modules if module.startswith(f"djdist.executors.{name}")]:
        monkeypatch.delitem(sys.modules, module)
    for ask in (lambda: resolve(name), lambda: getattr(djdist, attribute)):
        with pytest.raises(MissingLibraryError) as caught:
            ask()
        assert f'executor="{name}" needs {library}: pip install "' in str(caught.value)
        assert f' "{name}[' in str(caught.value)
    assert isinstance(caught.value, ImportError)


def test_a_missing_library_of_an_unpacked_djdist_is_named_by_its_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("djdist._libraries.requires", lambda name: None)
    assert str(explained(ImportError(name="no_such"), "It", "ray")) == (
        'It needs no_such: pip install "djdist[ray]"'
    )


HIDING = """
import datajoint, djdist, numpy
try:
    djdist.RayExecutor()
except djdist.MissingLibraryError as error:
    print(error)
"""


@pytest.mark.parametrize("start", [["ray.py"], ["-c", HIDING]], ids=["the script itself", "beside it"])
def test_a_file_of_the_users_that_hides_a_library_is_named(start: list[str], tmp_path: Path) -> None:
    file = tmp_path / "ray.py"
    file.write_text(HIDING if start == ["ray.py"] else "")
    done = subprocess.run(
        [sys.executable, *start], cwd=tmp_path, capture_output=True, text=True, check=True, env=environment()
    )
    said = f'executor="ray" needs the library ray, but {file} hides it: rename that file.'
    assert set(done.stdout.splitlines()) == {said}


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(djdist.__file__ or "").parents[1])}


def test_a_library_that_is_there_and_broken_is_told_from_a_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site-packages" / "djdist_broken"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from djdist_broken import what_is_not_there")
    monkeypatch.syspath_prepend(str(package.parent))
    with pytest.raises(ImportError) as caught:
        import_module("djdist_broken")
    told = str(explained(caught.value, "It", "ray"))
    assert told.startswith(
        "It needs djdist_broken, which is there but can't be imported: ImportError: cannot "
    )
    assert "pip install" in told


def test_objects_are_taken_as_they_are() -> None:
    executor = LocalExecutor(2)
    assert resolve(executor) is executor


def test_pools_are_wrapped(pool: cf.Executor) -> None:
    assert isinstance(resolve(pool), FuturesExecutor)
    assert isinstance(resolve(loky.ProcessPoolExecutor(1)), FuturesExecutor)


@pytest.mark.parametrize("wrong", [None, 3, object(), LocalExecutor, ["local"], b"local"])
def test_what_is_no_executor_is_refused(wrong: object) -> None:
    with pytest.raises(OptionError, match="executor"):
        resolve(wrong)


@pytest.mark.parametrize("processes", [2, None, 0, -1])
def test_processes_belong_to_local_alone(processes: int | None, pool: cf.Executor) -> None:
    pytest.importorskip("ray")
    for other in ("ray", pool, LocalExecutor(2)):
        with pytest.raises(OptionError, match=f"processes={processes}"):
            resolve(other, processes)


def test_optional_libraries_are_loaded_on_first_use_only() -> None:
    optional = ["ray", "distributed", "dask", "matplotlib", "typer", "rich"]
    loaded = f"print([name for name in {optional} if name in sys.modules])"
    code = f"import sys, djdist; print('datajoint' in sys.modules); djdist.enable(); {loaded}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["False", "[]"]


def test_djdist_names_what_it_offers() -> None:
    assert list(djdist.__all__) == sorted(djdist.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        djdist.no_such_name  # type: ignore[attr-defined] # noqa: B018
    for name in ("ClusterError", "LocalExecutor", "FuturesExecutor", "OptionError"):
        assert getattr(djdist, name).__name__ == name
    assert {*djdist.__all__, "LocalExecutor"} <= {*dir(djdist)}
    assert issubclass(djdist.OptionError, DjdistError)


def test_djdist_travels_by_name_as_modules_do() -> None:
    function = eval("lambda: djdist.OptionError", {"djdist": djdist, "__name__": "__main__"})
    assert pickle.loads(cloudpickle.dumps(function))() is OptionError
    assert pickle.loads(cloudpickle.dumps(djdist)) is djdist


def test_djdist_has_its_errors_at_once() -> None:
    code = "import djdist; print(djdist.errors.OptionError is djdist.OptionError, callable(djdist.populate))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True True\n"


def test_what_is_listed_can_be_had() -> None:
    hidden = "import sys; sys.modules.update(ray=None, distributed=None); import djdist, inspect"
    code = f"{hidden}; print({{'RayExecutor', 'populate'}} & {{*dict(inspect.getmembers(djdist))}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "{'populate'}\n"


def test_djdist_offers_the_class_of_each_name() -> None:
    classes = {name.removesuffix("Executor").lower() for name in djdist._EXECUTORS}
    assert classes == {*NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_an_executor_travels_also_while_it_is_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip({"dask": "distributed"}.get(name, "djdist" if name == "local" else name))
    monkeypatch.setattr(executor_class(name), "connect", lambda executor: None)
    monkeypatch.setattr(executor_class(name), "disconnect", lambda executor: None)
    with resolve(name) as executor, pickle.loads(pickle.dumps(executor)) as copy:
        assert type(copy) is type(executor)
    assert repr(pickle.loads(cloudpickle.dumps(executor))) == repr(executor)
