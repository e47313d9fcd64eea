"""Whole searches whose cells are run in another way: the same numbers to rounding, and what resume says of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import search_cases
from search_cases import EPOCH_STEPS, rows, search

MOMENT = 1e-9  # minutes: over as soon as the first dispatch is


@pytest.fixture(autouse=True)
def _quick():
    with search_cases.shared_programs():
        yield


def _losses(workdir):
    steps = rows(workdir, "step")
    return np.asarray([[row[name] for name in ("train_loss", "val_loss")] for row in steps])


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """The losses of the first epoch as a CPU computes them of itself."""
    workdir = tmp_path_factory.mktemp("lowerings") / "auto"
    with search_cases.shared_programs():
        assert search(workdir, epochs=1).status == "finished"
    return _losses(workdir)


@pytest.mark.parametrize("lowering", ["waves", pytest.param("scan", marks=pytest.mark.slow)])
def test_a_search_by_another_lowering(usual, tmp_path, capsys, lowering):
    """The first step is equal to rounding, and the steps after it drift apart no further than rounding makes them."""
    workdir, stopped = tmp_path / "w", tmp_path / "stopped"
    assert search(workdir, epochs=1, run__lowering=lowering).status == "finished"
    found = _losses(workdir)
    assert found.shape == usual.shape == (EPOCH_STEPS, 2)
    np.testing.assert_allclose(found[0], usual[0], rtol=1e-5)
    np.testing.assert_allclose(found, usual, rtol=1e-3)
    assert json.loads((workdir / "config.json").read_text())["platform"]["lowering"] == lowering
    # It may change on resume, which says so.
    assert search(stopped, epochs=1, run__lowering=lowering, run__time_limit=MOMENT).status == "time-limit"
    capsys.readouterr()
    assert search(stopped, epochs=1).status == "finished"
    assert f"to float tolerance only (lowering {lowering} -> auto)" in capsys.readouterr().out
    np.testing.assert_allclose(_losses(stopped), usual, rtol=1e-3)
