"""The depthwise convolution's own rules against XLA's grouped convolution with plain autodiff, and against loops."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from prdarts_jax.ops.depthwise import Window, depthwise_conv, depthwise_conv_reference

# (kernel, stride, dilation, size): both strides and dilations, odd and even sizes, a kernel that is not square.
CASES = [
    ((3, 3), 1, 1, (7, 6)),
    ((3, 3), 2, 1, (7, 6)),
    ((5, 5), 2, 2, (6, 9)),
    ((3, 3), 1, 2, (5, 8)),
    ((3, 5), 2, 1, (8, 5)),
    ((5, 5), 1, 1, (2, 3)),  # the kernel is larger than the image
]
IDS = [f"{k[0]}x{k[1]}-s{s}-d{d}-{h}x{w}" for k, s, d, (h, w) in CASES]


def _data(kernel: tuple[int, int], stride: int, size: tuple[int, int]) -> tuple[jax.Array, ...]:
    """x, w, two directions of their shapes, a cotangent of y."""
    rng = np.random.default_rng(0)
    out = tuple(-(-n // stride) for n in size)
    shapes = [(2, *size, 3), (*kernel, 3), (2, *size, 3), (*kernel, 3), (2, *out, 3)]
    return tuple(jnp.asarray(rng.normal(size=shape)) for shape in shapes)


@pytest.mark.parametrize(("kernel", "stride", "dilation", "size"), CASES, ids=IDS)
def test_first_and_second_derivatives(
    kernel: tuple[int, int], stride: int, dilation: int, size: tuple[int, int]
) -> None:
    """y, dx, dw, and the gradient of a product of gradients (reverse over reverse) in x, w and the cotangent."""
    with jax.enable_x64(True):
        x, w, vx, vw, ct = _data(kernel, stride, size)

        def everything(x, w, vx, vw, ct, conv):  # type: ignore[no-untyped-def]
            def inner(x, w, ct):  # type: ignore[no-untyped-def]
                y, pull = jax.vjp(lambda x, w: conv(x, w, stride=stride, dilation=dilation), x, w)
                dx, dw = pull(ct)
                return jnp.vdot(dx, vx * jnp.sin(dx)) + jnp.vdot(dw, vw * jnp.sin(dw)), (y, dx, dw)

            return jax.value_and_grad(inner, argnums=(0, 1, 2), has_aux=True)(x, w, ct)

        @oracles.quick_jit
        def both(*args: jax.Array):  # type: ignore[no-untyped-def]
            return everything(*args, depthwise_conv), everything(*args, depthwise_conv_reference)

        ours, theirs = both(x, w, vx, vw, ct)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == np.float64 and float(np.abs(b).max()) > 0
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


def test_definition_by_loops() -> None:
    """y[i,j,c] = sum_{p,q} x[s i + d p - P, s j + d q - P, c] w[p,q,c], P = d (k-1)/2."""
    x, w, *_ = _data((3, 5), 2, (7, 6))
    y = depthwise_conv(x, w, stride=2, dilation=2)
    expected = np.zeros((2, 4, 3, 3))
    for i, j, p, q in itertools.product(range(4), range(3), range(3), range(5)):
        row, col = 2 * i + 2 * p - 2, 2 * j + 2 * q - 4
        if 0 <= row < 7 and 0 <= col < 6:
            expected[:, i, j] += np.asarray(x)[:, row, col] * np.asarray(w)[p, q]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert Window(3, 5, 2, 2).output(7, 6) == (4, 3)


@pytest.mark.parametrize("stride", [1, 2])
def test_bfloat16_stays_close(stride: int) -> None:
    x, w, _, _, ct = _data((3, 3), stride, (7, 6))

    @oracles.quick_jit
    def run(x: jax.Array, w: jax.Array, ct: jax.Array):  # type: ignore[no-untyped-def]
        y, pull = jax.vjp(lambda x, w: depthwise_conv(x, w, stride=stride), x, w)
        return y, *pull(ct)

    low = run(x.astype(jnp.bfloat16), w, ct.astype(jnp.bfloat16))
    assert [a.dtype for a in low] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    for a, b in zip(low, run(x, w, ct), strict=True):
        # bfloat16 keeps 8 bits: each input is off by at most 2^-9 relative, the output by as much again.
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.015 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("shapes", [((2, 4, 4, 3), (3, 3, 4)), ((4, 4, 3), (3, 3, 3)), ((2, 4, 4, 3), (3, 3, 1, 3))])
def test_shapes_that_do_not_fit_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        depthwise_conv(jnp.zeros(shapes[0]), jnp.zeros(shapes[1]))
