"""What a notebook shows of results."""

from __future__ import annotations

import re
from pathlib import Path

from prdarts_jax import Evaluation, PopulationResult, SearchResult, TrainResult
from prdarts_jax.space.genotype import Genotype
from prdarts_jax.training.evaluation import Figures

PRDARTS = Genotype.named("PRDARTS")


def cells(html: str) -> dict[str, str]:
    return dict(re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td></tr>", html))


def test_a_search_shows_its_figures_and_its_cells(tmp_path: Path) -> None:
    row = {"val_accuracy": 0.87654, "normal_skips": 1, "epoch": 3, "kind": "epoch", "penalty/skip": 0.5}
    shown = SearchResult("finished", PRDARTS, tmp_path / "<run>", tmp_path / "report.html", row)._repr_html_()
    assert cells(shown) == {"val accuracy": "0.8765", "normal skips": "1"}
    assert shown.count("<svg") == 3 and "Search: finished (&lt;run&gt;)" in shown
    assert str(tmp_path / "report.html") in shown
    stopped = SearchResult("interrupted", None, tmp_path)._repr_html_()
    assert "Search: interrupted" in stopped and "<svg" not in stopped and "<table" not in stopped


def test_trainings_and_evaluations_show_their_figures(tmp_path: Path) -> None:
    shown = TrainResult("finished", tmp_path, {"test_accuracy": 0.5, "parameters": 3444814})._repr_html_()
    assert cells(shown) == {"test accuracy": "0.5", "parameters": "3444814"}
    figures = Figures(0.25, 0.75, 1.0, 0.125, (0.5, 1.0), (1, 1))
    shown = Evaluation(tmp_path, "digits", "test", 360, 3, 9, ("0", "1"), figures, None)._repr_html_()
    assert "360 images of digits" in shown
    assert cells(shown) == {"loss": "0.25", "accuracy": "0.75", "top5": "1", "calibration error": "0.125"}


def test_a_population_shows_a_row_a_member(tmp_path: Path) -> None:
    members = {"seed0": SearchResult("finished", PRDARTS, tmp_path, metrics={"val_accuracy": 0.875})}
    shown = PopulationResult("failed", members, {"seed1": "a metric is <nan>"}, tmp_path)._repr_html_()
    rows = re.findall(r"<tr>(.*?)</tr>", shown)
    assert rows == [
        "<td>seed0</td><td>finished</td><td>0.875</td>",
        "<td>seed1</td><td>failed</td><td>a metric is &lt;nan&gt;</td>",
    ]
