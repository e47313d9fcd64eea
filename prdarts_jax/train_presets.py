"""The path of version 0.1.0 for `prdarts_jax.presets.train`."""

from prdarts_jax.presets.train import *  # noqa: F403
