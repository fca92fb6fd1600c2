"""How fast keys are made, as ``djdist top`` measures it."""

from collections import deque

import pandas as pd

from djdist.monitoring.progress import with_time_left

WINDOW_SECONDS = 60.0


class Rates:
    """Measures from looks of the last minute what the jobs tables don't tell."""

    def __init__(self) -> None:
        self._looks: dict[str, deque[tuple[float, int]]] = {}

    def fill(self, frame: pd.DataFrame, now: float) -> pd.DataFrame:
        """Return the rate of each table that somebody populates, with the time left."""
        measured = pd.Series(
            {str(table): self._rate(str(table), row, now) for table, row in frame.iterrows()}
        )
        return with_time_left(frame.assign(keys_per_second=frame["keys_per_second"].fillna(measured)))

    def _rate(self, table: str, row: "pd.Series[float]", now: float) -> float:
        looks = self._looks.setdefault(table, deque())
        if not row["runs"]:
            looks.clear()
        looks.append((now, int(row["done"])))
        while len(looks) > 2 and now - looks[0][0] > WINDOW_SECONDS:
            looks.popleft()
        (began, before), (ended, done) = looks[0], looks[-1]
        return (done - before) / (ended - began) if row["runs"] and done > before else float("nan")
