"""How long to wait before the next try."""

import random

MOST_DOUBLINGS = 64
"""More would overflow where something is tried for hours."""


def backoff_seconds(tries: int, first_seconds: float, longest_seconds: float) -> float:
    """Return a pause that doubles with each try, up to a limit, with "equal jitter" [1]_.

    What failed together doesn't come back together; and half of the pause is kept, so that
    nothing comes back at once.

    Parameters
    ----------
    tries : int
        How many tries there have been, from 1.
    first_seconds, longest_seconds : float
        The pause after the first try, and its limit.

    References
    ----------
    .. [1] M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    longest = min(longest_seconds, first_seconds * 2.0 ** min(tries - 1, MOST_DOUBLINGS))
    return random.uniform(longest / 2, longest)
