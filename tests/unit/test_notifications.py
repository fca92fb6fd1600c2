"""Who doesn't look at a run is told of it: each cause once per period, and never what a URL holds."""

from __future__ import annotations

import json
import logging
import pickle
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Queue
from typing import Any

import pytest

import djdist
from djdist._notifier import Notifier
from djdist._settings import Settings
from djdist.monitoring import notifications
from djdist.monitoring.notifications import GATHER_SECONDS, MOST_CAUSES, OTHERS, Causes, notifier_of

SECONDS = 30
SUBJECT = "Run 396303eb of lab.Square by anna on rig"


class TestCauses:
    def test_a_cause_is_told_once_per_period_with_how_often_it_occurred(self) -> None:
        causes = Causes(100)
        for now in (0.0, 1.0, 2.0):
            causes.note("bad", f"bad at {now:g}", now)
        assert causes.due_at == GATHER_SECONDS
        assert causes.take(GATHER_SECONDS) == ["3 × bad at 0"]
        causes.note("bad", "bad at 50", 50)
        assert causes.take(99) == []
        assert causes.due_at == 100 + GATHER_SECONDS
        causes.note("worse", "worse at 104", 104)
        assert causes.take(105) == ["bad at 50", "worse at 104"]

    def test_what_comes_after_a_quiet_period_is_gathered_again(self) -> None:
        causes = Causes(100)
        causes.note("bad", "bad", 0)
        causes.take(10)
        causes.note("bad", "bad", 1000)
        assert causes.due_at == 1000 + GATHER_SECONDS

    def test_without_events_nothing_is_due(self) -> None:
        causes = Causes(100)
        assert causes.due_at == float("inf")
        causes.note("bad", "bad", 0)
        causes.take(10)
        assert causes.due_at == float("inf")
        assert causes.take(1000) == []

    def test_their_number_is_bounded_and_quiet_ones_are_forgotten(self) -> None:
        causes = Causes(100)
        for number in range(10 * MOST_CAUSES):
            causes.note(f"cause {number}", f"cause {number}", 0)
        told = causes.take(10)
        assert len(told) == MOST_CAUSES + 1
        assert told[-1] == f"{9 * MOST_CAUSES:,} × {OTHERS}"
        causes.take(1000)
        causes.note("new", "new", 1000)
        assert causes.take(2000) == ["new"]


@pytest.fixture
def received() -> Iterator[Queue[dict[str, Any]]]:
    """What a server was sent that stands at ``received.url``; it refuses what comes to another path."""
    messages: Queue[dict[str, Any]] = Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            messages.put(message | {"path": self.path})
            self.send_response(200 if self.path == "/good" else 500)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        messages.url = f"json://lab:secret@127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
        yield messages
        server.shutdown()


class TestSending:
    @pytest.fixture(autouse=True)
    def _apprise(self) -> None:
        pytest.importorskip("apprise", reason="pip install 'djdist[notify]'")

    def test_errors_are_grouped_by_cause(self, received: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(notifications, "GATHER_SECONDS", 0.2)
        told = pickle.loads(pickle.dumps(notifier_of([f"{received.url}/good"], 3600, SUBJECT)))
        for number in range(3):
            told.failed("Square", {"id": number}, f"ValueError: bad {number}\nmore of it")
        told.unreachable("Connection refused")
        told.unreachable("Lock wait timeout exceeded", "Locked")
        message = received.get(timeout=SECONDS)
        assert message["title"] == "djdist: a run needs a look"
        assert message["message"].split("\n") == [
            SUBJECT,
            "3 × Square: ValueError: bad 0 (id=0)",
            "The database can't be reached: Connection refused",
            "Locked: Lock wait timeout exceeded",
        ]
        told.failed("Square", {"id": 4}, "ValueError: bad 4")
        told.ended("9 made, 4 failed")
        message = received.get(timeout=SECONDS)
        assert message["title"] == "djdist: a run has ended"
        assert message["message"].split("\n") == [
            SUBJECT,
            "9 made, 4 failed",
            "Square: ValueError: bad 4 (id=4)",
        ]
        assert received.empty()

    def test_a_service_that_fails_is_named_once_and_keeps_no_other_from_it(
        self, received: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        monkeypatch.setattr(notifications, "GATHER_SECONDS", 0.0)
        told = notifier_of([f"{received.url}/bad", f"{received.url}/good"], 3600, SUBJECT)
        told.failed("Square", {"id": 1}, "ValueError")
        assert [received.get(timeout=SECONDS)["path"] for _ in range(2)] == ["/bad", "/good"]
        told.ended("0 made, 1 failed")
        assert [received.get(timeout=SECONDS)["path"] for _ in range(2)] == ["/bad", "/good"]
        (line,) = [record.getMessage() for record in caplog.records]
        assert line.startswith("A notification can't be sent by json://: the service refused it")

    def test_a_run_waits_for_a_slow_service_for_a_bounded_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        released = threading.Event()
        monkeypatch.setattr(notifications._Sender, "send", lambda *_: released.wait())
        monkeypatch.setattr(notifications, "FLUSH_SECONDS", 0.1)
        notifier_of(["json://localhost"], 3600, SUBJECT).ended("1 made")
        released.set()

    def test_a_url_that_apprise_can_t_use_is_refused_without_its_secret(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        with pytest.raises(
            djdist.OptionError, match=r"an entry slaque://… that apprise can't use"
        ) as refused:
            notifier_of(["slaque://secret"], 3600, SUBJECT)
        assert "secret" not in str(refused.value) + caplog.text


def test_without_apprise_the_cure_is_said_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apprise", None)
    with pytest.raises(djdist.MissingLibraryError, match=r"notify needs apprise: pip install "):
        notifier_of(["slack://secret"], 3600, SUBJECT)


def test_without_urls_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apprise", None)
    assert type(notifier_of((), 3600, SUBJECT)) is Notifier


def test_commas_part_urls_only_before_a_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DJDIST_NOTIFY", "slack://a/b/c, mailto://lab:pw@example.org?to=a@b.org,c@d.org")
    settings = Settings()
    assert settings.notify == ("slack://a/b/c", "mailto://lab:pw@example.org?to=a@b.org,c@d.org")
    assert "pw" not in repr(settings)
