"""The counts of runs, as Ray exports them."""

from collections.abc import Sequence
from functools import cache

from ray.util.metrics import Counter, Gauge, Histogram

from djdist._job import Counts

BUCKET_SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0]


class _Metrics:
    """The counts of this process's runs as Ray exports them, its prefix ``ray_`` before their names."""

    def __init__(self) -> None:
        by_table = {"tag_keys": ("table",)}
        self._finished = Counter("djdist_jobs_finished", "Keys that were made", **by_table)
        self._failed = Counter("djdist_jobs_failed", "Keys that became errors", **by_table)
        self._in_flight = Gauge("djdist_jobs_in_flight", "Keys that run or wait on the cluster", **by_table)
        self._pending = Gauge("djdist_jobs_pending", "Keys that wait in the jobs table", **by_table)
        seconds = "How long a task took for a key"
        self._seconds = Histogram("djdist_make_seconds", seconds, boundaries=BUCKET_SECONDS, **by_table)

    def record(self, table: str, before: Counts, now: Counts, make_seconds: Sequence[float]) -> None:
        tags = {"table": table}
        if now.made > before.made:
            self._finished.inc(now.made - before.made, tags)
        if now.failed > before.failed:
            self._failed.inc(now.failed - before.failed, tags)
        self._in_flight.set(now.running + now.queued, tags)
        self._pending.set(now.pending, tags)
        for seconds in make_seconds:
            self._seconds.observe(seconds, tags)


metrics = cache(_Metrics)
