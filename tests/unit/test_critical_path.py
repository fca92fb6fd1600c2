"""The longest chain of jobs of which each needed the one before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from djdist.jobs.critical_path import Relation, critical_path, in_order

BEGIN = pd.Timestamp("2026-01-01")
RELATIONS = (
    Relation("Spikes", "Raw", (("session", "session"),)),
    Relation("Units", "Spikes", (("session", "session"), ("method", "algorithm"))),
)


def jobs(*rows: tuple[str, dict[str, Any], float, float]) -> pd.DataFrame:
    """Give jobs of tables, with their keys, when they began and how long they took."""
    tables, keys, begins, seconds = zip(*rows, strict=True)
    began = BEGIN + pd.to_timedelta(list(begins), unit="s")
    ended = began + pd.to_timedelta(list(seconds), unit="s")
    columns = {"table": tables, "values": keys, "began": began, "ended": ended, "seconds": seconds}
    found: pd.DataFrame = pd.DataFrame(columns).assign(status="success")
    return found


def test_a_chain_follows_keys_under_the_names_that_each_table_has_for_them() -> None:
    found = jobs(
        ("Raw", {"session": 1}, 0, 5),
        ("Raw", {"session": 2}, 0, 6),
        ("Spikes", {"session": 1, "algorithm": "a"}, 6, 9),
        ("Spikes", {"session": 1, "algorithm": "b"}, 6, 8),
        ("Spikes", {"session": 2, "algorithm": "a"}, 6, 1),
        ("Units", {"session": 1, "method": "a"}, 15, 1),
        ("Units", {"session": 1, "method": "b"}, 14, 3),
    )
    assert critical_path(found, RELATIONS) == (0, 3, 6)


def test_one_long_job_may_be_longer_than_any_chain() -> None:
    found = jobs(("Raw", {"session": 1}, 0, 1), ("Spikes", {"session": 1, "algorithm": "a"}, 1, 1))
    alone = jobs(("Raw", {"session": 2}, 0, 9))
    assert critical_path(pd.concat([found, alone], ignore_index=True), RELATIONS) == (2,)


def test_what_was_made_again_since_was_not_what_a_key_needed() -> None:
    found = jobs(("Raw", {"session": 1}, 20, 5), ("Spikes", {"session": 1, "algorithm": "a"}, 6, 9))
    assert critical_path(found, RELATIONS) == (1,)


def test_errors_and_jobs_of_unknown_duration_are_in_no_chain() -> None:
    found = jobs(*[("Raw", {"session": n}, 0, 5) for n in range(2)], ("Spikes", {"session": 0}, 6, 1))
    found = found.assign(status=["success", "error", "success"], seconds=[np.nan, np.nan, 1.0])
    assert critical_path(found, RELATIONS[:1]) == (2,)


@pytest.mark.parametrize("relations", [(), RELATIONS])
def test_there_may_be_nothing(relations: tuple[Relation, ...]) -> None:
    assert critical_path(jobs(("Raw", {"session": 1}, 0, 1))[:0], relations) == ()


def test_a_chain_needs_tables_that_need_one_another() -> None:
    assert critical_path(jobs(("Raw", {"session": 1}, 0, 1)), ()) == ()


def test_tables_come_after_those_that_they_need() -> None:
    assert in_order(["Units", "Spikes", "Raw"], RELATIONS) == ["Raw", "Spikes", "Units"]
