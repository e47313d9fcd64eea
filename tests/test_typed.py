"""Shapes are checked in these tests; a user's program passes `mypy --strict`, and its mistakes are found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from prdarts_jax import gates, regularizers
from prdarts_jax.space import Space

ROOT = Path(__file__).parents[1]
PROGRAM = Path(__file__).with_name("typed_program.py")
# What a wrong program says, and the words of the error that it must meet: the types are not Any.
MISTAKES = {
    "genotype.skips(3)": 'incompatible type "int"; expected "str"',
    'len(prdarts_jax.resolve("digits").config.epochs)': 'incompatible type "int"; expected "Sized"',
    'regularizers.path_depth_term(drawn, "normal")': 'incompatible type "str"; expected "Space"',
    'prdarts_jax.search("digits", workdir)': 'incompatible type "str"; expected "SearchConfig"',
}


def test_a_shape_or_dtype_that_does_not_fit_is_found() -> None:
    """By the signature, where the function itself would broadcast or convert; the right call passes."""
    key, scores, allowed = jax.random.key(0), jnp.zeros((2, 3)), np.ones((2, 3), bool)
    assert gates.top_k(key, scores, allowed, 2).shape == (2, 2)
    wrong = (
        lambda: gates.top_k(key, scores, allowed[:1], 2),  # one edge for all of them
        lambda: gates.top_k(key, scores.astype(jnp.int32), allowed, 2),
        lambda: gates.straight_through(np.zeros(3, np.float32)),
        lambda: regularizers.skip_term(jnp.zeros((14, 8)), Space(), jnp.ones((1, 8), bool)),
    )
    for call in wrong:
        with pytest.raises(jaxtyping.TypeCheckError):
            call()


@pytest.mark.slow
def test_a_program_of_a_user_passes_mypy_strict(tmp_path: Path) -> None:
    """The library is seen as an installed package: its py.typed is what makes its types count."""
    (tmp_path / "right.py").write_text(PROGRAM.read_text(encoding="utf-8"), encoding="utf-8")
    wrong = PROGRAM.read_text(encoding="utf-8") + "".join(
        f"\n\ndef mistake_{i}(genotype: prdarts_jax.Genotype, drawn: jax.Array, workdir: Path) -> None:\n    {line}\n"
        for i, line in enumerate(MISTAKES)
    )
    (tmp_path / "wrong.py").write_text(wrong, encoding="utf-8")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "prdarts_jax").symlink_to(ROOT / "prdarts_jax")
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path / "site")
    }  # as site-packages; MYPYPATH would need no py.typed
    command = [sys.executable, "-m", "mypy", "--strict", "right.py", "wrong.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert not [line for line in errors if not line.startswith("wrong.py")], done.stdout
    assert len(errors) == len(MISTAKES), done.stdout
    for said in MISTAKES.values():
        assert any(said in line for line in errors), (said, done.stdout)
