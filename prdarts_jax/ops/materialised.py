"""A boundary for XLA:CPU's fusions."""

from __future__ import annotations
