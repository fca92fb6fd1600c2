"""The processes on Ray that stay warm between keys."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from djdist._needs import Needs
from lab.scripted import Clock

KINDS = 50


def test_needs_of_single_keys_are_forgotten_and_a_table_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("ray", reason="pip install 'djdist[ray]'")
    from djdist.executors.ray import workers

    caplog.set_level(logging.INFO)
    clock, killed = Clock(), list[Any]()
    monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(workers, "ray", SimpleNamespace(kill=killed.append))
    actor = SimpleNamespace(get_ready=SimpleNamespace(remote=object))
    started = SimpleNamespace(options=lambda **needs: SimpleNamespace(remote=lambda: actor))
    keys: Any = SimpleNamespace(remote=lambda cls: started)
    warm = workers.WarmWorkers(keys, {}, list)
    for number in range(KINDS):
        warm.submit(number, "Sorting", (), Needs(gpus=1, memory=number + 1), "")
        warm.cancel(number)
    clock.seconds += 10 * workers.IDLE_SECONDS
    assert warm.take([]) == []
    assert len(killed) == KINDS
    assert warm._short_at == {}
    assert len(caplog.messages) == 1
