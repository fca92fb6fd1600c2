from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import datajoint as dj
import pytest

from djdist.shipping.assignments import assigned, of_classes, of_instance

MODULE = """
import os
from pathlib import Path

import datajoint as dj
import numpy as np

BINS = 3
GPU = os.environ.get("NO_SUCH_VARIABLE") is None


class Base:
    gain = 1.0


class Detect(Base, dj.Computed):
    definition = "id : int32"
    scale: float = -1
    size, shape = 1, 2
    step = BINS / 4
    options = dict(bins=BINS)
    folder = Path("of") / str(BINS)
    edges = np.zeros(2)
    model = None
    method = staticmethod(len)
    root = os.getcwd()
    if GPU:
        device = "cuda"
    again = 1
    for again in (2, 3):
        pass

    class Peak(dj.Part):
        definition = "-> master"
        width = [1, {"a": None}]

    def __init__(self):
        super().__init__()
        self.opened, self.lock = 0, (n for n in ())

    def prepared(self, n):
        return n

    def make(self, key):
        note = scale = 5


Detect.below = (1, 2)
Detect.worked_out = os.getpid()
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "module_of_assignments.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("module_of_assignments")
    del sys.modules["module_of_assignments"]


def found(kind: Any) -> dict[str, Any]:
    return {f"{owner.__name__}.{name}": value for owner, name, value in of_classes(kind, cloudpickle.dumps)}


def test_what_the_module_itself_assigns_is_not_among_it(module: Any) -> None:
    assert found(module.Detect) == {}
    assert of_instance(module.Detect(), cloudpickle.dumps) == {}


def test_what_differs_from_the_source_is(module: Any) -> None:
    module.Detect.scale, module.Detect.note, module.Base.gain = 1, 5, 1
    module.Detect.below = (1, 3)
    module.Detect.Peak.width[1]["a"] = 2
    assert found(module.Detect) == {
        "Detect.scale": 1,
        "Detect.note": 5,
        "Base.gain": 1,
        "Detect.below": (1, 3),
        "Peak.width": [1, {"a": 2}],
    }


def test_neither_need_it_be_a_literal_there_nor_data(module: Any) -> None:
    detect = module.Detect
    detect.step, detect.folder, detect.model, detect.method = 1, "there", Path, json.dumps
    detect.options["bins"] = 5
    detect.edges[1] = 7
    detect.prepared, detect.extra = staticmethod(json.loads), json.dumps
    changed = ["step", "options", "folder", "edges", "model", "method", "prepared", "extra"]
    assert found(detect) == {f"Detect.{name}": vars(detect)[name] for name in changed}


def test_what_the_module_works_out_and_what_datajoint_sets_is_not(module: Any) -> None:
    module.Detect.root, module.Detect.device, module.Detect.again = "/elsewhere", "cpu", 4
    module.Detect.size, module.Detect.worked_out = 2, 0
    module.Detect.database, module.Detect._heading, module.Detect._allow_insert = "lab", None, True
    assert found(module.Detect) == {}


def test_an_instance_has_what_a_new_one_has_not(module: Any) -> None:
    table = module.Detect()
    table.opened, table.threshold, table._key_source = 1, 0.5, dj.U()
    table.lock = (n for n in (1, 2))
    assert of_instance(table, cloudpickle.dumps) == {"opened": 1, "threshold": 0.5}


def test_classes_have_it_for_the_time_of_a_with(module: Any) -> None:
    detect = module.Detect
    with assigned([(detect, "scale", 5), (detect, "note", 6)]):
        assert (detect.scale, detect.note) == (5, 6)
    assert (detect.scale, hasattr(detect, "note")) == (-1, False)
