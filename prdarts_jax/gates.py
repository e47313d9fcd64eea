"""Gates: samplers, activation probabilities, the choice of the executed operations.

u ~ Uniform(0,1);  g_bar = sigmoid((ln u - ln(1-u) + beta) / tau)                                     (section 4.1)
g = min(1, max(0, a + (b-a) g_bar));  P(g != 0) = sigmoid(beta - tau ln(-a/b))                          (Theorem 3)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeAlias

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, PRNGKeyArray

AnyArray: TypeAlias = jax.Array | np.ndarray  # on a device, or on the host as `at_epoch` sees the architecture
Scalar: TypeAlias = AnyArray | float | np.floating  # a number, or an array of one that enters a program


@flax.struct.dataclass
class Gates:
    """A sample of the architecture. Each leaf is per cell type; leaves may carry a leading axis over the cells.

    Attributes:
      ops: {"normal", "reduce"} -> float32[E,O]: the multipliers; zero for what is not executed.
      executed: int32[E,K]: operations that are computed; O (one past the last) computes nothing in that term.
      edges: float32[E] multipliers of all that an edge gives, channels that pass its operations by included; or None.
      stats: what a strategy wants to keep of the sample (masks for its penalty, numbers for the log).
    """

    ops: dict[str, jax.Array]
    executed: dict[str, jax.Array]
    edges: dict[str, jax.Array] | None = None
    stats: dict[str, Any] = flax.struct.field(default_factory=dict)

    def of_cell(self, kind: str, cell: int | jax.Array) -> Gates:
        """The gates of one cell of the network: row `cell` of leaves with a leading cell axis, else all of them."""

        def pick(leaf: jax.Array, ndim: int) -> jax.Array:
            return leaf[cell] if leaf.ndim == ndim + 1 else leaf

        edges = None if self.edges is None else {kind: pick(self.edges[kind], 1)}
        return Gates({kind: pick(self.ops[kind], 2)}, {kind: pick(self.executed[kind], 2)}, edges)

    def terms(self, kind: str) -> tuple[jax.Array, jax.Array]:
        """(values float32[E,K], executed int32[E,K]) of a cell type: what the sparse path computes with."""
        ops, executed = self.ops[kind], self.executed[kind]
        padded = jnp.pad(ops, ((0, 0), (0, 1)))
        values = jnp.take_along_axis(padded, executed, axis=1)
        if self.edges is not None:
            values = values * self.edges[kind][:, None]
        return values, executed

    def dense(self, kind: str) -> jax.Array:
        """float32[E,O]: the same multipliers for all operations; not executed means zero, without a gradient."""
        mask = executed_mask(self.executed[kind], self.ops[kind].shape[1])
        values = jnp.where(mask, self.ops[kind], 0.0)
        return values if self.edges is None else values * self.edges[kind][:, None]


def executed_mask(executed: Int[AnyArray, "E K"], num_ops: int) -> Bool[jax.Array, "E {num_ops}"]:
    """bool[E,O] of the operations in int32[E,K].

    >>> executed_mask(jnp.array([[2, 0]]), 3).tolist()
    [[True, False, True]]
    """
    return jnp.any(executed[:, :, None] == jnp.arange(num_ops, dtype=executed.dtype)[None, None, :], axis=1)


def uniform_open(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[jax.Array, ...]:
    """Uniform on the open interval (0,1), float32; `jax.random.uniform` alone can return 0.

    >>> bool((uniform_open(jax.random.key(0), (1000,)) > 0).all())
    True
    """
    tiny = np.finfo(np.float32).tiny
    return jnp.minimum(jax.random.uniform(key, shape, jnp.float32, minval=tiny, maxval=1.0), np.float32(1 - 2**-24))


def gumbel(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[jax.Array, ...]:
    """-ln(-ln u), u uniform on (0,1), float32: finite. The argmax of ln p + gumbel has the distribution p.

    >>> round(float(gumbel(jax.random.key(0), (100_000,)).mean()), 1)  # Euler's constant
    0.6
    """
    return -jnp.log(-jnp.log(uniform_open(key, shape)))


def check_interval(a: float, b: float) -> None:
    """Raises UserError unless a < 0 and b > 1: otherwise a gate could not be exactly 0 or exactly 1."""
    from prdarts_jax.errors import UserError

    if not a < 0:
        raise UserError(f"method.options.a: {a!r} is not possible; allowed: < 0 (gates could never be exactly 0)")
    if not b > 1:
        raise UserError(f"method.options.b: {b!r} is not possible; allowed: > 1 (gates could never be exactly 1)")


def stretched(
    u: Float[AnyArray, ...], beta: Float[AnyArray, ...], *, tau: Scalar, a: float, b: float
) -> Float[jax.Array, ...]:
    """g = min(1, max(0, a + (b-a) sigmoid((ln u - ln(1-u) + beta)/tau))) for given noise u in (0,1), shape of beta."""
    bar = jax.nn.sigmoid((jnp.log(u) - jnp.log1p(-u) + beta) / tau)
    return _clip01(a + (b - a) * bar)


@jax.custom_jvp
def _clip01(x: jax.Array) -> jax.Array:
    """min(1, max(0, x)); the gradient is zero wherever the value is clipped, ties included."""
    return jnp.clip(x, 0.0, 1.0)


@_clip01.defjvp
def _clip01_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    return _clip01(x), jnp.where((x > 0) & (x < 1), dx, 0.0)


def hard_concrete(
    key: PRNGKeyArray, beta: Float[AnyArray, "*shape"], *, tau: Scalar, a: float = -0.1, b: float = 1.1
) -> Float[jax.Array, "*shape"]:
    """Sampled gates g = min(1, max(0, a + (b-a) g_bar)), g_bar = sigmoid((ln u - ln(1-u) + beta)/tau)   (section 4.1).

    Args:
      key: PRNG key; one independent draw per entry of beta.
      beta: float32, any shape.
      tau: temperature > 0, a number or a scalar array.
      a, b: ends of the stretched interval, a < 0 < 1 < b.

    Returns:
      gates in [0,1], shape of beta; the gradient of a clipped gate is zero.

    >>> g = hard_concrete(jax.random.key(0), jnp.zeros((1000,)), tau=0.1)
    >>> bool((g == 0).any()), bool((g == 1).any()), bool((g >= 0).all()), bool((g <= 1).all())
    (True, True, True, True)
    """
    check_interval(a, b)
    chex.assert_type(beta, float)
    return stretched(uniform_open(key, beta.shape), beta, tau=tau, a=a, b=b)


def activation_probability(
    beta: Float[AnyArray, "*shape"], *, tau: Scalar, a: float = -0.1, b: float = 1.1
) -> Float[jax.Array, "*shape"]:
    """P(g != 0) = sigmoid(beta - tau ln(-a/b))   (Theorem 3), shape of beta.

    >>> round(float(activation_probability(jnp.zeros(()), tau=1.0)), 4)
    0.9167
    """
    check_interval(a, b)
    return jax.nn.sigmoid(beta - tau * math.log(-a / b))


def regimes(
    beta: jax.Array, *, tau: jax.Array | float, a: float = -0.1, b: float = 1.1
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(P(g = 0), P(0 < g < 1), P(g = 1)), each of the shape of beta; a gradient passes in the second case alone.

        P(g = 1) = sigmoid(beta - tau ln((1-a)/(b-1)))

    >>> [round(float(p), 3) for p in regimes(jnp.zeros(()), tau=0.1)]
    [0.44, 0.119, 0.44]
    """
    nonzero = activation_probability(beta, tau=tau, a=a, b=b)
    one = jax.nn.sigmoid(beta - tau * math.log((1 - a) / (b - 1)))
    return 1 - nonzero, nonzero - one, one


def shares_without_gradient(
    beta: jax.Array, k: int, *, tau: jax.Array | float, a: float = -0.1, b: float = 1.1
) -> tuple[jax.Array, jax.Array]:
    """The share of the executed gates that are 0 or 1, and P(an edge has no other), where the K largest are executed.

    With N1 gates of an edge at 1 and N inside, ones are executed first and zeros last, so min(N, max(K - N1, 0)) of
    the executed ones lie inside. The law of (N1, N) over the O operations is a Poisson-multinomial sum.

    Args:
      beta: float[..., O].
      k: K, at most O.
      tau: temperature.
      a, b: ends of the stretched interval.

    Returns:
      two arrays, the shape of beta without its last axis.

    >>> beta = jnp.zeros(8)
    >>> [[round(float(share), 2) for share in shares_without_gradient(beta, 2, tau=t)] for t in (10.0, 1.0, 0.1)]
    [[0.0, 0.0], [0.32, 0.14], [0.97, 0.94]]
    """
    zero, inside, one = regimes(beta, tau=tau, a=a, b=b)
    counts = np.arange(k + 1)
    more = jnp.asarray(np.minimum(counts + 1, k)[:, None] == counts[None, :], beta.dtype)  # one gate more, at most K
    # law[..., i, j]: i gates at 1 and j inside, both counted up to K.
    law = jnp.zeros((*beta.shape[:-1], k + 1, k + 1), beta.dtype).at[..., 0, 0].set(1.0)
    for o in range(beta.shape[-1]):
        p0, p, p1 = (each[..., o, None, None] for each in (zero, inside, one))
        law = p0 * law + p * (law @ more) + p1 * (more.T @ law)
    executed_inside = np.minimum(counts[None, :], k - counts[:, None])
    share = 1 - jnp.einsum("...ij,ij->...", law, jnp.asarray(executed_inside / k, beta.dtype))
    return share, jnp.einsum("...ij,ij->...", law, jnp.asarray(executed_inside == 0, beta.dtype))


def expected_gate(
    beta: Float[AnyArray, "*shape"], *, tau: Scalar, a: float = -0.1, b: float = 1.1, points: int = 256
) -> Float[jax.Array, "*shape"]:
    """E[g] by the midpoint rule over u on a fixed grid (the integrand is bounded and monotone), shape of beta.

    >>> round(float(expected_gate(jnp.zeros(()), tau=1.0)), 2)
    0.5
    """
    u = (jnp.arange(points, dtype=jnp.float32) + 0.5) / points
    return jnp.mean(stretched(u.reshape((-1,) + (1,) * beta.ndim), beta[None], tau=tau, a=a, b=b), axis=0)


def expected_executed(
    beta: Float[AnyArray, "E O"],
    allowed: Bool[AnyArray, "E O"],
    k: int,
    *,
    tau: Scalar,
    dropout: Scalar = 0.0,
    a: float = -0.1,
    b: float = 1.1,
    points: int = 256,
    ties: int = 16,
) -> Float[jax.Array, "E O"]:
    """E[g | the operation is among the K largest sampled gates of its edge], ties broken at random.

    E[g | executed] = int g(u) P(executed | g(u)) du / int P(executed | g(u)) du. P(executed | g) is the chance
    that fewer than K of the other gates of the edge are ahead: a Poisson-binomial sum over their tail probabilities
    P(g_j > x) = sigmoid(beta_j - tau logit((x - a)/(b - a))). The atoms at 0 and 1 tie; all orders of a tie are alike.

    Args:
      beta: float32[E,O].
      allowed: bool[E,O].
      k: K.
      tau: temperature.
      dropout: probability that 1 is taken from a gate before the choice.
      a, b: ends of the stretched interval.
      points, ties: of the midpoint rules over u, and over the order within a tie.

    Returns:
      float32[E,O]; 0 where an operation is not allowed.

    >>> beta = jnp.zeros((1, 8))
    >>> one = expected_executed(beta, np.ones((1, 8), bool), 2, tau=10.0)[0, 0]
    >>> all_ = expected_executed(beta, np.ones((1, 8), bool), 8, tau=10.0)[0, 0]
    >>> round(float(one), 2), round(float(all_), 2)
    (0.56, 0.5)
    """
    others = jnp.asarray(allowed[:, None, :] & ~np.eye(allowed.shape[1], dtype=bool)[None])
    last = jnp.float32(1 - 1e-6)

    def beyond(x: jax.Array) -> jax.Array:
        """P(g_j > x) of every gate j of the edge: scores [E,O] -> [E,O,O]."""
        s = jnp.clip((x - a) / (b - a), 1e-7, 1 - 1e-7)
        tail = jax.nn.sigmoid(beta[:, None, :] - (tau * (jnp.log(s) - jnp.log1p(-s)))[:, :, None])
        return jnp.where((x < 0)[:, :, None], 1.0, jnp.where((x >= 1)[:, :, None], 0.0, tail))

    def at(x: jax.Array) -> jax.Array:
        """P(g_j = x): the atoms at 0 and 1."""
        zero, one = 1 - beyond(jnp.zeros_like(x)), beyond(jnp.full_like(x, last))
        return jnp.where((x == 0)[:, :, None], zero, jnp.where((x == 1)[:, :, None], one, 0.0))

    def chance(x: jax.Array, place: jax.Array) -> jax.Array:
        """P(executed) of gates with score x: fewer than K of the others are ahead, or at x and before its place."""
        before = (1 - dropout) * (beyond(x) + place * at(x)) + dropout * (beyond(x + 1) + place * at(x + 1))
        before = jnp.where(others, before, 0.0)
        counts = [jnp.ones_like(x)] + [jnp.zeros_like(x)] * (k - 1)  # counts[n]: n of the gates so far are ahead
        for j in range(allowed.shape[1]):
            q = before[:, :, j]
            counts = [c * (1 - q) + (counts[n - 1] * q if n else 0.0) for n, c in enumerate(counts)]
        return sum(counts[1:], counts[0])

    def of(u: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(P(executed), gate) at one value of the noise."""
        g = stretched(u, beta, tau=tau, a=a, b=b)
        places = (jnp.arange(ties, dtype=jnp.float32) + 0.5) / ties
        both = jax.vmap(lambda place: (1 - dropout) * chance(g, place) + dropout * chance(g - 1, place))(places)
        return jnp.mean(both, axis=0), g

    executed, g = jax.vmap(of)((jnp.arange(points, dtype=jnp.float32) + 0.5) / points)
    mean = jnp.sum(g * executed, axis=0) / jnp.maximum(jnp.sum(executed, axis=0), 1e-12)
    return jnp.where(jnp.asarray(allowed), mean, 0.0)


def top_k(
    key: PRNGKeyArray, scores: Float[AnyArray, "E O"], allowed: Bool[AnyArray, "E O"], k: int
) -> Int[jax.Array, "E {k}"]:
    """The K best allowed operations of each edge, ties broken at random.

    Args:
      key: PRNG key of the tie-break.
      scores: float32[E,O].
      allowed: bool[E,O]; edges with fewer than K allowed operations fill up with O (= execute nothing).
      k: K.

    Returns:
      int32[E,K], best first.

    >>> top_k(jax.random.key(0), jnp.array([[0.1, 0.9, 0.5]]), np.ones((1, 3), bool), 2).tolist()
    [[1, 2]]
    """
    num_ops = scores.shape[1]
    loss = jnp.where(allowed, -scores, jnp.inf)
    ties = jax.random.uniform(key, scores.shape)
    index = jnp.broadcast_to(jnp.arange(num_ops, dtype=jnp.int32)[None, :], scores.shape)
    index = jnp.where(allowed, index, num_ops)
    _, _, order = lax.sort((lax.stop_gradient(loss), ties, index), dimension=1, num_keys=2)
    return order[:, :k]


def void_zeros(executed: Int[AnyArray, "E K"], ops: Float[AnyArray, "E O"]) -> Int[jax.Array, "E K"]:
    """Terms whose gate is exactly 0 execute nothing: value and gradient of a clipped gate are zero anyway.

    Only for gates whose gradient at 0 is zero by definition (clipped ones), never for gates that merely pass through 0.
    """
    num_ops = ops.shape[1]
    values = jnp.take_along_axis(jnp.pad(ops, ((0, 0), (0, 1))), executed, axis=1)
    return jnp.where(values == 0.0, num_ops, executed)


def straight_through(g: Float[jax.Array, "*shape"]) -> Float[jax.Array, "*shape"]:
    """1 in the forward pass, the gradient of g in the backward pass."""
    return g + lax.stop_gradient(1.0 - g)


def all_ops(allowed: Bool[AnyArray, "E O"]) -> Int[jax.Array, "E O"]:
    """int32[E,O]: every allowed operation of every edge is executed.

    >>> all_ops(np.array([[True, False]])).tolist()
    [[0, 2]]
    """
    num_ops = allowed.shape[1]
    return jnp.asarray(np.where(allowed, np.arange(num_ops)[None, :], num_ops).astype(np.int32))


def saturated_share(g: Float[AnyArray, "E O"], counted: Bool[AnyArray, "E O"]) -> Float[jax.Array, ""]:
    """Share of the counted gates (bool[E,O]: those allowed, or executed) that are exactly 0 or 1, a float32 scalar.

    >>> float(saturated_share(jnp.array([[0.0, 0.5, 1.0]]), np.array([[True, True, False]])))
    0.5
    """
    clipped = ((g == 0.0) | (g == 1.0)) & jnp.asarray(counted)
    number = jnp.sum(jnp.asarray(counted).astype(jnp.float32))
    return jnp.sum(clipped.astype(jnp.float32)) / jnp.maximum(number, 1.0)


def share_without_gradient(g: Float[AnyArray, "E O"], executed: Bool[AnyArray, "E O"]) -> Float[jax.Array, ""]:
    """Share of the edges none of whose executed gates (bool[E,O]) lies inside (0, 1), a float32 scalar.

    No gradient of a sample reaches the architecture there: the gradient of a clipped gate is zero.

    >>> float(share_without_gradient(jnp.array([[0.0, 0.5], [1.0, 0.0]]), jnp.ones((2, 2), bool)))
    0.5
    """
    inside = (g > 0.0) & (g < 1.0) & executed
    return jnp.mean(jnp.logical_not(jnp.any(inside, axis=1)).astype(jnp.float32))
