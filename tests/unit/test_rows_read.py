"""What is found in the code of a make(): which tables of a run it reads, and by what of its key."""

from __future__ import annotations

import importlib
import textwrap
from pathlib import Path

import pytest

from djdist.pipeline.foreign_keys import AttributeMap
from djdist.pipeline.rows_read import Reading, rows_read

DETECTION, SPIKE, SORTING = "`lab`.`__detection`", "`lab`.`__detection__spike`", "`lab`.`_sorting`"
CLASSES = {DETECTION: type("Detection", (), {}), SORTING: type("Sorting", (), {})}
KEY = ("subject", "session")
SAME = (("subject", "subject"), ("session", "session"))

MODULE = """
import datajoint as dj
from . import other

def load(key):
    return (Detection & key).fetch1()

def count():
    return len(Detection())

class Links:
    @staticmethod
    def count():
        return len(Detection())

class Base:
    def make(self, key):
        Sorting()

class Table(Base):
    def own(self, key):
        return Detection & key

    @staticmethod
    def everything():
        return Detection()

    def make(self, key):
{body}
"""


@pytest.fixture
def readings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> set[Reading]:
    body = textwrap.indent(textwrap.dedent(request.param), " " * 8)
    name = f"rows_{abs(hash(body))}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "other.py").write_text("def count():\n    return len(Detection())\n")
    (tmp_path / name / "tables.py").write_text(MODULE.replace("{body}", body))
    monkeypatch.syspath_prepend(tmp_path)
    table = importlib.import_module(f"{name}.tables").Table()
    return rows_read(table, CLASSES, [SPIKE], KEY)


def of_detection(*attributes: AttributeMap) -> set[Reading]:
    return {Reading(DETECTION, each) for each in attributes}


RENAMED = (("subject", "subject"), ("session", "date"))


@pytest.mark.parametrize(
    ("readings", "expected"),
    [
        ("self.insert1(key)", set()),
        ("(Detection & key).fetch1()", of_detection(SAME)),
        ("(Session * Detection() & key & 'n > 1').to_dicts()", of_detection(SAME)),
        ("(Detection.proj() & key).fetch1()", of_detection(SAME)),
        ("(lab.Detection.Spike & key).fetch1()", of_detection(SAME)),
        ("Detection & {**key, 'date': key['session']}", of_detection((*SAME, ("session", "date")))),
        ("Detection & {'subject': key['subject'], 'date': key['session']}", of_detection(RENAMED)),
        ("key['new'] = 1\nDetection & key", of_detection(SAME)),
        ("load(key)", of_detection(SAME)),
        ("self.own(key)", of_detection(SAME)),
        ("self.upstream[Detection].fetch1()", set()),
    ],
    indirect=["readings"],
)
def test_what_is_restricted_by_the_key(readings: set[Reading], expected: set[Reading]) -> None:
    assert readings == expected


@pytest.mark.parametrize(
    "readings",
    [
        "len(Detection())",
        "Detection.to_dicts()",
        "Detection & 'n > 1'",
        "Detection & {'subject': 1}",
        "key['session'] -= 1\nDetection & key",
        "key = dict(subject=1)\nDetection & key",
        "key.pop('session')\nDetection & key",
        "Detection.proj(day='session') & key",
        "Session & Detection & key",
        "(Session & key).aggr(Detection, n='count(*)')",
        "found = Detection()\nfound & key",
        "count()",
        "other.count()",
        "Links.count()",
        "self.everything()",
        "[Detection() for n in range(3)]",
        "(lambda: Detection())()",
        "from lab import Detection as D\nD()",
        "getattr(lab, 'Detection')()",
        "dj.FreeTable(self.connection, f'`{self.database}`.`__detection`')",
        "Detection.populate(key)",
    ],
    indirect=True,
)
def test_what_may_be_any_row(readings: set[Reading]) -> None:
    assert any(("session", "session") not in reading.attributes for reading in readings)
    assert {reading.table for reading in readings} == {DETECTION}


@pytest.mark.parametrize("readings", ["super().make(key)"], indirect=True)
def test_what_a_class_overrides_is_followed(readings: set[Reading]) -> None:
    assert readings == {Reading(SORTING)}


def test_code_without_a_text_is_read_by_its_names() -> None:
    namespace: dict[str, type] = {}
    code = "class Table:\n def make(self, key):\n  return [(Detection & k) for k in [key]]"
    exec(code, {"__name__": "lab"}, namespace)
    found = rows_read(namespace["Table"](), CLASSES, [SPIKE], KEY)
    assert found == {Reading(DETECTION)}
