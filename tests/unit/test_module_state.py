from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

import cloudpickle
import pytest

from djdist.shipping import module_state
from djdist.shipping.assignments import assigned
from djdist.shipping.module_state import given, modules_beside
from djdist.shipping.packed import Packer

MODULE = """
import os
from collections import namedtuple
from enum import Enum

ROOT = None
BINS = 1 + 2
PARAMETERS = {"bins": BINS}
FOLDER = os.getcwd()
IN_A_FOR = 0
for IN_A_FOR in range(3):
    pass
Pair = namedtuple("Pair", "a b")
registry = {}
_config = {"links": None}
_cache, _count = {}, 0
_models = {}
_opened = None


class Color(Enum):
    RED = 1


class State:
    root = None
    calls = []


class Slotted:
    __slots__ = ("a",)


slotted = Slotted()


def register(function):
    registry[function.__name__] = function
    return function


@register
def loaded(key):
    global _count
    _count += 1
    _models.setdefault(key, key)
    return _cache_of(key)


def _cache_of(key):
    _cache[key] = key


def activate(schema, root):
    _config["links"] = root
    State.root = root
    schema.activate("lab")
    _open()


def _open():
    global _opened
    _opened = 1


class Table:
    def make(self, key):
        loaded(key)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "module_of_state.py").write_text(MODULE)
    (tmp_path / "module_of_stars.py").write_text("from module_of_state import *\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("module_of_state")
    importlib.import_module("module_of_stars")
    yield module
    del sys.modules["module_of_state"], sys.modules["module_of_stars"]


def found(module: ModuleType) -> dict[str, Any]:
    items = given(modules_beside([module.__name__]), Packer(cloudpickle.dumps), set())
    values = ((each, each.value.unpacked(each.name, cloudpickle.loads)) for each in items)
    return {f"{each.owner}.{each.name}".strip("."): value for each, value in values}


def test_what_an_import_gives_is_left_to_each_process(module: Any) -> None:
    del module.registry["loaded"]
    assert found(module) == {}


def test_what_activation_and_others_set_travels(module: Any) -> None:
    del module.registry["loaded"]
    module._config["links"] = module.State.root = module._opened = module.ROOT = "/data"
    module.PARAMETERS["bins"] = 5
    module.State.calls.append(1)
    module.EXTRA = {"a": 1}
    assert found(module) == {
        "_config": {"links": "/data"},
        "_opened": "/data",
        "ROOT": "/data",
        "PARAMETERS": {"bins": 5},
        "EXTRA": {"a": 1},
        "State.root": "/data",
        "State.calls": [1],
    }


def test_caches_of_make_do_not_travel(module: Any) -> None:
    del module.registry["loaded"]
    module.loaded(1)
    module._cache["lock"] = Lock()
    assert (module._count, module._models) == (1, {1: 1})
    assert found(module) == {}


def test_what_was_assigned_and_cannot_travel_is_said(
    module: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_state, "LARGE_BYTES", 1000)
    module.ROOT, module.PARAMETERS["large"] = Lock(), "x" * 1000
    assert found(module).keys() == {"registry"}
    assert "module_of_state.ROOT was assigned after the import and stays here, since it can't" in caplog.text
    assert "module_of_state.PARAMETERS was assigned after the import and stays here, since it" in caplog.text


def test_what_a_process_has_in_its_own_way_stays(module: Any) -> None:
    module._config["links"] = module.ROOT = "/data"
    items = [*given([module], Packer(cloudpickle.dumps), set())]
    assert not [each for each in items if each.assignments(set(), set(), cloudpickle.loads)]
    module.ROOT = None
    assert [each.name for each in items if each.assignments(set(), set(), cloudpickle.loads)] == ["ROOT"]


def test_containers_of_modules_stay_the_same_objects(module: Any) -> None:
    config = module._config
    with assigned([(module, "_config", {"links": "/data"}), (module, "ROOT", [1])]):
        assert (config, module._config is config, module.ROOT) == ({"links": "/data"}, True, [1])
    assert (config, module.ROOT) == ({"links": None}, None)
