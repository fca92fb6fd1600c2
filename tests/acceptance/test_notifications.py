"""People who don't look at a run are told of it from where its driver is."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Queue
from types import ModuleType
from typing import Any

import pytest

import djdist
import lab as pipelines
from lab.watching import SECONDS


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> Iterator[Queue[dict[str, Any]]]:
    """What is sent to the server that ``djdist.config.notify`` names."""
    pytest.importorskip("apprise", reason="pip install 'djdist[notify]'")
    messages: Queue[dict[str, Any]] = Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            messages.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(djdist.config, "notify", f"json://127.0.0.1:{server.server_port}")
        yield messages
        server.shutdown()


def test_errors_and_the_end_are_told(lab: ModuleType, executor: Any, received: Queue[dict[str, Any]]) -> None:
    pipelines.fill(lab)
    lab.Fragile.populate(reserve_jobs=True, suppress_errors=True, executor=executor)
    texts = [received.get(timeout=SECONDS)["message"]]
    while "5 made, 1 failed" not in texts[-1]:
        texts.append(received.get(timeout=SECONDS)["message"])
    assert f"of {lab.SCHEMA}.Fragile by " in texts[0]
    assert "Fragile: ValueError: bad n 5 (subject_id=" in "\n".join(texts)
    lab.Fragile.populate(reserve_jobs=True, executor=executor)
    assert received.empty()


@pytest.mark.on("local")
def test_a_url_that_can_t_be_used_is_said_before_a_job_is_touched(
    lab: ModuleType, received: Queue[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipelines.fill(lab)
    monkeypatch.setattr(djdist.config, "notify", "slaque://secret")
    with pytest.raises(djdist.OptionError, match=r"djdist\.config\.notify has an entry slaque://…"):
        lab.Square.populate(reserve_jobs=True)
    assert len(lab.Square.jobs) == 0
    assert len(lab.Square()) == 0
