"""Notifications of a run by Slack, mail, Teams and all else that apprise knows."""

import logging
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from djdist._job import Key, key_text
from djdist._libraries import explained
from djdist._notifier import UNREACHABLE, Notifier
from djdist._style import VARYING_NUMBER
from djdist.errors import OptionError

GATHER_SECONDS = 5.0
"""What happens within this time of a cause's first event goes into the same message."""
FLUSH_SECONDS = 15.0
"""The end of a run waits this long for its last message."""
MOST_CAUSES = 20
LONGEST_LINE = 300
OTHERS = "other causes"

logger = logging.getLogger(__name__)
_sends: ContextVar[bool] = ContextVar("djdist_sends_a_notification", default=False)


def notifier_of(urls: Sequence[str], period_seconds: float, subject: str) -> Notifier:
    """Return what sends to the given URLs, once they have been found good; without any it tells nobody.

    Raises
    ------
    MissingLibraryError
        apprise isn't installed.
    OptionError
        apprise knows no such URL.
    """
    if not urls:
        return Notifier()
    with _unheard():
        for url in urls:
            _service(url)
    return Notifications(urls, period_seconds, subject)


class Notifications(Notifier):
    """Sends from a thread, so that neither a slow service nor a broken one disturbs the run.

    Parameters
    ----------
    urls : sequence of str
        Where to send, as apprise writes it. They hold secrets: nothing logs them.
    period_seconds : float
        A cause is told once in this time, with how often it occurred.
    subject : str
        Which run it is, the first line of all messages.
    """

    def __init__(self, urls: Sequence[str], period_seconds: float, subject: str) -> None:
        self._made_of = (tuple(urls), period_seconds, subject)
        self._urls, self._subject = tuple(urls), subject
        self._causes = Causes(period_seconds)
        self._summary: str | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def __reduce__(self) -> tuple[type["Notifications"], tuple[Any, ...]]:
        return Notifications, self._made_of

    def failed(self, table: str, key: Key, message: str) -> None:
        """Take note of a key that became an error."""
        line = message.strip().split("\n")[0][:LONGEST_LINE]
        cause = f"{table}: {VARYING_NUMBER.sub('…', line)}"
        self._note(cause, f"{table}: {line} ({key_text(key)})")

    def unreachable(self, message: str, trouble: str = UNREACHABLE) -> None:
        """Take note that the run can't use its database, and why."""
        self._note(f"database: {trouble}", f"{trouble}: {message.strip()[:LONGEST_LINE]}")

    def ended(self, summary: str) -> None:
        """Send how the run ended, with all that was not sent yet."""
        with self._changed:
            self._summary = summary
            thread = self._started()
        thread.join(FLUSH_SECONDS)

    def _note(self, cause: str, text: str) -> None:
        with self._changed:
            self._causes.note(cause, text, time.monotonic())
            self._started()

    def _started(self) -> threading.Thread:
        """Wake the thread, which the first event starts: in the process that runs the driver."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._send_all, name="djdist-notify", daemon=True)
            self._thread.start()
        self._changed.notify()
        return self._thread

    def _send_all(self) -> None:
        senders = [_Sender(url) for url in self._urls]
        for title, text in self._messages():
            for sender in senders:
                sender.send(title, text)

    def _messages(self) -> Iterator[tuple[str, str]]:
        """Yield titles and texts when they are due, the last one at the run's end."""
        summary = None
        while summary is None:
            with self._changed:
                while self._summary is None and (seconds := self._causes.due_at - time.monotonic()) > 0:
                    self._changed.wait(min(seconds, threading.TIMEOUT_MAX))
                summary = self._summary
                lines = self._causes.take(time.monotonic() if summary is None else float("inf"))
            title = "needs a look" if summary is None else "has ended"
            yield f"djdist: a run {title}", "\n".join([self._subject, *filter(None, [summary]), *lines])


@dataclass
class _Cause:
    text: str
    not_before: float
    due_at: float = 0.0
    count: int = 0

    def __str__(self) -> str:
        return f"{self.count:,} × {self.text}" if self.count > 1 else self.text


class Causes:
    """What happened, by cause; its size is bounded, however long a run and however odd its errors.

    Parameters
    ----------
    period_seconds : float
        A cause is due once in this time.
    """

    def __init__(self, period_seconds: float) -> None:
        self._period_seconds = period_seconds
        self._causes: dict[str, _Cause] = {}

    def note(self, cause: str, text: str, now: float) -> None:
        """Count an event of a cause; the text of the first one is told."""
        if cause not in self._causes and len(self._causes) >= MOST_CAUSES:
            cause = text = OTHERS
        noted = self._causes.setdefault(cause, _Cause(text, now))
        if not noted.count:
            noted.text, noted.due_at = text, max(noted.not_before, now + GATHER_SECONDS)
        noted.count += 1

    @property
    def due_at(self) -> float:
        """The moment at which the next cause is due; infinite if none occurred."""
        return min((cause.due_at for cause in self._causes.values() if cause.count), default=float("inf"))

    def take(self, now: float) -> list[str]:
        """Return what may be told by now, and forget causes that haven't occurred for a period."""
        due = [cause for cause in self._causes.values() if cause.count and cause.not_before <= now]
        lines = [str(cause) for cause in due]
        for cause in due:
            cause.count, cause.not_before = 0, now + self._period_seconds
        self._causes = {
            name: cause for name, cause in self._causes.items() if cause.not_before > now or cause.count
        }
        return lines


class _Sender:
    """Sends to one URL, and says at the first failure only that it can't."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._has_failed = False

    def send(self, title: str, text: str) -> None:
        try:
            with _unheard():
                why = "" if _service(self._url).notify(text, title=title) else "the service refused it"
        except Exception as error:  # its text may hold the URL
            why = type(error).__name__
        if why and not self._has_failed:
            self._has_failed = True
            logger.warning("A notification can't be sent by %s: %s; the run goes on", _scheme(self._url), why)


def _service(url: str) -> Any:
    try:
        import apprise
    except ImportError as error:
        raise explained(error, "djdist.config.notify", "notify") from error
    service = apprise.Apprise(asset=apprise.AppriseAsset(async_mode=False))
    if service.add(url):
        return service
    raise OptionError(
        f"djdist.config.notify has an entry {_scheme(url)}… that apprise can't use; "
        "https://appriseit.com/services lists how each service's URL is written."
    )


def _scheme(url: str) -> str:
    """Return what may be shown of a URL."""
    return re.split(r"(?<=://)", url)[0] if "://" in url else "without ://"


class _Unheard(logging.Filter):
    """Drops what libraries log while they send: it holds URLs, and those hold secrets."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not _sends.get()


@contextmanager
def _unheard() -> Iterator[None]:
    for name in ("apprise", "urllib3.connectionpool"):
        logging.getLogger(name).addFilter(_UNHEARD)  # once: a filter is not added twice
    token = _sends.set(True)  # apprise's own threads inherit it
    try:
        yield
    finally:
        _sends.reset(token)


_UNHEARD = _Unheard()
