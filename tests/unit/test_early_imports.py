"""What a worker imports before its first key, each time in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys
from djdist.worker.making import load_early

class Table:
    def make(self, key):
        {body}

for _ in range(2):
    load_early(Table())
print("deepdiff.deephash" in sys.modules)
import deepdiff
assert deepdiff.DeepHash([1])
print("deepdiff.deephash" in sys.modules)
"""


@pytest.mark.parametrize(("body", "early"), [("return None", "False"), ("yield", "True")])
def test_deepdiff_is_imported_for_a_make_in_parts_and_else_when_it_is_used(body: str, early: str) -> None:
    script = [sys.executable, "-W", "ignore", "-c", SCRIPT.format(body=body)]
    assert subprocess.check_output(script, text=True).split() == [early, "True"]
