"""States for the tests of checkpoints, and a comparison of bits that does not rely on digests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from prdarts_jax.run.checkpoint import Checkpointer


@struct.dataclass
class State:
    weights: Any
    moments: Any
    step: jax.Array
    name: str = struct.field(pytree_node=False, default="search")


def odd_floats() -> np.ndarray:
    """NaNs with payloads, both zeros, infinities and denormals, which only a comparison of bits can tell apart."""
    bits = [0x7FC00001, 0xFFC12345, 0x00000000, 0x80000000, 0x7F800000, 0xFF800000, 0x00000001, 0x807FFFFF]
    return np.array(bits, np.uint32).view(np.float32)


def state_at(step: int, size: int = 200) -> State:
    weights = {
        "normal": [jnp.asarray(np.random.default_rng(step).standard_normal((size, 3), np.float32))],
        "reduce": {"half": jnp.arange(7, dtype=jnp.bfloat16) + jnp.bfloat16(step), "odd": jnp.asarray(odd_floats())},
        "mask": jnp.array([True, False, True]),
    }
    moments = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)).init(weights["normal"])
    return State(weights, moments, jnp.asarray(step, jnp.int32))


def bits(tree: Any) -> list[tuple[str, str, bytes]]:
    """Independent of the digests: treedef, dtypes and raw bytes."""
    leaves, structure = jax.tree.flatten(tree)
    host = [np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x) for x in leaves]
    return [(str(structure), f"{x.dtype}{x.shape}", x.tobytes()) for x in host]


def restore_with_warnings(directory: Path) -> tuple[Any, list[str]]:
    lines: list[str] = []
    with Checkpointer(directory, warn=lines.append) as checkpoints:
        return checkpoints.restore_latest(state_at(0)), lines
