"""Colours that colour-blind people can tell apart (Okabe and Ito's), units, and what is one cause."""

import re

TABLES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442")
OTHER_TABLES = "#666666"
ERROR = "#D55E00"
STATUSES = {
    "success": "#009E73",
    "reserved": "#56B4E9",
    "pending": "#BBBBBB",
    "error": ERROR,
    "ignore": "#555555",
}
DAY_SECONDS = 86_400
VARYING_NUMBER = re.compile(r"0x[0-9a-fA-F]+|\d+(?:\.\d+)?")
"""What differs between messages of one cause."""
UNITS = {"d": DAY_SECONDS, "h": 3600, "min": 60, "s": 1, "ms": 0.001}


def shortened(text: str, length: int) -> str:
    """Leave out the middle of a long text: names and keys differ at their ends."""
    half = (length - 1) // 2
    return text if len(text) <= length else f"{text[:half]}…{text[-half:]}"


def format_duration(seconds: float) -> str:
    """Return a duration in the unit that fits it."""
    unit = next((unit for unit, size in UNITS.items() if seconds >= size), "ms")
    return f"{seconds / UNITS[unit]:.3g} {unit}"
