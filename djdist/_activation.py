"""``enable()`` and ``disable()``: djdist's populate and jobs on every auto-populated table."""

import inspect
from functools import cache
from typing import Any

import datajoint as dj

from djdist._populate import populate
from djdist.errors import IncompatibleDataJointError
from djdist.jobs.table import Jobs, jobs_of


class _JobsOfTable:
    """``Table.jobs``, on the class and on its instances."""

    def __get__(self, table: Any, table_class: Any) -> Jobs:
        return jobs_of(table_class() if table is None else table)


_native: dict[str, Any] = {name: vars(dj.AutoPopulate)[name] for name in ("populate", "jobs")}
_own: dict[str, Any] = {"populate": populate, "jobs": _JobsOfTable()}


def enable() -> None:
    """Put djdist's ``populate`` and ``jobs`` on every Computed and Imported table of this process.

    Tables that were imported before are included. Calling it again changes nothing.

    Raises
    ------
    IncompatibleDataJointError
        DataJoint lacks what djdist knows of it.
    """
    _check_datajoint()
    _give(_own)


def disable() -> None:
    """Restore DataJoint's own ``populate`` and ``jobs``."""
    _give(_native)


_KNOWN: tuple[tuple[Any, str, str], ...] = (
    (
        dj.AutoPopulate,
        "_populate1",
        "self key jobs suppress_errors return_exception_objects make_kwargs",
    ),
    (dj.AutoPopulate, "_jobs_to_do", "self restrictions"),
    (dj.Connection, "start_transaction", "self"),
    (dj.Connection, "commit_transaction", "self"),
    (dj.Connection, "cancel_transaction", "self"),
    (dj.Connection, "connect", "self"),
    (dj.Connection, "close", "self"),
    (dj.Job, "_get_fk_derived_pk_attrs", "self"),
    (dj.jobs, "_get_job_version", "config"),
    (dj.user_tables, "from_camel_case", "s"),
)
"""What djdist calls or replaces of DataJoint's private parts, with their parameters."""


@cache
def _check_datajoint() -> None:
    """Check that the private names of DataJoint that djdist uses are what it expects."""
    unknown = [
        f"{owner.__name__}.{name}" for owner, name, known in _KNOWN if _parameters(owner, name) != known
    ]
    if "commit_transaction" not in dj.AutoPopulate._populate1.__code__.co_names:
        unknown.append("the commit of AutoPopulate._populate1")
    if unknown:
        raise IncompatibleDataJointError(
            f"djdist does not know {', '.join(unknown)} of DataJoint {dj.__version__}: install a version of "
            "DataJoint that djdist's requirements admit, or a newer djdist."
        )


def _parameters(owner: Any, name: str) -> str:
    function = getattr(owner, name, None)
    return " ".join(inspect.signature(function).parameters) if inspect.isfunction(function) else ""


def _give(attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        setattr(dj.AutoPopulate, name, value)
