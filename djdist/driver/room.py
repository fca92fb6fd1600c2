"""What fits on the nodes, beside what is in flight."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from djdist._needs import ONE_CPU, Needs, Node, amounts_text
from djdist._task_pool import TaskPool
from djdist.errors import OptionError

AHEAD = 4
"""A quarter more tasks than fit may wait at the pool."""
ROUNDING = 1e-9
SCARCE_SHARE = 0.5
"""What is kept for keys that need a GPU is at most so much of its node's processors and memory."""
COMMON = ("cpus", "memory")
MOST_KINDS = 50
"""Where each key says its own needs, those of keys that are done are forgotten."""


class Room:
    """Packs the tasks in flight into the pool's nodes and tells how many more may be submitted.

    The pool places tasks by itself, so this is a model of it: it says how many of which needs to
    send, such that

    * what fits is sent, and a quarter more per kind of needs, so that no slot waits for the driver;
    * a key that needs a GPU doesn't wait behind those that don't: of the processors of a node with a free
      GPU, what one such key needs is kept for it; where nodes have no room for others beside one, such as
      Dask's workers, one of several is kept free until half of them make such keys;
    * a large task is not starved by small ones: what waits is placed in its order, and where smaller ones
      could take for ever what comes free, the freest node that can hold the large one is reserved for it.
      Ageing instead would leave it to chance when enough of one node is free, or stop all nodes for it.

    Parameters
    ----------
    pool : TaskPool
        Whose nodes they are.

    Attributes
    ----------
    waiting : collections.Counter
        How many tasks of each table are submitted beyond what fits.
    """

    def __init__(self, pool: TaskPool) -> None:
        self._pool = pool
        self.waiting = Counter[str]()
        self._seen: Sequence[Node] = ()
        self._nodes: list[_Filling] = []
        self._kinds: dict[Needs, _Kind] = {}
        self._placed: dict[int, tuple[_Kind, _Filling, str]] = {}
        self._scarce: tuple[Needs, ...] = ()
        self._reserved: set[Needs] = set()
        self._unshared: dict[Needs, list[_Filling]] = {}

    def expect(self, kinds: Iterable[Needs]) -> None:
        """Tell what may still be submitted; processors are kept for what is scarce of it, such as GPUs."""
        scarce = tuple(needs for needs in dict.fromkeys(kinds) if not _is_common(needs))
        if scarce != self._scarce:
            self._scarce = scarce
            self._recount()

    @property
    def nodes(self) -> Sequence[Node]:
        """What each node has."""
        return self._pool.nodes()

    def check(self, table: str, needs: Needs) -> None:
        """Check that a key will ever have room.

        Raises
        ------
        OptionError
            There is no such node, and none will come.
        """
        if not self._pool.may_grow and not self.slots(needs):
            raise OptionError(f"{unmet_text(table, needs, self.nodes)}.")

    def slots(self, needs: Needs) -> int:
        """Return how many tasks of these needs the nodes hold if nothing else runs."""
        self._look()
        return self._kind(needs).slots

    def free(self, needs: Needs) -> int:
        """Return how many tasks of these needs may be submitted now."""
        self._look()
        kind = self._kind(needs)
        ahead = (
            max(1, kind.slots // AHEAD) if self._pool.waits_for_room and not self._is_kept_from(needs) else 0
        )
        return max(0, kind.fitting + ahead - len(kind.waiting))

    def _is_kept_from(self, needs: Needs) -> bool:
        """Return whether what waits at the pool could take for ever what is kept for others.

        The pool knows nothing of that: it begins what it has as soon as that fits. One key that needs
        something scarce takes nothing for ever, and would else wait until the last large one is done.
        """
        kind = self._kind(needs)
        is_first_scarce = not (kind.placed or kind.waiting or _is_common(needs))
        is_smaller = any(_is_smaller(needs, each) for each in self._reserved)
        return kind.is_kept_from or (is_smaller and not is_first_scarce)

    def unmet(self) -> dict[str, Needs]:
        """Return by table what is waited for that no node holds."""
        kinds = [kind for kind in self._kinds.values() if kind.waiting and not kind.slots]
        return {table: kind.needs for kind in kinds for table in kind.waiting.values()}

    def take(self, ticket: int, needs: Needs, table: str) -> None:
        """Note a task that was submitted."""
        kind = self._kind(needs)
        if not self._place(ticket, kind, table):
            kind.waiting[ticket] = table
            self.waiting[table] += 1
            self._reserve_for(kind)
        self._keep_free()

    def leave(self, ticket: int) -> None:
        """Note a task that has ended."""
        if ticket in self._placed:
            kind, node, _ = self._placed.pop(ticket)
            kind.placed -= 1
            node.change(kind.needs, 1)
            self._count(node)
        else:
            for kind in self._kinds.values():
                self._waits_no_more(ticket, kind)
        self._keep_free()
        self._place_waiting()

    def memory(self, needs: Needs) -> tuple[int, int]:
        """Return the memory, in bytes, that such a key has in fact where it asks for none, and at most."""
        self._look()
        able = [node for node in self._nodes if node.holds(needs)]
        share = max((node.memory / node.holds(needs) for node in able), default=0)
        return int(share), int(max((node.memory for node in able), default=0))

    def _look(self) -> None:
        nodes = self._pool.nodes()
        if nodes is self._seen:
            return
        self._seen, self._nodes = nodes, [_Filling(node) for node in nodes]
        in_flight = {ticket: (kind.needs, table) for ticket, (kind, _, table) in self._placed.items()}
        for kind in self._kinds.values():
            in_flight |= {ticket: (kind.needs, table) for ticket, table in kind.waiting.items()}
            kind.waiting.clear()
            kind.placed = 0
        self._placed.clear()
        self._reserved.clear()
        self.waiting.clear()
        self._recount()
        for ticket in sorted(in_flight):
            self.take(ticket, *in_flight[ticket])

    def _kind(self, needs: Needs) -> "_Kind":
        if needs not in self._kinds:
            if len(self._kinds) >= MOST_KINDS:
                self._forget_unused()
            self._kinds[needs] = _Kind(needs)
            self._recount()
        return self._kinds[needs]

    def _forget_unused(self) -> None:
        used = {kind.needs for kind, *_ in self._placed.values()}
        self._kinds = {needs: kind for needs, kind in self._kinds.items() if kind.waiting or needs in used}

    def _recount(self) -> None:
        for kind in self._kinds.values():
            kind.slots = sum(node.holds(kind.needs) for node in self._nodes)
            kind.fitting, kind.on = 0, {}
            kept = self._kept_from(kind)
            kind.is_kept_from = any(node.keeps(each, kind.needs) for each in kept for node in self._nodes)
        for node in self._nodes:
            node.kept_for = None
            self._count(node)
        able = {needs: [node for node in self._nodes if node.holds(needs)] for needs in self._scarce}
        self._unshared = {
            needs: unshared
            for needs, nodes in able.items()
            if len(unshared := [node for node in nodes if not node.keeps(needs, ONE_CPU)]) > 1
        }
        for kind in self._kinds.values():
            kind.is_kept_from |= any(not _shares_scarce(kind.needs, needs) for needs in self._unshared)
        self._keep_free()

    def _keep_free(self) -> None:
        """Keep a node free for each kind that is scarce, of several and until half of them serve it."""
        for needs, nodes in self._unshared.items():
            serving = sum(_shares_scarce(kind.needs, needs) for kind, *_ in self._placed.values())
            free = [node for node in nodes if node.fits(needs, ()) and self._can_keep(node, needs)]
            free = free if 2 * serving < len(nodes) else []
            kept = next((node for node in nodes if node.kept_for == needs), None)
            if kept in free:
                continue
            for node, kept_for in ((kept, None), (next(iter(free), None), needs)):
                if node:
                    node.kept_for = kept_for
                    self._count(node)

    def _can_keep(self, node: "_Filling", needs: Needs) -> bool:
        """Return whether all that doesn't share what is scarce has somewhere else to go."""
        kept = {n for nodes in self._unshared.values() for n in nodes if n.kept_for not in (None, needs)}
        others = [kind for kind in self._kinds.values() if not _shares_scarce(kind.needs, needs)]
        return all(
            not kind.slots or kind.slots > sum(n.holds(kind.needs) for n in {node, *kept}) for kind in others
        )

    def _count(self, node: "_Filling") -> None:
        """Count again how many tasks of each kind fit on one node."""
        for kind in self._kinds.values():
            kind.set(node, node.fits(kind.needs, self._kept_from(kind)))

    def _kept_from(self, kind: "_Kind") -> list[Needs]:
        return [needs for needs in self._scarce if not _shares_scarce(kind.needs, needs)]

    def _place(self, ticket: int, kind: "_Kind", table: str) -> bool:
        node = kind.best()
        if node is None:
            return False
        kind.placed += 1
        node.change(kind.needs, -1)
        self._placed[ticket] = kind, node, table
        self._count(node)
        return True

    def _place_waiting(self) -> None:
        """Place what waits in the order of submission, so that neither large nor small ones are starved."""
        if self._reserved:
            self._reserved.clear()
            for node in [node for node in self._nodes if node.reserved_for]:
                node.reserved_for = None
                self._count(node)
        left = [kind for kind in self._kinds.values() if kind.waiting]
        while left:
            kind = min(left, key=lambda kind: kind.oldest)
            ticket = kind.oldest
            if self._place(ticket, kind, kind.waiting[ticket]):
                self._waits_no_more(ticket, kind)
            else:
                self._reserve_for(kind)
                left.remove(kind)
            left = [kind for kind in left if kind.waiting]

    def _waits_no_more(self, ticket: int, kind: "_Kind") -> None:
        if table := kind.waiting.pop(ticket, ""):
            self.waiting[table] -= 1

    def _reserve_for(self, kind: "_Kind") -> None:
        """Reserve a node for what waits, where smaller tasks could take for ever what comes free of it."""
        if not any(_is_smaller(other, kind.needs) for other in self._kinds):
            return
        able = [node for node in self._nodes if node.would_hold(kind.needs) and node.reserved_for is None]
        if able:
            freest = max(able, key=lambda node: node.free_share(kind.needs))
            freest.reserved_for = kind.needs
            self._reserved.add(kind.needs)
            self._count(freest)


class _Kind:
    """The tasks of the same needs, and where more of them fit."""

    def __init__(self, needs: Needs) -> None:
        self.needs = needs
        self.slots = self.fitting = self.placed = 0
        self.is_kept_from = False
        self.on: dict[_Filling, int] = {}
        self.waiting: dict[int, str] = {}

    @property
    def oldest(self) -> int:
        """The ticket that waits longest."""
        return next(iter(self.waiting))

    def set(self, node: "_Filling", count: int) -> None:
        self.fitting += count - self.on.pop(node, 0)
        if count:
            self.on[node] = count

    def best(self) -> "_Filling | None":
        """Return where the next one goes: if it can, where nothing is scarce that it doesn't need."""
        plain = next((node for node in self.on if not node.is_scarce_for(self.needs)), None)
        return plain or next(iter(self.on), None)


class _Filling:
    """A node and what of it is left."""

    def __init__(self, node: Node) -> None:
        self._amounts, self._left = node.amounts, dict(node.amounts)
        self._slots = self._slots_left = float("inf") if node.slots is None else float(node.slots)
        self.memory = node.amounts.get("memory", 0)
        self.reserved_for: Needs | None = None
        self.kept_for: Needs | None = None

    def change(self, needs: Needs, sign: int) -> None:
        """Note a task that ends there (1) or begins (-1)."""
        self._slots_left += sign
        for name, amount in needs.amounts.items():
            self._left[name] = self._left.get(name, 0) + sign * amount

    def holds(self, needs: Needs) -> int:
        """Count how many it holds when nothing else runs there."""
        return _count(self._amounts, needs, self._slots)

    def fits(self, needs: Needs, kept: Sequence[Needs]) -> int:
        """Count how many more it holds, with one task's room kept for each of some others."""
        if self.reserved_for and _is_smaller(needs, self.reserved_for):
            return 0
        if self.kept_for and not _shares_scarce(needs, self.kept_for):
            return 0
        left: Mapping[str, float] = self._left
        slots_left = self._slots_left
        for other in kept:
            if _count(left, other, slots_left) and self.keeps(other, needs):
                left = {name: amount - other.amounts.get(name, 0) for name, amount in left.items()}
                slots_left -= 1
        return _count(left, needs, slots_left)

    def keeps(self, other: Needs, needs: Needs) -> bool:
        """Return whether room is kept for a task: if it would hold both at once, and enough is left."""
        shares = (other.amounts.get(name, 0) <= SCARCE_SHARE * self._amounts.get(name, 0) for name in COMMON)
        beside = {name: amount - other.amounts.get(name, 0) for name, amount in self._amounts.items()}
        holds_both = self.holds(other) and _count(beside, needs, self._slots - 1)
        return SCARCE_SHARE * self._slots >= 1 and all(shares) and bool(holds_both)

    def would_hold(self, needs: Needs) -> bool:
        """Return whether it holds one once processors and memory come free there."""
        coming = {name: self._amounts[name] for name in COMMON if name in self._amounts}
        return _count(self._left | coming, needs, 1) > 0

    def free_share(self, needs: Needs) -> float:
        """Return how much of what a task needs is free."""
        left = self._left
        return min((left.get(name, 0) / n for name, n in needs.amounts.items()), default=self._slots_left)

    def is_scarce_for(self, needs: Needs) -> bool:
        """Return whether it has something scarce that such a task doesn't need."""
        return any(n and name not in (*COMMON, *needs.amounts) for name, n in self._amounts.items())


def _count(amounts: Mapping[str, float], needs: Needs, slots: float) -> int:
    """Count how many tasks fit; of those that need nothing there are as many as processors."""
    wanted = needs.amounts or {"cpus": 1}
    fitting = [amounts.get(name, 0) / amount for name, amount in wanted.items()]
    return max(0, int(min(*fitting, slots) + ROUNDING))


def _is_common(needs: Needs) -> bool:
    return all(name in COMMON for name in needs.amounts)


def _shares_scarce(one: Needs, other: Needs) -> bool:
    return any(name in other.amounts for name in one.amounts if name not in COMMON)


def _is_smaller(one: Needs, other: Needs) -> bool:
    """Return whether tasks of one kind could for ever take what another waits for."""
    shared = [name for name in one.amounts if name in other.amounts]
    return any(one.amounts[name] < other.amounts[name] for name in shared)


def unmet_text(table: str, needs: Needs, nodes: Sequence[Node]) -> str:
    """Say what a key of a table needs that no node has."""
    wanted = needs.amounts or ONE_CPU.amounts
    there = Counter(amounts_text({name: node.amounts.get(name, 0) for name in wanted}) for node in nodes)
    listed = "; ".join(f"{count} with {amounts}" for amounts, count in there.items()) or "none"
    return f"A key of {table} needs {needs}, which no node has: there are {listed}"
