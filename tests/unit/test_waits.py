"""The order of tables, and what waits for what, on graphs made by hand and at random."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from djdist.errors import OptionError
from djdist.pipeline.foreign_keys import AttributeMap, ForeignKey, ForeignKeys
from djdist.pipeline.plan import in_order
from djdist.pipeline.waits import KeySource, Waits, waits_of

SESSION = (("session", "session"),)
DEFAULT = KeySource()


def refers(
    child: str, parent: str, attributes: AttributeMap = SESSION, *, primary: bool = True
) -> ForeignKey:
    return ForeignKey(child, parent, attributes, primary)


def waits(table: str, keys: list[ForeignKey], run: dict[str, str], source: KeySource = DEFAULT) -> Waits:
    masters = {"detection__spike": "detection", "summary__member": "summary"}
    of_run = {name: key.split() for name, key in run.items()}
    return waits_of(table, source, of_run, ForeignKeys(keys, masters))


DETECTION = [
    refers("detection", "session"),
    refers("detection", "param", (("param", "param"),)),
]
BOTH = (("session", "session"), ("param", "param"))
SPIKE = refers("detection__spike", "detection", BOTH)
RUN = {"detection": "session param"}


def test_keys_of_the_table_above_are_followed_by_its_key() -> None:
    found = waits(
        "sorting", [*DETECTION, refers("sorting", "detection", BOTH)], RUN | {"sorting": "session param"}
    )
    assert (set(found.upstream), set(found.after)) == ({"detection"}, set())
    assert [(f.table, f.key.parent, f.attributes) for f in found.follows] == [
        ("detection", "detection", BOTH)
    ]


def test_renamed_attributes_are_followed_through_tables_of_others() -> None:
    keys = [
        *DETECTION,
        refers("choice", "detection", (("of_session", "session"), ("with", "param"))),
        refers("sorting", "choice", (("s", "of_session"), ("w", "with"), ("n", "number"))),
    ]
    (follow,) = waits("sorting", keys, RUN | {"sorting": "s w n"}).follows
    assert (follow.key.parent, follow.attributes) == (
        "choice",
        (("of_session", "session"), ("with", "param")),
    )


def test_a_part_table_is_followed_by_the_key_of_its_master() -> None:
    spike = (("session", "session"), ("param", "param"), ("spike", "spike"))
    found = waits(
        "shape", [*DETECTION, SPIKE, refers("shape", "detection__spike", spike)], RUN | {"shape": "session"}
    )
    assert (set(found.upstream), set(found.after)) == ({"detection"}, set())
    assert [(f.key.parent, f.attributes) for f in found.follows] == [("detection__spike", BOTH)]


def test_two_foreign_keys_to_one_table_are_both_followed() -> None:
    first, second = (("left", "session"),), (("right", "session"),)
    keys = [
        refers("detection", "session"),
        refers("pair", "detection", first),
        refers("pair", "detection", second),
    ]
    found = waits("pair", keys, {"detection": "session", "pair": "left right"})
    assert [f.attributes for f in found.follows] == [SESSION, SESSION]
    assert [f.key.attributes for f in found.follows] == [first, second]


def test_what_a_secondary_foreign_key_leads_to_has_to_be_done() -> None:
    keys = [*DETECTION, refers("report", "session"), refers("report", "detection", BOTH, primary=False)]
    found = waits("report", keys, RUN | {"report": "session"})
    assert (set(found.upstream), set(found.after)) == (set(), {"detection"})


def test_what_the_parts_of_a_summary_refer_to_has_to_be_done() -> None:
    keys = [
        *DETECTION,
        refers("summary", "session"),
        refers("summary__member", "summary"),
        refers("summary__member", "detection", BOTH),
    ]
    assert waits("summary", keys, RUN | {"summary": "session"}).after == {"detection"}


def test_parts_that_refer_to_rows_of_their_own_key_let_it_stream() -> None:
    """As a sorting's units refer to the spikes of the same detection."""
    spike = (*BOTH, ("spike", "spike"))
    keys = [
        *DETECTION,
        SPIKE,
        refers("summary", "detection", BOTH),
        refers("summary__member", "summary", BOTH),
        refers("summary__member", "detection__spike", spike),
    ]
    found = waits("summary", keys, RUN | {"summary": "session param"})
    assert (set(found.upstream), set(found.after)) == ({"detection"}, set())


def test_parts_that_refer_to_other_rows_do_not() -> None:
    other = (("session", "session"), ("other", "param"))
    keys = [
        *DETECTION,
        refers("summary", "detection", BOTH),
        refers("summary__member", "summary", BOTH),
        refers("summary__member", "detection", other),
    ]
    found = waits("summary", keys, RUN | {"summary": "session param"})
    assert (set(found.upstream), found.follows, set(found.after)) == (set(), (), {"detection"})


def test_a_key_source_of_rows_streams_and_is_refreshed_whole() -> None:
    source = KeySource(default=False, reads=frozenset({"detection"}))
    keys = [*DETECTION, refers("sorting", "detection", BOTH)]
    found = waits("sorting", keys, RUN | {"sorting": "session param"}, source)
    assert (set(found.upstream), found.follows, set(found.after)) == ({"detection"}, (), set())


@pytest.mark.parametrize(
    "source",
    [
        KeySource(default=False, reads=frozenset({"detection"}), row_by_row=False),
        KeySource(default=False),
    ],
    ids=["aggregates", "leaves out a parent"],
)
def test_other_key_sources_wait_until_all_is_done(source: KeySource) -> None:
    keys = [*DETECTION, refers("sorting", "detection", BOTH)]
    found = waits("sorting", keys, RUN | {"sorting": "session param"}, source)
    assert (set(found.upstream), set(found.after)) == (set(), {"detection"})


def test_a_part_table_may_refer_to_what_depends_on_its_master() -> None:
    keys = [refers("b", "a"), refers("a__later", "a"), refers("a__later", "b")]
    assert in_order(["b", "a"], ForeignKeys(keys, {"a__later": "a"})) == ["a", "b"]


def test_a_cycle_is_an_error_that_names_it() -> None:
    keys = ForeignKeys([refers("a", "b"), refers("b", "c"), refers("c", "a"), refers("a", "d")])
    with pytest.raises(OptionError, match="a and b and c depend on each other"):
        in_order(["a", "b", "c", "d"], keys)


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[str], ForeignKeys, dict[str, set[str]]]:
    """Tables that refer to earlier ones or to their Part tables, and which of them a run has."""
    names = [f"t{number}" for number in range(draw(st.integers(1, 9)))]
    parents = {
        name: draw(st.sets(st.sampled_from(names[:n]))) if n else set() for n, name in enumerate(names)
    }
    keys = [refers(f"{name}__part", name) for name in names]
    for child, above in parents.items():
        for parent in above:
            by_part, of_part, primary = (draw(st.booleans()) for _ in range(3))
            child_table = f"{child}__part" if by_part else child
            keys.append(refers(child_table, f"{parent}__part" if of_part else parent, primary=primary))
    run = draw(st.permutations(draw(st.lists(st.sampled_from(names), unique=True))))
    return run, ForeignKeys(keys, {f"{name}__part": name for name in names}), parents


def above(table: str, parents: dict[str, set[str]]) -> Iterator[str]:
    for parent in parents[table]:
        yield parent
        yield from above(parent, parents)


@given(graphs())
def test_no_table_comes_before_what_it_depends_on(
    graph: tuple[list[str], ForeignKeys, dict[str, set[str]]],
) -> None:
    run, foreign_keys, parents = graph
    ordered = in_order(run, foreign_keys)
    assert sorted(ordered) == sorted(run)
    for number, table in enumerate(ordered):
        assert {*above(table, parents)} & {*run} <= {*ordered[:number]}


@given(graphs())
def test_each_table_waits_for_those_above_it_and_for_no_others(
    graph: tuple[list[str], ForeignKeys, dict[str, set[str]]],
) -> None:
    run, foreign_keys, parents = graph
    keys = dict.fromkeys(run, ("session",))
    waiting = {table: waits_of(table, KeySource(), keys, foreign_keys) for table in run}
    for table, found in waiting.items():
        assert not found.upstream & found.after
        assert found.upstream | found.after <= {*above(table, parents)}
        assert {follow.table for follow in found.follows} <= found.upstream
        assert parents[table] & {*run} <= {*waited_for(table, waiting)}


def waited_for(table: str, waiting: dict[str, Waits]) -> Iterator[str]:
    for other in waiting[table].upstream | waiting[table].after:
        yield other
        yield from waited_for(other, waiting)
