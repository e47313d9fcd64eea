"""The slips in cells, kernels and layers."""

from __future__ import annotations

from slips import Mutation

_BATCH_NORM = "prdarts_jax/ops/batch_norm.py"
_CELL = "prdarts_jax/space/cell.py"
_CPU = "prdarts_jax/ops/cpu"
_DEPTHWISE = "prdarts_jax/ops/depthwise.py"
_IN_PLACE = "prdarts_jax/space/cell_kernels.py"
_LAYERS = "prdarts_jax/ops/layers.py"
_NOISE = "prdarts_jax/space/noise.py"
_PARTIAL = "prdarts_jax/space/partial.py"
_POOLS = "prdarts_jax/ops/pools.py"
_SCAN = "prdarts_jax/space/cell_scan.py"
_SIDE_BY_SIDE = "prdarts_jax/ops/side_by_side.py"
_WAVES = "prdarts_jax/space/cell_waves.py"

CELL_SLIPS = (
    Mutation(
        "waves: gradients of the weights of other edges",
        _WAVES,
        "lambda rows, places, _, ct: (ct[np.asarray(places)],)",
        "lambda rows, places, _, ct: (ct[np.asarray(rows)[: len(places)]],)",
        ("tests/space/test_cell_waves.py::test_nodes_and_gradients",),
    ),
    Mutation(
        "waves: small kernels in a corner of the large ones",
        _SIDE_BY_SIDE,
        "[(margin, margin)] * 2",
        "[(0, 2 * margin)] * 2",
        ("tests/space/test_cell_waves.py::test_nodes_and_gradients",),
    ),
    Mutation(
        "waves: the second half of a strided identity from the first pixel",
        _SIDE_BY_SIDE,
        "[taps[0], nothing, nothing, taps[1]]",
        "[taps[0] + taps[1], nothing, nothing, nothing]",
        ("tests/space/test_cell_waves.py::test_nodes_and_gradients",),
    ),
    Mutation(
        "waves: drop-path left out",
        _WAVES,
        "dropped = noise is not None and noise.edges is not None",
        "dropped = False",
        ("tests/space/test_cell_waves.py::test_noise_and_partial_channels",),
    ),
    Mutation(
        "waves: statistics by a difference of mean squares",
        _SIDE_BY_SIDE,
        "middle = wide[:, z.shape[1] // 2, z.shape[2] // 2]",
        "middle = jnp.zeros_like(wide[:, 0, 0])",
        ("tests/space/test_cell_waves.py::test_statistics_of_a_large_mean_and_an_image_far_from_the_others",),
    ),
    Mutation(
        "waves: the backward pass with the statistics of one device",
        _SIDE_BY_SIDE,
        "joined = lax.pmean(joined, axis_name)",
        "pass",
        ("tests/space/test_cell_waves.py::test_on_several_devices",),
    ),
    Mutation(
        "partial: a shuffle of C/K groups",
        _PARTIAL,
        "x.reshape(*x.shape[:-1], space.partial, -1)",
        "x.reshape(*x.shape[:-1], -1, space.partial)",
        ("tests/space/test_partial.py::test_what_passes_counts_once_an_edge",),
    ),
    Mutation(
        "partial: what passes without the multiplier of its edge",
        _PARTIAL,
        "if edges is None else edges[:, None]",
        "if edges is None else jnp.ones_like(edges)[:, None]",
        ("tests/space/test_partial.py::test_what_passes_counts_once_an_edge",),
    ),
    Mutation(
        "partial: the shuffle left out of the scan's backward pass",
        _SCAN,
        "total = jnp.where(index >= first, unshuffled(space, total), total)",
        "pass",
        ("tests/space/test_partial.py::test_lowerings_agree",),
    ),
    Mutation(
        "partial: multipliers without their gradient in the kernels",
        "prdarts_jax/space/cell_partial.py",
        "            if wanted.factors:\n",
        "            if False:\n",
        ("tests/space/test_partial.py::test_lowerings_agree",),
    ),
    Mutation(
        "noise: the same masks in every cell",
        _NOISE,
        "key = jax.random.fold_in(noise.key, cell)",
        "key = noise.key",
        ("tests/space/test_noise.py::test_masks_belong_to_key_cell_and_place_in_the_global_batch",),
    ),
    Mutation(
        "noise: the same dropout on every edge",
        _NOISE,
        "jax.random.fold_in(jax.random.fold_in(noise.key, edge), space.ops.index(op))",
        "jax.random.fold_in(noise.key, space.ops.index(op))",
        ("tests/space/test_noise.py::test_dropout_takes_each_element_by_itself",),
    ),
    Mutation(
        "noise: a backward pass of the kernels without drop-path",
        _IN_PLACE,
        "ct_nodes = path_dropped(noise, term.edge, ct)[None]",
        "ct_nodes = ct[None]",
        ("tests/space/test_noise.py::test_lowerings_draw_the_same_masks",),
    ),
    Mutation(
        "noise: a kernel takes the factor of the first image for all",
        f"{_CPU}/terms.h",
        "return of[by_image ? b : 0];",
        "return of[0];",
        ("tests/space/test_noise.py::test_lowerings_draw_the_same_masks",),
    ),
    Mutation(
        "noise: dropout of strided skip connections",
        _NOISE,
        'return space.table[op].group != "skip" or stride == 1',
        "return True",
        ("tests/space/test_noise.py::test_a_strided_skip_connection_has_no_dropout",),
    ),
    Mutation(
        "cell: gradients of weights without the gate",
        _SCAN,
        "flat = term.value.astype(flat.dtype) * jnp.pad(",
        "flat = jnp.pad(",
        ("tests/space/test_cell.py::test_small_spaces",),
    ),
    Mutation(
        "cell: gradients of inputs without the gate",
        _SCAN,
        "return total + term.value.astype(dx.dtype) * dx, flat, dvalue",
        "return total + dx, flat, dvalue",
        ("tests/space/test_cell.py::test_small_spaces",),
    ),
    Mutation(
        "cell: gradient of the gate times the gate",
        _SCAN,
        "dvalue = inner(ct, y, own_kernels=program.lowering.own_kernels).astype(value_dtype)",
        "dvalue = (term.value * inner(ct, y)).astype(value_dtype)",
        ("tests/space/test_cell.py::test_small_spaces",),
    ),
    Mutation(
        "cell: backward in the order of the nodes",
        _SCAN,
        "gathering = _gathering(terms.source, reverse=True)",
        "gathering = _gathering(terms.source, reverse=False)",
        ("tests/space/test_cell.py::test_small_spaces",),
    ),
    Mutation(
        "cell: backward through the groups in the order of the forward pass",
        _CELL,
        "for group in reversed(space.edge_groups(kind)):",
        "for group in space.edge_groups(kind):",
        ("tests/space/test_cell.py::test_small_spaces",),
    ),
    Mutation(
        "cell: rows of weights taken for edges",
        _SCAN,
        "rows = np.asarray([group.edges.index(e) for e in members])",
        "rows = np.arange(len(members))",
        ("tests/space/test_cell.py::test_small_spaces",),
    ),
    Mutation(
        "terms: sources of a reduction cell not shifted",
        "prdarts_jax/space/terms.py",
        "source if group.stride == 2 else source - 2, target - 2",
        "source if group.stride == 2 else source - 1, target - 2",
        ("tests/space/test_cell.py::test_small_spaces",),
    ),
    Mutation(
        "cell in place: backward from the first term",
        _IN_PLACE,
        "lax.scan(one, carry, scanned, reverse=True)",
        "lax.scan(one, carry, scanned)",
        ("tests/space/test_cell_in_place.py::test_nodes_and_gradients",),
    ),
    Mutation(
        "cell in place: gradients of other weights without the gate",
        _IN_PLACE,
        "scaled = jax.tree.map(lambda d: term.value.astype(d.dtype) * d, dp)",
        "scaled = dp",
        ("tests/space/test_cell_in_place.py::test_nodes_and_gradients",),
    ),
    Mutation(
        "cell in place: a cotangent added to the target",
        _IN_PLACE,
        "return _add(cts, dx, term.source, term.value), dvalue, dothers",
        "return _add(cts, dx, term.target, term.value), dvalue, dothers",
        ("tests/space/test_cell_in_place.py::test_nodes_and_gradients",),
    ),
)

KERNEL_SLIPS = (
    Mutation(
        "kernel: dilation of the columns left out",
        f"{_CPU}/loops.cc",
        "load(line + (D * q + S * t) * kLanes)",
        "load(line + (q + S * t) * kLanes)",
        ("tests/ops/test_native.py::test_a_separable_unit_and_its_gradients",),
    ),
    Mutation(
        "kernel: rows of the kernel gradient shifted by one",
        f"{_CPU}/loops.cc",
        "lines[p] = image.at(c / kLanes, S * i + D * (first + p), 0);",
        "lines[p] = image.at(c / kLanes, S * i + D * p, 0);",
        ("tests/ops/test_native.py::test_a_separable_unit_and_its_gradients",),
    ),
    Mutation(
        "kernel: variance between images left out",
        f"{_CPU}/statistics.h",
        "(within / pixels + between) / batch",
        "(within / pixels) / batch",
        ("tests/ops/test_native.py::test_a_pointwise_unit_and_the_sums",),
    ),
    Mutation(
        "kernel: mean of dy y without 1/sigma",
        f"{_CPU}/statistics.h",
        "second * s, n);",
        "second, n);",
        ("tests/ops/test_native.py::test_a_pointwise_unit_and_the_sums",),
    ),
    Mutation(
        "kernel: a normalisation's gradient keeps its mean",
        f"{_CPU}/separable.h",
        "(load(dy + i * channels + c, n) - offset - centred * slope)",
        "(load(dy + i * channels + c, n) - centred * slope)",
        ("tests/ops/test_native.py::test_a_separable_unit_and_its_gradients",),
    ),
    Mutation(
        "kernel: input gradient with the kernel not flipped",
        f"{_CPU}/depthwise.h",
        "(flip ? taps - 1 - t : t)",
        "t",
        ("tests/ops/test_native.py::test_a_separable_unit_and_its_gradients",),
    ),
    Mutation(
        "kernel: a ReLU cut at 0 instead of at the mean",
        f"{_CPU}/images.h",
        "where_above(load(x + at + c, n), load(bound + c, n), v)",
        "where_above(load(x + at + c, n), Vec{}, v)",
        ("tests/ops/test_native.py::test_units_in_a_row_and_their_gradients",),
    ),
    Mutation(
        "kernel: an input gradient without the gate",
        f"{_CPU}/images.h",
        "load(data + i, n) + factor * v",
        "load(data + i, n) + v",
        ("tests/space/test_cell_in_place.py::test_nodes_and_gradients",),
    ),
    Mutation(
        "kernel: a matrix gradient without the gate",
        f"{_CPU}/terms.h",
        "dpointwise[i] += factor * of_pointwise[i]",
        "dpointwise[i] += of_pointwise[i]",
        ("tests/space/test_cell_in_place.py::test_nodes_and_gradients",),
    ),
    Mutation(
        "kernel: gradient of a gate that is a mean",
        f"{_CPU}/terms.h",
        "*dvalue = static_cast<float>(total * g.batch * g.out_pixels());",
        "*dvalue = static_cast<float>(total * g.out_pixels());",
        ("tests/space/test_cell_in_place.py::test_nodes_and_gradients",),
    ),
    Mutation(
        "kernel: the last of equal pixels is the maximum",
        f"{_CPU}/pools.h",
        "const auto better = w > best;",
        "const auto better = w >= best;",
        ("tests/space/test_cell_in_place.py::test_the_first_of_equal_pixels_is_the_maximum",),
    ),
    Mutation(
        "kernel: a pool counts pixels of the padding",
        f"{_CPU}/pools.h",
        "std::min(centre + 1, size - 1)",
        "std::min(centre + 1, size)",
        ("tests/space/test_cell_in_place.py::test_nodes_and_gradients",),
    ),
    Mutation(
        "kernel: the last image of a part left out",
        f"{_CPU}/threads.h",
        "(part + 1) * batch / parts}",
        "(part + 1) * (batch - 1) / parts}",
        ("tests/ops/test_native.py::test_a_pointwise_unit_and_the_sums",),
    ),
)

LAYER_SLIPS = (
    Mutation(
        "batch norm: one of the two means left out of the rule",
        _BATCH_NORM,
        "- per_channel(mean) - wide * per_channel(cross))",
        "- per_channel(mean))",
        ("tests/ops/test_layers.py::test_rules_to_second_order",),
    ),
    Mutation(
        "batch norm: variance between devices left out",
        _BATCH_NORM,
        "variances + jnp.square(means - mean[None])",
        "variances",
        ("tests/ops/test_layers.py::test_batch_norm_over_a_mapped_axis_is_that_of_the_whole_batch",),
    ),
    Mutation(
        "batch norm: variance between devices by a difference of squares",
        _BATCH_NORM,
        "variances + jnp.square(means - mean[None]), axis=0)",
        "variances + means * means, axis=0) - mean * mean",
        ("tests/ops/test_layers.py::test_statistics_over_devices_do_not_cancel",),
    ),
    Mutation(
        "batch norm: means of the rule not taken over the devices",
        _BATCH_NORM,
        "return means if axis_name is None else lax.pmean(means, axis_name)",
        "return means",
        ("tests/ops/test_layers.py::test_batch_norm_over_a_mapped_axis_is_that_of_the_whole_batch",),
    ),
    Mutation(
        "unit: gradient of the matrix without gamma",
        "prdarts_jax/ops/separable.py",
        "d_matrix = d_matrix * affine.scale.astype(d_matrix.dtype)[None]",
        "d_matrix = d_matrix * jnp.ones_like(affine.scale)[None]",
        ("tests/ops/test_native.py::test_an_affine_of_units_in_a_row_and_its_gradients",),
    ),
    Mutation(
        "max pool: gradient to the wrong parity",
        _POOLS,
        "slice(int(tap == 0), size + int(tap == 0))",
        "slice(int(tap == 2), size + int(tap == 2))",
        ("tests/ops/test_layers.py::test_max_pool_sends_the_whole_cotangent_to_the_first_maximum",),
    ),
    Mutation(
        "max pool: the last maximum gets the gradient",
        _POOLS,
        "better = part > best",
        "better = part >= best",
        ("tests/ops/test_layers.py::test_max_pool_sends_the_whole_cotangent_to_the_first_maximum",),
    ),
    Mutation(
        "average pool: the divisor counts the padding",
        _POOLS,
        "return np.minimum(centre + 1, n - 1) - np.maximum(centre - 1, 0) + 1",
        "return np.full(centre.shape, 3)",
        ("tests/ops/test_layers.py::test_pooling_by_loops",),
    ),
    Mutation(
        "factorized reduce: the second half not shifted",
        _LAYERS,
        "pointwise(x[:, 1::2, 1::2], second)",
        "pointwise(x[:, ::2, ::2], second)",
        ("tests/ops/test_layers.py::test_factorized_reduce_by_its_definition",),
    ),
    Mutation(
        "weights: drawn within 1/fan_in",
        _LAYERS,
        "/ math.sqrt(w.fan_in)).reshape",
        "/ w.fan_in).reshape",
        ("tests/ops/test_layers.py::test_drawn_weights_are_uniform_within_their_bound",),
    ),
    Mutation(
        "depthwise: padding without the dilation",
        _DEPTHWISE,
        "return self.dilation * (self.height - 1) // 2, self.dilation * (self.width - 1) // 2",
        "return (self.height - 1) // 2, (self.width - 1) // 2",
        ("tests/ops/test_depthwise.py::test_definition_by_loops",),
    ),
    Mutation(
        "depthwise: input gradient with the kernel not flipped",
        _DEPTHWISE,
        "flipped = kernel[window.height - 1 - p, window.width - 1 - q]",
        "flipped = kernel[p, q]",
        ("tests/ops/test_depthwise.py::test_first_and_second_derivatives",),
    ),
)
