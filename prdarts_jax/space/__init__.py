"""The search space: its description, the mixed cell, the supernet, and genotypes."""

from prdarts_jax.space.genotype import Genotype
from prdarts_jax.space.spec import CELL_TYPES, CellSpec, EdgeGroup, Space

__all__ = ["CELL_TYPES", "CellSpec", "EdgeGroup", "Genotype", "Space"]
