"""What editors and notebooks see of ``populate()``."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib.resources import files
from typing import Any, get_args, get_type_hints

import datajoint as dj
import pytest
from IPython.core.completer import IPCompleter, provisionalcompleter

import djdist
from djdist.executors import ExecutorName


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


def test_jupyter_completes_executor(method: Any) -> None:
    completer = IPCompleter(namespace={"method": method})  # type: ignore[no-untyped-call]
    line = "method(exec"
    with provisionalcompleter():
        assert "executor=" in {completion.text for completion in completer.completions(line, len(line))}


def test_the_choices_are_the_executors_that_there_are() -> None:
    assert ExecutorName in get_args(get_type_hints(djdist.populate)["executor"])
