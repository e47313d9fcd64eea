"""`python -m prdarts_jax` = `prdarts`."""

from __future__ import annotations

import sys

from prdarts_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
