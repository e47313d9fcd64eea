"""The path of version 0.1.0 for `prdarts_jax.interop.export`."""

from prdarts_jax.interop.export import *  # noqa: F403
