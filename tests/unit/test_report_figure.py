"""The picture of a report, from jobs that no database holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from djdist._style import DAY_SECONDS, TABLES, format_duration
from djdist.jobs.critical_path import Relation
from djdist.jobs.history import History, by_cause

pytest.importorskip("matplotlib")
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from djdist.monitoring import report_figure
from djdist.monitoring.report_figure import MOST_BARS, RATES, draw
from djdist.monitoring.report_graph import Graph

BEGIN = pd.Timestamp("2026-01-01 20:00")


def jobs(*made: tuple[float, float, str, int], table: str = "Table", error: str = "") -> pd.DataFrame:
    """Give jobs that ran from a second to another one, on a host, in a process."""
    begins, ends, hosts, pids = zip(*made, strict=True)
    began, ended = (BEGIN + pd.to_timedelta(list(seconds), unit="s") for seconds in (begins, ends))
    rows: pd.DataFrame = pd.DataFrame(
        {
            "table": table,
            "key": [f"path=$HOME/$\\x{n}, n={n}" for n in range(len(made))],
            "status": "error" if error else "success",
            "began": ended if error else began,
            "ended": ended,
            "seconds": np.nan if error else np.subtract(ends, begins),
            "host": hosts,
            "pid": pids,
            "error_message": error,
        }
    )
    return rows


def history(*parts: pd.DataFrame) -> History:
    found = pd.concat(parts, ignore_index=True)
    tables = list(dict.fromkeys(found["table"]))
    counts = pd.DataFrame(0, index=tables, columns=["made", "pending", "reserved", "error", "ignore"])
    return History(counts, found, ())


def part(figure: Any, name: str) -> Any:
    return next(axis for axis in figure.axes if axis.get_label() == name)


def timeline(found: History) -> Any:
    return part(draw(found), "timeline")


def test_a_process_takes_the_lane_of_one_that_ended() -> None:
    axis = timeline(history(jobs((0, 5, "a", 1), (6, 9, "a", 2), (0, 9, "a", 3), (0, 1, "b", 1))))
    lanes = [round(bar.get_y() + bar.get_height() / 2) for bar in axis.patches]
    assert len(lanes) == 4
    assert sorted(set(lanes)) == [0, 1, 2]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b"]


def test_jobs_of_unknown_processes_run_side_by_side() -> None:
    axis = timeline(history(jobs((0, 5, "", 0), (1, 6, "", 0), (7, 8, "", 0))))
    assert "unknown hosts, at most 2 at once" in axis.get_title("left")


def test_many_jobs_become_a_picture_of_how_busy_each_process_was() -> None:
    ticks = np.linspace(0, 1000, MOST_BARS)
    dense = [(tick, tick + ticks[1], "a", 1) for tick in ticks]
    half = [(tick, tick + ticks[1] / 2, "b", 1) for tick in ticks if tick < 500]
    (image,) = timeline(history(jobs(*dense), jobs(*half))).images
    picture = np.asarray(image.get_array())
    columns = picture.shape[1]
    inner = picture[[len(picture) // 4, 3 * len(picture) // 4], columns // 30 : -columns // 30]
    ink = (1 - inner) / (1 - np.array(to_rgb(TABLES[0])))
    assert ink[0].min() > 0.98
    assert ink[1, : 4 * columns // 10].mean() == pytest.approx(0.25 + 0.75 / 2, abs=0.02)
    assert ink[1, 6 * columns // 10 :].max() == 0


def test_the_picture_of_many_jobs_has_the_colour_of_the_table_that_took_most() -> None:
    ticks = range(MOST_BARS)
    long = jobs(*[(tick, tick + 0.6, "a", 1) for tick in ticks], table="Long")
    short = jobs(*[(tick + 0.6, tick + 1, "a", 1) for tick in ticks], table="Short")
    axis = timeline(history(long, short))
    (image,) = axis.images
    picture = np.asarray(image.get_array())
    middle = picture[len(picture) // 2, picture.shape[1] // 10 : -picture.shape[1] // 10]
    assert np.abs(middle - to_rgb(TABLES[0])).max() < 0.02
    assert "pale: idle, colour: main table" in axis.get_title("left")


@pytest.mark.parametrize("number", [1, 50, 51])
def test_all_jobs_that_ended_are_counted(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_figure, "MOST_BARS", 50)
    made = jobs(*[(n, n + 1.0, f"host {n % 30}", n) for n in range(number)])
    failed = jobs((0, 1, "elsewhere", 7), table="Other", error="ValueError: $\\frac{x$ and _y^")
    figure = draw(history(made, failed))
    assert figure.png().startswith(b"\x89PNG")
    rates = part(figure, "rate")
    unit_seconds = RATES[rates.get_title("left").split()[-1]]
    areas = [bar.get_height() * bar.get_width() * DAY_SECONDS / unit_seconds for bar in rates.patches]
    assert sum(areas) == pytest.approx(number + 1)


def test_jobs_without_duration_are_counted_too() -> None:
    finished = jobs((0, 0, "a", 1), (0, 5, "$a_{$", 2)).assign(seconds=np.nan)
    assert draw(history(finished)).png().startswith(b"\x89PNG")
    assert len(draw(history(finished)).axes) == 2


def test_durations_that_are_alike_have_an_axis_too() -> None:
    figure: Any = draw(history(jobs((0, 0.3, "a", 1), (1, 1.31, "a", 1))))
    figure.canvas.draw()
    (durations,) = [axis for axis in figure.axes if axis.get_title("left").startswith("How long")]
    assert [label.get_text() for label in durations.get_xticklabels()] == ["231 ms", "403 ms"]


def test_errors_of_several_tables_are_named_after_them() -> None:
    error = "ValueError: bad n 3"
    found = history(*[jobs((0, 1, "a", 1), table=table, error=error) for table in ("Table1", "Table2")])
    assert sorted(found.causes["cause"]) == [f"Table1: {error}", f"Table2: {error}"]


def test_errors_are_grouped_whatever_their_numbers() -> None:
    errors = pd.concat(
        [
            jobs((0, 1, "a", 1), (0, 3, "a", 1), error="OSError: no /data/7/x at 0x7f3a"),
            jobs((0, 2, "a", 1), error="OSError: no /data/12.5/x at 0x7f3b\nsecond line"),
            jobs((0, 4, "a", 1), error="timed out after 600 s"),
        ]
    )
    causes = by_cause(errors)
    assert list(causes["cause"]) == ["OSError: no /data/…/x at …", "timed out after 600 s"]
    assert list(causes["errors"]) == [3, 1]
    assert list((causes["last"] - BEGIN).dt.total_seconds()) == [3, 4]
    assert len(by_cause(errors[:0])) == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 ms"), (0.0214, "21.4 ms"), (59.5, "59.5 s"), (5400, "1.5 h"), (200_000, "2.31 d")],
)
def test_durations_are_written_in_the_unit_that_fits(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def relations(*pairs: str) -> list[Relation]:
    """Give relations written as parent and child."""
    return [Relation(pair.split()[1], pair.split()[0]) for pair in pairs]


def drawn(tables: str, *pairs: str) -> tuple[Graph, Any]:
    names = tables.split()
    counts = dict.fromkeys(["made", "pending", "reserved", "error", "ignore"], 0) | {"made": 3, "error": 1}
    graph, axis = Graph(names, relations(*pairs)), Figure().add_subplot()
    graph.draw(axis, pd.DataFrame(counts, index=names), dict.fromkeys(names, "C0"), 10)
    return graph, axis


def test_a_graph_says_how_many_keys_each_table_has_made() -> None:
    _, axis = drawn("Raw Spikes", "Raw Spikes")
    assert [text.get_text() for text in axis.texts] == [
        "Raw",
        "3 made, 1 failed",
        "Spikes",
        "3 made, 1 failed",
    ]


def test_tables_stand_to_the_right_of_what_they_need() -> None:
    graph, axis = drawn("C A B D", "A B", "B C", "A C", "A D")
    columns = {text.get_text(): text.get_position()[0] for text in axis.texts[::2]}
    assert columns == {"A": 0, "B": 1, "D": 1, "C": 2}
    assert (graph.columns, graph.rows) == (3, 2)


def test_a_line_that_others_imply_is_left_out() -> None:
    graph, _ = drawn("A B C", "A B", "B C", "A C")
    assert graph._lines == [[("A",), ("B",)], [("B",), ("C",)]]


def test_a_long_line_passes_beside_the_tables_between_its_ends() -> None:
    graph, _ = drawn("A B C D E", "A B", "B C", "C D", "E D")
    (passing,) = [line for line in graph._lines if len(line) > 2]
    assert all(graph._places[node] != graph._places[other,] for node in passing[1:-1] for other in "ABCD")


def test_lines_cross_no_more_than_they_have_to() -> None:
    graph, _ = drawn("A B X Y Z", "A Z", "A Y", "B X")
    heights = {table: graph._places[table,][1] for table in "ABXYZ"}
    assert (heights["A"] < heights["B"]) == (max(heights["Y"], heights["Z"]) < heights["X"])


def test_a_report_of_several_tables_draws_their_graph_and_the_longest_chain() -> None:
    raw, spikes = jobs((0, 5, "a", 1), table="Raw"), jobs((6, 9, "b", 1), table="Spikes")
    found = history(*(rows.assign(values=pd.Series([{"id": 1}])) for rows in (raw, spikes)))
    figure: Any = draw(replace(found, relations=(Relation("Spikes", "Raw", (("id", "id"),)),)))
    assert len(part(figure, "graph").texts) == 4
    chain = "Black: the longest chain of keys that need one another (8 s)"
    assert chain in part(figure, "timeline").get_title("left")
    assert figure.png().startswith(b"\x89PNG")


def test_a_report_of_30_tables_has_no_text_over_another() -> None:
    names = [f"Table{n}OfAPipelineWithLongNames" for n in range(30)]
    pairs = [f"{names[n]} {names[min(29, n // 3 * 3 + step)]}" for n in range(27) for step in (3, 4, 5)]
    parts = [
        jobs((n, n + 1, "a", 1), table=name).assign(values=pd.Series([{"id": n}]))
        for n, name in enumerate(names)
    ]
    figure: Any = draw(replace(history(*parts), relations=tuple(relations(*pairs))))
    figure.draw_without_rendering()
    legend = part(figure, "legend").get_legend().get_texts()
    boxes = [text.get_window_extent() for text in (*part(figure, "graph").texts, *legend)]
    assert not [box for n, box in enumerate(boxes) for other in boxes[:n] if box.overlaps(other)]
