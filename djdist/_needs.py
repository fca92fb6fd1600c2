"""What one key needs of a machine, and what the nodes of a cluster have."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from numbers import Real
from types import MappingProxyType
from typing import Any

from djdist.errors import OptionError

EXAMPLE = 'djdist.Needs(cpus=4, gpus=1, memory="16GiB", custom={"scanner": 1})'
OWN_NAMES = ("cpus", "gpus", "memory")


class Unsaid(int):
    """An amount that holds because nobody has said one; an executor may know better."""


@dataclass(frozen=True)
class Needs:
    """What one key of a table needs.

    Said on the table as the attribute ``needs``, or as a method ``needs(self, key)`` that returns it. What
    is said, such as ``cpus=1``, wins over what the executor says for all tables.

    Parameters
    ----------
    cpus : float
        Processors; a part of one is shared with others. Default 1.
    gpus : float
        GPUs; a part of one is shared with others. Default 0.
    memory : int or str, optional
        Memory in bytes, or with a unit, such as ``"500MB"`` or ``"16GiB"``. Default: not counted.
    custom : dict of str to float
        What else a node must have for it, by the cluster's own names. Default: nothing.

    Raises
    ------
    OptionError
        An amount can't be one.

    Examples
    --------
    >>> Needs(cpus=4, memory="16GiB").amounts
    {'cpus': 4, 'memory': 17179869184}
    """

    cpus: float = Unsaid(1)
    gpus: float = Unsaid(0)
    memory: int | str | None = None
    custom: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "memory", bytes_of(self.memory))
        if not isinstance(self.custom, Mapping) or set(OWN_NAMES) & set(self.custom):
            raise OptionError(f"custom={self.custom!r} must be a dict of other names: {EXAMPLE}.")
        object.__setattr__(self, "custom", MappingProxyType(dict(sorted(self.custom.items()))))
        amounts: dict[str, object] = {"cpus": self.cpus, "gpus": self.gpus, **self.custom}
        for name, amount in amounts.items():
            if not isinstance(amount, Real) or not 0 <= float(amount) < float("inf"):
                raise OptionError(f"A key can't need {name}={amount!r}: a number from 0, as in {EXAMPLE}.")

        if self.gpus > 1 and self.gpus % 1:
            raise OptionError(f"A key can't need {self.gpus} GPUs: a number from 0, whole above 1.")

    def __hash__(self) -> int:
        return hash(tuple(self.amounts.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Needs) and self.amounts == other.amounts

    def __reduce__(self) -> tuple[Any, ...]:
        return Needs, (self.cpus, self.gpus, self.memory, dict(self.custom))

    def __str__(self) -> str:
        return amounts_text(self.amounts)

    @cached_property
    def amounts(self) -> dict[str, float]:
        """What it needs by name, without what it needs none of; memory in bytes."""
        own = {"cpus": self.cpus, "gpus": self.gpus, "memory": self.memory or 0}
        return {name: amount for name, amount in (own | dict(self.custom)).items() if amount}  # type: ignore[misc]

    def over(self, default: "Needs") -> "Needs":
        """Return the same, with what it says nothing of as in a default; what it says may be a default."""
        said = {each.name: getattr(self, each.name) for each in fields(self)}
        unsaid = {name for name, amount in said.items() if isinstance(amount, Unsaid) or amount in (None, {})}
        return replace(default, **{name: said[name] for name in said.keys() - unsaid})

    def with_memory(self, memory: int) -> "Needs":
        """Return the same with another amount of memory, in bytes."""
        return replace(self, memory=memory)


@dataclass(frozen=True)
class Node:
    """What one node of a cluster has for keys.

    ``amounts`` has the names of :attr:`Needs.amounts`; ``slots`` is how many keys it takes at a
    time however little they need, None for as many as fit.
    """

    amounts: Mapping[str, float]
    slots: int | None = None

    def __str__(self) -> str:
        return amounts_text(self.amounts) or "nothing"


def bytes_of(memory: object) -> int | None:
    """Return an amount of memory in bytes.

    Raises
    ------
    OptionError
        It is none.
    """
    if memory is None:
        return None
    from pydantic import (  # a driver that is told nothing needs none of it
        ByteSize,
        TypeAdapter,
        ValidationError,
    )

    try:
        return int(TypeAdapter(ByteSize).validate_python(memory))
    except ValidationError as error:
        raise OptionError(f'memory={memory!r} must be bytes, or a text such as "16GiB".') from error


def memory_text(peak: int, asked: int) -> str:
    """Say how much memory a process had that made keys; :data:`MEMORY_USED` reads it again."""
    had, wanted = (amounts_text({"memory": amount}) for amount in (peak, asked))
    return f"its process had at most {had}; the key asked for {wanted}"


MEMORY_USED = r"^its process had at most (\S+) GiB memory; the key asked for (\S+) GiB memory$"


def amounts_text(amounts: Mapping[str, float]) -> str:
    """Return amounts as messages show them."""
    return ", ".join(_amount_text(name, amount) for name, amount in amounts.items())


def _amount_text(name: str, amount: float) -> str:
    if name == "memory":
        return f"{amount / 2**30:.3g} GiB memory"
    singular = {"cpus": "CPU", "gpus": "GPU"}.get(name)
    return f"{amount:g} {name}" if singular is None else f"{amount:g} {singular}{'s' * (amount != 1)}"


ONE_CPU = Needs()


def checked(needs: object, table: str) -> Needs:
    """Return what was said that a key of a table needs, if it is that.

    Raises
    ------
    OptionError
        It is something else.
    """
    if not isinstance(needs, Needs):
        raise OptionError(f"needs of {table} must be {EXAMPLE}, not {needs!r}.")
    return needs
