"""What is sent to nodes that differ, for keys that need different things."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from djdist._job import BreakageKind, Ending, Job, Policy
from djdist._needs import ONE_CPU, Needs, Node, bytes_of
from djdist.driver.room import Room
from djdist.errors import OptionError
from lab.graphs import FakeCluster, FakePipeline, FakeTable, run, slots
from lab.scripted import Clock, ScriptedPool

GPU = Needs(cpus=1, gpus=1)


class Nodes(ScriptedPool):
    """Has the nodes that a test gives it, and takes more tasks than fit."""

    waits_for_room = True

    def __init__(self, *nodes: Node) -> None:
        super().__init__(0)
        self.given: Sequence[Node] = list(nodes)

    def nodes(self) -> Sequence[Node]:
        return self.given


def filled(room: Room, needs: Needs, first: int = 0) -> int:
    """Submit tasks of these needs as long as there is room; return how many."""
    count = 0
    while room.free(needs):
        count += 1
        room.take(first + count, needs, "Table")
    return count


class TestNeeds:
    def test_memory_has_units(self) -> None:
        assert [bytes_of(m) for m in (5, "500MB", "16G", "16GiB", None)] == [
            5, 500 * 10**6, 16 * 10**9, 16 * 2**30, None,
        ]  # fmt: skip

    @pytest.mark.parametrize(
        "wrong", [{"cpus": -1}, {"gpus": "one"}, {"memory": "lots"}, {"custom": {"gpus": 1}}, {"custom": 3}]
    )
    def test_what_can_not_be_needed_is_refused(self, wrong: Any) -> None:
        with pytest.raises(OptionError):
            Needs(**wrong)

    def test_equal_needs_are_the_same_however_they_are_written(self) -> None:
        assert {Needs(memory="1KiB", custom={"a": 1})} == {Needs(1.0, 0.0, 1024, {"a": 1.0})}

    def test_what_is_said_wins_over_an_executor_also_where_it_is_the_default(self) -> None:
        executor = Needs(cpus=4, gpus=1, memory=500, custom={"a": 1})
        assert Needs().over(executor) == pickle.loads(pickle.dumps(Needs())).over(executor) == executor
        said = pickle.loads(pickle.dumps(Needs(cpus=1, gpus=0, memory=0)))
        assert said.over(executor) == Needs(custom={"a": 1})


class TestRoom:
    def test_what_fits_is_sent_node_by_node_and_a_quarter_more(self) -> None:
        room = Room(Nodes(Node({"cpus": 8}), Node({"cpus": 3})))
        assert (room.slots(Needs(cpus=2)), room.slots(Needs(cpus=4))) == (5, 2)
        assert filled(room, Needs(cpus=2)) == 6

    def test_parts_of_a_gpu_are_shared(self) -> None:
        room = Room(Nodes(Node({"cpus": 8, "gpus": 1})))
        assert filled(room, Needs(cpus=1, gpus=0.25)) == 5

    def test_a_worker_with_one_slot_takes_one_task(self) -> None:
        room = Room(Nodes(*[Node({"cpus": 4}, slots=1)] * 3))
        assert room.slots(ONE_CPU) == 3

    def test_where_no_node_can_hold_a_key_one_is_sent_to_show_that_it_is_wanted(self) -> None:
        room = Room(Nodes(Node({"cpus": 2})))
        assert (room.slots(GPU), room.free(GPU)) == (0, 1)
        room.take(1, GPU, "Table")
        assert (room.free(GPU), room.free(ONE_CPU)) == (0, 3)

    def test_keys_of_one_kind_do_not_wait_behind_those_of_another(self) -> None:
        room = Room(Nodes(Node({"cpus": 4, "gpus": 2})))
        room.expect([ONE_CPU, GPU])
        assert filled(room, ONE_CPU) == 3  # one is kept for a key with a GPU
        assert room.free(GPU) >= 1
        room.take(100, GPU, "Table")
        assert room.waiting["Table"] == 0

    def test_keys_without_a_gpu_go_where_there_is_none(self) -> None:
        room = Room(Nodes(Node({"cpus": 1, "gpus": 1}), Node({"cpus": 1})))
        assert (room.free(ONE_CPU), room.free(GPU)) == (3, 2)
        room.take(1, ONE_CPU, "Table")
        room.take(2, GPU, "Table")
        assert room.waiting["Table"] == 0

    def test_of_several_workers_with_a_gpu_one_is_kept_free_until_half_of_them_serve_it(self) -> None:
        plain, gpu = (Node({"cpus": 1, "gpus": n}, slots=1) for n in (0, 1))
        room = Room(Nodes(plain, gpu, gpu, gpu))
        room.expect([ONE_CPU, GPU])
        assert filled(room, ONE_CPU) == 3
        room.take(100, GPU, "Table")
        assert room.waiting["Table"] == 0
        room.leave(3)
        assert room.free(ONE_CPU) == 0
        room.take(101, GPU, "Table")
        room.leave(2)
        assert room.free(ONE_CPU) == 1  # two of three make keys with a GPU
        room.leave(100)
        room.leave(101)
        room.expect([ONE_CPU])
        assert room.free(ONE_CPU) == 3 + 1

    def test_no_worker_is_kept_free_where_others_have_nowhere_else_to_go(self) -> None:
        room = Room(Nodes(*[Node({"cpus": cpus, "gpus": 1}, slots=1) for cpus in (4, 1)]))
        large = Needs(cpus=4)
        room.expect([GPU, large])
        assert room.free(large) == 1
        room.take(1, GPU, "Table")
        assert room.waiting["Table"] == 0

    def test_what_waits_at_a_pool_does_not_starve_a_larger_task(self) -> None:
        """A pool begins what it has when it fits: it must run dry of small tasks before the node is free."""
        room = Room(Nodes(Node({"cpus": 4})))
        large = Needs(cpus=4)
        assert filled(room, ONE_CPU) == 5
        room.take(100, large, "Large")
        for ticket in range(1, 6):
            assert room.free(ONE_CPU) == 0
            room.leave(ticket)
        assert room.waiting["Large"] == 0
        assert room.free(ONE_CPU) == 1

    def test_nodes_that_come_and_go_are_seen(self) -> None:
        pool = Nodes(Node({"cpus": 2}))
        room = Room(pool)
        assert filled(room, ONE_CPU) == 3
        pool.given = [Node({"cpus": 2}), Node({"cpus": 2})]
        assert (room.free(ONE_CPU), room.waiting["Table"]) == (2, 0)
        pool.given = []
        assert (room.free(ONE_CPU), room.waiting["Table"]) == (0, 3)

    @settings(deadline=None, max_examples=60)
    @given(st.data())
    def test_it_comes_back_to_where_it_began(self, data: st.DataObject) -> None:
        nodes = [
            Node({"cpus": data.draw(st.integers(1, 8)), "gpus": data.draw(st.integers(0, 2))})
            for _ in range(data.draw(st.integers(1, 4)))
        ]
        kinds = [ONE_CPU, GPU, Needs(cpus=3), Needs(cpus=0.5, gpus=0.5)]
        room = Room(Nodes(*nodes))
        room.expect(kinds)
        before = [room.free(needs) for needs in kinds]
        inside: list[int] = []
        for ticket in range(data.draw(st.integers(0, 30))):
            needs = data.draw(st.sampled_from(kinds))
            if room.free(needs):
                room.take(ticket, needs, "Table")
                inside.append(ticket)
            elif inside:
                room.leave(inside.pop(data.draw(st.integers(0, len(inside) - 1))))
        for ticket in inside:
            room.leave(ticket)
        assert [room.free(needs) for needs in kinds] == before
        assert not room.waiting["Table"]


def key(table: str, n: int) -> tuple[str, Any]:
    return table, (("n", n),)


def test_a_large_key_is_not_starved_by_small_ones_nor_they_by_it() -> None:
    tables = [FakeTable("Large", needs=Needs(cpus=4)), FakeTable("Small")]
    clock = Clock()
    cluster = FakeCluster(FakePipeline(tables, 400), slots(4), clock, lambda job: 1 + job.key["n"] % 3)
    run(cluster)
    large = sorted(cluster.began[key("Large", n)] for n in range(400))
    small = sorted(cluster.began[key("Small", n)] for n in range(400))
    assert large[3] < clock.seconds / 10
    assert small[3] < clock.seconds / 10


def test_gpu_keys_begin_at_once_beside_many_without() -> None:
    tables = [FakeTable("Few"), FakeTable("OnGpu", ("Few",), needs=GPU), FakeTable("Many")]
    clock, pipeline = Clock(), FakePipeline(tables, 50)
    cluster = FakeCluster(pipeline, [Node({"cpus": 4, "gpus": 1})], clock, lambda job: 10.0)
    run(cluster)
    first_parent = min(began for (table, _), began in cluster.began.items() if table == "Few")
    first_on_gpu = min(began for (table, _), began in cluster.began.items() if table == "OnGpu")
    assert first_on_gpu <= first_parent + 11


def memory_pipeline(policy: Policy, *, needed: int, node: int) -> tuple[FakeCluster, Any]:
    """Run keys that are lost unless they get so much memory."""
    pipeline = FakePipeline([FakeTable("Sorting", needs=Needs(memory=1000))], 20)

    def ending(job: Job) -> Any:
        given = cluster.given[job.table, tuple(job.key.items())]
        return Ending.MADE if int(given.memory or 0) >= needed else BreakageKind.OUT_OF_MEMORY

    cluster = FakeCluster(pipeline, [Node({"cpus": 2, "memory": node})], Clock(), ending=ending)
    return cluster, run(cluster, policy)


def test_a_key_that_runs_out_of_memory_gets_twice_as_much_and_its_table_learns() -> None:
    cluster, summary = memory_pipeline(Policy(), needed=3000, node=64_000)
    assert summary.success_count == 20
    assert {needs.memory for needs in cluster.given.values()} == {4000}
    assert len(cluster.begun) < 20 + 3 * 3  # only those that ran before the first was made


def test_jobs_and_log_say_what_was_asked_for_and_what_was_used(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "djdist")
    pipeline = FakePipeline([FakeTable("Sorting", needs=Needs(memory="2GiB")), FakeTable("Plain")], 3)
    cluster = FakeCluster(pipeline, [Node({"cpus": 2, "memory": 2**34})], Clock(), peak_memory=3 * 2**30)

    def ending(job: Job) -> Any:
        is_enough = (
            job.table == "Plain" or int(cluster.given[job.table, tuple(job.key.items())].memory or 0) > 2**32
        )
        return Ending.MADE if is_enough else BreakageKind.OUT_OF_MEMORY

    cluster.ending, store = ending, pipeline.store()
    for each in store.stores.values():
        each.keeps_made = True
    summary = run(cluster, store=store)
    assert summary.peak_memory == {"Sorting": 3 * 2**30, "Plain": 3 * 2**30}
    sorting, plain = (store.stores[name].notes for name in ("Sorting", "Plain"))  # type: ignore[attr-defined]
    assert plain == []
    assert {*sorting} >= {
        "ran out of memory with 2 GiB memory; it runs again with 4 GiB memory",
        "ran out of memory with 4 GiB memory; it runs again with 8 GiB memory",
    }
    assert sorting.count("its process had at most 3 GiB memory; the key asked for 8 GiB memory") == 3
    assert caplog.text.count("The next keys of Sorting start from 8 GiB memory") == 1
    assert "made keys of Sorting had at most 3 GiB memory; a key asks for 8 GiB memory" in caplog.text


@pytest.mark.parametrize(("policy", "node"), [(Policy(suppress_errors=True), 2500), (None, 64_000)])
def test_it_gets_no_more_than_there_is_and_is_an_error_then(policy: Policy | None, node: int) -> None:
    policy = policy or Policy(suppress_errors=True, memory_max=2500)
    cluster, summary = memory_pipeline(policy, needed=3000, node=node)
    assert (summary.success_count, summary.failed) == (0, 20)
    assert max(int(needs.memory or 0) for needs in cluster.given.values()) == 2500
    assert "out of memory" in summary.errors[0][1].message


@pytest.mark.parametrize("waits_for_room", [True, False])
def test_each_key_gets_what_its_table_says_of_it(waits_for_room: bool) -> None:
    pipeline, clock = FakePipeline([FakeTable("Each", needs=None)], 60), Clock()

    def needs_of(job: Job) -> Needs | None:
        return None if job.key["n"] % 5 == 0 else Needs(cpus=0.5 + job.key["n"] % 2 / 2)

    cluster = FakeCluster(pipeline, [Node({"cpus": 1}, slots=1)], clock, needs_of=needs_of)
    cluster.waits_for_room = waits_for_room
    summary = run(cluster)
    assert (summary.success_count, summary.failed) == (48, 12)
    assert all(needs == needs_of(Job(t, dict(k))) for (t, k), needs in cluster.given.items())


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("names", [("Whole", "OnGpu"), ("OnGpu", "Whole")])
def test_keys_of_whole_nodes_and_keys_with_a_gpu_take_turns(names: tuple[str, str], nodes: int) -> None:
    needs = {"Whole": Needs(cpus=4), "OnGpu": GPU}
    clock, pipeline = Clock(), FakePipeline([FakeTable(name, needs=needs[name]) for name in names], 60)
    node = Node({"cpus": 4, "gpus": 1})
    cluster = FakeCluster(pipeline, [node] * nodes, clock, lambda job: 10.0)
    run(cluster)
    for name in names:
        began = sorted(moment for (table, _), moment in cluster.began.items() if table == name)
        assert max(after - before for before, after in zip([0.0, *began], began, strict=False)) <= 40, name


@pytest.mark.parametrize("after", [("A",), ()])
def test_keys_that_fill_a_node_are_begun_beside_a_table_on_gpus(after: tuple[str, ...]) -> None:
    tables = [FakeTable("A", needs=Needs(cpus=8)), FakeTable("OnGpu", needs=GPU, after=after)]
    pipeline, clock = FakePipeline(tables, 50), Clock()
    cluster = FakeCluster(pipeline, [Node({"cpus": 8, "gpus": 1})], clock)
    assert run(cluster).success_count == 100
    first = {
        name: min(began for (table, _), began in cluster.began.items() if table == name)
        for name in ("A", "OnGpu")
    }
    assert after or first["A"] < clock.seconds / 4
