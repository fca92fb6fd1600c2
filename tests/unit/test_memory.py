"""How much memory making keys takes, as workers measure it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from djdist.worker import memory
from djdist.worker.memory import measured

LARGE = 200_000_000


def test_each_group_has_a_peak_of_its_own() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux forgets a peak")
    with measured() as large:
        held = bytearray(LARGE)
    del held
    with measured() as small:
        pass
    assert large.bytes > LARGE
    assert 0 < small.bytes < large.bytes - LARGE / 2


def test_what_a_make_populates_counts_for_its_key() -> None:
    with measured() as outer:
        held = bytearray(LARGE)
        del held
        with measured() as inner:
            pass
    assert inner.bytes == 0
    assert outer.bytes > LARGE


def test_without_a_reset_only_what_exceeds_all_before_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_reset", lambda: False)
    with measured():
        held = bytearray(2 * LARGE)
    del held
    with measured() as less:
        pass
    assert less.bytes == 0


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_it_is_asked_another_way_where_there_is_no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(self: Path, *arguments: object) -> str:
        raise OSError

    monkeypatch.setattr(Path, "read_text", unreadable)
    assert memory._highest() > 1_000_000
