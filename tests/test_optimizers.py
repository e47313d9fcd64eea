"""The optimizers of the two groups against their formulas in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles

from prdarts_jax.config.search import ArchConfig
from prdarts_jax.optimizers import arch_transform


def test_the_architecture_is_clipped_before_its_weight_decay() -> None:
    """Three steps of Adam: a gradient far above the norm, one below it, and one a little above."""
    config = ArchConfig(learning_rate=0.04, weight_decay=0.3, clip_norm=2.0)
    rng = np.random.default_rng(0)
    arch = [rng.normal(size=shape) for shape in ((5, 3), (4,))]
    moments = [(np.zeros_like(a), np.zeros_like(a)) for a in arch]
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        tx, found = arch_transform(config), [jnp.asarray(a) for a in arch]
        state = tx.init(found)
        for t, norm in enumerate((30.0, 0.5, 2.2), start=1):
            grads = [rng.normal(size=a.shape) for a in arch]
            whole = np.sqrt(sum(np.sum(g**2) for g in grads))
            grads = [norm / whole * g for g in grads]
            updates, state = tx.update([jnp.asarray(g) for g in grads], state, found)
            found = optax.apply_updates(found, updates)
            for i, g in enumerate(oracles.clip_by_global_norm(grads, 2.0)):
                arch[i], *rest = oracles.adam_coupled(
                    arch[i], g, *moments[i], t, lr=0.04, b1=0.5, b2=0.999, eps=1e-8, wd=0.3
                )
                moments[i] = rest[0], rest[1]
            for a, b in zip(found, arch, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-6)


def test_sgd_of_the_architecture() -> None:
    """Three steps against those of torch.optim.SGD written out, with and without momentum."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        for momentum in (0.0, 0.8):
            config = ArchConfig(optimizer="sgd", learning_rate=0.1, momentum=momentum, weight_decay=0.2, clip_norm=1.0)
            tx, arch, velocity = arch_transform(config), rng.normal(size=5), np.zeros(5)
            found = jnp.asarray(arch)
            state = tx.init(found)
            for _ in range(3):
                g = rng.normal(size=5)
                updates, state = tx.update(jnp.asarray(g), state, found)
                found = optax.apply_updates(found, updates)
                velocity = momentum * velocity + g / max(1.0, np.linalg.norm(g)) + 0.2 * arch
                arch = arch - 0.1 * velocity
            np.testing.assert_allclose(found, arch, rtol=1e-6)


def test_without_clipping_the_state_has_no_place_for_it() -> None:
    """Checkpoints of searches without clipping name the leaves of Adam's state by their place in the chain."""
    plain = optax.chain(optax.add_decayed_weights(1e-3), optax.adam(3e-4))
    arch = {"normal": jnp.zeros((2, 3))}
    found = arch_transform(ArchConfig()).init(arch).inner_state
    assert jax.tree.structure(found) == jax.tree.structure(plain.init(arch))
