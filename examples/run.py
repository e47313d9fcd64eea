"""Executes the notebooks of this folder from top to bottom, each in an empty folder.

    python -m examples.run             with the settings of a trial, a minute or two
    python -m examples.run --full      with their own settings, and keeps what they show in the files

A notebook has one cell with the tag `parameters`; a trial puts its settings behind it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from prdarts_jax.cli.runs import compilation_cache

FOLDER = Path(__file__).parent
_QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
_SMALL = {
    "space.cells": 3,
    "space.channels": 4,
    "space.nodes": 1,
    "space.ops": "none,skip_connect,sep_conv_3x3",
    "epochs": 1,
    "batch_size": 128,
}
TRIALS = {
    "quickstart": {
        "search_flags": _SMALL,
        "train_flags": {"network.cells": 3, "network.channels": 4, "epochs": 1, "batch_size": 128},
    },
    "own_data": {"search_flags": _SMALL, "train_flags": {"network.cells": 3, "network.channels": 4, "epochs": 1}},
}


def execute(path: Path, *, full: bool) -> None:
    """Runs one notebook; with `full` the file keeps what it shows.

    Raises:
      CellExecutionError: a cell fails; its message has the cell and the traceback.
    """
    notebook = nbformat.read(path, as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    if not full:
        parameters.source += "".join(f"\n{name} = {value!r}" for name, value in TRIALS[path.stem].items())
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": folder}})
        client.execute()
    if full:
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)
            if "outputs" in cell:
                cell.outputs = [out for out in cell.outputs if not _of_this_machine(out)]
        notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
        path.write_text(nbformat.writes(notebook).replace(f"{folder}/", "") + "\n", encoding="utf-8")


def _of_this_machine(output: dict[str, Any]) -> bool:
    """Warnings, and how long compiling took: they say nothing about another machine."""
    return output.get("name") == "stderr" or output.get("text", "").startswith("compil")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the notebooks; returns the exit status."""
    parser = argparse.ArgumentParser("examples.run", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--full", action="store_true", help="their own settings; keep what they show")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {' '.join(TRIALS)}")
    args = parser.parse_args(argv)
    # The kernels start with this environment: this library from here, nothing on a GPU.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(FOLDER.parent), os.environ.get("PYTHONPATH")]))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    compilation_cache()
    if not args.full:  # most of the time of a trial is compilation
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_QUICK}"
    for name in args.names or TRIALS:
        try:
            execute(FOLDER / f"{name}.ipynb", full=args.full)
        except CellExecutionError as error:
            print(f"{name}.ipynb: {error}", file=sys.stderr)
            return 1
        print(f"{name}.ipynb: every cell ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())
