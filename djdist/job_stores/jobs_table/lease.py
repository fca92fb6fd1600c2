"""A run's token, and the lease that it tells: for numbers and moments, and for columns of them in SQL."""

import secrets
from collections.abc import Callable
from typing import Any

SMALLEST_TOKEN = 2**40
"""No connection id of a server is so large, which native workers write where a run writes its token."""
LEASE_RANGE = 2**16


def new_token(lease_seconds: int) -> int:
    """Draw a run's token.

    Its last 16 bits say for how long a reservation lives without renewal. DataJoint's jobs table has no
    column for that, and a rescuer that went by its own setting would rob runs with a longer lease.
    """
    random = SMALLEST_TOKEN // LEASE_RANGE + secrets.randbelow(2**46)
    return random * LEASE_RANGE + lease_seconds


def is_of_run(token: Any) -> Any:
    """Return whether a ``connection_id`` is a token, and not a native worker's."""
    return token >= SMALLEST_TOKEN


def lease_seconds_of(token: Any) -> Any:
    """Return for how long a run's reservations live without renewal."""
    return token % LEASE_RANGE


def is_over(token: Any, renewed_at: Any, in_seconds: Callable[[Any], Any]) -> Any:
    """Return whether the lease of a run's reservation is over; ``in_seconds`` adds seconds to the present."""
    return renewed_at < in_seconds(-lease_seconds_of(token))
