"""The cell of the paper's theory: one-dimensional convolutions, skips and zeros, a squared loss (section 3, eq. 3-6).

    X^(0) = conv(W^(0), X),   conv(W; Z) = sigma(W Phi(Z)) / sqrt(m)                                              (3)
    X^(l) = sum_{s<l} ( a_{s,1} zero + a_{s,2} X^(s) + a_{s,3} conv(W_s^(l); X^(s)) ),   l = 1..h-1               (4)
    u = sum_s <W_s, X^(s)>,   F = 1/(2n) sum_i (u_i - y_i)^2                                                      (5)
    W <- W - eta dF/dW   for all weights of the cell, on all samples                                              (6)

Every function takes one architecture, `gates` [E,3], and is mapped over many by `jax.vmap`. The dtype is that of the
arguments; rates of convergence over several orders of magnitude need float64 (`jax.enable_x64`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

ZERO, SKIP, CONV = 0, 1, 2  # columns of the gates; the paper counts them from 1

Sigma = Callable[[jax.Array], jax.Array]
# Lipschitz, smooth, analytic and no polynomials, as the theorems ask.
ACTIVATIONS: dict[str, Sigma] = {"softplus": jax.nn.softplus, "sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh}


class CellWeights(NamedTuple):
    """All that gradient descent moves.

    Attributes:
      stems: [R, m, k mbar]: W^(0) of each root.
      convs: [E, m, k m]: W_s^(l) of each edge, in the order of `edges`.
      heads: [h, m, p]: W_s of each node.
    """

    stems: jax.Array
    convs: jax.Array
    heads: jax.Array


def edges(nodes: int, roots: tuple[int, ...] = (0,)) -> tuple[tuple[int, int], ...]:
    """The edges (s, l) of a cell, node-major. A root is fed by the input; other nodes by those of their branch before.

    The deep cell A of Theorem 4 has one root, the shallow cell B has two: nodes / 2 begins a branch of its own.

    >>> edges(4)
    ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
    >>> edges(4, (0, 2))
    ((0, 1), (2, 3))
    """
    found = []
    for node in range(nodes):
        first = max(root for root in roots if root <= node)
        found += [(source, node) for source in range(first, node)]
    return tuple(found)


def init(
    key: jax.Array,
    *,
    nodes: int,
    width: int,
    channels: int,
    positions: int,
    kernel: int = 3,
    roots: tuple[int, ...] = (0,),
) -> CellWeights:
    """Weights drawn from N(0, 1), as the theorems assume.

    Args:
      key: PRNG key.
      nodes: h.
      width: m, channels of every node.
      channels, positions: mbar and p of the input X [mbar, p].
      kernel: k, odd.
      roots: nodes that the input feeds.

    >>> [leaf.shape for leaf in init(jax.random.key(0), nodes=3, width=8, channels=2, positions=5)]
    [(1, 8, 6), (3, 8, 24), (3, 8, 5)]
    """
    stem, conv, head = jax.random.split(key, 3)
    return CellWeights(
        jax.random.normal(stem, (len(roots), width, kernel * channels)),
        jax.random.normal(conv, (len(edges(nodes, roots)), width, kernel * width)),
        jax.random.normal(head, (nodes, width, positions)),
    )


def patches(z: jax.Array, kernel: int) -> jax.Array:
    """Phi(Z) [k m, p] of Z [m, p]: row i k + j, column t is Z[i, t + j - (k-1)/2], zero outside.

    >>> patches(jnp.array([[1.0, 2.0, 3.0]]), 3).tolist()
    [[0.0, 1.0, 2.0], [1.0, 2.0, 3.0], [2.0, 3.0, 0.0]]
    """
    half, positions = (kernel - 1) // 2, z.shape[1]
    padded = jnp.pad(z, ((0, 0), (half, half)))
    return jnp.stack([padded[:, j : j + positions] for j in range(kernel)], axis=1).reshape(-1, positions)


def conv(weight: jax.Array, z: jax.Array, sigma: Sigma) -> jax.Array:
    """conv(W; Z) = sigma(W Phi(Z)) / sqrt(m)   (eq. 3): W [m, k c], Z [c, p] -> [m, p].

    >>> float(conv(jnp.ones((4, 3)), jnp.ones((1, 1)), jnp.tanh)[0, 0] * 2) == float(jnp.tanh(1.0))
    True
    """
    return sigma(weight @ patches(z, weight.shape[1] // z.shape[0])) / math.sqrt(weight.shape[0])


def node_values(
    weights: CellWeights, gates: jax.Array, x: jax.Array, *, sigma: Sigma, roots: tuple[int, ...] = (0,)
) -> jax.Array:
    """X^(0), ..., X^(h-1) [h, m, p]   (eq. 4) of one sample X [mbar, p]; gates [E,3]: zero, skip, convolution."""
    nodes: list[jax.Array] = []
    places = edges(weights.heads.shape[0], roots)
    for node in range(weights.heads.shape[0]):
        if node in roots:
            nodes.append(conv(weights.stems[roots.index(node)], x, sigma))
            continue
        terms = [
            gates[e, SKIP] * nodes[source] + gates[e, CONV] * conv(weights.convs[e], nodes[source], sigma)
            for e, (source, target) in enumerate(places)
            if target == node
        ]
        nodes.append(sum(terms[1:], terms[0]))
    return jnp.stack(nodes)


def output(
    weights: CellWeights, gates: jax.Array, x: jax.Array, *, sigma: Sigma, roots: tuple[int, ...] = (0,)
) -> jax.Array:
    """u = sum_s <W_s, X^(s)> of one sample   (eq. 5), a scalar."""
    return jnp.sum(weights.heads * node_values(weights, gates, x, sigma=sigma, roots=roots))


def loss(
    weights: CellWeights,
    gates: jax.Array,
    x: jax.Array,
    y: jax.Array,
    *,
    sigma: Sigma,
    roots: tuple[int, ...] = (0,),
) -> jax.Array:
    """F = 1/(2n) sum_i (u_i - y_i)^2   (eq. 5): X [n, mbar, p], y [n] -> a scalar."""
    u = jax.vmap(lambda one: output(weights, gates, one, sigma=sigma, roots=roots))(x)
    return jnp.mean((u - y) ** 2) / 2


def descend(
    weights: CellWeights,
    gates: jax.Array,
    x: jax.Array,
    y: jax.Array,
    *,
    rate: jax.Array | float,
    steps: int,
    sigma: Sigma,
    roots: tuple[int, ...] = (0,),
) -> tuple[CellWeights, jax.Array]:
    """Full-batch gradient descent with one rate on all weights   (eq. 6).

    Returns:
      the weights after `steps` steps, and F before each of them [steps].

    >>> weights = init(jax.random.key(0), nodes=2, width=4, channels=1, positions=2)
    >>> case = jnp.ones((1, 3)), jnp.ones((1, 1, 2)), jnp.ones(1)
    >>> _, losses = descend(weights, *case, rate=0.1, steps=3, sigma=jnp.tanh)
    >>> bool(losses[2] < losses[0])
    True
    """

    def step(weights: CellWeights, _: None) -> tuple[CellWeights, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(weights, gates, x, y, sigma=sigma, roots=roots)
        return jax.tree.map(lambda w, g: w - rate * g, weights, gradient), value

    return lax.scan(step, weights, None, length=steps)


def jacobian(
    weights: CellWeights, gates: jax.Array, x: jax.Array, *, sigma: Sigma, roots: tuple[int, ...] = (0,)
) -> CellWeights:
    """du_i/dW: a leaf [n, ...] for each leaf of the weights."""
    of_one = jax.grad(lambda w, one: output(w, gates, one, sigma=sigma, roots=roots))
    return jax.vmap(of_one, in_axes=(None, 0))(weights, x)


def gram(
    weights: CellWeights, gates: jax.Array, x: jax.Array, *, sigma: Sigma, roots: tuple[int, ...] = (0,)
) -> jax.Array:
    """G = J J^T [n,n], J = du/dW. To first order u - y shrinks by (I - eta/n G) in a step of eq. 6.

    Its spectrum is `jnp.linalg.eigvalsh(gram(...))`; eta/n times the smallest eigenvalue is the rate in which eq. 6
    ends.
    """
    rows = jacobian(weights, gates, x, sigma=sigma, roots=roots)
    return jax.tree.reduce(jnp.add, jax.tree.map(lambda j: jnp.einsum("ia,ja->ij", *[j.reshape(len(x), -1)] * 2), rows))


def rate_sum(gates: jax.Array, nodes: int, *, first: int = 0, roots: tuple[int, ...] = (0,)) -> jax.Array:
    """A(a) = sum_{s=first}^{h-2} (a_{s,3}^(h-1))^2 prod_{t=first}^{s-1} (a_{t,2}^(s))^2   (Theorem 1).

    With first = h/2 it is what Theorem 4 adds for the shallow cell. (The theorem's sum runs to h-1, which would need an
    edge from the last node to itself.)

    Args:
      gates: [E,3].
      nodes: h.
      first: the node at which sum and products begin.
      roots: of the cell whose gates they are.

    >>> float(rate_sum(jnp.full((6, 3), 0.5), 4)) == 0.25 + 0.25**2 + 0.25**3
    True
    """
    places = {edge: e for e, edge in enumerate(edges(nodes, roots))}
    total = jnp.zeros((), gates.dtype)
    for source in range(first, nodes - 1):
        term = gates[places[source, nodes - 1], CONV] ** 2
        for earlier in range(first, source):
            term = term * gates[places[earlier, source], SKIP] ** 2
        total = total + term
    return total


def pair_eigenvalues(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Smallest eigenvalue of the matrix K_ij of every two samples, as Theorem 1 prints it and as it may be meant.

        printed: [<X_i,X_j>, <X_i,X_j>; <X_j,X_i>, <X_j,X_j>]      meant: [<X_i,X_i>, <X_i,X_j>; <X_j,X_i>, <X_j,X_j>]

    For i = j all four numbers are equal in both, and the smallest eigenvalue is 0. Of the second it is 1 - |<X_i,X_j>|
    for unit samples; of the first it is below 0 where the samples are obtuse.

    Args:
      x: [n, mbar, p].

    Returns:
      two arrays [n,n].

    >>> x = jnp.eye(2).reshape(2, 1, 2)
    >>> [[[round(float(v), 6) + 0.0 for v in row] for row in found] for found in pair_eigenvalues(x)]
    [[[0.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]]
    """
    products = jnp.einsum("iab,jab->ij", x, x)
    own = jnp.broadcast_to(jnp.diagonal(products)[:, None], products.shape)

    def smallest(corner: jax.Array) -> jax.Array:
        matrices = jnp.stack([jnp.stack([corner, products], -1), jnp.stack([products, own.T], -1)], -2)
        return jnp.linalg.eigvalsh(matrices)[..., 0]

    return smallest(products), smallest(own)
