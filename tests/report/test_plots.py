"""Pictures: what stands in a figure, and that nothing in it hides anything else."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.transforms import Bbox

from prdarts_jax.errors import UserError
from prdarts_jax.pictures.cell_layout import _spread, lay_out
from prdarts_jax.pictures.figure import stacked
from prdarts_jax.report import plots
from prdarts_jax.space.genotype import CELLS, Genotype, names

USER_CELL = Genotype(
    normal=(
        (("my$op", 0), ("my$op", 0), ("a_really_long_user_defined_operation", 1)),
        (),
        (("sep_conv_7x7", 2), ("none", 3)),
        (("skip_connect", 4), ("skip_connect", 4), ("max_pool_3x3", 0)),
        (("dil_conv_5x5", 0), ("dil_conv_5x5", 5)),
    ),
    normal_concat=(5, 6),
    reduce=((("none", 0),),),
    reduce_concat=(2,),
)
ALL = [*((n, Genotype.named(n)) for n in names()), ("user", USER_CELL)]
EVERY_CELL = pytest.mark.parametrize(
    ("genotype", "cell"), [pytest.param(g, c, id=f"{n}-{c}") for n, g in ALL for c in CELLS]
)


@functools.cache
def drawn_once(genotype: Genotype, cell: str) -> Figure:
    figure = plots.cell_diagram(genotype, cell, title="a title")
    figure.canvas.draw()
    return figure


def boxes_of(figure: Figure) -> list[Bbox]:
    return [p.get_window_extent() for p in figure.axes[0].patches if isinstance(p, FancyBboxPatch)]


def overlaps(boxes: list[Bbox]) -> int:
    return sum(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


@EVERY_CELL
def test_every_pair_is_one_label(genotype: Genotype, cell: str) -> None:
    nodes, _ = genotype.cell(cell)
    texts = drawn_once(genotype, cell).axes[0].texts
    drawn = [(t.get_gid(), t.get_text()) for t in texts if (t.get_gid() or "").startswith("pair-")]
    wanted = [(f"pair-{i}-{k}-{op}-{s}", op) for i, p in enumerate(nodes) for k, (op, s) in enumerate(p)]
    assert sorted(drawn) == sorted(wanted)


@EVERY_CELL
def test_nothing_overlaps(genotype: Genotype, cell: str) -> None:
    figure = drawn_once(genotype, cell)
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    texts = [t.get_window_extent(renderer) for t in figure.axes[0].texts]
    boxes = boxes_of(figure)
    assert overlaps(texts) == 0
    assert overlaps(boxes) == 0
    title = next(t.get_window_extent(renderer) for t in figure.axes[0].texts if t.get_text() == "a title")
    assert not any(title.overlaps(b) for b in boxes)
    # each text lies inside its own box, and everything inside the picture
    whole = figure.bbox
    for t in texts:
        assert whole.x0 <= t.x0 and t.x1 <= whole.x1 and whole.y0 <= t.y0 and t.y1 <= whole.y1
        if not np.allclose(t.bounds, title.bounds):
            assert any(b.x0 <= t.x0 and t.x1 <= b.x1 and b.y0 <= t.y0 and t.y1 <= b.y1 for b in boxes)


@EVERY_CELL
def test_no_line_runs_through_a_box_that_is_not_its_own(genotype: Genotype, cell: str) -> None:
    nodes, concat = genotype.cell(cell)
    figure = drawn_once(genotype, cell)
    curves = [p for p in figure.axes[0].patches if isinstance(p, PathPatch)]
    assert len(curves) == 2 * (sum(map(len, nodes)) + len(concat))  # a line and its white rim
    boxes = boxes_of(figure)
    ops = sum(map(len, nodes))
    for i, curve in enumerate(curves[::2]):
        points = curve.get_path().interpolated(1).to_polygons(closed_only=False)[0]
        dense = np.concatenate([np.linspace(a, b, 20) for a, b in itertools.pairwise(points)])
        xy = figure.axes[0].transData.transform(dense)
        touched = [
            b
            for b in boxes
            if ((b.x0 + 1 < xy[:, 0]) & (xy[:, 0] < b.x1 - 1) & (b.y0 + 1 < xy[:, 1]) & (xy[:, 1] < b.y1 - 1)).any()
        ]
        assert len(touched) == (1 if i < ops else 0)  # its own op's label; a line to the output has none


def test_lines_join_what_the_genotype_joins() -> None:
    for _, genotype in ALL:
        for cell in CELLS:
            nodes, concat = genotype.cell(cell)
            layout = lay_out(nodes, concat, label_width=lambda text: 1.0)
            drawn = []
            for line in layout.lines:
                path = [layout.boxes[i] for i in line.path]
                assert all(b.column == a.column + 1 and b.x > a.x for a, b in itertools.pairwise(path))
                ops = [b.text for b in path if b.kind == "op"]
                assert ops == ([line.op] if line.op is not None else [])
                drawn.append((path[0].gid, line.op, path[-1].gid))
            wanted = [(f"state-{s}", op, f"state-{i + 2}") for i, pairs in enumerate(nodes) for op, s in pairs]
            wanted += [(f"state-{s}", None, "output") for s in concat]
            assert sorted(map(str, drawn)) == sorted(map(str, wanted))


def test_lines_that_leave_one_state_do_not_share_a_port() -> None:
    nodes, concat = Genotype.named("BayesNAS_0.01").cell("reduce")
    layout = lay_out(nodes, concat, label_width=lambda text: 1.0)
    for i, box in enumerate(layout.boxes):
        for ends in (
            sorted(line.leaves for line in layout.lines if line.path[0] == i),
            sorted(line.arrives for line in layout.lines if line.path[-1] == i),
        ):
            assert all(b - a > 0.07 for a, b in itertools.pairwise(ends))
            assert all(box.y - box.height / 2 < y < box.y + box.height / 2 for y in ends)


def test_a_planar_cell_is_drawn_without_a_crossing() -> None:
    nodes = [[("a", 0), ("b", 1)], [("c", 2)], [("d", 3)]]
    layout = lay_out(nodes, [4], label_width=lambda text: 0.5)
    for one, two in itertools.combinations(layout.links(), 2):
        a, b, c, d = (layout.boxes[i] for i in (*one, *two))
        if a.column == c.column:
            assert (a.y - c.y) * (b.y - d.y) >= 0


def test_empty_nodes_are_faint_and_unused_outputs_absent() -> None:
    figure = plots.cell_diagram(Genotype.named("FairDARTS_g"), "normal")
    dashed = [p for p in figure.axes[0].patches if isinstance(p, FancyBboxPatch) and p.get_linestyle() != "-"]
    assert len(dashed) == 1
    layout = lay_out(*USER_CELL.cell("normal"), label_width=lambda text: 1.0)
    assert sorted(layout.boxes[line.path[0]].gid for line in layout.lines if line.op is None) == ["state-5", "state-6"]


def test_spread_is_the_least_squares_fit() -> None:
    rng = np.random.default_rng(0)
    wish, gaps, weights = rng.normal(size=6), rng.uniform(0.1, 0.5, 5), rng.uniform(0.5, 3, 6)
    offset = np.concatenate([[0], np.cumsum(gaps)])
    found = _spread(wish, offset, weights)
    assert (found[:-1] - found[1:] >= gaps - 1e-12).all()
    cost = (weights * (found - wish) ** 2).sum()
    for _ in range(2000):  # no feasible neighbour is better: a minimum of a convex problem
        other = found + rng.normal(scale=0.02, size=6)
        if (other[:-1] - other[1:] >= gaps).all():
            assert (weights * (other - wish) ** 2).sum() > cost


def test_op_families() -> None:
    families = {op: plots.op_family(op) for op in ("sep_conv_7x7", "dil_conv_3x3", "avg_pool_3x3", "skip_connect", "x")}
    assert list(families.values()) == ["sep", "dil", "pool", "skip", "other"]
    figure = plots.cell_diagram(Genotype.named("DARTS_V2"), "reduce")
    colours = {t.get_text(): t.get_color() for t in figure.axes[0].texts if t.get_gid().startswith("pair-")}
    assert colours == {op: plots.FAMILY_COLOURS[plots.op_family(op)] for op in ("max_pool_3x3", "skip_connect")}


def test_heatmap_shows_the_values() -> None:
    edges = [(j, n) for n in range(2, 6) for j in range(n)]
    history = np.random.default_rng(0).uniform(0.2, 0.7, (5, 14, 3))
    figure = plots.probability_heatmap(history, edges, ["none", "a$b", "c"], epochs=[3, 4, 5, 6, 7], label="P")
    panels = [a for a in figure.axes if a.images]
    assert len(panels) == 14
    for e, axes in enumerate(panels[:14]):
        image = axes.images[0]
        np.testing.assert_array_equal(image.get_array(), history[:, e].T)
        assert image.get_clim() == (0.2, 0.7) and list(image.get_extent()) == [2.5, 7.5, 2.5, -0.5]
    assert panels[4].get_title() == "0 to 1"
    assert [t.get_text() for t in panels[0].get_yticklabels()] == ["none", r"a\$b", "c"]
    figure.canvas.draw()
    assert overlaps([a.get_window_extent() for a in figure.axes]) == 0


@pytest.mark.parametrize("shape", [(0, 14, 3), (2, 13, 3), (2, 14, 2), (2, 14)])
def test_heatmap_refuses_shapes_that_do_not_fit(shape: tuple[int, ...]) -> None:
    edges = [(j, n) for n in range(2, 6) for j in range(n)]
    with pytest.raises(UserError, match=r"history: shape .*; allowed: \[epochs >= 1, 14 edges, 3 ops\]"):
        plots.probability_heatmap(np.zeros(shape), edges, ["none", "a", "b"])


def test_curves_and_bands() -> None:
    runs = [[(0, 1.0), (1, 2.0), (2, 4.0)], [(0, 3.0), (1, 2.0)], [(1, 5.0), (0, 2.0)]]
    band = plots.mean_and_std(runs)
    assert band == [(0, 2.0, statistics.stdev([1, 3, 2])), (1, 3.0, statistics.stdev([2, 2, 5]))]
    assert math.isclose(band[1][2], math.sqrt((1 + 1 + 4) / 2))
    assert plots.mean_and_std(runs[:1])[0] == (0, 1.0, 0.0)
    figure = plots.curves({"one": runs[0]}, "loss", title="t", bands={"all": band})
    line, mean = figure.axes[0].lines
    np.testing.assert_array_equal(line.get_xydata(), runs[0])
    np.testing.assert_array_equal(mean.get_xydata(), [(x, m) for x, m, _ in band])
    shade = figure.axes[0].collections[0].get_paths()[0].vertices
    assert math.isclose(shade[:, 1].max(), 3 + band[1][2]) and math.isclose(shade[:, 1].min(), 1.0)
    assert figure.axes[0].get_ylabel() == "loss"


def test_files_are_deterministic_and_safe(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    for suffix in ("svg", "png"):
        for i in range(2):
            plots.save(plots.cell_diagram(USER_CELL, "normal", title="<&> $"), tmp_path / f"{i}.{suffix}")
        assert (tmp_path / f"0.{suffix}").read_bytes() == (tmp_path / f"1.{suffix}").read_bytes()
    assert (tmp_path / "0.png").read_bytes()[:4] == b"\x89PNG"
    root = ET.parse(tmp_path / "0.svg").getroot()
    text = {"".join(t.itertext()).strip() for t in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"my$op", "sep_conv_7x7", "<&> $"} <= text
    assert "date" not in (tmp_path / "0.svg").read_text().lower()
    assert dict(matplotlib.rcParams) == before
    with pytest.raises(UserError, match=r"allowed: .png \| .svg"):
        plots.save(plots.curves({}, "y"), tmp_path / "x.pdf")
    assert not (tmp_path / "x.pdf").exists()


def test_a_genotype_shows_both_cells_below_each_other() -> None:
    """The heights add up, every pair of both cells is there, and no id twice."""
    genotype = Genotype.named("PRDARTS")
    root = ET.fromstring(genotype._repr_svg_())
    inner = [child for child in root if child.tag.endswith("svg")]
    assert [float(part.get("y", 0)) for part in inner] == [0, float(inner[0].get("height", 0))]
    size = [float(root.get(side, "").removesuffix("pt")) for side in ("width", "height")]
    assert size[1] == pytest.approx(sum(float(part.get("height", 0)) for part in inner), abs=0.01)
    assert size[0] == max(float(part.get("width", 0)) for part in inner)
    for part, cell in zip(inner, CELLS, strict=True):
        names = [group.get("id", "").split("-")[-2] for group in part.iter() if "-pair-" in group.get("id", "")]
        assert sorted(names) == sorted(op for pairs in genotype.cell(cell)[0] for op, _ in pairs)
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert stacked([plots.to_svg(plots.cell_diagram(genotype))]).count("<svg") == 2
