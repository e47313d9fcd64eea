"""Operations, cells and the whole search network against torch.nn layers, in float64, values and all gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from prdarts_jax.gates import Gates
from prdarts_jax.ops.layer_set import LayerSet, fast_layers, reference_layers
from prdarts_jax.ops.primitives import PRIMITIVES
from prdarts_jax.space import supernet
from prdarts_jax.space.cell import declare_edges, mixed_nodes
from prdarts_jax.space.cell_reference import mixed_nodes_reference
from prdarts_jax.space.spec import CELL_TYPES, Space

pytestmark = pytest.mark.reference

LEAVES = {"fast": fast_layers(), "reference": reference_layers()}
SIZES = {1: ((5, 8),), 2: ((5, 8), (6, 7))}  # by stride: odd and even, not square
TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}


def _assert_close(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == np.float64, jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, **TOLERANCE, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", PRIMITIVES)
@pytest.mark.parametrize("leaves", LEAVES.values(), ids=LEAVES)
def test_primitive(name: str, stride: int, leaves: LayerSet) -> None:
    torch = oracles.require_torch()
    primitive, channels = PRIMITIVES[name], 4
    with jax.enable_x64(True):
        params = oracles.float64(oracles.drawn(primitive.weights(channels, stride)))
        images = [oracles.normal(i, (3, *size, channels)) for i, size in enumerate(SIZES[stride])]
        cotangents = [oracles.normal(9, (3, -(-h // stride), -(-w // stride), channels)) for h, w in SIZES[stride]]

        @oracles.quick_jit
        def run(params: Any, images: list[jax.Array], cotangents: list[jax.Array]) -> Any:
            ys, pull = jax.vjp(lambda p, xs: [primitive.apply(p, x, stride, leaves) for x in xs], params, images)
            return ys, pull(cotangents)

        ys, (dparams, dimages) = run(params, [jnp.asarray(x) for x in images], [jnp.asarray(c) for c in cotangents])
        leaf = oracles.torch_leaves(params)
        inputs = [torch.tensor(x, requires_grad=True) for x in images]
        for x, y, ct in zip(inputs, ys, cotangents, strict=True):
            out = oracles.nhwc(oracles.torch_primitive(name, leaf, oracles.nchw(x), stride))
            np.testing.assert_allclose(y, out.detach().numpy(), **TOLERANCE)
            out.backward(torch.tensor(ct))
        _assert_close(dparams, oracles.torch_grads(leaf))
        _assert_close(dimages, oracles.torch_grads(inputs))


def test_primitives_of_the_table_are_all_covered() -> None:
    assert len(PRIMITIVES) == 10


def test_ties_of_max_pooling_go_where_torch_sends_them() -> None:
    torch = oracles.require_torch()
    with jax.enable_x64(True):
        x = np.random.default_rng(0).integers(0, 3, (2, 7, 6, 3)).astype(np.float64)
        inputs = torch.tensor(x, requires_grad=True)
        for stride in (1, 2):
            y, pull = jax.vjp(lambda x, stride=stride: LEAVES["fast"].max_pool(x, stride), jnp.asarray(x))
            ct = oracles.normal(1, y.shape)
            out = oracles.nhwc(torch.nn.MaxPool2d(3, stride, 1)(oracles.nchw(inputs)))
            (expected,) = torch.autograd.grad(out, inputs, torch.tensor(ct))
            np.testing.assert_allclose(pull(jnp.asarray(ct))[0], expected.numpy(), **TOLERANCE)


# --- cells and networks -----------------------------------------------------------------------------------------------

_FEW = ("none", "max_pool_3x3", "skip_connect", "dil_conv_3x3")


def _random_gates(space: Space, seed: int) -> dict[str, np.ndarray]:
    return {
        kind: np.where(space.allowed[kind], oracles.normal(seed + i, (space.num_edges, space.num_ops)), 0.0)
        for i, kind in enumerate(CELL_TYPES)
    }


@pytest.mark.parametrize("kind", CELL_TYPES)
@pytest.mark.parametrize(
    "space",
    [Space(nodes=1), Space(nodes=2, ops=("skip_connect", "avg_pool_3x3", "dil_conv_3x3"), pool_norm=False)],
    ids=["all-ops", "two-nodes"],
)
def test_cell(space: Space, kind: str) -> None:
    """The sparse cell (all operations executed) and the reference cell; torch sums node by node.

    Of all eight operations the sparse cell only: the reference is held against it, to rounding, in test_cell.py.
    """
    torch = oracles.require_torch()
    with jax.enable_x64(True):
        weights = oracles.float64(oracles.drawn(declare_edges(space, kind, 4)))
        gates = _random_gates(space, 3)[kind]
        s0, s1 = oracles.normal(5, (2, 7, 6, 4)), oracles.normal(6, (2, 7, 6, 4))
        executed = oracles.all_executed(space, kind)

        def sparse(w: Any, g: jax.Array, s0: jax.Array, s1: jax.Array) -> jax.Array:
            return mixed_nodes(w, g, executed, s0, s1, space=space, kind=kind)

        def dense(w: Any, g: jax.Array, s0: jax.Array, s1: jax.Array) -> jax.Array:
            return mixed_nodes_reference(w, g, s0, s1, space=space, kind=kind)

        leaf, g, t0, t1 = (oracles.torch_leaves(v) for v in (weights, gates, s0, s1))
        nodes = oracles.torch_cell(space, kind, leaf, g, oracles.nchw(t0), oracles.nchw(t1))
        expected = torch.stack([oracles.nhwc(n) for n in nodes])
        ct = oracles.normal(7, tuple(expected.shape))
        expected.backward(torch.tensor(ct))

        for network in (sparse,) if space.nodes == 1 else (sparse, dense):

            @oracles.quick_jit
            def run(ct: jax.Array, *args: Any, network: Any = network) -> Any:
                out, pull = jax.vjp(network, *args)
                return out, pull(ct)

            out, found = run(jnp.asarray(ct), weights, *(jnp.asarray(v) for v in (gates, s0, s1)))
            np.testing.assert_allclose(out, expected.detach().numpy(), **TOLERANCE)
            _assert_close(found, tuple(oracles.torch_grads(v) for v in (leaf, g, t0, t1)))


@pytest.mark.parametrize("head_norm", [True, False])
def test_supernet(head_norm: bool) -> None:
    """Stem, preprocessing after a reduction and after none, both cell types, head; odd image size, loss gradients."""
    torch = oracles.require_torch()
    ops = _FEW if head_norm else ("skip_connect", "none")
    space = Space(nodes=1, cells=4, channels=4, classes=5, in_channels=2, ops=ops, head_norm=head_norm)
    assert [c.kind[0] for c in space.layout] == list("nrrn")
    with jax.enable_x64(True):
        weights = oracles.float64(oracles.drawn(supernet.declare(space)))
        gates, images = _random_gates(space, 4), oracles.normal(8, (4, 11, 9, 2))
        labels = np.array([0, 3, 4, 1])
        executed = {kind: oracles.all_executed(space, kind) for kind in CELL_TYPES}

        def loss(weights: Any, gates: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits, _ = supernet.apply(weights, Gates(gates, executed), images, space=space)
            return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(4), labels]), logits

        run = oracles.quick_jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
        (value, logits), found = run(weights, {k: jnp.asarray(g) for k, g in gates.items()}, jnp.asarray(images))

        leaf, g, x = (oracles.torch_leaves(v) for v in (weights, gates, images))
        theirs = oracles.torch_supernet(space, leaf, g, x)
        their_loss = torch.nn.CrossEntropyLoss()(theirs, torch.tensor(labels))
        their_loss.backward()
        np.testing.assert_allclose(logits, theirs.detach().numpy(), **TOLERANCE)
        assert float(value) == pytest.approx(their_loss.item(), rel=1e-10)
        _assert_close(found, tuple(oracles.torch_grads(v) for v in (leaf, g, x)))


def test_absent_torch_fails_in_ci_and_skips_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(oracles.importlib, "import_module", absent)
    for value, outcome in (("true", pytest.fail.Exception), ("", pytest.skip.Exception)):
        monkeypatch.setenv("CI", value)
        with pytest.raises(outcome, match="torch"):
            oracles.require_torch()
