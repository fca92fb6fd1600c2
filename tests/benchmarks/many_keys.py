"""Tables of a million keys, and what the jobs table costs at least: the bare statements."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from djdist.jobs.table import jobs_of

ORDERS_OF_TEN = 6
NEW_JOBS = """
INSERT INTO {jobs} (n, status, priority, scheduled_time)
SELECT n, 'pending', 5, CURRENT_TIMESTAMP(3) FROM {source} s
WHERE NOT EXISTS (SELECT 1 FROM {target} t WHERE t.n = s.n)
AND NOT EXISTS (SELECT 1 FROM {jobs} j WHERE j.n = s.n)
"""
DUE = """
SELECT n FROM {jobs} WHERE status = 'pending' AND scheduled_time <= CURRENT_TIMESTAMP(3)
ORDER BY priority, scheduled_time LIMIT {limit} FOR UPDATE SKIP LOCKED
"""
RESERVED = """
UPDATE {jobs} SET status = 'reserved', reserved_time = CURRENT_TIMESTAMP(3), connection_id = 1
WHERE n IN ({keys})
"""


def add_numbers(lab: ModuleType, count: int, first: int = 0) -> None:
    digits = " UNION ALL ".join(f"SELECT {digit} AS d" for digit in range(10))
    places = range(ORDERS_OF_TEN)
    number = " + ".join(f"{10**place} * p{place}.d" for place in places)
    tables = ", ".join(f"({digits}) p{place}" for place in places)
    lab.Number.connection.query(
        f"INSERT INTO {lab.Number().full_table_name} "
        f"SELECT n + {first}, n FROM (SELECT {number} AS n FROM {tables}) numbers WHERE n < {count}"
    )
    update_statistics(lab.Number())


def update_statistics(table: Any) -> None:
    """Spare the bare statements a plan that was made for another number of rows."""
    analyze = "ANALYZE" if table.connection.adapter.backend == "postgresql" else "ANALYZE TABLE"
    table.connection.query(f"{analyze} {table.full_table_name}")


def empty_jobs(lab: ModuleType) -> None:
    lab.Number.connection.query(f"TRUNCATE TABLE {jobs_of(lab.Doubled()).full_table_name}")


def bare_refresh(lab: ModuleType) -> int:
    """Add the new jobs and do nothing else; count them."""
    return int(lab.Number.connection.query(_filled(NEW_JOBS, lab)).rowcount)


def bare_reserve(lab: ModuleType, limit: int) -> int:
    """Reserve the most urgent jobs and count them."""
    connection = lab.Number.connection
    with connection.transaction:
        keys = [str(n) for (n,) in connection.query(_filled(DUE, lab, limit=limit)).fetchall()]
        return int(connection.query(_filled(RESERVED, lab, keys=", ".join(keys))).rowcount)


def seconds(act: Callable[[], Any]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def _filled(sql: str, lab: ModuleType, **values: Any) -> str:
    jobs = jobs_of(lab.Doubled()).full_table_name
    return sql.format(
        jobs=jobs, source=lab.Number().full_table_name, target=lab.Doubled().full_table_name, **values
    )
