"""Image sets as uint8 arrays, their global batches, and the augmentation of those batches.

`sources` and `batches` need numpy only; `augment` (the module that runs inside jit) is imported by its own name.
"""

from __future__ import annotations

from prdarts_jax.data.sources import Dataset, load

__all__ = ["Dataset", "load"]
