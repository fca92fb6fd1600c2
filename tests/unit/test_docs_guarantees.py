"""The tests by which docs/explanation/guarantees.md shows what it promises are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "explanation" / "guarantees.md").read_text()


@pytest.mark.parametrize(("file", "name"), re.findall(r"`(tests/.*?\.py)::(\w+)`", PAGE))
def test_each_exists(file: str, name: str) -> None:
    assert re.search(rf"^ *(?:def|class) {name}\b", (ROOT / file).read_text(), re.MULTILINE)
