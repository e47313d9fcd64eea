"""matplotlib without the window system of the environment: pictures here are files."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

_NAME = "MPLBACKEND"


@contextlib.contextmanager
def no_backend() -> Iterator[None]:
    """A block that imports matplotlib for the first time, whatever backend the environment names.

    Jupyter and Colab name one for all programs that they start, and matplotlib cannot be imported where its package is
    absent. A backend that is there is matplotlib's after the block, for the figures of the caller.
    """
    named = None if "matplotlib" in sys.modules else os.environ.pop(_NAME, None)
    try:
        yield
    finally:
        if named is not None:
            os.environ[_NAME] = named
            with contextlib.suppress(ImportError, ValueError):
                import matplotlib

                matplotlib.rcParams["backend"] = named
