"""Keys that share a task."""

from __future__ import annotations

import datetime
from types import ModuleType

import pytest

import lab as pipelines
from djdist.driver.grouping import CLOCKS_DIFFER_SECONDS
from djdist.job import GROUP_SECONDS

SLOW_SECONDS = 2 * (GROUP_SECONDS + CLOCKS_DIFFER_SECONDS)


@pytest.mark.long
def test_a_slow_key_holds_back_none_of_its_group(lab: ModuleType) -> None:
    pipelines.fill(lab, subjects=1, sessions=400)
    slow_date = pipelines.FIRST_DATE + datetime.timedelta(days=200)
    nap = {"seconds": SLOW_SECONDS, "slow_date": slow_date}
    summary = lab.Logged.populate(reserve_jobs=True, processes=2, make_kwargs=nap)
    assert summary == {"success_count": 400, "error_list": []}
    is_slow = {"session_date": slow_date}
    slow_ends_at = (lab.Logged & is_slow).fetch1("monotonic_ns") + SLOW_SECONDS * 1e9
    assert max((lab.Logged - is_slow).to_arrays("monotonic_ns")) < slow_ends_at
