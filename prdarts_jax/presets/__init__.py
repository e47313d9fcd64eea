"""Configs by name, and where each of their values comes from."""

from prdarts_jax.presets.merge import OPTIONS, Preset, Resolved, table
from prdarts_jax.presets.search import PRESETS, PROVENANCE, resolve

__all__ = ["OPTIONS", "PRESETS", "PROVENANCE", "Preset", "Resolved", "resolve", "table"]
