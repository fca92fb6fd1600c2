"""A table's method ``needs(self, key)``, which also a driver far from the caller can ask."""

from collections.abc import Callable, Mapping
from typing import Any

from djdist._needs import EXAMPLE, Needs
from djdist.database.dbapi import ConnectionSettings
from djdist.errors import OptionError


class TableNeeds:
    """Says what a key of a table needs.

    Where it is sent, the table is loaded like on a worker when it is asked for the first time.

    Parameters
    ----------
    table : datajoint.Table
        The table; None where it is still packed.
    pack : callable
        Returns the arguments with which it is unpacked.
    """

    def __init__(self, table: Any, pack: Callable[[], tuple[Any, ...]]) -> None:
        self._table = table
        self._pack = pack

    def __call__(self, key: Mapping[str, Any]) -> Needs:
        if self._table is None:
            from djdist.shipping.packing import (
                unpack,  # it imports DataJoint, which takes half a second
            )

            self._table = unpack(*self._pack())[0]
        return checked(self._table.needs(dict(key)), type(self._table).__name__)

    def __reduce__(self) -> tuple[Any, ...]:
        return _packed, self._pack()


def checked(needs: Any, table: str) -> Needs:
    """Return what was said that a table needs, if it is that.

    Raises
    ------
    OptionError
        It is something else.
    """
    if not isinstance(needs, Needs):
        raise OptionError(f"needs of {table} must be {EXAMPLE}, not {needs!r}.")
    return needs


def _packed(
    packed: bytes, settings: ConnectionSettings, shared: ConnectionSettings | None, preload: tuple[str, ...]
) -> TableNeeds:
    return TableNeeds(None, lambda: (packed, settings, shared, preload))
