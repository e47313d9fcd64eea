"""What `make check-accelerators` refuses, and that the page has the rows that were measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import check_accelerators as checked

ROW: dict[str, Any] = {
    **{"case": "paper", "target": "tpu:v5e:4x4", "program": "search", "batch": 128, "dtype": "float32"},
    **{"device_mib": 16384, "fits": True, "cpu_kernels": 0},
    **{"compile_s": 100.0, "temp_mib": 900.0, "memory_mib": 1100.0},
    **{"launches_per_step": 1000, "conditionals_per_step": 0, "all_reduces_per_step": 400},
    **{"bytes_per_step": 10**9, "cycles_per_step": 10**8},
}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, []),
        ({"launches_per_step": 1050}, []),  # 5 % more
        ({"launches_per_step": 1051}, ["launches_per_step: 1051 is more than before, 1000"]),
        ({"compile_s": 300.0}, []),  # another machine, perhaps
        ({"compile_s": 401.0}, ["compile_s: 401 is more than the aim, 400"]),
        ({"conditionals_per_step": 1}, ["conditionals_per_step: 1 is more than before, 0"]),
        ({"cycles_per_step": None}, []),
        ({"cpu_kernels": 3}, ["3 CPU kernels are in the program"]),
        ({"fits": False, "memory_mib": 17000.0}, ["it does not fit: 17000 of 16384 MiB"]),
        (
            {"all_reduces_per_step": 500},
            [
                "all_reduces_per_step: 500 is more than the aim, 450",
                "all_reduces_per_step: 500 is more than before, 400",
            ],
        ),
        ({"failure": "RESOURCE_EXHAUSTED"}, ["it is not compiled: RESOURCE_EXHAUSTED"]),
    ],
)
def test_what_is_refused(change: dict[str, Any], says: list[str]) -> None:
    aim = {"compile_s": 400, "all_reduces_per_step": 450}
    assert checked.refusals(ROW | change, aim, ROW) == says


def test_a_first_row_is_held_against_its_aim_alone() -> None:
    assert checked.refusals(ROW, None, None) == []
    assert checked.refusals(ROW, {"bytes_per_step": 1}, None) == ["bytes_per_step: 1e+09 is more than the aim, 1"]


def test_rows_and_page_are_written_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{checked.BEGIN}\nold\n{checked.END}\nafter\n")
    monkeypatch.setattr(checked, "FOLDER", tmp_path)
    monkeypatch.setattr(checked, "PAGE", page)
    checked.write([ROW])
    checked.write([ROW | {"launches_per_step": 7}, ROW | {"target": "cuda:h100:1", "cycles_per_step": None}])
    assert [row["launches_per_step"] for row in json.loads((tmp_path / "rows.json").read_text())] == [7, 1000]
    lines = page.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    assert sum(line.startswith("| `paper` |") for line in lines) == 2


def test_the_page_has_the_rows() -> None:
    text = checked.PAGE.read_text(encoding="utf-8")
    shown = text.partition(checked.BEGIN)[2].partition(checked.END)[0].strip().splitlines()
    assert shown == checked.table(checked.read("rows"))


def test_every_row_meets_its_aim() -> None:
    aims = {checked.key(aim): aim for aim in checked.read("aims")}
    rows = checked.read("rows")
    assert rows and {checked.key(row) for row in rows} <= set(aims)
    for row in rows:
        assert checked.refusals(row, aims[checked.key(row)], None) == []
