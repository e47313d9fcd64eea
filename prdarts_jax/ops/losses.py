"""Losses and accuracies of a batch of logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of float32[B,classes] and int32[B], in nats."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Share of correct top-1 predictions, float32 scalar."""
    return jnp.mean((jnp.argmax(logits, axis=1) == labels).astype(jnp.float32))


def smoothed_cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    """Mean cross-entropy, in nats, against the targets (1 - s) one-hot + s / K.

    Args:
      logits: float32[B,K].
      labels: int32[B].
      smoothing: s in [0,1).

    Source: Szegedy et al., "Rethinking the Inception Architecture" (CVPR 2016), section 7.

    >>> round(float(smoothed_cross_entropy(jnp.zeros((1, 4)), jnp.zeros(1, jnp.int32), 0.1)), 4)  # ln 4
    1.3863
    """
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[1], dtype=logits.dtype), smoothing)
    return jnp.mean(optax.softmax_cross_entropy(logits, targets))
