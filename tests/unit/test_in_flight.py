from __future__ import annotations

from itertools import count
from types import SimpleNamespace
from typing import Any

from djdist._job import Job
from djdist._needs import ONE_CPU
from djdist.driver.tasks import InFlight

FIRST, SECOND = (Job("Square", {"n": n}) for n in range(2))


def test_what_a_task_has_that_is_reserved_again_goes_to_no_second_one() -> None:
    """As when a run was frozen for so long that another one took its jobs, and put some back."""
    tickets = count()
    pool: Any = SimpleNamespace(submit=lambda *_: next(tickets))
    room: Any = SimpleNamespace(take=lambda *_: None, leave=lambda *_: None)
    store: Any = None
    tasks = InFlight(store, pool, room, lambda: 0.0)
    assert tasks.not_in_flight([FIRST, SECOND]) == [FIRST, SECOND]
    tasks.submit([(ONE_CPU, (FIRST,))])
    assert tasks.not_in_flight([Job("Square", {"n": 0}), SECOND]) == [SECOND]
    tasks.pop(0)
    assert tasks.not_in_flight([FIRST]) == [FIRST]
