"""The operations, a cell and the search network written from flax.linen modules: a second oracle, with other kernels.

The modules receive the weights of the library, so their gradients land in the library's own tree. Images are NHWC.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from prdarts_jax.space.spec import Space
from prdarts_jax.space.supernet import by_cell


def convolution(x: jax.Array, kernel: Any, stride: Any = 1, dilation: int = 1, groups: int = 1) -> jax.Array:
    """nn.Conv without bias; `kernel` HWIO, padding that keeps the size at stride 1."""
    kh, kw, _, features = kernel.shape
    strides = (stride, stride) if isinstance(stride, int) else stride
    layer = nn.Conv(
        features,
        (kh, kw),
        strides,
        padding=[(dilation * (k - 1) // 2,) * 2 for k in (kh, kw)],
        kernel_dilation=dilation,
        feature_group_count=groups,
        use_bias=False,
        param_dtype=x.dtype,
    )
    return layer.apply({"params": {"kernel": kernel}}, x)


def norm(x: jax.Array, affine: Mapping[str, Any] | None = None) -> jax.Array:
    """nn.BatchNorm with the statistics of the batch, two-pass variance."""
    layer = nn.BatchNorm(
        use_running_average=False,
        epsilon=1e-5,
        use_bias=affine is not None,
        use_scale=affine is not None,
        use_fast_variance=False,
        param_dtype=x.dtype,
    )
    statistics = {"mean": jnp.zeros(x.shape[-1], x.dtype), "var": jnp.ones(x.shape[-1], x.dtype)}
    variables = {"batch_stats": statistics} | ({} if affine is None else {"params": dict(affine)})
    with jax.numpy_dtype_promotion("standard"):  # the module promotes with float32
        return layer.apply(variables, x, mutable=["batch_stats"])[0]


def _depthwise(x: jax.Array, kernel: Any, stride: int = 1, dilation: int = 1) -> jax.Array:
    return convolution(x, kernel[:, :, None, :], stride, dilation, groups=kernel.shape[2])


def _pointwise(x: jax.Array, kernel: Any, stride: int = 1) -> jax.Array:
    return convolution(x, kernel[None, None], stride)


def _factorized_reduce(x: jax.Array, first: Any, second: Any) -> jax.Array:
    x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
    return jnp.concatenate([_pointwise(x, first, 2), _pointwise(x[:, 1:, 1:], second, 2)], axis=-1)


def primitive(name: str, params: Mapping[str, Any], x: jax.Array, stride: int) -> jax.Array:
    """One operation of the search space, [B,H,W,C] -> [B,ceil(H/s),ceil(W/s),C]."""
    pool = {"window_shape": (3, 3), "strides": (stride, stride), "padding": ((1, 1), (1, 1))}
    if name == "none":
        return 0.0 * nn.max_pool(x, (1, 1), (stride, stride))
    if name == "max_pool_3x3":
        return nn.max_pool(x, **pool)
    if name == "avg_pool_3x3":
        return nn.avg_pool(x, **pool, count_include_pad=False)
    if name == "skip_connect":
        return x if stride == 1 else norm(_factorized_reduce(nn.relu(x), params["first"], params["second"]))
    if name.startswith("sep_conv"):
        x = norm(_pointwise(_depthwise(nn.relu(x), params["depthwise1"], stride), params["pointwise1"]))
        return norm(_pointwise(_depthwise(nn.relu(x), params["depthwise2"]), params["pointwise2"]))
    if name.startswith("dil_conv"):
        return norm(_pointwise(_depthwise(nn.relu(x), params["depthwise"], stride, 2), params["pointwise"]))
    assert name == "conv_7x1_1x7"
    return norm(convolution(convolution(nn.relu(x), params["conv_1x7"], (1, stride)), params["conv_7x1"], (stride, 1)))


def cell(space: Space, kind: str, weights: Any, gates: Any, s0: jax.Array, s1: jax.Array) -> jax.Array:
    """The nodes [N,B,h,w,C], each the gated sum of every operation of every edge into it; the same ops on all edges."""
    states, edge = [s0, s1], 0
    places = {"stride1": 0, "stride2": 0}
    for n in range(2, 2 + space.nodes):
        terms = []
        for j in range(n):
            stride = 2 if kind == "reduce" and j < 2 else 1
            group = f"stride{stride}"
            for o, name in enumerate(space.ops):
                stack = weights[group].get(name, {})
                params = {key: array[places[group]] for key, array in stack.items()}
                y = primitive(name, params, states[j], stride)
                terms.append(gates[edge, o] * (norm(y) if "pool" in name and space.pool_norm else y))
            places[group] += 1
            edge += 1
        states.append(sum(terms))
    return jnp.stack(states[2:])


def _preprocess(params: Mapping[str, Any], x: jax.Array) -> jax.Array:
    x = nn.relu(x)
    return norm(
        _pointwise(x, params["pointwise"])
        if "pointwise" in params
        else _factorized_reduce(x, params["first"], params["second"])
    )


def supernet(space: Space, weights: Any, gates: Mapping[str, Any], images: jax.Array) -> jax.Array:
    """Logits of the search network."""
    stem = weights["stem"]
    x = norm(convolution(images, stem["conv"]), {k: v for k, v in stem.items() if k != "conv"})
    before_last, last = x, x
    for i, one in enumerate(by_cell(weights, space)):
        kind = "reduce" if i in (space.cells // 3, 2 * space.cells // 3) else "normal"
        s0, s1 = _preprocess(one["preprocess0"], before_last), _preprocess(one["preprocess1"], last)
        nodes = cell(space, kind, one["edges"], gates[kind], s0, s1)
        before_last, last = last, jnp.concatenate(list(nodes), axis=-1)
    head = weights["head"]
    if "norm" in head:
        last = nn.relu(norm(last, head["norm"]))
    dense = nn.Dense(head["kernel"].shape[1], param_dtype=last.dtype)
    return dense.apply({"params": {k: head[k] for k in ("kernel", "bias")}}, last.mean((1, 2)))
