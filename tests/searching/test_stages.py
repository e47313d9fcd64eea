"""What the next stage of a search begins with."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from prdarts_jax.searching import stages
from prdarts_jax.space import supernet
from prdarts_jax.space.spec import CELL_TYPES, Space


def test_kept_weights_are_those_of_the_same_edge_and_operation() -> None:
    """Cells that are the same, operations that both allow: to the bit; all else is new."""
    ops = ("skip_connect", "sep_conv_3x3", "dil_conv_3x3")
    before = Space(nodes=2, cells=5, channels=2, ops=ops)
    lists = tuple(tuple(ops[i % 2 : 2 + i % 2] for i in range(before.num_edges)) for _ in CELL_TYPES)
    after = dataclasses.replace(before, cells=6, edge_ops=lists)
    old, new = (jax.device_get(supernet.init(jax.random.key(i), s)) for i, s in enumerate((before, after)))
    kept = stages.kept_weights(old, new, before, after)
    assert jax.tree.structure(kept) == jax.tree.structure(new)
    assert all(np.shape(a) == np.shape(b) for a, b in zip(*map(jax.tree.leaves, (kept, new)), strict=True))
    was, fresh, now = (supernet.by_cell(w, s) for w, s in ((old, before), (new, after), (kept, after)))
    for i, spec in enumerate(after.layout):
        same = i < before.cells and before.layout[i] == spec
        for group in after.edge_groups(spec.kind):
            for op, edges in after.rows(spec.kind, group).items():
                for name, leaf in now[i]["edges"][group.name].get(op, {}).items():
                    for row, e in enumerate(edges):
                        source = was[i] if same else None
                        there = before.rows(spec.kind, group)[op].index(e)
                        expected = fresh[i]["edges"][group.name][op][name][row]
                        if source is not None:
                            expected = source["edges"][group.name][op][name][there]
                        np.testing.assert_array_equal(leaf[row], expected)
    np.testing.assert_array_equal(kept["stem"]["conv"], old["stem"]["conv"])
