"""The graph of a report: which tables need which, and how many keys each has made."""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path

from djdist._style import ERROR, shortened
from djdist.jobs.critical_path import Relation, in_order

Node = tuple[str, ...]
"""A table; or two tables and a column, in which the line between them passes by others."""

BOX_WIDTH, BOX_HEIGHT = 0.7, 0.74
"""Of the distance from one table to the next, to the right and downward."""
ROW_INCHES = 0.85
MOST_ROOMY = 6
"""More columns than that have a smaller font."""
CHARACTERS_PER_INCH = 95
"""Of a font of one point."""
SWEEPS = 8
GREY = "0.55"
ARROW = Path([(-2, -0.7), (0, 0), (-2, 0.7)])


class Graph:
    """Where tables and the lines between them are, from the left to the right.

    Parameters
    ----------
    tables : sequence of str
        The tables.
    relations : collection of Relation
        Which of them need which.
    """

    def __init__(self, tables: Sequence[str], relations: Collection[Relation]) -> None:
        self._tables = tables
        pairs = _direct(relations)
        columns = _columns(in_order(tables, relations), pairs)
        self._lines = [_line(parent, child, columns) for parent, child in pairs]
        layers = defaultdict[int, list[Node]](list)
        for table in tables:
            layers[columns[table]].append((table,))
        for line in self._lines:
            for node in line[1:-1]:
                layers[int(node[2])].append(node)
        _untangle(layers, self._lines)
        self._places = {
            node: (x, y - (len(layer) - 1) / 2) for x, layer in layers.items() for y, node in enumerate(layer)
        }
        self.columns, self.rows = len(layers), max(map(len, layers.values()))

    @property
    def inches(self) -> float:
        """The height that it needs."""
        return ROW_INCHES * self.rows

    def draw(
        self,
        axis: Axes,
        counts: pd.DataFrame,
        colours: Mapping[str, str],
        width_inches: float,
        notes: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Draw each table with how many of its keys are made, and maybe a note."""
        axis.set_axis_off()
        axis.set(xlim=(-0.5, self.columns - 0.5), ylim=(self.rows / 2, -self.rows / 2))
        for line in self._lines:
            _draw_line(axis, [self._places[node] for node in line])
        points = 11 if self.columns <= MOST_ROOMY else 8
        room = int(width_inches / self.columns * BOX_WIDTH * CHARACTERS_PER_INCH / points)
        for table in self._tables:
            made, failed = (int(counts[status][table]) for status in ("made", "error"))
            shares = made / (total := max(1, int(counts.loc[table].sum()))), failed / total
            left = f", {failed:,} failed" if failed else ""
            texts = _wrapped(table, room), f"{made:,} made{left}", notes.get(table, "")
            _draw_table(axis, self._places[table,], texts, shares, colours[table], points)


def _direct(relations: Collection[Relation]) -> list[tuple[str, str]]:
    """Return pairs of a parent and its child, but for parents that another parent needs, too."""
    parents = defaultdict[str, set[str]](set)
    for relation in relations:
        parents[relation.child].add(relation.parent)
    above: dict[str, set[str]] = {}
    for table in in_order(parents, relations):
        above[table] = parents[table].union(*(above[parent] for parent in parents[table]))
    return [
        (parent, child)
        for child, needed in parents.items()
        for parent in sorted(needed)
        if not any(parent in above[other] for other in needed)
    ]


def _columns(ordered: Sequence[str], pairs: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Put each table to the right of all that it needs."""
    columns: dict[str, int] = {}
    for table in ordered:
        columns[table] = max((columns[parent] + 1 for parent, child in pairs if child == table), default=0)
    return columns


def _line(parent: str, child: str, columns: Mapping[str, int]) -> list[Node]:
    between = range(columns[parent] + 1, columns[child])
    return [(parent,), *((parent, child, str(column)) for column in between), (child,)]


def _untangle(layers: Mapping[int, list[Node]], lines: Sequence[Sequence[Node]]) -> None:
    """Order each column by where its neighbours are, to and fro, as Sugiyama's method does."""
    neighbours = defaultdict[Node, list[Node]](list)
    for left, right in (pair for line in lines for pair in pairwise(line)):
        neighbours[left].append(right)
        neighbours[right].append(left)
    for _ in range(SWEEPS):
        for column in [*sorted(layers), *sorted(layers, reverse=True)]:
            heights = {node: y / len(layer) for layer in layers.values() for y, node in enumerate(layer)}
            mean = {
                node: sum(heights[n] for n in near) / len(near)
                if (near := neighbours[node])
                else heights[node]
                for node in layers[column]
            }
            layers[column].sort(key=mean.__getitem__)


def _draw_line(axis: Axes, points: Sequence[tuple[float, float]]) -> None:
    """Draw a line that leaves and enters tables, and passes others, horizontally."""
    half = BOX_WIDTH / 2
    vertices = [(points[0][0] + half, points[0][1])]
    for (_, above), (right, y) in pairwise(points):
        begin, end = right - 1 + half, right - half
        middle = (begin + end) / 2
        vertices += [(begin, above)] * 3 + [(middle, above), (middle, y), (end, y)]
    codes = [Path.MOVETO, *[Path.CURVE4] * (len(vertices) - 1)]
    axis.add_patch(PathPatch(Path(vertices, codes), fill=False, edgecolor=GREY, linewidth=1.2))
    axis.plot(*vertices[-1], marker=ARROW, color=GREY, markersize=18)


def _draw_table(
    axis: Axes,
    place: tuple[float, float],
    texts: Sequence[str],
    shares: tuple[float, float],
    colour: str,
    points: int,
) -> None:
    """Draw a box with a strip at its top that is filled as far as keys are made or failed."""
    (x, y), (made, failed) = place, (BOX_WIDTH * share for share in shares)
    left, top, strip = x - BOX_WIDTH / 2, y - BOX_HEIGHT / 2, BOX_HEIGHT / 8
    axis.add_patch(
        Rectangle((left, top), BOX_WIDTH, BOX_HEIGHT, facecolor="white", edgecolor=colour, linewidth=1.5)
    )
    axis.add_patch(Rectangle((left, top), made, strip, color=colour, linewidth=0))
    striped: dict[str, Any] = {"facecolor": ERROR, "edgecolor": "white", "hatch": "////", "linewidth": 0}
    axis.add_patch(Rectangle((left + made, top), failed, strip, **striped))
    shown = [text for text in texts if text]
    heights = [1 + text.count("\n") for text in shown]
    for row, text in enumerate(shown):
        middle = (0.2 + sum(heights[:row]) + heights[row] / 2) / (0.4 + sum(heights))
        middle = top + strip + (BOX_HEIGHT - strip) * middle
        style: dict[str, Any] = {"fontsize": points - (row > 0), "fontweight": "normal" if row else "bold"}
        axis.text(x, middle, text, ha="center", va="center", parse_math=False, **style)


def _wrapped(name: str, length: int) -> str:
    """Write a name in two lines if one is too short, and between words of it."""
    if len(name) <= length:
        return name
    words = re.findall(r"[A-Z]?[^A-Z]+|[A-Z]+", name)
    fitting = max((n for n in range(1, len(words)) if len("".join(words[:n])) <= length), default=0)
    lines = "".join(words[:fitting]) or name[:length], "".join(words[fitting:]) if fitting else name[length:]
    return "\n".join(shortened(line, length) for line in lines)
