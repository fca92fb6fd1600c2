"""Whole pipelines in one run, on a cluster that pretends, by a clock."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from djdist._job import Ending, Job, Policy, Recipe
from djdist.driver import Driver, RunContext
from djdist.driver.tables import TableJobs, Tables
from djdist.errors import DatabaseError
from djdist.job_stores.memory import MemoryStore
from djdist.job_stores.pipeline import PipelineStore
from lab.graphs import FakeCluster, FakePipeline, FakeStore, FakeTable, driver_of, lower_bound, run, slots
from lab.scripted import Clock

CHAIN = [FakeTable("A"), FakeTable("B", ("A",)), FakeTable("C", ("B",))]


@st.composite
def graphs(draw: st.DrawFn) -> list[FakeTable]:
    """Draw a graph of up to eight tables with forks, joins, fan-out and key sources of their own."""
    tables: list[FakeTable] = []
    for number in range(draw(st.integers(1, 8))):
        names = [table.name for table in tables]
        parents = draw(st.lists(st.sampled_from(names), unique=True, max_size=3)) if names else []
        fan_out = draw(st.sampled_from([1, 1, 1, 2]))
        tables.append(FakeTable(f"T{number}", tuple(parents), fan_out, draw(st.booleans())))
    return tables


def descends_from_failed(pipeline: FakePipeline, name: str, key: Any, failed: set[tuple[str, Any]]) -> bool:
    """Return whether a key, or one that it comes of, has failed."""
    parents = pipeline.tables[name].parents
    return (name, key) in failed or any(
        descends_from_failed(pipeline, parent, pipeline.of_parent(parent, key), failed) for parent in parents
    )


@settings(deadline=None, max_examples=40)
@given(graphs(), st.integers(1, 5), st.integers(1, 6), st.randoms(use_true_random=False))
def test_each_key_is_made_once_after_its_parents_and_none_is_left(
    tables: list[FakeTable], keys: int, slot_count: int, chance: random.Random
) -> None:
    pipeline = FakePipeline(tables, keys)
    failed = set[tuple[str, Any]]()

    def ending(job: Job) -> Ending:
        if chance.random() < 0.1:
            failed.add((job.table, tuple(job.key.items())))
            return Ending.FAILED
        return Ending.MADE

    cluster = FakeCluster(pipeline, slots(slot_count), Clock(), lambda job: chance.uniform(0.01, 10), ending)
    summary = run(cluster)
    begun = Counter((job.table, tuple(job.key.items())) for job in cluster.begun)
    assert set(begun.values()) <= {1}
    for name, key in begun:
        for parent in pipeline.tables[name].parents:
            assert pipeline.of_parent(parent, key) in pipeline.made[parent]
    whole = FakePipeline(tables, keys)
    for name in whole.tables:
        whole.made[name] = whole.key_source(name)
        expected = {k for k in whole.made[name] if not descends_from_failed(whole, name, k, failed)}
        assert pipeline.made[name] == expected
    assert summary.success_count == sum(map(len, pipeline.made.values()))
    assert {name: c.failed for name, c in summary.tables.items()} == {
        name: sum(table == name for table, _ in failed) for name in pipeline.tables
    }


@settings(deadline=None, max_examples=25)
@given(graphs(), st.integers(1, 6), st.randoms(use_true_random=False))
def test_nothing_is_held_back_that_could_run(
    tables: list[FakeTable], slot_count: int, chance: random.Random
) -> None:
    """A list schedule takes at most the work by the slots and the longest way, whatever the order [1]_.

    .. [1] Graham, Bounds on multiprocessing timing anomalies. SIAM J. Appl. Math. 17(2), 1969.
    """
    tables = [FakeTable(table.name, table.parents, table.fan_out) for table in tables]
    seconds = dict[tuple[str, Any], float]()

    def took(job: Job) -> float:
        return seconds.setdefault((job.table, tuple(job.key.items())), chance.uniform(2, 10))

    pipeline, clock = FakePipeline(tables, 4), Clock()
    run(FakeCluster(pipeline, slots(slot_count), clock, took))
    work = sum(seconds.values()) / slot_count
    longest = lower_bound(pipeline, 10**9, took)
    assert clock.seconds <= work + longest * (1 - 1 / slot_count) + 0.1 * len(tables)


@pytest.mark.parametrize("count", [3, 10, pytest.param(30, marks=pytest.mark.long)])
@pytest.mark.parametrize("lengths", ["equal", "heavy-tailed"])
def test_a_run_takes_hardly_longer_than_it_must(count: int, lengths: str) -> None:
    chance = random.Random(count)
    tables = [FakeTable("T0")]
    for number in range(1, count):
        parents = {
            f"T{chance.randrange(max(0, number - 4), number)}" for _ in range(chance.choice([1, 1, 2]))
        }
        tables.append(FakeTable(f"T{number}", tuple(sorted(parents))))

    def took(job: Job) -> float:
        drawn = random.Random(f"{job.table} {job}").paretovariate(1.5)
        return 5.0 if lengths == "equal" else min(20.0, drawn)

    pipeline, clock = FakePipeline(tables, 1000 if count == 3 else 300), Clock()
    run(FakeCluster(pipeline, slots(16), clock, took))
    assert clock.seconds <= 1.10 * lower_bound(pipeline, 16, took)


def test_what_is_begun_gets_to_its_end_first_and_the_other_way_round() -> None:
    for order, expected in (("downstream", [0, 1, 2]), ("upstream", [0, 3, 6])):
        pipeline, clock = FakePipeline(CHAIN, 3), Clock()
        cluster = FakeCluster(pipeline, slots(1), clock)
        cluster.waits_for_room = False
        run(cluster, Policy(order=order))
        positions = [i for i, job in enumerate(cluster.begun) if job.table in ("A", "B", "C")]
        first_of = {name: next(i for i in positions if cluster.begun[i].table == name) for name in "ABC"}
        assert [first_of[name] for name in "ABC"] == expected


def test_an_urgent_key_goes_first_whatever_its_table() -> None:
    pipeline, clock = FakePipeline([FakeTable("A"), FakeTable("B")], 20), Clock()
    store = pipeline.store()
    store.stores["A"].priorities = lambda key: dict(key)["n"]  # type: ignore[attr-defined]
    store.stores["B"].priorities = lambda key: dict(key)["n"]  # type: ignore[attr-defined]
    cluster = FakeCluster(pipeline, slots(1), clock)
    cluster.waits_for_room = False
    run(cluster, store=store)
    numbers = [job.key["n"] for job in cluster.begun]
    assert numbers == sorted(numbers)


def test_a_table_that_cannot_be_followed_is_read_at_a_pace() -> None:
    tables = [FakeTable("A"), FakeTable("B", ("A",), follows=False)]
    pipeline, clock = FakePipeline(tables, 200), Clock()
    store = pipeline.store()
    run(FakeCluster(pipeline, slots(4), clock, lambda job: 1.0), store=store)
    refreshed = store.stores["B"].asked["refresh"]  # type: ignore[attr-defined]
    assert len(pipeline.made["B"]) == 200
    assert refreshed <= clock.seconds + 3


def test_rounds_follow_what_was_made_once_a_second_while_all_slots_are_busy() -> None:
    pipeline, clock = FakePipeline(CHAIN, 2000), Clock()
    store = pipeline.store()
    run(FakeCluster(pipeline, slots(100), clock, lambda job: 0.5), store=store)
    rounds = store.stores["B"].asked["add_new"]  # type: ignore[attr-defined]
    assert len(pipeline.made["C"]) == 2000
    assert rounds <= clock.seconds + 10


def test_a_first_result_comes_early_though_all_slots_are_busy() -> None:
    names = [f"T{number}" for number in range(8)]
    tables = [FakeTable(name, tuple(names[max(0, n - 1) : n])) for n, name in enumerate(names)]
    pipeline, clock = FakePipeline(tables, 100), Clock()
    cluster = FakeCluster(pipeline, slots(4), clock, lambda job: 0.4)
    run(cluster)
    first = min(moment for (table, _), moment in cluster.began.items() if table == names[-1])
    assert first <= 1.5 * 0.4 * len(names)


class Refreshed(FakeStore):
    """A table to which others are adding jobs, so that its rounds fail for a while."""

    def add_new(self, parents: Sequence[Job]) -> int | None:
        added = super().add_new(parents)
        return None if self.asked["add_new"] <= 3 else added


def test_a_round_that_fails_because_others_add_jobs_is_done_again() -> None:
    pipeline, clock = FakePipeline(CHAIN, 20), Clock()
    store = pipeline.store()
    store.stores["B"] = Refreshed(pipeline, "B")
    run(FakeCluster(pipeline, slots(4), clock, lambda job: 0.1), store=store)
    assert len(pipeline.made["C"]) == 20


def test_keys_that_others_are_making_upstream_are_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    pipeline, clock = FakePipeline(CHAIN[:2], 2), Clock()
    store = pipeline.store()
    held = store.stores["A"]
    held.elsewhere = 1  # type: ignore[attr-defined]
    pipeline.made["A"] = {(("n", 0),)}
    held.failed = {(("n", 1),)}  # type: ignore[attr-defined]

    def watch(status: Any) -> bool:
        if clock.seconds > 20:
            held.elsewhere = 0  # type: ignore[attr-defined]
            pipeline.made["A"] = {(("n", 0),), (("n", 1),)}
        return True

    caplog.set_level("INFO")
    summary = driver_of(FakeCluster(pipeline, slots(2), clock), store=store).run(watch)
    assert summary.success_count == 2
    assert "Waiting for 1 keys of A" in caplog.text


def test_a_table_that_may_read_all_of_another_waits_for_others_who_fill_that() -> None:
    pipeline, clock = FakePipeline([FakeTable("A"), FakeTable("Summary", after=("A",))], 3), Clock()
    store = pipeline.store()
    store.stores["A"].elsewhere = 1  # type: ignore[attr-defined]

    def watch(status: Any) -> bool:
        if clock.seconds > 20:
            store.stores["A"].elsewhere = 0  # type: ignore[attr-defined]
        return True

    cluster = FakeCluster(pipeline, slots(2), clock)
    driver_of(cluster, store=store).run(watch)
    assert len(pipeline.made["Summary"]) == 3
    assert min(began for (table, _), began in cluster.began.items() if table == "Summary") >= 20


class Dropped(FakeStore):
    """A table that is gone for a while."""

    gone = True

    def refresh(self) -> dict[str, int]:
        return super().refresh() if self.pipeline.made["A"] else {}

    def next_priority(self) -> int | None:
        self._refuse()
        return super().next_priority()

    def add_new(self, parents: Sequence[Job]) -> int | None:
        self._refuse()
        return super().add_new(parents)

    def _refuse(self) -> None:
        if self.gone:
            raise DatabaseError("there is no such table")


def test_a_run_that_watches_leaves_a_table_alone_that_its_database_refuses(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pipeline, clock = FakePipeline(CHAIN, 5), Clock()
    store = pipeline.store()
    store.stores["B"] = dropped = Dropped(pipeline, "B")

    def watch(status: Any) -> bool:
        if clock.seconds > 100:
            dropped.gone = False
        return clock.seconds < 200

    cluster = FakeCluster(pipeline, slots(2), clock)
    driver_of(cluster, Policy(poll_seconds=5, suppress_errors=True), store).run(watch)
    assert [len(pipeline.made[name]) for name in "ABC"] == [5, 5, 5]
    assert caplog.text.count("B is left alone until its database accepts it again") == 1

    other = FakePipeline(CHAIN, 5)
    store = other.store()
    store.stores["B"] = Dropped(other, "B")
    with pytest.raises(DatabaseError, match="no such table"):
        run(FakeCluster(other, slots(2), Clock()), store=store)


def test_a_run_that_watches_takes_what_comes_and_ends_when_it_was_idle_for_long() -> None:
    pipeline, clock = FakePipeline(CHAIN, 2), Clock()

    def watch(status: Any) -> bool:
        if clock.seconds > 100:
            pipeline.keys = 5
        return True

    cluster = FakeCluster(pipeline, slots(2), clock)
    policy = Policy(poll_seconds=10, idle_exit_seconds=300, suppress_errors=True)
    summary = driver_of(cluster, policy).run(watch)
    assert summary.success_count == 15
    assert 400 < clock.seconds < 450


def test_a_run_that_watches_for_long_asks_no_more_often_than_it_was_told(thorough: bool) -> None:
    pipeline, clock = FakePipeline(CHAIN, 2), Clock()
    store = pipeline.store()
    whole = (7 * 24 if thorough else 1) * 3600
    cluster = FakeCluster(pipeline, slots(2), clock)
    driver_of(cluster, Policy(poll_seconds=60), store).run(lambda status: clock.seconds < whole)
    for each in store.stores.values():
        assert each.asked["refresh"] <= whole / 60 + 10  # type: ignore[attr-defined]


def test_a_table_that_may_read_all_of_another_waits_until_that_is_done() -> None:
    tables = [*CHAIN, FakeTable("Summary", after=("B",)), FakeTable("OfSummary", ("Summary",))]
    pipeline, clock = FakePipeline(tables, 20), Clock()
    cluster = FakeCluster(pipeline, slots(3), clock, lambda job: 1 + job.key["n"] % 4)
    run(cluster)
    assert len(pipeline.made["OfSummary"]) == 20
    last_of_b = max(began + 1 + dict(key)["n"] % 4 for (t, key), began in cluster.began.items() if t == "B")
    assert min(began for (t, _), began in cluster.began.items() if t == "Summary") >= last_of_b


WAITING = [FakeTable("P"), FakeTable("A", ("P",)), FakeTable("S", after=("A",))]


def begun_at(cluster: FakeCluster, table: str) -> list[float]:
    return sorted(began for (name, _), began in cluster.began.items() if name == table)


def test_who_reads_all_rows_waits_for_others_further_upstream_and_for_what_comes_of_theirs() -> None:
    pipeline, clock = FakePipeline(WAITING, 2), Clock()
    store = pipeline.store()
    others = store.stores["P"]
    others.failed, others.elsewhere = {(("n", 1),)}, 1  # type: ignore[attr-defined]

    def watch(status: Any) -> bool:
        if clock.seconds > 30 and others.elsewhere:  # type: ignore[attr-defined]
            others.elsewhere = 0  # type: ignore[attr-defined]
            pipeline.made["P"].add((("n", 1),))
        return True

    cluster = FakeCluster(pipeline, slots(2), clock)
    driver_of(cluster, store=store).run(watch)
    assert len(begun_at(cluster, "S")) == 2
    assert begun_at(cluster, "S")[0] > begun_at(cluster, "A")[-1]


def test_a_table_that_is_refused_counts_as_not_done() -> None:
    pipeline, clock = FakePipeline([FakeTable("A"), FakeTable("S", after=("A",))], 2), Clock()
    store = pipeline.store()
    store.stores["A"] = dropped = Dropped(pipeline, "A")
    dropped.refresh = FakeStore.refresh.__get__(dropped)  # type: ignore[method-assign]

    def watch(status: Any) -> bool:
        dropped.gone = clock.seconds < 30
        return clock.seconds < 100

    cluster = FakeCluster(pipeline, slots(4), clock)
    driver_of(cluster, Policy(poll_seconds=10, suppress_errors=True), store).run(watch)
    assert begun_at(cluster, "S")[0] > begun_at(cluster, "A")[-1]


def test_a_run_that_watches_makes_what_waits_for_all_rows_though_keys_keep_coming() -> None:
    pipeline, clock = FakePipeline([FakeTable("A"), FakeTable("S", after=("A",))], 2), Clock()

    def watch(status: Any) -> bool:
        pipeline.keys = 2 + int(clock.seconds // 10)
        return clock.seconds < 1800

    cluster = FakeCluster(pipeline, slots(8), clock, lambda job: 30.0)
    driver_of(cluster, Policy(poll_seconds=10, suppress_errors=True)).run(watch)
    assert len(pipeline.made["S"]) > 120


def test_a_table_counts_as_not_done_while_it_is_read() -> None:
    tables = [FakeTable("P"), FakeTable("A", ("P",), follows=False), FakeTable("S", after=("A",))]
    pipeline, clock = FakePipeline(tables, 2), Clock()
    store = pipeline.store()
    store.stores["S"].waiting = dict.fromkeys(pipeline.key_source("S"), 5)  # type: ignore[attr-defined]
    read, slow = store.stores["A"].refresh, threading.Event()

    def refresh() -> dict[str, int]:
        slow.wait(0.3)  # the clock goes on meanwhile
        return read()

    store.stores["A"].refresh = refresh  # type: ignore[method-assign]
    cluster = FakeCluster(pipeline, slots(4), clock, lambda job: 3.0 if job.key["n"] else 0.2)
    run(cluster, store=store)
    assert len(begun_at(cluster, "A")) == 2
    assert begun_at(cluster, "S")[0] > begun_at(cluster, "A")[-1]


def test_what_a_make_inserts_for_a_table_that_nothing_connects_is_found_in_the_end() -> None:
    pipeline, clock = FakePipeline([FakeTable("A"), FakeTable("B")], 3), Clock()
    of_graph = pipeline.key_source

    def key_source(name: str, among: Any = None) -> Any:
        return {*pipeline.made["A"]} if name == "B" else of_graph(name, among)

    pipeline.key_source = key_source  # type: ignore[method-assign]
    assert run(FakeCluster(pipeline, slots(2), clock)).success_count == 6


def test_jobs_that_a_refresh_puts_back_are_made_too() -> None:
    class Repending(FakeStore):
        """Has jobs that a refresh puts back, once its rows were deleted."""

        def refresh(self) -> dict[str, int]:
            return {"added": 0, "re_pended": super().refresh()["added"]}

    pipeline, clock = FakePipeline([FakeTable("A"), FakeTable("S", after=("A",))], 2), Clock()
    store = pipeline.store()
    store.stores["S"] = Repending(pipeline, "S")
    assert run(FakeCluster(pipeline, slots(2), clock), store=store).success_count == 4


def test_a_run_that_stops_waits_in_peace_for_what_runs() -> None:
    pipeline, clock = FakePipeline(CHAIN, 4), Clock()
    waits: list[float] = []

    class Noting(FakeCluster):
        def wait(self, timeout_seconds: float) -> Any:
            waits.append(timeout_seconds)
            return super().wait(timeout_seconds)

    def ending(job: Job) -> Ending:
        return Ending.FAILED if job.key["n"] == 2 and job.table == "A" else Ending.MADE

    cluster = Noting(pipeline, slots(2), clock, lambda job: 500.0 if job.key["n"] == 1 else 1.0, ending)
    driver_of(cluster, Policy()).run(lambda status: True)
    assert waits.count(0.0) < 10


def test_the_look_at_long_keys_is_borne_where_a_database_refuses_it() -> None:
    pipeline, clock = FakePipeline([FakeTable("A"), FakeTable("B", ("A",))], 2), Clock()
    store = pipeline.store()

    def refuse(jobs: Sequence[Job]) -> list[Job]:
        raise DatabaseError("away")

    store.stores["A"].begun = refuse  # type: ignore[method-assign]
    recipes = {name: replace(each, timeout_seconds=1000) for name, each in pipeline.recipes().items()}
    cluster, policy = FakeCluster(pipeline, slots(2), clock, lambda job: 500.0), Policy(poll_seconds=10)
    context = RunContext(store, cluster, recipes, policy, "p", clock=clock, sleep=clock.sleep)
    Driver(context).run(lambda status: clock.seconds < 2000)
    assert len(pipeline.made["B"]) == 2


def test_a_run_that_watches_asks_little_while_others_hold_a_key() -> None:
    pipeline, clock = FakePipeline(CHAIN, 1), Clock()
    store = pipeline.store()
    store.stores["A"].elsewhere = 1  # type: ignore[attr-defined]
    driver_of(FakeCluster(pipeline, slots(2), clock), Policy(poll_seconds=600), store).run(
        lambda status: clock.seconds < 3600
    )
    assert all(each.asked["refresh"] <= 8 for each in store.stores.values())  # type: ignore[attr-defined]


def test_the_table_nearest_to_a_last_one_goes_first_or_the_one_with_the_longest_way() -> None:
    ways = {"First": (), "Long": ("First",), "Longer": ("Long",), "Short": ("First",), "Last": ("Longer",)}
    recipes = {name: Recipe(name, upstream=upstream) for name, upstream in ways.items()}

    def ordered(order: str) -> list[str]:
        asked = list[str]()

        def fill_from(table: TableJobs, _: int | None) -> bool:
            asked.append(table.name)
            return False

        stores = PipelineStore({name: MemoryStore(name, [{"n": 1}]) for name in recipes})
        tables = Tables(recipes, stores, Policy(order=order), lambda: 0.0)
        tables.fill(fill_from, {}, lambda table: nullcontext())
        return list(dict.fromkeys(asked))

    assert ordered("downstream") == ["Last", "Short", "Longer", "First", "Long"]
    assert ordered("upstream") == ["First", "Long", "Longer", "Short", "Last"]
