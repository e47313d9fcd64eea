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
from oracles import quick_jit

from benchmarks import bench_gpu, gpu_sections, ours
from benchmarks.lowerings import LIBRARY, LOWERINGS, using
from prdarts_jax.ops import depthwise
from prdarts_jax.ops.depthwise import depthwise_conv, depthwise_conv_reference
from prdarts_jax.space.cell_reference import mixed_nodes_reference

ROOT = Path(__file__).parents[2]
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
    assert said[0] == 'step-correctness "": left out, 5 s of 5 s are left and it needs 40 s'


def test_the_whole_run_names_only_sections_that_exist_and_stays_under_nine_minutes() -> None:
    for section in bench_gpu._full(("scan", "waves")) + bench_gpu._smoke("gpu"):
        assert section.name in gpu_sections.SECTIONS and section.least <= section.limit
        json.dumps(section.given)
    lowerings = {s.given["lowering"] for s in bench_gpu._full() if s.name == "search"}
    assert lowerings >= {LIBRARY, "shifts", "diagonal"}  # `grouped` is what the library takes on a GPU
    assert bench_gpu.BUDGET + 20 < 9 * 60  # with what it takes to ask for the GPU and to end the last section


def test_the_lowerings_of_the_cell_are_compared_before_all_else() -> None:
    """What is wrong, before that; whole epochs and a piece of a search behind it."""
    sections = bench_gpu._full(("scan", "waves"))
    names = [section.name for section in sections]
    assert names[:3] == ["step-correctness", "step-correctness", "cell"]
    (cell,) = [section.given for section in sections if section.name == "cell"]
    assert cell["lowerings"] == ["scan", "waves"] and cell["precisions"] == list(gpu_sections.PRECISIONS)
    steps = [s.given for s in sections if s.name == "search" and s.given["lowering"] == LIBRARY and not s.xla_flags]
    compared = {(one["case"]["lowering"], one["precision"]) for one in steps if one["case"]["executed"] == 2}
    assert compared == {(lowering, p) for lowering in ("scan", "waves") for p in gpu_sections.PRECISIONS}
    rest = names.index("bandwidth")
    assert {"epochs", "piece"} <= set(names[:rest]) and "peer" not in names[:rest]
    assert all(section.given["case"]["lowering"] == "scan" for section in sections if section.name == "epochs")


def test_the_cell_that_is_timed_computes_each_step_from_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the dense cell with plain autodiff: inputs, weights and gates move along their gradients."""
    seen: list[Any] = []
    real = ours.compiled

    def compiled(program: Any, *args: Any) -> Any:
        seen.extend(args)
        return real(program, *args)

    monkeypatch.setattr(ours, "compiled", compiled)
    case = bench_gpu._TINY._replace(side=5, batch=2)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        run, _ = ours.cell("normal", **case._asdict())
        found: Any = run(2)
        first, executed, ct, _ = seen
        space, state = ours.search_parts(case)["space"], first

        def nodes(weights: Any, values: jax.Array, s0: jax.Array, s1: jax.Array, terms: jax.Array) -> jax.Array:
            dense = (
                jnp.zeros((space.num_edges, space.num_ops)).at[jnp.arange(space.num_edges)[:, None], terms].add(values)
            )
            return mixed_nodes_reference(weights, dense, s0, s1, space=space, kind="normal")

        @quick_jit
        def step(state: Any, terms: jax.Array) -> Any:
            y, pull = jax.vjp(lambda *state: nodes(*state, terms), *state)
            return jax.tree.map(lambda a, d: a + 1e-4 * d, state, pull(ct + 1e-4 * y))

        for i in range(2):
            state = step(state, executed[i])
    for (path, a), b, before in zip(
        jax.tree.leaves_with_path(found), *map(jax.tree.leaves, (state, first)), strict=True
    ):
        moved = np.abs(np.asarray(b) - before).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=0.02 * moved + 1e-6, err_msg=jax.tree_util.keystr(path))


def test_a_section_that_dies_or_hangs_costs_its_own_numbers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    dies = bench_gpu.Section("no-such-section", {}, 0, 60)
    (end,) = bench_gpu._run(dies, "cpu", 60, said.append)
    assert end["what"] == f"section {dies.mark}" and end["failure"].startswith("status 1: ")
    hangs = bench_gpu.Section("bandwidth", {"megabytes": 1, "steps": 1}, 0, 1)
    found = list(bench_gpu._run(hangs, "cpu", 0.05, said.append))
    assert found[-1]["failure"] == "ended after 0 s" and "KeyError" in said[0]


def test_a_wrong_number_is_the_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"section": "correctness", "what": "error, shifts", "value": 1.0, "unit": "", "ok": False}
    monkeypatch.setattr(bench_gpu, "rows", lambda *args: iter([dict(row)]))
    assert bench_gpu.main(["--platform", "cpu", "--scale", "smoke"]) == 1
    assert "wrong: error, shifts" in capsys.readouterr().err
    dead = {"section": "step-correctness", "what": "section x", "value": 1.0, "unit": "s", "failure": "status 1"}
    monkeypatch.setattr(bench_gpu, "rows", lambda *args: iter([dict(dead)]))
    assert bench_gpu.main(["--platform", "cpu", "--scale", "smoke"]) == 1
    monkeypatch.setattr(bench_gpu, "rows", lambda *args: iter([{**dead, "section": "peer"}]))
    assert bench_gpu.main(["--platform", "cpu", "--scale", "smoke"]) == 0


def test_nan_is_an_error_wherever_it_stands() -> None:
    fine, nan = np.array([1.0, 2.0]), np.array([1.0, np.nan])
    for found in ([fine, nan], [nan, fine]):
        assert gpu_sections.error_of(found, [fine, fine]) == np.inf
    row = gpu_sections._judged("error", lambda: gpu_sections.error_of([nan], [fine]), 1e-2)
    assert row["ok"] is False and json.loads(json.dumps(row, allow_nan=False))["value"] is None


def test_a_lowering_that_crashes_costs_its_own_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def crashes(*args: Any, **options: Any) -> Any:
        raise RuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setitem(LOWERINGS, "shifts", LOWERINGS["shifts"]._replace(kernel_gradient=crashes))
    found = list(gpu_sections.correctness({"side": 5, "channels": 2, "shapes": [[3, 1, 1]]}))
    assert len(found) == 3 * (1 + len(LOWERINGS))
    for row in found:
        crashed = ", shifts, " in row["what"]
        assert row["ok"] is not crashed and row.get("failure", "") == ("RuntimeError: RESOURCE_EXHAUSTED" * crashed)
    timed = {"scale": "smoke", "batch": 2, "precisions": ["float32"], "steps": 1, "megabytes": 1}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as a user runs it
        names = {row["what"].split(", ")[2]: row.get("failure", "") for row in gpu_sections.depthwise(timed)}
    assert names == {LIBRARY: "", "shifts": "RuntimeError: RESOURCE_EXHAUSTED", "grouped": "", "diagonal": ""}


def test_the_loop_that_is_timed_computes_each_step_from_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and both gradients are in it: a result that nothing needs would be left out by the compiler."""
    seen: list[Any] = []
    real = ours.compiled

    def compiled(program: Any, *args: Any) -> Any:
        seen.extend(args)
        return real(program, *args)

    monkeypatch.setattr(ours, "compiled", compiled)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        run, _ = ours.depthwise(loop=True, side=5, channels=2, kernel=3, batch=2)
        found: Any = run(2)
        with pytest.raises(ValueError, match="stride: 2 is not possible in a loop; allowed: 1"):
            ours.depthwise(loop=True, side=5, channels=2, kernel=3, batch=2, stride=2)
    x, kernel, ct = seen[:3]
    for _ in range(2):
        y, pull = jax.vjp(depthwise_conv_reference, x, kernel)
        dx, dk = pull(ct)
        x, ct = y, dx
    for a, b in zip(found, (y, dk, dx), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-5)


def test_the_same_command_goes_on_with_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sections = [bench_gpu.Section(name, {"of": name}, 0, 60) for name in ("whole", "failed")]
    monkeypatch.setattr(bench_gpu, "_smoke", lambda platform, lowerings: sections)
    ran: list[str] = []

    def run(section: bench_gpu.Section, *rest: Any) -> Any:
        ran.append(section.name)
        yield {"section": section.name, "what": f"speed of {section.name}", "value": 1.0, "unit": ""}
        failure = {"failure": "ended after 60 s"} if ran == ["whole", "failed"] else {}
        yield {"section": section.name, "what": f"section {section.mark}", "value": 2.0, "unit": "s", **failure}

    monkeypatch.setattr(bench_gpu, "_run", run)
    command = ["--platform", "cpu", "--scale", "smoke", "--out", str(tmp_path)]
    for expected in (["whole", "failed"], ["failed"], []):
        ran.clear()
        assert bench_gpu.main(command) == 0 and ran == expected
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and not any("failure" in row for row in rows)
    ran.clear()
    assert bench_gpu.main([*command, "--anew"]) == 0 and ran == ["whole", "failed"]


@pytest.mark.slow
def test_no_two_sections_of_the_whole_run_are_the_same_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row replaces the one of the same name, so names have to tell sections apart."""
    sections = bench_gpu._full()
    assert len({section.mark for section in sections}) == len(sections)
    executed = [section.given["case"]["executed"] for section in sections if section.name == "search"]
    assert set(executed) == {2, 8}
    timed = {"lowering": LIBRARY, "precision": "float32", "steps": 1}
    names, real, made = [], ours.search, []

    def once(**fields: Any) -> Any:
        """The second program would be compiled for its name alone."""
        made.append(fields)
        return real(**fields) if len(made) == 1 else (lambda steps: None, {"compile_s": 1.0})

    monkeypatch.setattr(ours, "search", once)
    for k in (1, 2):
        case = {**bench_gpu._TINY._asdict(), "executed": k, "ops": ("none", "skip_connect")}
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            names.append({row["what"] for row in gpu_sections.search({**timed, "case": case})})
    assert [fields["executed"] for fields in made] == [1, 2] and not names[0] & names[1]


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
from prdarts_jax.devices import sharding
from prdarts_jax.searching import inputs as search_inputs, program
from prdarts_jax.training import inputs, program
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
