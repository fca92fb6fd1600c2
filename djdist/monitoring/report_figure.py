"""The picture of a report."""

import heapq
import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from djdist._style import DAY_SECONDS, ERROR, OTHER_TABLES, TABLES, format_duration, shortened
from djdist.jobs.history import History
from djdist.monitoring.report_graph import Graph

Colours = dict[str, str]
Floats = NDArray[np.float64]

WIDTH_INCHES = 13.0
DOTS_PER_INCH = 110
GRAPH_INCHES = 9.0
"""What long labels beside the other drawings leave of the width."""
DECORATION_INCHES = 0.75
"""What a row's title and labels take."""
MOST_BARS = 2000
"""So many jobs are drawn one by one; more of them as how busy each process was."""
MOST_CROSSES = 500
BUSY_COLUMNS = 300
"""Wide enough to hold several jobs: were it one each, tables that run together would look like noise."""
DOTS = 1500
FAINTEST = 0.25
MOST_GAPS, ROWS_PER_LANE = 60, 10
LABEL_INCHES, LEGEND_INCHES = 0.17, 0.1
MOST_CAUSES = 8
LONGEST_NAME, LONGEST_KEY, LONGEST_CAUSE = 30, 50, 120
LONGEST_LEGEND, LONGEST_LINE = 90, 175
MOST_TICKS = 6
MOST_LABELS = 20
"""More tables than that have one line each."""
RATES = {"second": 1, "minute": 60, "hour": 3600, "day": DAY_SECONDS}
NICE_SECONDS = [size * 10**power for power in (-3, -2, -1, 0) for size in (1, 2, 5)] + [10, 20, 30]
NICE_SECONDS += [size * 60 for size in (1, 2, 5, 10, 20, 30)] + [size * 3600 for size in (1, 2, 5, 12)]
NICE_SECONDS += [size * DAY_SECONDS for size in (1, 2, 5, 10, 20, 50, 100)]


class ReportFigure(Figure):
    """A figure that a notebook shows, although pyplot doesn't know it."""

    def png(self) -> bytes:
        """Return the picture as a file's content."""
        picture = io.BytesIO()
        self.savefig(picture, format="png", dpi=DOTS_PER_INCH)
        return picture.getvalue()

    _repr_png_ = png


def draw(history: History) -> ReportFigure:
    """Draw when and where jobs ran, how many ended, how long they took, and why they failed."""
    jobs, causes = _with_lanes(history.jobs), history.causes
    timed = jobs[(jobs["status"] == "success") & jobs["seconds"].notna()]
    memory = _memory_texts(history)
    below = (
        history.notes
        if history.relations
        else (*map("{0[0]}: {0[1]}".format, memory.items()), *history.notes)
    )
    notes = [line for note in below for line in textwrap.wrap(note, LONGEST_LINE)]
    graph = Graph(list(history.counts.index), history.relations) if history.relations else None
    heights = _heights(jobs, timed, causes, len(history.counts), graph)
    decoration = DECORATION_INCHES * (len(heights) + 1) + LABEL_INCHES * len(notes)
    figure = ReportFigure((WIDTH_INCHES, sum(heights.values()) + decoration), layout="constrained")
    figure.suptitle(headline(history), fontsize=15, fontweight="bold", x=0.01, ha="left")
    figure.supxlabel("\n".join(notes), fontsize=10, x=0.01, ha="left", style="italic")
    rows: list[Any] = [names.split() for names in heights]
    axes = figure.subplot_mosaic(rows, height_ratios=[*heights.values()]) if rows else {}
    colours = _colours(list(history.counts.index))
    if graph is not None:
        graph.draw(axes["graph"], history.counts, colours, GRAPH_INCHES, memory)
    if len(jobs):
        _draw_timeline(axes["timeline"], jobs, colours, history.critical_path)
        _draw_rate(axes["rate"], jobs, colours)
        _add_legend(axes["legend" if "legend" in axes else "rate"], jobs, colours)
    if len(timed):
        _draw_seconds(axes["seconds"], timed, colours)
        _draw_slowest(axes["slowest"], timed, colours)
    if len(causes):
        _draw_causes(axes["causes"], causes)
    return figure


def draw_run(
    history: History, graph_axis: Axes, timeline_axis: Axes, graph_inches: float, notes: Mapping[str, str]
) -> None:
    """Draw what needs what, with a note on some tables, and below it when and where jobs ran."""
    colours = _colours(list(history.counts.index))
    graph = Graph(list(history.counts.index), history.relations)
    graph.draw(graph_axis, history.counts, colours, graph_inches, notes)
    _draw_timeline(timeline_axis, _with_lanes(history.jobs), colours, history.critical_path)
    timeline_axis.tick_params(labelbottom=True)


def _memory_texts(history: History) -> dict[str, str]:
    return {
        str(table): f"memory {row['most']:.3g} of {row['asked_for']:.3g} GiB"
        for table, row in history.memory.iterrows()
    }


def headline(history: History) -> str:
    """Say how the jobs stand, in one line."""
    counts, names = history.counts.sum(), list(history.counts.index)
    subject = names[0] if len(names) == 1 else f"{len(names)} tables"
    said = [f"{counts['made']:,} made", f"{counts['error']:,} failed"]
    others = {"reserved": "reserved", "pending": "pending", "ignore": "ignored"}
    said += [f"{counts[status]:,} {word}" for status, word in others.items() if counts[status]]
    return f"{subject}: {', '.join(said)}"


def _heights(
    jobs: pd.DataFrame, timed: pd.DataFrame, causes: pd.DataFrame, tables: int, graph: Graph | None
) -> dict[str, float]:
    """Return the rows' heights in inches by the names of what is in them."""
    heights: dict[str, float] = {} if graph is None else {"graph graph": graph.inches}
    if len(jobs):
        heights |= {"legend legend": LEGEND_INCHES} if tables > 1 else {}
        heights |= {"timeline timeline": _timeline_inches(jobs), "rate rate": 1.3}
    if len(timed):
        heights["seconds slowest"] = float(np.clip(0.6 * timed["table"].nunique(), 2, 8))
    if len(causes):
        heights["causes causes"] = 0.3 * min(MOST_CAUSES + 1, len(causes))
    return heights


def _timeline_inches(jobs: pd.DataFrame) -> float:
    return float(np.clip(0.22 * (jobs["lane"].max() + 1), 0.9, 4.5))


def _colours(tables: Sequence[str]) -> Colours:
    return dict.fromkeys(tables, OTHER_TABLES) | dict(zip(tables, TABLES, strict=False))


def _with_lanes(jobs: pd.DataFrame) -> pd.DataFrame:
    """Assign each process a lane of its host, which it may take over from one that had ended.

    Times become numbers, as matplotlib counts them.
    """
    jobs = jobs.assign(job=jobs.index, left=date2num(jobs["began"]), right=date2num(jobs["ended"]))
    jobs["process"] = jobs["pid"].where(jobs["pid"] != 0, -1 - jobs.index.to_numpy())
    spans = jobs.groupby(["host", "process"]).agg(left=("left", "min"), right=("right", "max"))
    spans = spans.sort_values(["host", "left"]).reset_index()
    spans["lane"] = 0
    first = 0
    for rows in spans.groupby("host").groups.values():
        lanes = _lanes(spans.loc[rows, ["left", "right"]].to_numpy())
        spans.loc[rows, "lane"] = [first + lane for lane in lanes]
        first += max(lanes) + 1
    placed: pd.DataFrame = jobs.merge(spans[["host", "process", "lane"]], on=["host", "process"])
    return placed


def _lanes(spans: Floats) -> list[int]:
    lanes, busy = [], list[tuple[float, int]]()
    for left, right in spans:
        lane = heapq.heappop(busy)[1] if busy and busy[0][0] <= left else len(busy)
        heapq.heappush(busy, (right, lane))
        lanes.append(lane)
    return lanes


def _draw_timeline(axis: Axes, jobs: pd.DataFrame, colours: Colours, path: pd.DataFrame) -> None:
    made, errors = jobs[jobs["status"] == "success"], jobs[jobs["status"] == "error"]
    left, right = _limits(jobs)
    few = len(made) <= MOST_BARS
    (_draw_bars if few else _draw_busy)(axis, made, colours, left, right)
    size = 5 if len(errors) < MOST_CROSSES else 3
    for colour, width in (("white", size / 2), (ERROR, size / 4)):
        axis.plot(errors["right"], errors["lane"], "x", color=colour, markersize=size, markeredgewidth=width)
    axis.set(xlim=(left, right), ylim=(jobs["lane"].max() + 0.5, -0.5))
    title = _span(jobs) + ("" if few else _reading(made))
    if len(path):
        _draw_path(axis, jobs.set_index("job").loc[path.index])
        seconds = format_duration(path["seconds"].sum())
        title += f"\nBlack: the longest chain of keys that need one another ({seconds})"
    axis.set_title(title, loc="left", fontsize=11)
    _label_hosts(axis, jobs)
    _mark_time(axis)
    axis.tick_params(labelbottom=False)
    axis.xaxis.offsetText.set_visible(False)


def _draw_path(axis: Axes, path: pd.DataFrame) -> None:
    """Draw a line through jobs, thick where one of them ran."""
    times = path[["left", "right"]].to_numpy()
    for colour, width in (("white", 4.0), ("black", 2.2)):
        axis.hlines(path["lane"], *times.T, color=colour, linewidth=width)
    axis.plot(times.ravel(), path["lane"].repeat(2), color="black", linewidth=0.9)


def _draw_bars(axis: Axes, made: pd.DataFrame, colours: Colours, left: float, right: float) -> None:
    """Draw each job as a bar, with a gap to the next one where there is room for it."""
    dot = (right - left) / DOTS
    widths = (made["right"] - made["left"]).clip(lower=dot)
    edges = np.where(widths > 5 * dot, 0.5, 0)
    shades = [colours[table] for table in made["table"]]
    axis.barh(
        made["lane"], widths, left=made["left"], height=0.8, color=shades, edgecolor="white", linewidth=edges
    )


def _draw_busy(axis: Axes, made: pd.DataFrame, colours: Colours, left: float, right: float) -> None:
    """Draw how busy each process was, and with which table most: bars would be thinner than a dot."""
    lanes = int(made["lane"].max()) + 1
    tables, parts = zip(*made.groupby("table"), strict=True)
    shares = np.array([_busy(rows, lanes, left, right) for rows in parts])
    ink = 1 - np.array([to_rgb(colours[table]) for table in tables])[shares.argmax(axis=0)]
    total = shares.sum(axis=0).clip(0, 1)
    emphasis = np.where(total > 0, FAINTEST + (1 - FAINTEST) * total, 0)
    picture = 1 - ink * emphasis[..., None]
    if lanes <= MOST_GAPS:
        picture = picture.repeat(ROWS_PER_LANE, axis=0)
        picture[::ROWS_PER_LANE] = 1
    axis.imshow(picture, aspect="auto", extent=(left, right, lanes - 0.5, -0.5))


def _reading(made: pd.DataFrame) -> str:
    return "; pale: idle" + ", colour: main table" * (made["table"].nunique() > 1)


def _busy(jobs: pd.DataFrame, lanes: int, left: float, right: float) -> Floats:
    """Return the busy part of each column of time, for each lane."""
    lane, scale = jobs["lane"].to_numpy(), BUSY_COLUMNS / (right - left)
    begin, end = ((jobs[edge].to_numpy() - left) * scale for edge in ("left", "right"))
    return _passed(lane, end, lanes) - _passed(lane, begin, lanes)


def _passed(lane: NDArray[np.int64], moments: Floats, lanes: int) -> Floats:
    """Sum up, for all moments, which part of each column comes before the moment."""
    column = moments.astype(int).clip(0, BUSY_COLUMNS - 1)
    parts, hits = np.zeros((lanes, BUSY_COLUMNS)), np.zeros((lanes, BUSY_COLUMNS))
    np.add.at(parts, (lane, column), moments - column)
    np.add.at(hits, (lane, column), 1)
    passed: Floats = parts + hits[:, ::-1].cumsum(axis=1)[:, ::-1] - hits
    return passed


def _draw_rate(axis: Axes, jobs: pd.DataFrame, colours: Colours) -> None:
    edges = np.linspace(*_limits(jobs), int(np.clip(len(jobs) // 3, 10, 120)) + 1)
    bin_seconds = (edges[1] - edges[0]) * DAY_SECONDS
    peak = np.histogram(jobs["right"], edges)[0].max() / bin_seconds
    unit = next((unit for unit, size in RATES.items() if peak * size >= 1), "day")
    series = [(jobs["right"][_is_made(jobs, table)], colour, "") for table, colour in colours.items()]
    series.append((jobs["right"][jobs["status"] == "error"], ERROR, "////"))
    axis.hist(
        [times for times, _, _ in series],
        edges.tolist(),
        weights=[np.full(len(times), RATES[unit] / bin_seconds) for times, _, _ in series],
        color=[colour for _, colour, _ in series],
        hatch=[hatch for _, _, hatch in series],
        edgecolor="white",
        linewidth=0,
        stacked=True,
    )
    axis.set(xlim=(edges[0], edges[-1]))
    axis.set_title(f"Jobs that ended, per {unit}", loc="left", fontsize=11)
    axis.yaxis.set_major_locator(MaxNLocator(4))
    _mark_time(axis)


def _draw_seconds(axis: Axes, made: pd.DataFrame, colours: Colours) -> None:
    """Draw the histograms of the tables' durations, one above the other."""
    seconds = made["seconds"].clip(lower=NICE_SECONDS[0])
    shortest, longest = seconds.min() / 1.3, seconds.max() * 1.3
    edges = np.geomspace(shortest, longest, int(np.clip(3 * len(made) ** 0.3, 8, 60)) + 1)
    labels = {}
    for base, table in enumerate(reversed(list(dict.fromkeys(made["table"])))):
        counts, _ = np.histogram(seconds[made["table"] == table], edges)
        steps = 0.85 * counts / counts.max() + base
        axis.stairs(steps, edges, baseline=base, fill=True, color=colours[table])
        median = seconds[made["table"] == table].median()
        axis.plot([median, median], [base, base + 0.85], color="black", linewidth=1.5)
        between = ", " if made["table"].nunique() > MOST_LABELS else "\nmedian "
        labels[base + 0.4] = f"{shortened(table, LONGEST_NAME)}{between}{format_duration(median)}"
    axis.set(xscale="log", xlim=(shortest, longest), ylim=(0, len(labels)))
    axis.set_yticks(list(labels), list(labels.values()))
    axis.tick_params(axis="y", length=0)
    _mark_durations(axis.xaxis, shortest, longest)
    axis.set_title("How long make() took; black: the median", loc="left", fontsize=11)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _mark_durations(axis: Axis, shortest: float, longest: float) -> None:
    nice = [seconds for seconds in NICE_SECONDS if shortest <= seconds <= longest] or [shortest, longest]
    axis.set_ticks(nice[:: len(nice) // MOST_TICKS + 1])
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda seconds, _: format_duration(seconds)))


def _draw_slowest(axis: Axes, made: pd.DataFrame, colours: Colours) -> None:
    room = int(np.clip(3 * made["table"].nunique(), 8, 36))
    slowest = made.nlargest(room, "seconds")
    shades = [colours[table] for table in slowest["table"]]
    labels = [
        _brief_key(key) if shade != OTHER_TABLES else _brief_key(f"{table}: {key}")
        for key, table, shade in zip(slowest["key"], slowest["table"], shades, strict=True)
    ]
    bars = axis.barh(range(len(slowest)), slowest["seconds"], color=shades)
    axis.bar_label(bars, [format_duration(seconds) for seconds in slowest["seconds"]], padding=3)
    axis.set_yticks(range(len(slowest)), labels, parse_math=False)
    axis.set_title("The slowest keys", loc="left", fontsize=11)
    _be_a_list(axis, room)


def _draw_causes(axis: Axes, causes: pd.DataFrame) -> None:
    shown = causes.head(MOST_CAUSES)
    texts, labels = list(shown["cause"]), [f"{number:,} ×" for number in shown["errors"]]
    axis.barh(range(len(shown)), shown["errors"], color=ERROR, alpha=0.35)
    if others := len(causes) - len(shown):
        texts.append(f"other causes ({others:,})")
        labels.append(f"{causes['errors'][MOST_CAUSES:].sum():,} ×")
    axis.set_yticks(range(len(texts)), labels)
    beside: dict[str, Any] = {"textcoords": "offset points", "va": "center", "parse_math": False}
    for row, cause in enumerate(texts):
        text = cause if len(cause) <= LONGEST_CAUSE else f"{cause[:LONGEST_CAUSE]}…"
        axis.annotate(text, (0, row), (4, 0), **beside)
    axis.set_title("Errors by cause", loc="left", fontsize=11)
    _be_a_list(axis, len(texts))


def _be_a_list(axis: Axes, rows: int) -> None:
    axis.set_ylim(rows - 0.5, -0.5)
    axis.xaxis.set_visible(False)
    axis.tick_params(length=0)
    axis.margins(x=0.12)
    axis.spines[:].set_visible(False)


def _is_made(jobs: pd.DataFrame, table: str) -> "pd.Series[bool]":
    return (jobs["table"] == table) & (jobs["status"] == "success")


def _limits(jobs: pd.DataFrame) -> tuple[float, float]:
    left, right = jobs["left"].min(), jobs["right"].max()
    margin = max((right - left) * 0.005, 0.5 / DAY_SECONDS)
    return left - margin, right + margin


def _span(jobs: pd.DataFrame) -> str:
    first, last = jobs["began"].min(), jobs["ended"].max()
    seconds = (last - first).total_seconds()
    at_once, hosts = int(jobs["lane"].max()) + 1, len(set(jobs["host"]) - {""})
    where = f"{hosts:,} host{'' if hosts == 1 else 's'}" if hosts else "unknown hosts"
    return (
        f"{first:%Y-%m-%d %H:%M:%S} to {last:%Y-%m-%d %H:%M:%S} by the database's clock "
        f"({format_duration(seconds)}), {where}, at most {at_once:,} at once"
    )


def _label_hosts(axis: Axes, jobs: pd.DataFrame) -> None:
    lanes = jobs.groupby("host")["lane"].agg(["min", "max"])
    axis.tick_params(axis="y", length=0)
    if len(lanes) * LABEL_INCHES > _timeline_inches(jobs):
        axis.set_yticks([], [])
        axis.set_ylabel(f"{len(lanes):,} hosts")
        return
    labels = [shortened(host, LONGEST_NAME) or "unknown host" for host in lanes.index]
    axis.set_yticks(lanes.mean(axis=1), labels, parse_math=False)
    for first in lanes["min"][1:]:
        axis.axhline(first - 0.5, color="0.3", linewidth=0.8)


def _mark_time(axis: Axes) -> None:
    locator = AutoDateLocator()
    axis.xaxis.set(major_locator=locator, major_formatter=ConciseDateFormatter(locator))
    axis.spines[["top", "right"]].set_visible(False)


def _add_legend(axis: Axes, jobs: pd.DataFrame, colours: Colours) -> None:
    """Add a legend of the colours, but not of a single table's."""
    named = [table for table in colours if len(colours) > 1 and colours[table] != OTHER_TABLES]
    length = LONGEST_LEGEND // max(1, len(named))
    handles: list[Any] = [Patch(color=colours[t], label=shortened(t, length)) for t in named]
    if OTHER_TABLES in colours.values():
        handles.append(Patch(color=OTHER_TABLES, label="other tables"))
    if "error" in jobs["status"].to_numpy():
        handles.append(Patch(facecolor=ERROR, edgecolor="white", hatch="////", label="errors (×)"))
    place: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.2}
    if axis.get_label() == "legend":
        axis.set_axis_off()
        place |= {"loc": "center right", "bbox_to_anchor": (1, 0.5)}
    if handles:
        legend = axis.legend(handles=handles, ncols=len(handles), frameon=False, handlelength=1, **place)
        legend.set_in_layout(False)  # it may begin under the labels at the left


def _brief_key(key: str) -> str:
    return key if len(key) <= LONGEST_KEY else shortened(re.sub(r"\w+=", "", key), LONGEST_KEY)
