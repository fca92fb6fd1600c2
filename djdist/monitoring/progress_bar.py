"""The progress bar at the caller."""

import logging
import sys
from types import TracebackType

from tqdm.auto import tqdm

from djdist._job import Status


class ProgressBar:
    """Shows a run's status as one bar: done, errors, running, queued, rate and time left.

    Parameters
    ----------
    name : str
        The table's name.
    max_calls : int, optional
        Maximum number of keys that the run makes.
    shown : bool
        False keeps it silent.
    """

    def __init__(self, name: str, max_calls: int | None = None, *, shown: bool = True) -> None:
        self._max_calls = max_calls
        self._bar = tqdm(desc=name, unit="key", disable=not shown, dynamic_ncols=True)

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def show(self, status: Status) -> bool:
        """Draw a status; the run goes on."""
        done = status.made + status.failed
        total = done + status.running + status.queued + status.pending
        self._bar.total = total if self._max_calls is None else min(total, self._max_calls)
        counts = {"errors": status.failed, "running": status.running, "queued": status.queued}
        self._bar.set_postfix(counts, refresh=False)
        self._bar.update(done - self._bar.n)
        return True


class LogAboveBars(logging.Handler):
    """Writes lines to stderr, above a bar that is drawn there."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)
