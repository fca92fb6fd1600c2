"""Runs on a cluster as their handles show them, and what a run gives back."""

import time
from typing import Any

from djdist import executors
from djdist._executor import ActorCall
from djdist._job import Counts, RunInfo, Status, Summary
from djdist._settings import config
from djdist.driver.following import await_summary
from djdist.errors import DjdistError, DriverLostError
from djdist.monitoring.progress_bar import ProgressBar
from djdist.worker.failure import exception_of


class Run:
    """A run on a Ray or Dask cluster, which any process there can look at.

    Attributes
    ----------
    info : RunInfo
        Who runs what, from where and since when.
    failed : int or None
        How many keys failed, more maybe than ``error_list`` holds; None until ``wait()`` knows the end.
    """

    def __init__(self, info: RunInfo, call: ActorCall) -> None:
        self.info = info
        self.failed: int | None = None
        self._call = call

    def __repr__(self) -> str:
        info = self.info
        try:
            status = self._end() or str(self.status())
        except DriverLostError:
            status = "over"
        kind = "detached" if info.detached else f"process {info.pid}"
        since = info.started_at.astimezone().strftime("%Y-%m-%d %H:%M:%S")
        return (
            f"<{info.table} of {info.schema} by {info.user} on {info.host} ({kind}) since {since}: {status}>"
        )

    def _end(self) -> str:
        """Say what ended a detached run; only others have a caller, who alone asks for the result."""
        result = self._call("result") if self.info.detached else None
        return f"ended by {type(result).__name__}: {result}" if isinstance(result, DjdistError) else ""

    def status(self) -> Status:
        """Return how many keys are made, failed, running, queued on the cluster and pending.

        Raises
        ------
        DriverLostError
            The run is over and its result no longer kept, or its driver is lost.
        """
        status: Status = self._call("status")
        return status

    def stop(self) -> None:
        """Stop the run: it reserves no more, and what runs gets its caller's ``config.grace_seconds``."""
        self._call("stop")

    def wait(self, timeout_seconds: float | None = None, *, display_progress: bool = False) -> dict[str, Any]:
        """Wait for the end of the run. Ctrl-C ends the waiting, not the run.

        A detached run's result is kept for a day, and for an hour after somebody has waited for it.

        Parameters
        ----------
        timeout_seconds : float, optional
            The longest time to wait.
        display_progress : bool, optional
            Show a bar. Default False.

        Returns
        -------
        dict
            What ``populate()`` would have returned: ``success_count`` and ``error_list``.

        Raises
        ------
        TimeoutError
            The run goes on.
        ClusterError
            The cluster lost the run's driver too often.
        Exception
            What ``populate()`` would have raised.
        """
        deadline = float("inf") if timeout_seconds is None else time.monotonic() + timeout_seconds

        with ProgressBar(self.info.table, shown=display_progress) as bar:

            def watch(status: Status) -> bool:
                bar.show(status)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{self!r} goes on after {timeout_seconds} seconds")
                return True

            try:
                summary = await_summary(self._call, watch)
                bar.show(self.status())
            except DjdistError as error:
                if not isinstance(error, DriverLostError):
                    self._forget()
                raise
        self._forget()
        self.failed = summary.failed
        return result_of(summary, self.info)

    def _forget(self) -> None:
        if self.info.detached:
            self._call("forget")


def runs(executor: Any = None) -> list[Run]:
    """Find the runs on a cluster, of all its users and from all their processes.

    Parameters
    ----------
    executor : str or object, optional
        The cluster, as ``populate()`` takes it. Default: ``djdist.config.executor``.

    Returns
    -------
    list of Run
        With ``status()``, ``wait()`` and ``stop()``; printed, it shows who runs what.

    Raises
    ------
    OptionError
        There is no such executor, or it is no cluster.
    ClusterError
        The cluster can't be joined.
    """
    chosen = executors.resolve(config.executor if executor is None else executor)
    chosen.check_detaches()
    chosen.__enter__()
    found = [Run(info, call) for info, call in chosen.runs()]
    return sorted(found, key=lambda run: run.info.started_at)


def result_of(summary: Summary, info: RunInfo) -> dict[str, Any]:
    """Return a run's result as ``populate()`` returns it, or raise what it raises."""
    if summary.errors and not info.suppress_errors:
        raise exception_of(summary.errors[0][1])
    errors = [
        (job.table, job.key, exception_of(failure) if info.return_exception_objects else failure.message)
        for job, failure in summary.errors
    ]
    if info.tables:
        tables = {name: _result_of_table(summary, name) for name in info.tables}
        return {"success_count": summary.success_count, "error_list": errors, "tables": tables}
    return {"success_count": summary.success_count, "error_list": [(key, error) for _, key, error in errors]}


def _result_of_table(summary: Summary, name: str) -> dict[str, Any]:
    counts, held_back = summary.tables.get(name, Counts()), dict(summary.held_back.get(name, {}))
    return {
        "made": counts.made,
        "failed": counts.failed,
        "held_back": sum(held_back.values()),
        "held_back_by": held_back,
        "peak_memory": summary.peak_memory.get(name, 0),
    }
