"""The cell of section 3 against loops in numpy, a convolution, finite differences and closed forms; all in float64."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax import lax
from jax.test_util import check_grads

from prdarts_jax import theory
from prdarts_jax.theory import CellWeights

NODES, WIDTH, CHANNELS, POSITIONS, SAMPLES = 4, 3, 2, 5, 3
SHAPE = {"nodes": NODES, "width": WIDTH, "channels": CHANNELS, "positions": POSITIONS}
CELLS = {"deep": (0,), "shallow": (0, 2)}


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def _case(roots: tuple[int, ...], seed: int = 0) -> tuple[CellWeights, jax.Array, jax.Array, jax.Array]:
    """Weights, gates [E,3], X [n, mbar, p], y [n]."""
    rng = np.random.default_rng(seed)
    weights = theory.init(jax.random.key(seed), **SHAPE, roots=roots)
    gates = rng.uniform(size=(len(theory.edges(NODES, roots)), 3))
    return weights, jnp.asarray(gates), jnp.asarray(rng.normal(size=(SAMPLES, CHANNELS, POSITIONS))), jnp.arange(3.0)


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_a_product_with_the_patches_is_a_convolution(kernel: int) -> None:
    rng = np.random.default_rng(kernel)
    z, weight = rng.normal(size=(4, 7)), rng.normal(size=(6, 4 * kernel))
    half = (kernel - 1) // 2
    expected = lax.conv_general_dilated(
        jnp.asarray(z[None]),
        jnp.asarray(weight.reshape(6, 4, kernel)),
        (1,),
        [(half, half)],
        dimension_numbers=("NCH", "OIH", "NCH"),
    )[0]
    np.testing.assert_allclose(weight @ np.asarray(theory.patches(jnp.asarray(z), kernel)), expected, atol=1e-12)


def _compiled(f, **static):  # type: ignore[no-untyped-def]
    """One program in the place of dozens of small ones."""
    return oracles.quick_jit(lambda *args: f(*args, **static))


def _conv(weight: np.ndarray, z: np.ndarray) -> np.ndarray:
    """tanh(W Phi(Z)) / sqrt(m), each entry by its definition."""
    channels, positions = z.shape
    out = np.zeros((len(weight), positions))
    for o in range(len(weight)):
        for t in range(positions):
            for i in range(channels):
                for j, place in enumerate((t - 1, t, t + 1)):
                    if 0 <= place < positions:
                        out[o, t] += weight[o, 3 * i + j] * z[i, place]
    return np.tanh(out) / np.sqrt(len(weight))


@pytest.mark.parametrize("cell", CELLS)
def test_nodes_output_and_loss_by_loops(cell: str) -> None:
    roots = CELLS[cell]
    weights, gates, x, y = _case(roots)
    stems, convs, heads = map(np.asarray, weights)
    values = _compiled(theory.node_values, sigma=jnp.tanh, roots=roots)
    u = []
    for one in np.asarray(x):
        nodes, e = [], 0
        for node in range(NODES):
            if node in roots:
                nodes.append(_conv(stems[roots.index(node)], one))
                continue
            total = np.zeros((WIDTH, POSITIONS))
            for source in range(roots[-1] if node > roots[-1] else 0, node):
                total += gates[e, 1] * nodes[source] + gates[e, 2] * _conv(convs[e], nodes[source])
                e += 1
            nodes.append(total)
        u.append(sum((head * node).sum() for head, node in zip(heads, nodes, strict=True)))
        np.testing.assert_allclose(values(weights, gates, jnp.asarray(one)), nodes, atol=1e-12)
    expected = np.mean((np.array(u) - np.asarray(y)) ** 2) / 2
    found = _compiled(theory.loss, sigma=jnp.tanh, roots=roots)(weights, gates, x, y)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_shallow_cell_is_the_sum_of_its_branches() -> None:
    weights, gates, x, _ = _case((0, 2))
    assert theory.edges(NODES, (0, 2)) == ((0, 1), (2, 3))

    def outputs(weights: CellWeights, gates: jax.Array, roots: tuple[int, ...]) -> jax.Array:
        of_one = _compiled(
            lambda w, g, x: jax.vmap(lambda one: theory.output(w, g, one, sigma=jnp.tanh, roots=roots))(x)
        )
        return of_one(weights, gates, x)

    branches = [
        outputs(CellWeights(*(leaf[part] for leaf, part in zip(weights, parts, strict=True))), gates[parts[1]], (0,))
        for parts in (
            (slice(0, 1), slice(0, 1), slice(0, 2)),
            (slice(1, 2), slice(1, 2), slice(2, 4)),
        )
    ]
    np.testing.assert_allclose(outputs(weights, gates, (0, 2)), branches[0] + branches[1], rtol=1e-12)


@pytest.mark.parametrize("name", theory.ACTIVATIONS)
def test_gradients_by_finite_differences(name: str) -> None:
    weights, gates, x, y = _case((0,))
    sigma = theory.ACTIVATIONS[name]
    f = jax.jit(lambda weights, gates: theory.loss(weights, gates, x, y, sigma=sigma))
    check_grads(f, (weights, gates), order=1, modes=["rev"], rtol=1e-6, atol=1e-6)


def test_gram_matrix_of_two_samples_by_hand() -> None:
    """One node: u = <V, tanh(W Phi)> / sqrt(m); du/dV = X^(0), du/dW = (V * tanh'(W Phi)) Phi^T / sqrt(m)."""
    weights = theory.init(jax.random.key(3), nodes=1, width=WIDTH, channels=CHANNELS, positions=POSITIONS)
    x = np.random.default_rng(3).normal(size=(2, CHANNELS, POSITIONS))
    w, v = np.asarray(weights.stems[0]), np.asarray(weights.heads[0])
    rows = []
    for one in x:
        phi = np.asarray(theory.patches(jnp.asarray(one), 3))
        h = np.tanh(w @ phi)
        rows.append(np.concatenate([(h / np.sqrt(WIDTH)).ravel(), ((v * (1 - h**2)) @ phi.T / np.sqrt(WIDTH)).ravel()]))
    expected = np.array([[a @ b for b in rows] for a in rows])
    found = _compiled(theory.gram, sigma=jnp.tanh)(weights, jnp.zeros((0, 3)), jnp.asarray(x))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_gram_matrix_by_finite_differences(cell: str) -> None:
    """u(W + eps J^T v) - u(W - eps J^T v) = 2 eps G v + O(eps^3)."""
    roots = CELLS[cell]
    weights, gates, x, _ = _case(roots, seed=1)

    def u(weights: CellWeights) -> jax.Array:
        return jax.vmap(lambda one: theory.output(weights, gates, one, sigma=jnp.tanh, roots=roots))(x)

    outputs, pull = oracles.quick_jit(u), oracles.quick_jit(lambda w, v: jax.vjp(u, w)[1](v)[0])
    g = _compiled(theory.gram, sigma=jnp.tanh, roots=roots)(weights, gates, x)
    for v in jnp.eye(SAMPLES):
        moved = [jax.tree.map(lambda a, b, eps=eps: a + eps * b, weights, pull(weights, v)) for eps in (1e-5, -1e-5)]
        np.testing.assert_allclose((outputs(moved[0]) - outputs(moved[1])) / 2e-5, g @ v, rtol=1e-6, atol=1e-6)


def test_descent_of_a_linear_model_has_the_rates_of_its_gram_matrix() -> None:
    """With features that do not move, u is linear in the heads: u_k - y = (I - eta/n G)^k (u_0 - y), exactly."""
    weights, gates, x, y = _case((0,))
    frozen = lambda z: lax.stop_gradient(jnp.tanh(z))  # noqa: E731
    g = np.asarray(_compiled(theory.gram, sigma=frozen)(weights, gates, x))
    rate = 0.5 * SAMPLES / np.linalg.eigvalsh(g)[-1]
    descend = _compiled(theory.descend, rate=float(rate), steps=30, sigma=frozen)
    _, losses = descend(weights, gates, x, y)
    u = oracles.quick_jit(jax.vmap(lambda one: theory.output(weights, gates, one, sigma=frozen)))(x)
    residual = np.asarray(u - y)
    expected = []
    for _ in range(30):
        expected.append(residual @ residual / (2 * SAMPLES))
        residual = residual - rate / SAMPLES * g @ residual
    np.testing.assert_allclose(losses, expected, rtol=1e-9)
    assert losses[-1] < 0.1 * losses[0]


def test_a_step_moves_every_weight_against_its_gradient() -> None:
    weights, gates, x, y = _case((0, 2))
    settings = {"sigma": jax.nn.softplus, "roots": (0, 2)}
    moved, _ = _compiled(theory.descend, rate=0.01, steps=1, **settings)(weights, gates, x, y)
    gradient = _compiled(jax.grad(theory.loss), **settings)(weights, gates, x, y)
    for before, after, slope in zip(weights, moved, gradient, strict=True):
        assert float(jnp.abs(slope).max()) > 1e-6
        np.testing.assert_allclose(after, before - 0.01 * slope, rtol=1e-12)


def test_rate_sum_and_what_it_depends_on() -> None:
    gates = jnp.asarray(np.random.default_rng(5).uniform(size=(6, 3)))
    at = {edge: np.asarray(gates)[e] for e, edge in enumerate(theory.edges(4))}
    expected = (
        at[0, 3][2] ** 2 + at[1, 3][2] ** 2 * at[0, 1][1] ** 2 + at[2, 3][2] ** 2 * at[0, 2][1] ** 2 * at[1, 2][1] ** 2
    )
    np.testing.assert_allclose(_compiled(theory.rate_sum, nodes=4)(gates), expected, rtol=1e-12)
    np.testing.assert_allclose(theory.rate_sum(gates, 4, first=2), at[2, 3][2] ** 2, rtol=1e-12)
    depends = np.asarray(_compiled(jax.grad(theory.rate_sum), nodes=4)(gates)) != 0
    shared_skips = [[False, target < 3, target == 3] for _, target in theory.edges(4)]
    assert depends.tolist() == shared_skips


def test_eigenvalues_of_pairs_by_numpy() -> None:
    x = np.random.default_rng(6).normal(size=(3, 2, 4))
    x /= np.linalg.norm(x, axis=(1, 2), keepdims=True)
    printed, meant = oracles.quick_jit(theory.pair_eigenvalues)(jnp.asarray(x))
    for i in range(3):
        for j in range(3):
            ij = (x[i] * x[j]).sum()
            np.testing.assert_allclose(printed[i, j], np.linalg.eigvalsh([[ij, ij], [ij, 1.0]])[0], atol=1e-12)
            np.testing.assert_allclose(meant[i, j], 1 - abs(ij), atol=1e-12)


def test_architectures_are_mapped() -> None:
    weights, _, x, _ = _case((0,))
    gates = jnp.asarray(np.random.default_rng(7).uniform(size=(2, 6, 3)))
    gram = _compiled(theory.gram, sigma=jnp.tanh)
    many = oracles.quick_jit(jax.vmap(lambda g: theory.gram(weights, g, x, sigma=jnp.tanh)))(gates)
    for one, alone in zip(many, gates, strict=True):
        np.testing.assert_allclose(one, gram(weights, alone, x), rtol=1e-9)
