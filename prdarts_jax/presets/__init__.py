"""Configs by name, and where each of their values comes from."""

from prdarts_jax.presets.merge import Preset, Resolved
from prdarts_jax.presets.search import OPTIONS, PRESETS, PROVENANCE, resolve, table

__all__ = ["OPTIONS", "PRESETS", "PROVENANCE", "Preset", "Resolved", "resolve", "table"]
