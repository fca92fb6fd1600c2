"""What editors and notebooks see of ``populate()``."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib.resources import files
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import datajoint as dj
import pytest
from IPython.core.completer import IPCompleter, provisionalcompleter
from typing_extensions import assert_type

import djdist
from djdist._populate import Options
from djdist.executors import ExecutorName

if TYPE_CHECKING:  # mypy checks it

    def what_populate_gives(detach: bool) -> None:
        assert_type(djdist.populate(Undeclared, "n = 1", executor="ray"), dict[str, Any])
        assert_type(djdist.populate(Undeclared, executor="ray", detach=True), djdist.Run)
        assert_type(djdist.populate(Undeclared, detach=detach), dict[str, Any] | djdist.Run)
        djdist.populate(Undeclared, executor="slurm")  # type: ignore[call-overload]


class Undeclared(dj.Computed):
    definition = "-> master"


@pytest.fixture(params=["class", "instance"])
def method(request: pytest.FixtureRequest) -> Iterator[Any]:
    djdist.enable()
    yield Undeclared.populate if request.param == "class" else Undeclared().populate
    djdist.disable()


def test_djdist_says_that_it_is_typed() -> None:
    assert files("djdist").joinpath("py.typed").is_file()


def test_the_method_shows_executor_and_its_choices(method: Any) -> None:
    signature = inspect.signature(method)
    assert next(iter(signature.parameters)) == "restrictions"
    assert "Literal['local', 'ray', 'dask']" in str(signature.parameters["executor"])
    assert method.__doc__ == djdist.populate.__doc__


def test_checkers_know_the_options_that_there_are() -> None:
    hints = get_type_hints(djdist.populate)
    for name in ("target", "restrictions", "detach", "dry_run", "return"):
        del hints[name]
    assert get_type_hints(Options) == hints


def test_jupyter_completes_executor(method: Any) -> None:
    completer = IPCompleter(namespace={"method": method})  # type: ignore[no-untyped-call]
    line = "method(exec"
    with provisionalcompleter():
        assert "executor=" in {completion.text for completion in completer.completions(line, len(line))}


def test_the_executors_classes_are_listed_though_they_load_late() -> None:
    for library in ("ray", "distributed"):
        pytest.importorskip(library)
    assert {"DaskExecutor", "FuturesExecutor", "LocalExecutor", "RayExecutor"} <= {*dir(djdist)}


def test_the_choices_are_the_executors_that_there_are() -> None:
    assert ExecutorName in get_args(get_type_hints(djdist.populate)["executor"])
