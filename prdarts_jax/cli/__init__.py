"""The command line."""

from prdarts_jax.cli.commands import main

__all__ = ["main"]
