"""The CPU kernels against plain JAX in float64, and what happens where they cannot be had."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from prdarts_jax.ops import kernels
from prdarts_jax.ops.batch_norm import backward_means, batch_moments, batch_norm_reference, inner
from prdarts_jax.ops.depthwise import depthwise_conv_reference
from prdarts_jax.ops.layer_set import reference_layers
from prdarts_jax.ops.layers import pointwise
from prdarts_jax.ops.separable import Affine, Unit, pointwise_unit, separable_units
from prdarts_jax.run import provenance

# (kernel, stride, dilation, height, width, channels in, out, batch): every compiled geometry; channels that fill
# vectors, that leave one lane over, that are fewer than one; odd sizes; images smaller than the kernel; more images
# than parts.
CASES = [
    (3, 1, 1, 7, 6, 3, 5, 2),
    (3, 2, 1, 7, 6, 16, 16, 3),
    (3, 1, 2, 9, 4, 17, 33, 2),
    (3, 2, 2, 5, 8, 36, 20, 2),
    (5, 1, 1, 8, 13, 8, 40, 2),
    (5, 2, 1, 9, 9, 20, 3, 2),
    (5, 1, 2, 6, 9, 32, 7, 1),
    (5, 2, 2, 2, 3, 4, 4, 37),
    (7, 1, 1, 5, 12, 5, 16, 2),
    (7, 2, 1, 10, 7, 18, 6, 2),
    (1, 1, 1, 6, 7, 20, 36, 3),
    (1, 1, 1, 13, 12, 37, 65, 2),
]
IDS = ["-".join(map(str, case)) for case in CASES]


def _data(case: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    k, s, _, h, w, c, d, b = case
    rng = np.random.default_rng(0)
    shapes = [(b, h, w, c), (k, k, c), (c, d), (b, -(-h // s), -(-w // s), d)]
    return tuple(rng.normal(size=shape) for shape in shapes)


def _unit(x: jax.Array, depthwise: jax.Array, matrix: jax.Array, **options: bool) -> jax.Array:
    return separable_units(x, [Unit(depthwise, matrix)], **options)[0]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_separable_unit_and_its_gradients(case: tuple[int, ...]) -> None:
    """y, the moments, and the three gradients; the oracle is XLA's convolution under plain autodiff in float64."""
    oracles.require_kernels()
    _, s, d, *_ = case
    x, depthwise, matrix, ct = _data(case)

    def ours(x: Any, depthwise: Any, matrix: Any, ct: Any) -> list[Any]:
        def run(*a: Any) -> Any:
            y, (moments,) = separable_units(a[0], [Unit(*a[1:], s, d)])
            return y, moments

        y, pull, moments = jax.vjp(run, x, depthwise, matrix, has_aux=True)
        (dx,) = jax.vjp(lambda x: run(x, depthwise, matrix)[0], x)[1](ct)  # the kernel without weight gradients
        return [y, *moments, *pull(ct), dx]

    def theirs(x: Any, depthwise: Any, matrix: Any, ct: Any) -> list[Any]:
        def z(x: Any, depthwise: Any, matrix: Any) -> Any:
            convolved = reference_layers().depthwise(jax.nn.relu(x), depthwise, stride=s, dilation=d)
            return pointwise(convolved, matrix)

        y, pull = jax.vjp(lambda *a: batch_norm_reference(z(*a)), x, depthwise, matrix)
        out, grads = z(x, depthwise, matrix), pull(ct)
        return [y, out.mean(axis=(0, 1, 2)), out.var(axis=(0, 1, 2)), *grads, grads[0]]

    singles = [jnp.asarray(a, jnp.float32) for a in (x, depthwise, matrix, ct)]
    assert "prdarts_separable_backward" in jax.jit(ours).lower(*singles).as_text()
    found = jax.jit(ours)(*singles)
    with jax.enable_x64(True):
        expected = oracles.quick_jit(theirs)(*(jnp.asarray(a, jnp.float32).astype(jnp.float64) for a in singles))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5 * float(np.abs(b).max()))


def test_units_in_a_row_and_their_gradients() -> None:
    """What lies between two units is never stored: the second reads it through a mean and a scale."""
    oracles.require_kernels()
    rng = np.random.default_rng(2)
    shapes = [(4, 7, 6, 17), (3, 3, 17), (17, 12), (5, 5, 12), (12, 9), (4, 4, 3, 9)]
    *arrays, ct = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)

    def ours(x: Any, *weights: Any) -> Any:
        return separable_units(x, [Unit(*weights[:2], 2), Unit(*weights[2:], 1, 2)])[0]

    def theirs(x: Any, *weights: Any) -> Any:
        return reference_layers().separable(("", ""), x, [Unit(*weights[:2], 2), Unit(*weights[2:], 1, 2)])

    y, pull = jax.vjp(ours, *arrays)
    (dx,) = jax.vjp(lambda x: ours(x, *arrays[1:]), arrays[0])[1](ct)
    with jax.enable_x64(True):
        wide = [a.astype(jnp.float64) for a in (*arrays, ct)]
        z, through = oracles.quick_jit(lambda *a: (theirs(*a[:-1]), jax.vjp(theirs, *a[:-1])[1](a[-1])))(*wide)
    for a, b in zip((y, *pull(ct), dx), (z, *through, through[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5 * float(np.abs(b).max()))


@pytest.mark.parametrize(("channels", "out"), [(3, 5), pytest.param(16, 48, marks=pytest.mark.slow), (33, 20)])
def test_a_pointwise_unit_and_the_sums(channels: int, out: int) -> None:
    oracles.require_kernels()
    rng = np.random.default_rng(1)
    x, matrix, ct = (
        rng.normal(size=s).astype(np.float32) for s in ((3, 5, 4, channels), (channels, out), (3, 5, 4, out))
    )
    y, pull = jax.vjp(lambda x, m: pointwise_unit(x, m)[0], jnp.asarray(x), jnp.asarray(matrix))
    with jax.enable_x64(True):
        wide = [jnp.asarray(a.astype(np.float64)) for a in (x, matrix, ct)]
        z, through = jax.vjp(lambda x, m: batch_norm_reference(pointwise(jax.nn.relu(x), m)), *wide[:2])
        expected = z, *through(wide[2])
    for a, b in zip((y, *pull(jnp.asarray(ct))), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
    mean, variance = batch_moments(jnp.asarray(ct) + 100)  # far from zero: a mean of squares would lose the variance
    np.testing.assert_allclose(mean, ct.mean(axis=(0, 1, 2)) + 100, rtol=1e-6)
    np.testing.assert_allclose(variance, (ct + np.float32(100)).astype(np.float64).var(axis=(0, 1, 2)), rtol=1e-4)
    means = backward_means(jnp.asarray(ct), y, mean, variance)
    np.testing.assert_allclose(means[0], ct.mean(axis=(0, 1, 2)), rtol=1e-4, atol=1e-6)
    cross = (ct * (np.asarray(y) - np.asarray(mean)) * np.asarray(variance)).mean(axis=(0, 1, 2))
    np.testing.assert_allclose(means[1], cross, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(inner(jnp.asarray(ct), y), np.vdot(ct, y), rtol=1e-4)


def test_second_derivatives_are_those_of_the_composition() -> None:
    oracles.require_kernels()
    x, depthwise, matrix, ct = (jnp.asarray(a, jnp.float32) for a in _data(CASES[0]))

    def norm_of_gradient(x: jax.Array, own: bool) -> jax.Array:
        def loss(matrix: jax.Array) -> jax.Array:
            return jnp.vdot(jnp.sin(_unit(x, depthwise, matrix, own_kernels=own)), ct)

        return jnp.sum(jax.grad(loss)(matrix) ** 2)

    ours, theirs = (oracles.quick_jit(partial(jax.grad(norm_of_gradient), own=own))(x) for own in (True, False))
    assert float(jnp.abs(theirs).max()) > 0
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4 * float(jnp.abs(theirs).max()))


def test_a_batch_of_calls_is_a_call_each() -> None:
    oracles.require_kernels()
    x, depthwise, matrix, _ = (jnp.asarray(a, jnp.float32) for a in _data(CASES[0]))
    both = jax.vmap(lambda x: _unit(x, depthwise, matrix))(jnp.stack([x, -x]))
    np.testing.assert_array_equal(both, [_unit(a, depthwise, matrix) for a in (x, -x)])


@pytest.mark.parametrize("case", [CASES[0], CASES[-1]], ids=["3x3", "1x1"])
def test_nan_does_not_vanish_in_a_relu(case: tuple[int, ...]) -> None:
    oracles.require_kernels()
    x, depthwise, matrix, _ = (jnp.asarray(a, jnp.float32) for a in _data(case))
    assert bool(jnp.isnan(_unit(x.at[0, 3, 3, 0].set(jnp.nan), depthwise, matrix)).any())


_IMPORTS = """
import hashlib, json, os, sys
import jax, jax.numpy as jnp
from prdarts_jax.ops import kernels
from prdarts_jax.ops.separable import Unit, separable_units
"""
_COMPUTE = """
x, d, m = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(13, 9, 8, 20), (5, 5, 20), (20, 24)]))
y, pull = jax.vjp(lambda x, *w: separable_units(x, [Unit(*w)])[0], x, d, m)
parts = [y, *pull(jnp.cos(y))]
digests = [hashlib.sha256(a.tobytes()).hexdigest() for a in parts]
print(json.dumps([*kernels.kernels(), digests, float(abs(parts[1]).sum())]))
"""


def _elsewhere(*others: Mapping[str, str], **changed: str) -> Any:
    """What a process of its own finds and computes; in each of `others` in turn, if any: it forgets what it found.

    Starting a process takes longer than what it computes.
    """
    settings = {"PRDARTS_CPU_KERNELS": "auto", "XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment = {**os.environ, **settings, **changed}
    turns = [
        f"os.environ.update({dict(other)!r}); kernels.kernels.cache_clear()\n{_COMPUTE}" for other in others or ({},)
    ]
    code = "\n".join([_IMPORTS, *turns])
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return found if others else found[0]


@cache
def _on_one_thread() -> Any:
    return _elsewhere(PJRT_NPROC="1")


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    oracles.require_kernels()
    one, many = _on_one_thread(), _elsewhere(PJRT_NPROC="7")
    assert one[0] and one == many


def test_without_kernels_the_values_are_the_same_to_rounding(tmp_path: Path) -> None:
    """Switched off; without a compiler; with one that fails: XLA computes, and says why."""
    failing = tmp_path / "failing"
    failing.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "no such thing" >&2\nexit 1\n')
    failing.chmod(0o755)
    cases: Mapping[str, Mapping[str, str]] = {
        "off (PRDARTS_CPU_KERNELS)": {"PRDARTS_CPU_KERNELS": "off"},
        "no C++ compiler": {"CXX": str(tmp_path / "absent"), "XDG_CACHE_HOME": str(tmp_path)},
        "the C++ compiler failed: ['no such thing']": {"CXX": str(failing), "XDG_CACHE_HOME": str(tmp_path)},
    }
    expected = _on_one_thread()[3] if kernels.kernels().loaded else None
    settings = [{"PRDARTS_CPU_KERNELS": "auto", **environment} for environment in cases.values()]
    for reason, (loaded, description, _, total) in zip(cases, _elsewhere(*settings), strict=True):
        assert (loaded, description) == (False, reason)
        assert expected is None or total == pytest.approx(expected, rel=1e-4)


def test_a_command_says_once_that_there_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    say = provenance.warn_without_kernels.__wrapped__  # without the memory of what was said
    for why in ("native 0123", "off (PRDARTS_CPU_KERNELS)", "no CPU"):
        say(why)
    assert capsys.readouterr().err == ""
    say("no C++ compiler")
    (line,) = capsys.readouterr().err.splitlines()
    assert "no CPU kernels (no C++ compiler): " in line and "PRDARTS_CPU_KERNELS=off" in line


def test_a_damaged_file_is_compiled_again(tmp_path: Path) -> None:
    """By a compiler that has the result at hand: the kernels of the other tests are compiled by the real one."""
    oracles.require_kernels()
    library, digest = kernels._library()
    compiler, asked = tmp_path / "compiler", tmp_path / "asked"
    lines = [
        "#!/bin/sh",
        f'[ "$1" = --version ] && exec {kernels._compiler()} --version',
        f'echo "$*" >> {asked}',
        f'case "$*" in *-shared*) made={library._name};; *) made=/dev/null;; esac',
        "while [ $# -gt 1 ]; do shift; done",
        'cp "$made" "$1"',
    ]
    compiler.write_text("\n".join(lines))
    compiler.chmod(0o755)
    kept = tmp_path / "prdarts_jax" / "kernels" / f"{digest}.so"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"not a library")
    assert _elsewhere(XDG_CACHE_HOME=str(tmp_path), CXX=str(compiler))[0] is True
    assert len(asked.read_text().splitlines()) == 4  # three files, and one of them all
    assert kept.stat().st_size > 10_000 and [p.name for p in kept.parent.iterdir()] == [kept.name]


def test_other_kernels_are_a_reason_for_other_last_bits() -> None:
    old, new = ({"platform": {"cpu_kernels": name}} for name in ("native 0", "off"))
    assert provenance.tolerance(old, new) == ["cpu_kernels native 0 -> off"]


@pytest.mark.parametrize("window", [(3, 5, 1, 1), (9, 9, 1, 1), (3, 3, 3, 1), (7, 7, 1, 2), (1, 1, 2, 1)])
def test_other_geometries_are_left_to_xla(window: tuple[int, int, int, int]) -> None:
    assert not kernels.compiled(*window)


@pytest.mark.parametrize("own", [True, False], ids=["kernels", "composed"])
def test_an_affine_of_units_in_a_row_and_its_gradients(own: bool) -> None:
    """Against plain autodiff of the layers in float64; one gamma is zero."""
    if own:
        oracles.require_kernels()
    rng = np.random.default_rng(4)
    sizes = ((3, 6, 5, 4), (3, 3, 4), (4, 4), (4,), (4,), (3, 3, 4), (4, 7), (7,), (7,), (3, 3, 3, 7))
    *given, ct = (rng.normal(size=size) for size in sizes)
    given[3][1] = 0.0

    def ours(x: jax.Array, *w: jax.Array) -> jax.Array:
        units, affines = [Unit(*w[:2], stride=2), Unit(*w[4:6])], [Affine(*w[2:4]), Affine(*w[6:])]
        return separable_units(x, units, affines, own_kernels=own)[0]

    def theirs(x: jax.Array, *w: jax.Array) -> jax.Array:
        for (depthwise, matrix, scale, bias), stride in ((w[:4], 2), (w[4:], 1)):
            convolved = depthwise_conv_reference(jax.nn.relu(x), depthwise, stride=stride)
            y = batch_norm_reference(pointwise(convolved, matrix))
            x = y * scale.reshape(1, 1, 1, -1) + bias.reshape(1, 1, 1, -1)
        return x

    def with_gradients(f: Callable[..., jax.Array]) -> Callable[..., Any]:
        def run(ct: jax.Array, *args: jax.Array) -> tuple[jax.Array, ...]:
            y, pull = jax.vjp(f, *args)
            return y, *pull(ct)

        return oracles.quick_jit(run)

    found = with_gradients(ours)(*(jnp.asarray(a, jnp.float32) for a in (ct, *given)))
    with jax.enable_x64(True):
        expected = with_gradients(theirs)(*map(jnp.asarray, (ct, *given)))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=5e-4, atol=5e-5 * float(np.abs(b).max()))
