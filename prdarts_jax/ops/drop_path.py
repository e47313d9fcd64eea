"""Drop-path, a draw an image and edge, and dropout, a draw an element."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def drop_path_draws(key: jax.Array, positions: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform draws in [0,1) a sample: float32[B, *shape], from fold_in(key, position) alone.

    Args:
      key: PRNG key, the same on all devices.
      positions: int[B], of the samples in the global batch.
      shape: of the draws of one sample.

    >>> drop_path_draws(jax.random.key(0), jnp.arange(4), (20, 7)).shape
    (4, 20, 7)
    """

    def one(position: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(key, position), shape, jnp.float32)

    return jax.vmap(one)(positions)


def drop_path(x: jax.Array, draws: jax.Array, rate: jax.Array) -> jax.Array:
    """x / (1 - rate) where draw >= rate, else 0: a whole sample at a time.

    Args:
      x: [B,H,W,C].
      draws: float32[B], uniform in [0,1).
      rate: float32 scalar in [0,1): the probability that a sample is dropped.

    Source: Larsson, Maire and Shakhnarovich, "FractalNet" (ICLR 2017), in the form the DARTS programs train with.

    >>> drop_path(jnp.ones((2, 1, 1, 1)), jnp.asarray([0.1, 0.7]), jnp.float32(0.5)).ravel().tolist()
    [0.0, 2.0]
    """
    return x * kept(draws, rate).reshape(-1, 1, 1, 1).astype(x.dtype)


def kept(draws: jax.Array, rate: jax.Array) -> jax.Array:
    """1 / (1 - rate) where draw >= rate, else 0: factors of mean 1, in the dtype of the rate.

    >>> kept(jnp.asarray([0.1, 0.7]), jnp.float32(0.5)).tolist()
    [0.0, 2.0]
    """
    return jnp.where(draws >= rate, 1.0 / (1.0 - rate), jnp.zeros((), rate.dtype))


def dropout(key: jax.Array, positions: jax.Array, x: jax.Array, rate: jax.Array) -> jax.Array:
    """x / (1 - rate) where a draw of its own is at least the rate, else 0: element by element.

    Args:
      key: PRNG key, the same on all devices.
      positions: int[B], of the samples in the global batch.
      x: [B,H,W,C].
      rate: float32 scalar in [0,1).

    >>> dropout(jax.random.key(0), jnp.arange(2), jnp.ones((2, 3, 3, 1)), jnp.float32(0.0)).min()
    Array(1., dtype=float32)
    """
    return x * kept(drop_path_draws(key, positions, x.shape[1:]), rate).astype(x.dtype)
