"""Where the boxes and lines of a cell's picture go: a layered graph layout, free of any drawing library.

Columns alternate between states and the ops that lead to the next states; a line that has to pass a column gets a lane
in it, so that no line runs through a box (Sugiyama, Tagawa and Toda, "Methods for visual understanding of hierarchical
system structures", 1981). All lengths are inches; y grows upwards.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

INPUTS = ("$c_{k-2}$", "$c_{k-1}$")  # the states that a cell is given: the first two
_BOX = 0.25  # height of an op's label
_ROW_GAP = 0.11  # between two boxes of a column
_LANE_GAP = 0.2  # between a lane and its neighbour
_STATE = (0.46, 0.36)  # least width and height of a state
_LEAVING, _ARRIVING = 0.075, 0.105  # between the lines that leave a state, and between the arrows that reach it


@dataclass
class Box:
    """A state, an op's label, or a lane: the room in a column that a passing line takes."""

    kind: str  # state | op | lane
    column: int
    text: str = ""
    gid: str = ""  # pair-NODE-POSITION-OP-INPUT | state-NUMBER | output
    faint: bool = False  # an empty node, a `none` op
    width: float = 0.0
    height: float = 0.0
    x: float = 0.0  # of the centre
    y: float = 0.0


@dataclass(eq=False)
class Line:
    """A line from a state through an op's label to a state, or (op None) from a state to the output."""

    path: list[int]  # indices of boxes in neighbouring columns
    op: str | None
    faint: bool = False
    leaves: float = 0.0  # y at the first box
    arrives: float = 0.0  # y at the last box


@dataclass
class Layout:
    """The picture of a cell: boxes with their places, and the lines through them."""

    boxes: list[Box]
    lines: list[Line]
    columns: list[list[int]]  # indices of boxes, from the top down

    def links(self) -> list[tuple[int, int]]:
        """Every pair of boxes in neighbouring columns that a line joins."""
        return [link for line in self.lines for link in itertools.pairwise(line.path)]


def lay_out(
    nodes: Sequence[Sequence[tuple[str, int]]], concat: Sequence[int], *, label_width: Callable[[str], float]
) -> Layout:
    """Place a cell: few crossings, no box touches another, no line passes through a box.

    Args:
      nodes: per node the (op, input) pairs, as in Genotype.
      concat: the states that go to the output.
      label_width: the width of an op's label box in inches.

    >>> layout = lay_out([[("skip_connect", 0), ("none", 1)]], [2], label_width=lambda text: 0.1 * len(text))
    >>> [box.text for box in layout.boxes if box.kind == "op"], len(layout.lines)
    (['skip_connect', 'none'], 3)
    """
    layout = _layered(nodes, concat, label_width)
    _order(layout)
    _place(layout)
    for line in layout.lines:
        line.leaves, line.arrives = _port(layout, line, 0), _port(layout, line, -1)
    return layout


def state_name(state: int) -> str:
    """What a state is called in pictures: the two cell inputs as in the papers, nodes numbered from 0 (mathtext).

    >>> state_name(0), state_name(2)
    ('$c_{k-2}$', '0')
    """
    return INPUTS[state] if state < len(INPUTS) else str(state - len(INPUTS))


def _layered(
    nodes: Sequence[Sequence[tuple[str, int]]], concat: Sequence[int], label_width: Callable[[str], float]
) -> Layout:
    level = [0] * len(INPUTS)
    for pairs in nodes:
        level.append(1 + max((level[source] for _, source in pairs), default=0))
    last = 2 * max(level) + 1
    empty = [False] * len(INPUTS) + [not pairs for pairs in nodes]
    boxes = [
        *(Box("state", 2 * lv, state_name(i), f"state-{i}", empty[i], *_STATE) for i, lv in enumerate(level)),
        Box("state", last, "$c_k$", "output", False, *_STATE),
    ]
    output = len(level)  # the states have the first indices
    lines: list[Line] = []

    def add(*new: Box) -> list[int]:
        boxes.extend(new)
        return list(range(len(boxes) - len(new), len(boxes)))

    def lanes(source: int, stop: int) -> list[Box]:
        return [Box("lane", column) for column in range(2 * level[source] + 1, stop)]

    for state, pairs in enumerate(nodes, start=len(INPUTS)):
        column = 2 * level[state] - 1
        for k, (op, source) in enumerate(pairs):
            gid = f"pair-{state - len(INPUTS)}-{k}-{op}-{source}"
            [label] = add(Box("op", column, op, gid, op == "none", label_width(op), _BOX))
            lines.append(Line([source, *add(*lanes(source, column)), label, state], op, faint=op == "none"))
    for state in concat:
        lines.append(Line([state, *add(*lanes(state, last)), output], None, faint=empty[state]))
    for i, box in enumerate(boxes[: output + 1]):
        leaving = sum(line.path[0] == i for line in lines)
        arriving = sum(line.path[-1] == i for line in lines)
        box.height = max(box.height, _LEAVING * (leaving + 1), _ARRIVING * (arriving + 1))
    columns = [[i for i, box in enumerate(boxes) if box.column == c] for c in range(last + 1)]
    return Layout(boxes, lines, columns)


def _order(layout: Layout) -> None:
    """Order the boxes of every column so that few lines cross: barycentres and swaps from several starts, best kept."""
    left: list[list[int]] = [[] for _ in layout.boxes]
    right: list[list[int]] = [[] for _ in layout.boxes]
    for a, b in layout.links():
        right[a].append(b)
        left[b].append(a)

    def crossings(upper: int, lower: int, rank: Mapping[int, int]) -> int:
        return sum(rank[p] > rank[q] for side in (left, right) for p in side[upper] for q in side[lower])

    shuffle = random.Random(0)
    orders: list[tuple[int, int, list[list[int]]]] = []
    for start in range(24):
        columns = [list(column) for column in layout.columns]
        if start:
            for column in columns:
                shuffle.shuffle(column)
        rank = {box: r for column in columns for r, box in enumerate(column)}
        for sweep in range(12):
            side = right if sweep % 2 else left
            for column in columns[::-1] if sweep % 2 else columns:
                column.sort(key=lambda box: statistics.fmean(rank[n] for n in side[box]) if side[box] else rank[box])
                rank.update(zip(column, itertools.count()))
        improved = True
        while improved:
            improved = False
            for column in columns:
                for r, (a, b) in enumerate(itertools.pairwise(column)):
                    if crossings(b, a, rank) < crossings(a, b, rank):
                        column[r : r + 2] = b, a
                        rank.update({b: r, a: r + 1})
                        improved = True
                        break
        total = sum(crossings(a, b, rank) for column in columns for a, b in itertools.combinations(column, 2))
        # Of orders with as many crossings, and of an order and its mirror image: the one that follows the numbering.
        for order in (columns, [column[::-1] for column in columns]):
            unordered = sum(a > b for column in order for a, b in itertools.combinations(column, 2))
            orders.append((total, unordered, order))
    _, _, layout.columns = min(orders, key=lambda order: order[:2])


def _place(layout: Layout) -> None:
    """Every box near the height of its neighbours without touching; columns as far apart as their lines are steep."""
    boxes, links = layout.boxes, layout.links()
    pulls: list[list[tuple[int, float]]] = [[] for _ in boxes]
    for a, b in links:
        # Long lines are kept straight before short ones.
        weight = 4.0 ** sum(boxes[i].kind == "lane" for i in (a, b))
        pulls[a].append((b, weight))
        pulls[b].append((a, weight))
    stacks = []  # the boxes of a column, and the least distance of each from the first
    for column in layout.columns:
        offset = [0.0] * len(column)
        for r, (a, b) in enumerate(itertools.pairwise(column), start=1):
            gap = _LANE_GAP if "lane" in (boxes[a].kind, boxes[b].kind) else _ROW_GAP
            offset[r] = offset[r - 1] + (boxes[a].height + boxes[b].height) / 2 + gap
        stacks.append((column, np.array(offset)))
        for i, o in zip(column, offset, strict=True):
            boxes[i].y = offset[-1] / 2 - o
    for sweep in range(60):
        for column, steps in stacks[::-1] if sweep % 2 else stacks:
            # The little pull to its own height keeps a box without lines in place.
            pulled = [[(boxes[i].y, 1e-3), *((boxes[j].y, w) for j, w in pulls[i])] for i in column]
            weights = np.array([sum(w for _, w in pull) for pull in pulled])
            wish = np.array([sum(w * y for y, w in pull) for pull in pulled]) / weights
            for i, y in zip(column, _spread(wish, steps, weights), strict=True):
                boxes[i].y = float(y)
    x = 0.0
    for c, column in enumerate(layout.columns):
        if c:
            steep = max((abs(boxes[a].y - boxes[b].y) for a, b in links if boxes[b].column == c), default=0.0)
            x += min(0.34 + 0.2 * steep, 1.2)
        width = max((boxes[i].width for i in column), default=0.0)
        for i in column:
            boxes[i].x = x + width / 2
            boxes[i].width = width  # labels in line, and a lane runs straight past all of them
        x += width


def _spread(wish: np.ndarray, offset: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The heights nearest to the wished ones (weighted squares) that fall by the given steps or more: isotonic fit."""
    blocks: list[tuple[float, float, int]] = []  # mean, weight, length
    for target, weight in zip(wish + offset, weights, strict=True):
        blocks.append((float(target), float(weight), 1))
        while len(blocks) > 1 and blocks[-2][0] < blocks[-1][0]:
            (m1, w1, n1), (m2, w2, n2) = blocks[-2:]
            blocks[-2:] = [((m1 * w1 + m2 * w2) / (w1 + w2), w1 + w2, n1 + n2)]
    return np.repeat([m for m, _, _ in blocks], [n for _, _, n in blocks]) - offset


def _port(layout: Layout, line: Line, end: int) -> float:
    """The height at which a line leaves (end 0) or reaches (end -1) its state: ports in the order of the other ends."""
    box = layout.boxes[line.path[end]]
    mates = [other for other in layout.lines if other.path[end] == line.path[end]]
    mates.sort(key=lambda other: layout.boxes[other.path[1 if end == 0 else -2]].y)
    return box.y + box.height / (len(mates) + 1) * (mates.index(line) - (len(mates) - 1) / 2)
