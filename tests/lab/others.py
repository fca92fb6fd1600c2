"""What other runs would have written into a jobs table."""

from __future__ import annotations

from datetime import datetime
from typing import Any

LEASE_SECONDS = 60
ALIVE, DEAD, NATIVE = 2**48 + LEASE_SECONDS, 2**49 + LEASE_SECONDS, 77


def change(jobs: Any, condition: str, **values: Any) -> None:
    """Write into a jobs table what other runs would."""
    quoted = jobs.adapter.quote_identifier
    if "connection_id" in values:
        values = {"reserved_time": datetime.now()} | values
    assignments = ", ".join(f"{quoted(name)} = %s" for name in values)
    sql = f"UPDATE {jobs.full_table_name} SET {assignments} WHERE {condition}"
    jobs.connection.query(sql, args=[*values.values()])
