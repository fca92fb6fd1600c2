"""Codecs that the caller has registered, and that no module of a worker need import."""

import logging
from collections.abc import Callable
from typing import Any

import datajoint as dj

from djdist.shipping.bindings import tables

logger = logging.getLogger(__name__)


def codecs_beside_datajoints() -> dict[str, type[dj.Codec]]:
    """Return the classes of this process's codecs by their names."""
    kinds = {name: type(codec) for name, codec in dj.codecs._codec_registry.items()}
    return {name: kind for name, kind in kinds.items() if kind.__module__.partition(".")[0] != "datajoint"}


def codecs_used(table: dj.Table) -> set[str]:
    """Return the names of the codecs of a table, its parts and all that it is made from."""
    used = {*table.ancestors(), *table.parts()}
    return {
        attribute.codec.name
        for kind in tables(dj.user_tables.UserTable)
        if kind._connection is table.connection and kind.full_table_name in used
        for attribute in kind._heading.attributes.values()
        if attribute.codec
    }


def register_codec(name: str, load: Callable[[], Any], *, is_needed: bool) -> None:
    """Register a codec of the caller; one that this run needs must be there.

    Raises
    ------
    Exception
        What kept a needed one from being loaded.
    """
    registry = dj.codecs._codec_registry
    if type(registry.get(name)).__module__ == "__main__":
        del registry[name]  # it came with another run, and importing the module of this one would fail
    try:
        kind = load()
    except Exception:
        if is_needed:
            raise
        logger.debug("There is no codec <%s> here", name, exc_info=True)
        return
    if type(registry.get(name)) is not kind:
        registry[name] = kind()
