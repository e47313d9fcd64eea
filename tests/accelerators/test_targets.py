"""Names of devices that are not here, and what is said where there is no compiler for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prdarts_jax import cli
from prdarts_jax.accelerators import targets
from prdarts_jax.errors import UserError


@pytest.mark.parametrize(
    ("text", "size", "gib"),
    [
        ("cuda:h100", 1, 79),
        ("cuda:h200:8", 8, 139),
        ("cuda:a100:64", 64, 79),
        ("tpu:v5e", 1, 16),
        ("tpu:v5e:4x4", 16, 16),
        ("tpu:v5p:4x4x8", 128, 95),
    ],
)
def test_a_target_says_how_many_devices_of_what_memory(text: str, size: int, gib: int) -> None:
    found = targets.parse(text)
    assert (found.size, found.memory) == (size, gib * 2**30)
    assert targets.parse(str(found)) == found


WRONG = ["", "cuda", "cuda:", "cpu:x86", "gpu:h100", "cuda:v5e", "tpu:h100", "cuda:h100:", "cuda:h100:0", "cuda:h100:x"]


@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_target_is_one_line_with_all_that_are(text: str) -> None:
    with pytest.raises(UserError) as error:
        targets.parse(text)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"target: {text!r} is not known; allowed: ")
    assert all(kind in line for kind in (*targets.GPUS, *targets.TPUS))


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("cuda:h100:12", "1..8, or a multiple of 8"),
        ("cuda:h100:2x4", "1..8, or a multiple of 8"),
        ("tpu:v5e:4x4x4", "1 | AxB"),
        ("tpu:v4:4x4", "1 | AxBxC"),
        ("tpu:v5e:16", "1 | AxB"),
    ],
)
def test_a_topology_has_the_form_of_its_kind(text: str, allowed: str) -> None:
    with pytest.raises(UserError) as error:
        targets.parse(text)
    assert str(error.value).endswith(f"are not possible; allowed: {allowed}")


@pytest.mark.parametrize(("text", "package"), [("cuda:h100", "jax-cuda13-plugin=="), ("tpu:v5e:2x2", "jax[tpu]==")])
def test_without_a_compiler_one_line_says_what_to_install(
    text: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(targets, "_installed", lambda module: False)
    monkeypatch.setattr(targets, "before_jax", lambda: None)  # this process goes on
    words = ["check", "--preset", "digits", "--program", "search", "--target", text, "--json", str(tmp_path / "rows")]
    assert cli.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is not installed; install: pip install " in line and package in line
    assert not (tmp_path / "rows").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--target: none is given; allowed: cuda:"),
        (["--target", "cuda:h1000"], "target: 'cuda:h1000' is not known; allowed: cuda:a100"),
        (["--target", "cuda:h100", "--devices", "2"], "run.devices: "),
        (["--target", "cuda:h100", "--json", "/no/such/rows.json"], "--json: no directory '/no/such'; allowed: "),
        (["--target", "cuda:h100", "--genotype", "PRDART"], "genotype: "),
        (["--target", "cuda:h100", "--program", "sarch"], "--program: unknown value 'sarch'; did you mean 'search'?"),
        (["--target", "cuda:h100", "--cells", "1"], "space.cells: 1 is not possible"),
        (["--target"], "argument --target: expected one argument"),
        (["--targt", "cuda:h100"], "flag: unknown --targt; did you mean --target?"),
    ],
)
def test_wrong_words_are_one_line(
    words: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(targets, "before_jax", lambda: None)
    assert cli.main(["check", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"prdarts: error: {says}")


def test_a_program_that_does_not_fit_is_the_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from prdarts_jax.accelerators import check

    figures: dict[str, Any] = {"temp_mib": 1.0, "memory_mib": 99999999.0, "bytes_per_step": 10**9, "compile_s": 1.0}
    figures |= dict.fromkeys(("launches_per_step", "conditionals_per_step", "all_reduces_per_step"), 1000)
    figures |= {"cycles_per_step": None, "cpu_kernels": 0, "device_mib": 80896}
    head = {"target": "cuda:h100:1", "batch": 32, "dtype": "float32"}
    monkeypatch.setattr(targets, "before_jax", lambda: None)
    monkeypatch.setattr(targets, "devices", lambda target: [])
    monkeypatch.setattr(check, "search_row", lambda *args: {**head, "program": "search", **figures})
    monkeypatch.setattr(check, "train_row", lambda *args: {**head, "program": "train", "failure": "RESOURCE_EXHAUSTED"})
    out = tmp_path / "rows.json"
    assert cli.main(["check", "--preset", "digits", "--target", "cuda:h100", "--json", str(out)]) == 1
    said = capsys.readouterr()
    assert "does not fit, 99,999,999 of 80,896 MiB" in said.out and "XLA does not compile it" in said.out
    assert said.err == "prdarts: error: check: cuda:h100:1 search, cuda:h100:1 train cannot be run with this batch\n"
    assert [row["fits"] for row in json.loads(out.read_text())] == [False, False]
