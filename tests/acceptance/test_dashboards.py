"""What Dask's own pages show of a run; what Ray's show is tested with the credentials."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import lab as pipelines


def test_dask_groups_the_tasks_by_table_and_names_them_by_key(lab: ModuleType, dask_client: Any) -> None:
    pipelines.fill(lab, subjects=1, sessions=3)
    lab.Square.populate(reserve_jobs=True, executor=dask_client)
    keys, groups = dask_client.run_on_scheduler(what_the_dashboard_shows)
    assert {key[1] for key in keys if key[0] == "Square"} >= {
        f"subject_id=1, session_date=2026-01-0{day}" for day in (1, 2, 3)
    }
    assert "Square" in groups
    assert any("djdist driver" in str(key) for key in keys)


def what_the_dashboard_shows(dask_scheduler: Any) -> tuple[list[Any], list[str]]:
    """Give the names of all tasks that the scheduler has seen, and of the groups of its progress page."""
    return [event[0] for event in dask_scheduler.transition_log], list(dask_scheduler.task_prefixes)
