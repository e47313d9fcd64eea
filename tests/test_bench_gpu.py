"""What `make bench-gpu` relies on where nobody watches: lowerings, the budget, failures, the few packages needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import bench_gpu, gpu_sections
from benchmarks.lowerings import LIBRARY, LOWERINGS, using
from prdarts_jax.ops import depthwise
from prdarts_jax.ops.depthwise import depthwise_conv, depthwise_conv_reference

ROOT = Path(__file__).parents[1]
ABSENT = [
    *("tensorflow_datasets", "array_record", "importlib_resources", "matplotlib", "sklearn", "PIL", "tqdm"),
    *("safetensors", "flatbuffers", "torch", "tensorboardX"),
]


def _all(conv: Any, x: jax.Array, kernel: jax.Array) -> list[jax.Array]:
    y, pull = jax.vjp(lambda x, k: conv(x, k, stride=2, dilation=2), x, kernel)
    return [y, *pull(jnp.cos(y))]


@pytest.mark.parametrize("name", [LIBRARY, *LOWERINGS])
def test_every_lowering_computes_the_convolution_and_its_gradients(name: str) -> None:
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 7, 6, 3), (5, 5, 3)))
    before = depthwise._forward
    with using(name):
        assert (depthwise._forward is before) == (name == LIBRARY)
        found = _all(depthwise_conv, x, kernel)
    assert depthwise._forward is before
    for a, b in zip(found, _all(depthwise_conv_reference, x, kernel), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-5)


def test_a_lowering_is_what_is_traced() -> None:
    """Shifts have no convolution; the two others have, one with and one without groups."""
    x, kernel = jnp.zeros((1, 4, 4, 2)), jnp.zeros((3, 3, 2))
    texts = {}
    for name in LOWERINGS:
        with using(name):
            texts[name] = str(jax.make_jaxpr(lambda x, k: jax.vjp(depthwise_conv, x, k)[1](x))(x, kernel))
    assert "conv_general_dilated" not in texts["shifts"]
    assert "feature_group_count=2" in texts["grouped"]
    assert "conv_general_dilated" in texts["diagonal"] and "feature_group_count=2" not in texts["diagonal"]


def test_sections_without_time_are_left_out_with_a_line() -> None:
    said: list[str] = []
    assert list(bench_gpu.rows("gpu", "full", 5.0, said.append)) == []
    assert len(said) == len(bench_gpu._full())
    assert said[0] == 'bandwidth "": left out, 5 s of 5 s are left and it needs 15 s'


def test_the_whole_run_names_only_sections_that_exist_and_stays_under_nine_minutes() -> None:
    for section in bench_gpu._full() + bench_gpu._smoke("gpu"):
        assert section.name in gpu_sections.SECTIONS and section.least <= section.limit
        json.dumps(section.given)
    lowerings = {s.given["lowering"] for s in bench_gpu._full() if s.name == "search"}
    assert lowerings >= {LIBRARY, "shifts", "diagonal"}  # `grouped` is what the library takes on a GPU
    assert bench_gpu.BUDGET + 20 < 9 * 60  # with what it takes to ask for the GPU and to end the last section


def test_a_section_that_dies_or_hangs_costs_its_own_numbers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    dies = bench_gpu.Section("no-such-section", {}, 0, 60)
    assert [row["what"] for row in bench_gpu._run(dies, "cpu", 60, said.append)] == ["failed"]
    hangs = bench_gpu.Section("bandwidth", {"megabytes": 1, "steps": 1}, 0, 1)
    found = list(bench_gpu._run(hangs, "cpu", 0.05, said.append))
    assert found[-1]["failure"] == "ended after 0 s" and "KeyError" in said[0]


def test_a_wrong_number_is_the_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"section": "correctness", "what": "error, shifts", "value": 1.0, "unit": "", "device": "x", "ok": False}
    monkeypatch.setattr(bench_gpu, "rows", lambda *args: iter([dict(row)]))
    assert bench_gpu.main(["--platform", "cpu", "--scale", "smoke"]) == 1
    assert "wrong: error, shifts" in capsys.readouterr().err


def test_nothing_else_has_to_be_installed() -> None:
    """The modules of every section import where only jax, flax, optax, chex and orbax-checkpoint are installed."""
    program = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {ABSENT!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import benchmarks.bench_gpu, benchmarks.gpu_sections, benchmarks.lowerings, benchmarks.ours
from prdarts_jax import parallel, search_inputs, search_program, train_inputs, train_program
from prdarts_jax.data.sources import from_arrays
import numpy as np
case = benchmarks.bench_gpu._TINY
benchmarks.ours.search_parts(case)
from prdarts_jax import config as cfg
images = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 3), np.uint8)
data = from_arrays("random", images, (np.arange(32) % 10).astype(np.int32))
space = cfg.SpaceConfig(cells=3, channels=4, ops=case.ops)
augment = cfg.DataConfig(crop_padding=1)
search_inputs.prepare(cfg.SearchConfig(space=space, data=augment, batch_size=4), data=data)
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "fine", done.stderr
