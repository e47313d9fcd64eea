"""The slips that `make mutate` tries: each can still be made, and names tests that exist."""

from __future__ import annotations

from pathlib import Path

import mutate
import pytest
from mutations import MUTATIONS

ROOT = Path(__file__).parents[1]


def test_every_mutation_can_be_made():
    assert mutate.problems(MUTATIONS) == []
    assert len(MUTATIONS) >= 25


@pytest.mark.parametrize("node", sorted({node for one in MUTATIONS for node in one.tests}))
def test_the_tests_it_names_are_there(node):
    file, _, name = node.partition("::")
    assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(encoding="utf-8")
