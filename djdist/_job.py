"""The values that travel between driver, store, executor and worker."""

import os
import platform
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from functools import cached_property
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, Literal

from djdist._needs import ONE_CPU, Needs
from djdist.errors import OptionError

Key = dict[str, Any]
Identity = tuple[str, tuple[tuple[str, Any], ...]]

LONGEST_SECONDS = 1e9
ORDERS = ("downstream", "upstream")
"""Whether tables further downstream go first, so that results finish early, or those further upstream."""

KeysPerTransaction = int | Literal["auto"]
AUTO_KEYS_PER_TRANSACTION = 128
"""With so many, what a transaction costs is a small part of what its keys do."""

SHARED_SECONDS = 0.5
"""A shared transaction begins no key with which it would last longer: so old is what make() may read."""

GROUP_SECONDS = 5.0
"""A worker that has been busy with a group for this time begins no more keys of it."""


@dataclass(frozen=True)
class Job:
    """One key of an auto-populated table that has been reserved to be made.

    Sent to a worker, one that ``asks`` isn't made: it asks what the key needs.
    """

    table: str
    key: Key
    asks: bool = False

    def __reduce__(self) -> tuple[type["Job"], tuple[str, Key, bool]]:
        return Job, (self.table, self.key, self.asks)  # without its identity, which is as long again

    @cached_property
    def identity(self) -> Identity:
        """The table and the key as a hashable value."""
        return self.table, tuple(self.key.items())

    def __str__(self) -> str:
        return key_text(self.key)


def key_text(key: Key) -> str:
    """Return a key as messages and dashboards show it."""
    return ", ".join(f"{name}={value}" for name, value in key.items())


class Ending(Enum):
    """How an attempt to make one key ended."""

    MADE = "made"
    ALREADY_MADE = "already made"
    """The result was in the table already."""
    FAILED = "failed"
    """``make()`` raised."""
    INTERRUPTED = "interrupted"
    """A signal stopped it."""
    LOST = "lost"
    """Its worker or its node died."""
    TRANSIENT = "transient"
    """The database was away, or gave its transaction up for another one."""
    NOT_STARTED = "not started"
    """Its worker had others to make first, and stopped before it."""
    LEASE_LOST = "lease lost"
    """The job is no longer this run's; nothing was changed."""


@dataclass(frozen=True)
class Failure:
    """Why a key was not made.

    ``exception`` is the object itself where it was raised in this process, its
    pickle where it comes from another one, None where it can't be pickled; ``kinds`` are
    the names of its class and of that class's bases, ``limit`` the setting of the server by which
    a statement or the session was ended, ``blocked`` tells of a wait for a lock.
    """

    message: str
    traceback: str = ""
    exception: BaseException | bytes | None = field(default=None, repr=False)
    kinds: tuple[str, ...] = ()
    limit: str = ""
    blocked: bool = False

    def clear_frames(self) -> None:
        """Drop all that the code still holds that raised in this process: the arrays of a ``make()``.

        An error that the caller was handling already is none of ours.
        """
        left, known = [self.exception], {id(sys.exc_info()[1])}
        while left:
            error = left.pop()
            if isinstance(error, BaseException) and id(error) not in known:
                known.add(id(error))
                traceback.clear_frames(error.__traceback__)
                left += [error.__cause__, error.__context__, *getattr(error, "exceptions", ())]


@dataclass(frozen=True)
class Outcome:
    """What became of one job."""

    job: Job
    ending: Ending
    failure: Failure | None = None
    host: str = ""
    pid: int = 0


@dataclass(frozen=True)
class Report:
    """What a worker answers to one task: an outcome per job, or why it can't work at all.

    ``place`` is where it can't, as its cluster names it, and ``may_pass`` says that it may later; ``seconds``
    is how long it took for what it made, ``peak_memory`` how many bytes its process had at most, 0 where that
    can't be told, ``needs`` what each key needs of jobs that ask for that, but for those over which their
    table raised.
    """

    outcomes: tuple[Outcome, ...] = ()
    setup_error: str = ""
    place: str = field(default="", compare=False)
    may_pass: bool = field(default=False, compare=False)
    seconds: float = 0.0
    peak_memory: int = field(default=0, compare=False)
    needs: tuple[tuple[Job, Needs], ...] = ()


class BreakageKind(Enum):
    """What broke under a task, as far as its engine tells."""

    OUT_OF_MEMORY = "out of memory"
    WORKER_DIED = "worker died"
    NODE_LOST = "node lost"
    REFUSED = "refused"
    """The engine can't run it as it was asked to."""
    OTHER = "other"


@dataclass(frozen=True)
class Breakage:
    """What broke under a task: infrastructure, for what a ``make()`` raises is an outcome."""

    kind: BreakageKind
    message: str

    @classmethod
    def of(
        cls, error: BaseException, kinds: Mapping[type[BaseException], BreakageKind] = MappingProxyType({})
    ) -> "Breakage":
        """Describe what an engine raised, of which the engine's own file knows the kind."""
        kind = next((kind for raised, kind in kinds.items() if isinstance(error, raised)), BreakageKind.OTHER)
        return cls(kind, f"{type(error).__name__}: {error}")


@dataclass(frozen=True)
class Completion:
    """A task that has ended; without a report, what broke under it."""

    ticket: int
    report: Report | None = None
    error: Breakage | None = None


TaskFunction = Callable[[Sequence[Job]], Report]
"""Makes a group of jobs on a worker. It never raises; no jobs is a trial of the set-up."""


def _no_task(jobs: Sequence[Job]) -> Report:
    raise NotImplementedError


@dataclass(frozen=True)
class Recipe:
    """How the keys of one table are made.

    ``task`` is what its workers call, given once the options have been found good.
    ``timeout_seconds`` of None lets a ``make()`` take as long as it likes; ``retry_on`` holds
    names of exception classes, none of them for all. Numbers may be numpy's.
    ``needs`` is what one key needs, None where the table says so of each key, beyond
    ``default_needs``. Up to ``keys_per_transaction`` share a transaction. ``upstream`` are the tables of
    the run on which the key source depends; new keys are found by the keys made of those that it ``follows``,
    and by reading the whole key source where it follows not all. Those of ``after`` have to be done before a
    key is begun, since it may be made from any of their rows.

    Raises
    ------
    OptionError
        What a user can choose of it can't be.
    """

    table: str
    task: TaskFunction = field(default=_no_task, repr=False)
    timeout_seconds: float | None = None
    retries: int = 0
    retry_on: tuple[str, ...] = ()
    needs: Needs | None = ONE_CPU
    default_needs: Needs = ONE_CPU
    keys_per_transaction: KeysPerTransaction = 1
    upstream: tuple[str, ...] = ()
    follows: frozenset[str] = frozenset()
    after: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        timeout: object = self.timeout_seconds
        if timeout is not None and not (isinstance(timeout, Real) and 0 < float(timeout) <= LONGEST_SECONDS):
            raise OptionError(
                f"timeout_seconds={timeout!r} must be a number above 0, up to {LONGEST_SECONDS:g}, or None."
            )
        if not _is_count(self.retries):
            raise OptionError(f"retries={self.retries!r} must be a whole number from 0.")
        keys_per_transaction = checked_keys_per_transaction(self.keys_per_transaction)
        object.__setattr__(self, "keys_per_transaction", keys_per_transaction)
        for name, plain in (("timeout_seconds", float), ("retries", int)):
            if (number := getattr(self, name)) is not None:
                object.__setattr__(self, name, plain(number))

    @property
    def most_per_transaction(self) -> int:
        """How many keys may share a transaction at most."""
        return AUTO_KEYS_PER_TRANSACTION if self.keys_per_transaction == "auto" else self.keys_per_transaction


@dataclass(frozen=True)
class Policy:
    """How a run goes about its jobs, whatever their table.

    With ``poll_seconds`` a run watches: it looks for new keys so often and doesn't end, or not before it has
    had nothing to do for ``idle_exit_seconds``. ``order`` says which of two tables goes first where
    priorities are the same. ``memory_max`` bounds what a key gets that has run out of memory.

    Raises
    ------
    OptionError
        One of them can't be used; numbers may be numpy's.
    """

    max_calls: int | None = None
    suppress_errors: bool = False
    max_worker_losses: int = 3
    lease_seconds: float = 60.0
    count_pending: bool = False
    grace_seconds: float = 10.0
    retry_pause_seconds: float = 1.0
    task_seconds: float = 0.5
    max_errors_listed: int = 1000
    return_exception_objects: bool = False
    poll_seconds: float | None = None
    idle_exit_seconds: float | None = None
    order: str = ORDERS[0]
    memory_max: int | None = None

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise OptionError(f"order={self.order!r} must be {' or '.join(map(repr, ORDERS))}.")
        for name in ("poll_seconds", "idle_exit_seconds"):
            self._check_seconds(name)
        if self.max_calls is None:
            return
        if not _is_count(self.max_calls):
            raise OptionError(
                f"max_calls={self.max_calls!r} must be a whole number from 0, or None for no limit."
            )
        object.__setattr__(self, "max_calls", int(self.max_calls))

    def _check_seconds(self, name: str) -> None:
        seconds = getattr(self, name)
        if seconds is not None and not (isinstance(seconds, Real) and 0 < float(seconds) <= LONGEST_SECONDS):
            raise OptionError(f"{name}={seconds!r} must be a number of seconds above 0.")

    @property
    def watches(self) -> bool:
        """Whether the run goes on when nothing is left."""
        return self.poll_seconds is not None


def checked_keys_per_transaction(given: Any) -> KeysPerTransaction:
    """Return how many keys may share a transaction, if it can be that; numbers may be numpy's.

    Raises
    ------
    OptionError
        It is something else.
    """
    if isinstance(given, str) and given == "auto":
        return "auto"
    if _is_count(given) and not isinstance(given, bool) and given != 0:
        return int(given)
    raise OptionError(f"keys_per_transaction={given!r} must be a whole number from 1, or 'auto'.")


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and int(value) >= 0


@dataclass(frozen=True)
class Handover:
    """What another driver has to know that goes on with a run.

    ``host`` and ``pid`` say where the driver is, ``losses`` how many workers each key has lost
    that is not done; ``errors`` holds the one that ends the run, or those of the result where no jobs table
    has them, ``memory`` what each table's keys have been found to need, in bytes.
    """

    host: str = field(default_factory=platform.node)
    pid: int = field(default_factory=os.getpid)
    stopping: bool = False
    losses: tuple[tuple[Identity, int], ...] = ()
    errors: tuple[tuple[Job, Failure], ...] = ()
    memory: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Counts:
    """How many keys of a table, or of all tables of a run, are where at one moment.

    ``running`` keys are being made; ``queued`` ones are on the cluster and wait there for a place,
    or for others of their group; ``pending`` is what the run may still reserve.
    """

    made: int = 0
    failed: int = 0
    running: int = 0
    queued: int = 0
    pending: int = 0

    @property
    def counts(self) -> str:
        """All counts in words."""
        queued = f"{self.queued} queued, " if self.queued else ""
        return (
            f"{self.made} made, {self.failed} failed, {self.running} running, {queued}{self.pending} pending"
        )


@dataclass(frozen=True)
class Status(Counts):
    """A run's counts at one moment, and those of each of its tables.

    Of a run that has not ``begun`` to make keys the counts say nothing yet. ``unmet`` says by table what its
    keys need that no node has.
    """

    tables: Mapping[str, Counts] = field(default_factory=dict, repr=False, compare=False)
    handover: Handover = field(default_factory=Handover, repr=False, compare=False)
    begun: bool = field(default=False, repr=False, compare=False)
    unmet: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, tables: Mapping[str, Counts], handover: Handover, *, begun: bool) -> "Status":
        """Add up the counts of tables."""
        each = [(c.made, c.failed, c.running, c.queued, c.pending) for c in tables.values()]
        made, failed, running, queued, pending = map(sum, zip(*each, strict=True))
        return cls(made, failed, running, queued, pending, tables, handover, begun)

    @property
    def progress(self) -> tuple[int, int]:
        """Grows whenever the run gets nearer to its end."""
        return self.made + self.failed, sum(losses for _, losses in self.handover.losses)

    def __str__(self) -> str:
        return self.counts if self.begun else "starting"


@dataclass(frozen=True)
class Summary:
    """A run's result; ``errors`` are the first of those that ``failed``.

    ``tables`` holds the counts of each table, ``held_back`` by table how many of its keys the errors of
    which other tables keep from being made, ``peak_memory`` the most bytes of a process that made some.
    """

    success_count: int = 0
    errors: tuple[tuple[Job, Failure], ...] = ()
    failed: int = 0
    tables: Mapping[str, Counts] = field(default_factory=dict, compare=False)
    held_back: Mapping[str, Mapping[str, int]] = field(default_factory=dict, compare=False)
    peak_memory: Mapping[str, int] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class RunInfo:
    """Who runs what, from where and since when.

    ``detached`` runs go on without their caller; ``suppress_errors`` and ``return_exception_objects`` say how
    the caller wants its errors, ``tables`` are those of a run that was asked for several.
    """

    id: str
    table: str
    schema: str
    user: str
    host: str
    pid: int
    started_at: datetime
    detached: bool = False
    suppress_errors: bool = False
    return_exception_objects: bool = False
    tables: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"Run {self.id} of {self.table if self.tables else f'{self.schema}.{self.table}'}"

    @property
    def is_here(self) -> bool:
        """Whether this process is the caller."""
        return (self.host, self.pid) == (platform.node(), os.getpid())


Watch = Callable[[Status], bool]
"""Is told a run's status after every step; answers whether to go on."""
