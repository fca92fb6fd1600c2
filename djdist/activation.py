"""``enable()`` and ``disable()``: djdist's populate and jobs on every auto-populated table."""

from typing import Any

import datajoint as dj

from djdist.jobs import Jobs, jobs_of
from djdist.populate import populate


class _JobsOfTable:
    """``Table.jobs``, on the class and on its instances."""

    def __get__(self, table: Any, table_class: Any) -> Jobs:
        return jobs_of(table_class() if table is None else table)


_native: dict[str, Any] = {name: vars(dj.AutoPopulate)[name] for name in ("populate", "jobs")}
_own: dict[str, Any] = {"populate": populate, "jobs": _JobsOfTable()}


def enable() -> None:
    """Give every Computed and Imported table of this process djdist's ``populate`` and ``jobs``.

    Tables that were imported before are included. Calling it again changes nothing.
    """
    _give(_own)


def disable() -> None:
    """Give the tables DataJoint's own ``populate`` and ``jobs`` back."""
    _give(_native)


def _give(attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        setattr(dj.AutoPopulate, name, value)
