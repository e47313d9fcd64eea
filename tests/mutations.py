"""Slips that a careless change could make, and the tests that must notice each of them: what `mutate.py` tries."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """One slip: in `file`, the text `old` (which is there exactly once) becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]  # node ids of the quick suite, of which at least one must fail


_AUGMENT = "prdarts_jax/data/augment.py"
_BATCHES = "prdarts_jax/data/batches.py"
_BATCH_NORM = "prdarts_jax/ops/batch_norm.py"
_BILEVEL = "prdarts_jax/bilevel.py"
_CELL = "prdarts_jax/space/cell.py"
_CHECKPOINT = "prdarts_jax/run/checkpoint.py"
_CONFIG = "prdarts_jax/config/search.py"
_COUNTS = "prdarts_jax/network/counts.py"
_CPU = "prdarts_jax/ops/cpu"
_DEPTHWISE = "prdarts_jax/ops/depthwise.py"
_DERIVE = "prdarts_jax/space/derive.py"
_EVALUATION = "prdarts_jax/training/evaluation.py"
_GATES = "prdarts_jax/gates.py"
_GENOTYPE = "prdarts_jax/space/genotype.py"
_GENOTYPE_TEXT = "prdarts_jax/space/genotype_text.py"
_IN_PLACE = "prdarts_jax/space/cell_kernels.py"
_LAYERS = "prdarts_jax/ops/layers.py"
_METRICS = "prdarts_jax/run/metrics.py"
_NOISE = "prdarts_jax/space/noise.py"
_OPTIMIZERS = "prdarts_jax/optimizers.py"
_PARTIAL = "prdarts_jax/space/partial.py"
_PENALTY = "prdarts_jax/regularizers.py"
_POOLS = "prdarts_jax/ops/pools.py"
_PRDARTS = "prdarts_jax/strategies/prdarts.py"
_SCAN = "prdarts_jax/space/cell_scan.py"
_SCHEDULES = "prdarts_jax/schedules.py"
_SCHEMA = "prdarts_jax/config/schema.py"
_SEARCH = "prdarts_jax/searching/program.py"
_SWEEP = "prdarts_jax/searching/sweep.py"
_TRAIN = "prdarts_jax/training/program.py"

_GATE_SLIPS = (
    Mutation(
        "gate: sign of beta in the sigmoid",
        _GATES,
        "jnp.log1p(-u) + beta",
        "jnp.log1p(-u) - beta",
        ("tests/test_gates.py::test_theorem_3_by_monte_carlo",),
    ),
    Mutation(
        "gate: temperature left out of the sample",
        _GATES,
        "jnp.log1p(-u) + beta) / tau)",
        "jnp.log1p(-u) + beta))",
        ("tests/test_gates.py::test_distribution_of_the_gates",),
    ),
    Mutation(
        "gate: temperature left out of the probability",
        _GATES,
        "beta - tau * math.log(-a / b)",
        "beta - math.log(-a / b)",
        ("tests/test_gates.py::test_theorem_3_by_monte_carlo",),
    ),
    Mutation(
        "gate: not clipped at 1",
        _GATES,
        "jnp.clip(x, 0.0, 1.0)",
        "jnp.maximum(x, 0.0)",
        ("tests/test_gates.py::test_distribution_of_the_gates",),
    ),
    Mutation(
        "gate: a gradient at the ends of the interval",
        _GATES,
        "(x > 0) & (x < 1)",
        "(x >= 0) & (x <= 1)",
        ("tests/test_gates.py::test_gradient_at_the_ends_of_the_interval_is_zero",),
    ),
    Mutation(
        "gate: straight-through without a gradient",
        _GATES,
        "return g + lax.stop_gradient(1.0 - g)",
        "return lax.stop_gradient(g + (1.0 - g))",
        ("tests/test_gates.py::test_straight_through_is_one_forward_and_the_identity_backward",),
    ),
    Mutation(
        "gate: ties to the first operation",
        _GATES,
        "ties = jax.random.uniform(key, scores.shape)",
        "ties = jnp.zeros(scores.shape)",
        ("tests/test_gates.py::test_ties_are_broken_uniformly",),
    ),
    Mutation(
        "prdarts: both cell types draw the same noise",
        _PRDARTS,
        "jax.random.split(jax.random.fold_in(key, i))",
        "jax.random.split(key)",
        ("tests/strategies/test_strategies.py::test_cell_types_draw_different_noise",),
    ),
    Mutation(
        "prdarts: gate dropout favours what it drops",
        _PRDARTS,
        "g - dropped.astype(g.dtype)",
        "g + dropped.astype(g.dtype)",
        ("tests/test_gates.py::test_gate_dropout_changes_the_choice_with_its_probability",),
    ),
    Mutation(
        "prdarts: temperature ends one epoch late",
        _PRDARTS,
        "fraction = epoch / (epochs - 1) if",
        "fraction = epoch / epochs",
        ("tests/strategies/test_strategies.py::test_temperature_is_linear_from_the_first_to_the_last_epoch",),
    ),
)

_PENALTY_SLIPS = (
    Mutation(
        "penalty: a mean over operations that the edge may not use",
        _PENALTY,
        "jnp.sum(jnp.where(counted, probabilities, 0.0)) / jnp.maximum(number, 1.0)",
        "jnp.sum(jnp.where(counted, probabilities, 0.0)) / counted.size",
        ("tests/test_regularizers.py::test_terms_equal_loops",),
    ),
    Mutation(
        "penalty: a path that is a sum of its edges",
        _PENALTY,
        "jnp.prod(jnp.where(present, factor, 1.0))",
        "jnp.sum(jnp.where(present, factor, 0.0))",
        ("tests/test_regularizers.py::test_terms_equal_loops",),
    ),
    Mutation(
        "penalty: sign of the path term",
        _PRDARTS,
        '"path": -numbers["lambda3"] * path / 2',
        '"path": numbers["lambda3"] * path / 2',
        ("tests/test_regularizers.py::test_penalty_of_the_presets_by_hand",),
    ),
    Mutation(
        "penalty: a term left out of the total",
        _PRDARTS,
        'return ce + (terms["skip"] + terms["nonskip"] + terms["path"]), terms',
        'return ce + (terms["skip"] + terms["path"]), terms',
        ("tests/test_regularizers.py::test_penalty_of_the_presets_by_hand",),
    ),
    Mutation(
        "penalty: the coefficients of two terms exchanged",
        _PRDARTS,
        '"skip": numbers["lambda1"] * group(skips)',
        '"skip": numbers["lambda2"] * group(skips)',
        ("tests/test_regularizers.py::test_penalty_of_the_presets_by_hand",),
    ),
    Mutation(
        "penalty: the hinge turned round",
        _PRDARTS,
        "jnp.maximum(mean - hinge, 0.0)",
        "jnp.maximum(hinge - mean, 0.0)",
        ("tests/test_regularizers.py::test_hinge_stops_the_pull_below_its_level",),
    ),
)

_CELL_SLIPS = (
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
        "dvalue = inner(ct, y).astype(value_dtype)",
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

_KERNEL_SLIPS = (
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

_LAYER_SLIPS = (
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

_STEP_SLIPS = (
    Mutation(
        "step: the other group first",
        _BILEVEL,
        'for group in (first, "arch" if first == "weights" else "weights"):',
        'for group in ("arch" if first == "weights" else "weights", first):',
        ("tests/test_bilevel.py::test_the_second_group_sees_the_first_one_moved",),
    ),
    Mutation(
        "step: one key for both halves",
        _BILEVEL,
        "gradient(state, batches, weight_key, arch_key, numbers)",
        "gradient(state, batches, weight_key, weight_key, numbers)",
        ("tests/test_bilevel.py::test_the_two_half_steps_draw_gates_from_different_keys",),
    ),
    Mutation(
        "step: keys of the two halves exchanged",
        _BILEVEL,
        "weight_key, arch_key = jax.random.split(key)",
        "arch_key, weight_key = jax.random.split(key)",
        ("tests/test_bilevel.py::test_the_second_group_sees_the_first_one_moved",),
    ),
    Mutation(
        "step: what the objective reads of the architecture itself does not move it",
        _BILEVEL,
        "d_arch = jax.tree.map(jnp.add, pull(through)[0], direct)",
        "d_arch = pull(through)[0]",
        ("tests/test_bilevel.py::test_the_second_group_sees_the_first_one_moved",),
    ),
    Mutation(
        "step: what the objective reads of the gates does not move the architecture",
        _BILEVEL,
        "lambda slope, own: by_ce * slope + own, d_parts, by_parts",
        "lambda slope, own: by_ce * slope, d_parts, by_parts",
        ("tests/test_bilevel.py::test_an_objective_of_loss_gates_arch_and_memory",),
    ),
    Mutation(
        "step: an objective taken for the cross-entropy and a sum",
        _BILEVEL,
        "lambda slope, own: by_ce * slope + own, d_parts, by_parts",
        "lambda slope, own: slope + own, d_parts, by_parts",
        ("tests/test_bilevel.py::test_an_objective_of_loss_gates_arch_and_memory",),
    ),
    Mutation(
        "step: the norm of a term's gradient at a fixed cross-entropy",
        _BILEVEL,
        "whole(ce + sum(jax.tree.leaves(moved)), arch, drawn)[1]",
        "whole(ce, arch, drawn)[1]",
        ("tests/test_bilevel.py::test_an_objective_of_loss_gates_arch_and_memory",),
    ),
    Mutation(
        "step: gates of the architecture's role for the weights",
        "prdarts_jax/searching/step.py",
        'weight=Loss(gates("weights")',
        'weight=Loss(gates("arch")',
        ("tests/test_bilevel.py::test_the_two_half_steps_draw_gates_from_different_keys",),
    ),
    Mutation(
        "step: weights trained on the validation batch",
        _BILEVEL,
        "rest = (state.arch, state.memory, batches.train, weight_key, numbers)",
        "rest = (state.arch, state.memory, batches.val, weight_key, numbers)",
        ("tests/test_bilevel.py::test_the_second_group_sees_the_first_one_moved",),
    ),
    Mutation(
        "step: gradients not averaged over the devices",
        _BILEVEL,
        "ce, accuracy, slopes = mean_over(self.axis_name, (ce, accuracy, slopes))",
        "ce, accuracy = mean_over(self.axis_name, (ce, accuracy))",
        ("tests/test_bilevel.py::test_four_devices_take_the_step_of_one",),
    ),
    Mutation(
        "method: DARTS moves the weights first",
        "prdarts_jax/strategies/darts.py",
        'rule=alternating(first="arch")',
        'rule=alternating(first="weights")',
        ("tests/strategies/test_strategies.py::test_who_moves_first_in_the_two_methods",),
    ),
    Mutation(
        "method: gates of an evaluation are drawn",
        _PRDARTS,
        'if role == "eval":',
        'if role == "evaluation":',
        ("tests/strategies/test_methods.py::test_contract",),
    ),
    Mutation(
        "method: fields of the first version not refused",
        "prdarts_jax/strategy.py",
        "        _refuse_old(fields)\n        return super()._replace",
        "        return super()._replace",
        ("tests/searching/test_search_errors.py::test_a_method_of_the_first_version_is_told_the_new_fields",),
    ),
    Mutation(
        "optimizer: weight decay after the momentum",
        _OPTIMIZERS,
        "optax.add_decayed_weights(weight_decay),\n"
        "            optax.sgd(learning_rate, momentum=momentum, nesterov=config.nesterov),",
        "optax.trace(momentum, config.nesterov),\n"
        "            optax.add_decayed_weights(weight_decay),\n"
        "            optax.scale_by_learning_rate(learning_rate),",
        ("tests/test_bilevel.py::test_two_steps_by_hand",),
    ),
    Mutation(
        "optimizer: decoupled weight decay of the architecture",
        _OPTIMIZERS,
        "optax.chain(*clipping, optax.add_decayed_weights(weight_decay), moved)",
        "optax.chain(*clipping, moved, optax.add_decayed_weights(-learning_rate * weight_decay))",
        ("tests/test_bilevel.py::test_two_steps_by_hand",),
    ),
    Mutation(
        "optimizer: the architecture clipped after its weight decay",
        _OPTIMIZERS,
        "optax.chain(*clipping, optax.add_decayed_weights(weight_decay), moved)",
        "optax.chain(optax.add_decayed_weights(weight_decay), *clipping, moved)",
        ("tests/test_optimizers.py::test_the_architecture_is_clipped_before_its_weight_decay",),
    ),
    Mutation(
        "dispatch: sums of an epoch go on in the next",
        "prdarts_jax/run/steps.py",
        "sums = {name: jnp.where(fresh, 0.0, value) for name, value in sums.items()}",
        "sums = dict(sums)",
        ("tests/searching/test_search_program.py::test_an_epoch_is_the_mean_of_its_steps",),
    ),
    Mutation(
        "search: every step has the same key",
        _SEARCH,
        "jax.random.fold_in(jax.random.fold_in(key, state.step), purpose)",
        "jax.random.fold_in(key, purpose)",
        (
            "tests/searching/test_search_augmentation.py::test_crop_flip_and_cutout_reach_both_halves_with_draws_of_their_own",
        ),
    ),
    Mutation(
        "search: one key for all purposes of a step",
        _SEARCH,
        "jax.random.fold_in(jax.random.fold_in(key, state.step), purpose)",
        "jax.random.fold_in(key, state.step)",
        (
            "tests/searching/test_search_augmentation.py::test_crop_flip_and_cutout_reach_both_halves_with_draws_of_their_own",
        ),
    ),
    Mutation(
        "search: an evaluation counts what fills the last batch",
        _SEARCH,
        "jnp.sum(jnp.where(counted, v, 0.0))",
        "jnp.sum(v)",
        ("tests/searching/test_search_program.py::test_an_evaluation_counts_every_image_once",),
    ),
    Mutation(
        "training: every step has the same key",
        _TRAIN,
        "jax.random.fold_in(jax.random.fold_in(key, state.step), purpose)",
        "jax.random.fold_in(key, purpose)",
        ("tests/training/test_train_step.py::test_every_step_draws_with_keys_of_its_own",),
    ),
    Mutation(
        "training: one key for augmentation and drop-path",
        _TRAIN,
        "keys[_DROP_PATH], numbers)",
        "keys[_AUGMENT], numbers)",
        ("tests/training/test_train_step.py::test_every_step_draws_with_keys_of_its_own",),
    ),
    Mutation(
        "training: weight of the auxiliary head left out",
        _TRAIN,
        "loss + problem.auxiliary_weight * metrics",
        "loss + metrics",
        ("tests/training/test_train_step.py::test_the_loss_is_both_heads_with_smoothed_targets",),
    ),
    Mutation(
        "training: shares of the average exchanged",
        _TRAIN,
        "decay * a + (1.0 - decay) * b",
        "decay * b + (1.0 - decay) * a",
        ("tests/training/test_train_step.py::test_the_average_is_the_sum_of_its_closed_form",),
    ),
)

_DATA_SLIPS = (
    Mutation(
        "batches: each epoch of the other share begins a pass",
        _BATCHES,
        "return rows[first % own :][:steps]",
        "return rows[:steps]",
        ("tests/data/test_data_batches.py::test_passes_of_a_stream_do_not_end_with_an_epoch",),
    ),
    Mutation(
        "data: what is held out depends on the seed of the search",
        "prdarts_jax/searching/inputs.py",
        "hold_out(examples, config.data.holdout, config.data.holdout_seed)",
        "hold_out(examples, config.data.holdout, config.seed)",
        ("tests/searching/test_search_program.py::test_neither_part_has_what_is_held_out",),
    ),
    Mutation(
        "data: the weights learn from what is held out",
        "prdarts_jax/searching/inputs.py",
        "return kept[parts[0]], kept[parts[1]]",
        "return parts[0], kept[parts[1]]",
        ("tests/searching/test_search_program.py::test_neither_part_has_what_is_held_out",),
    ),
    Mutation(
        "batches: every epoch in the same order",
        _BATCHES,
        "_rng(seed, epoch, purpose).permutation(",
        "_rng(seed, purpose).permutation(",
        ("tests/data/test_data_batches.py::test_order_depends_on_seed_epoch_and_purpose_and_nothing_else",),
    ),
    Mutation(
        "batches: halves that share an example",
        _BATCHES,
        "order[train : train + val]",
        "order[train - 1 : train - 1 + val]",
        ("tests/data/test_data_batches.py::test_halves_are_disjoint_and_equal",),
    ),
    Mutation(
        "batches: what fills the last one up is counted once",
        _BATCHES,
        "(flat < n).reshape(shape)",
        "(flat <= n).reshape(shape)",
        ("tests/data/test_data_batches.py::test_padded_batches_count_every_example_once",),
    ),
    Mutation(
        "augmentation: a crop never drawn",
        _AUGMENT,
        "jnp.array([2 * crop_padding + 1, 2 * crop_padding + 1, 2, height, width]",
        "jnp.array([2 * crop_padding, 2 * crop_padding, 2, height, width]",
        ("tests/data/test_data_augment.py::test_offsets_flips_and_centres_are_uniform",),
    ),
    Mutation(
        "augmentation: images upside down",
        _AUGMENT,
        "images[:, :, ::-1]",
        "images[:, ::-1]",
        ("tests/data/test_data_augment.py::test_equals_slicing_in_numpy",),
    ),
    Mutation(
        "augmentation: a square one pixel off",
        _AUGMENT,
        "first = centres - side // 2",
        "first = centres - (side - 1) // 2",
        ("tests/data/test_data_augment.py::test_equals_slicing_in_numpy",),
    ),
    Mutation(
        "augmentation: all images of a batch drawn alike",
        _AUGMENT,
        "jax.random.fold_in(key, p), (5,)",
        "jax.random.fold_in(key, 0 * p), (5,)",
        ("tests/data/test_data_augment.py::test_draws_depend_on_the_key_and_the_position_alone",),
    ),
)

_RUN_SLIPS = (
    Mutation(
        "checkpoint: digests of the leaves not compared",
        _CHECKPOINT,
        "if leaf._replace(value=values[path]).record() != records[path]:",
        'if leaf._replace(value=values[path]).record()["shape"] != records[path]["shape"]:',
        ("tests/run/test_checkpoint.py::test_a_wrong_number_with_matching_file_digests_is_found_by_its_leaf",),
    ),
    Mutation(
        "checkpoint: digests of the files not compared",
        _CHECKPOINT,
        "if wrong:",
        "if len(wrong) > 1:",
        ("tests/run/test_checkpoint.py::test_one_flipped_bit_anywhere_is_found",),
    ),
    Mutation(
        "checkpoint: the oldest is restored",
        _CHECKPOINT,
        "for step in reversed(steps):",
        "for step in steps:",
        ("tests/run/test_checkpoint.py::test_saving_a_step_again_replaces_it",),
    ),
    Mutation(
        "checkpoint: one fewer is kept",
        _CHECKPOINT,
        "set(steps[: -self._keep])",
        "set(steps[: 1 - self._keep])",
        ("tests/run/test_checkpoint.py::test_the_newest_are_kept",),
    ),
    Mutation(
        "resume: rows after the restored step kept",
        _METRICS,
        'bool(row["step"] <= step)',
        "True",
        ("tests/run/test_metrics.py::test_resumed_rows_equal_uninterrupted_ones",),
    ),
    Mutation(
        "resume: the row of an epoch that is computed again kept",
        _METRICS,
        '["epoch"] < epochs_done)',
        '["epoch"] <= epochs_done)',
        ("tests/searching/test_resume.py::test_half_written_lines_are_dropped",),
    ),
    Mutation(
        "resume: sums of the epoch begin anew",
        "prdarts_jax/run/loop.py",
        "np.bool_(start == 0)",
        "np.bool_(start == first)",
        ("tests/searching/test_resume.py::test_stopped_after_every_dispatch",),
    ),
    Mutation(
        "resume: another search in the workdir not refused",
        "prdarts_jax/run/workdir.py",
        "    if differences:\n",
        "    if len(differences) > 9:\n",
        ("tests/searching/test_resume.py::test_another_search_is_refused",),
    ),
    Mutation(
        "workdir: a lock that two can hold",
        "prdarts_jax/run/workdir.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
        ("tests/run/test_workdir.py::test_the_second_process_is_refused_and_a_kill_releases",),
    ),
    Mutation(
        "config: a momentum of 1 allowed",
        _SCHEMA,
        "lambda value: 0 <= value < 1)",
        "lambda value: 0 <= value <= 1)",
        ("tests/config/test_config.py::test_impossible_values_are_one_line",),
    ),
    Mutation(
        "config: seeds that repeat others allowed",
        _SCHEMA,
        "lambda seed: 0 <= seed < 2**32)",
        "lambda seed: 0 <= seed)",
        ("tests/config/test_config.py::test_impossible_values_are_one_line",),
    ),
    Mutation(
        "config: infinite numbers of the architecture allowed",
        _CONFIG,
        'finite(self, "arch.", but=("clip_norm",))\n',
        "pass\n",
        ("tests/config/test_config.py::test_every_number_is_finite_but_the_norm_that_means_no_clipping",),
    ),
    Mutation(
        "sweep: the seed changes slowest",
        _SWEEP,
        "key=lambda name: (name == _SEED,",
        "key=lambda name: (name != _SEED,",
        ("tests/searching/test_sweep.py::test_members_are_the_product_and_their_names_are_canonical",),
    ),
    Mutation(
        "sweep: a range without its end",
        _SWEEP,
        "range(first, last + 1)",
        "range(first, last)",
        ("tests/searching/test_sweep.py::test_parse",),
    ),
)

_RESULT_SLIPS = (
    Mutation(
        "derive: of equal pairs the last",
        _DERIVE,
        "for _, e, o in sorted(candidates):",
        "for _, e, o in sorted(candidates, key=lambda c: (c[0], -c[1], -c[2])):",
        ("tests/strategies/test_strategies.py::test_equal_scores_keep_the_order_of_edges_and_operations",),
    ),
    Mutation(
        "derive: three pairs a node",
        _DERIVE,
        "len(chosen) < pairs",
        "len(chosen) <= pairs",
        ("tests/strategies/test_strategies.py::test_derivation_by_brute_force",),
    ),
    Mutation(
        "derive: both pairs of a node from one input",
        _DERIVE,
        " and not (distinct_inputs and source in [j for _, j in chosen])",
        "",
        ("tests/strategies/test_strategies.py::test_derivation_by_brute_force",),
    ),
    Mutation(
        "derive: none is an operation",
        _DERIVE,
        "usable = space.allowed[kind] & ~none[None, :]",
        "usable = space.allowed[kind]",
        ("tests/strategies/test_strategies.py::test_derivation_by_brute_force",),
    ),
    Mutation(
        "genotype: the last node of a text left out",
        _GENOTYPE_TEXT,
        "for i in range(0, len(value), 2)]",
        "for i in range(0, len(value) - 2, 2)]",
        ("tests/space/test_genotype.py::test_text_form_equals_the_zoo",),
    ),
    Mutation(
        "genotype: the first of several taken",
        _GENOTYPE_TEXT,
        "if len(distinct) > 1:",
        "if len(distinct) > 9:",
        ("tests/space/test_genotype_text.py::test_one_of_several_is_chosen_by_its_name",),
    ),
    Mutation(
        "records: an image that lies keeps its height",
        "prdarts_jax/data/records.py",
        "width, height = height, width",
        "pass",
        ("tests/data/test_data_left_out.py::test_orientation_is_applied",),
    ),
    Mutation(
        "provenance: other random numbers called rounding",
        "prdarts_jax/run/provenance.py",
        "if text.split()[0] in _DRAWS]",
        "if text.split()[0] in ()]",
        ("tests/cli/test_environment.py::test_a_setting_that_changes_numbers_is_recorded_and_said",),
    ),
    Mutation(
        "output: what the stream still holds fails at the end",
        "prdarts_jax/run/output.py",
        "os.dup2(nowhere, number)",
        "pass",
        ("tests/cli/test_environment.py::test_a_broken_pipe_is_said_once_and_holds_nothing_back",),
    ),
    Mutation(
        "genotype: depth along the shortest path",
        _GENOTYPE,
        "1 + max(reached)",
        "1 + min(reached)",
        ("tests/space/test_genotype.py::test_depth_is_the_longest_path",),
    ),
    Mutation(
        "counts: a grouped convolution counted as a dense one",
        _COUNTS,
        "kernel = equation.invars[1].aval.shape\n",
        "kernel = (*equation.invars[1].aval.shape[:2], equation.invars[0].aval.shape[3], 1)\n",
        ("tests/network/test_zoo_counts.py::test_jaxpr_macs_counts_grouped_convolutions_and_inner_jaxprs",),
    ),
    Mutation(
        "counts: the classifier's weights left out",
        _COUNTS,
        "total = sum(counts.values())",
        'total = sum(counts.values()) - counts[("classifier",)]',
        ("tests/network/test_zoo_counts.py::test_a_hand_counted_network",),
    ),
    Mutation(
        "network: drop-path spares reductions too",
        "prdarts_jax/network/plan.py",
        'identity = primitives[op].group == "skip" and stride == 1',
        'identity = primitives[op].group == "skip"',
        ("tests/network/test_network.py::test_drop_path_spares_identities_and_needs_no_second_compilation",),
    ),
    Mutation(
        "network: drop-path without its scale",
        "prdarts_jax/ops/drop_path.py",
        "jnp.where(draws >= rate, 1.0 / (1.0 - rate), ",
        "jnp.where(draws >= rate, jnp.ones((), rate.dtype), ",
        ("tests/network/test_network.py::test_drop_path_keeps_the_mean_and_drops_whole_samples",),
    ),
    Mutation(
        "network: a biased running variance",
        "prdarts_jax/network/layers.py",
        "moments[1] * (n / max(n - 1, 1))",
        "moments[1]",
        ("tests/network/test_network.py::test_batch_norm_is_that_of_flax_but_for_the_unbiased_running_variance",),
    ),
    Mutation(
        "schedule: a cosine that ends at its low end",
        _SCHEDULES,
        "math.cos(math.pi * epoch / epochs)",
        "math.cos(math.pi * epoch / max(epochs - 1, 1))",
        ("tests/config/test_train_config.py::test_cosine_is_that_of_optax_and_ends_near_zero",),
    ),
    Mutation(
        "schedule: a step down before the first epoch",
        _SCHEDULES,
        "high * STEP_FACTOR**epoch",
        "high * STEP_FACTOR ** (epoch + 1)",
        ("tests/config/test_train_config.py::test_step_is_0_97_an_epoch",),
    ),
    Mutation(
        "network: a second BN in every auxiliary head",
        "prdarts_jax/network/layers.py",
        'layers.norm("bn2", x) if second_norm else x',
        'layers.norm("bn2", x)',
        ("tests/config/test_train_config.py::test_the_auxiliary_head_is_that_of_the_recipe",),
    ),
    Mutation(
        "schedule: a warm-up from 0",
        _SCHEDULES,
        "min(1.0, (epoch + 1) / warmup_epochs)",
        "min(1.0, epoch / warmup_epochs)",
        ("tests/config/test_train_config.py::test_warm_up_multiplies_the_schedule",),
    ),
    Mutation(
        "evaluation: bins that are closed below",
        _EVALUATION,
        "np.ceil(confidence * bins).astype(int) - 1",
        "np.floor(confidence * bins).astype(int)",
        ("tests/training/test_evaluation.py::test_calibration_error_of_known_cases",),
    ),
    Mutation(
        "evaluation: the sixth counts among the top five",
        _EVALUATION,
        "np.mean(rank < _TOP)",
        "np.mean(rank <= _TOP)",
        ("tests/training/test_evaluation.py::test_five_classes_are_the_top_five",),
    ),
    Mutation(
        "evaluation: ties count as right",
        _TRAIN,
        "ahead = (logits > own) | ((logits == own) & before)",
        "ahead = logits > own",
        ("tests/training/test_evaluation.py::test_rank_counts_classes_ahead_and_ties_in_their_order",),
    ),
)

_CONTRACT_SLIPS = (
    Mutation(
        "rule: a virtual step without momentum",
        _OPTIMIZERS,
        "rate * (momentum * v + g + decay * w)",
        "rate * (v + g + decay * w)",
        ("tests/test_rules.py::test_unrolled_is_the_closed_form",),
    ),
    Mutation(
        "rule: the finite difference over its radius, not over twice that",
        _BILEVEL,
        "(u - d) / (2 * e)",
        "(u - d) / e",
        ("tests/test_rules.py::test_unrolled_is_the_closed_form",),
    ),
    Mutation(
        "rule: the mixed product added",
        _BILEVEL,
        "a - rate * p",
        "a + rate * p",
        ("tests/test_rules.py::test_unrolled_with_an_objective_by_finite_differences",),
    ),
    Mutation(
        "rule: both levels without the scale",
        _BILEVEL,
        "v + scale * t",
        "v + t",
        ("tests/test_rules.py::test_mixed_level_is_the_stated_sum",),
    ),
    Mutation(
        "rule: the architecture moves one step early",
        _BILEVEL,
        "(state.step + 1) % weight_steps == 0",
        "state.step % weight_steps == 0",
        ("tests/test_rules.py::test_weight_steps_between_steps_of_the_architecture",),
    ),
    Mutation(
        "events: a stage begins with the weights of the one before",
        "prdarts_jax/searching/loop.py",
        "        if event.keep_weights:\n",
        "        if not event.keep_weights:\n",
        ("tests/searching/test_events.py::test_kept_weights_reach_the_stage",),
    ),
    Mutation(
        "events: hyperparameters of a step back are lost",
        "prdarts_jax/searching/stages.py",
        "    for name, value in event.hyperparameters.items():\n        state = ",
        "    for name, value in event.hyperparameters.items():\n        _ = ",
        ("tests/searching/test_events.py::test_a_rollback_computes_the_epochs_again_with_other_hyperparameters",),
    ),
    Mutation(
        "events: a kept operation takes the row of another edge",
        "prdarts_jax/searching/stages.py",
        "(row, was[op].index(e))",
        "(row, row)",
        ("tests/searching/test_events.py::test_kept_weights_are_those_of_the_same_edge_and_operation",),
    ),
    Mutation(
        "gates: the mean of all gates for that of executed ones",
        _GATES,
        "mean = jnp.sum(g * executed, axis=0) / jnp.maximum(jnp.sum(executed, axis=0), 1e-12)",
        "mean = jnp.mean(g, axis=0)",
        ("tests/test_gates.py::test_the_mean_of_an_executed_gate_has_its_limits",),
    ),
    Mutation(
        "gates: a dropped gate is ahead of a tie",
        _GATES,
        "dropout * (beyond(x + 1) + place * at(x + 1))",
        "dropout * beyond(x)",
        ("tests/test_gates.py::test_the_mean_of_an_executed_gate_by_monte_carlo",),
    ),
    Mutation(
        "transform: edges weighted over the whole cell",
        "prdarts_jax/strategies/transforms.py",
        "same = into[:, None] == into[None, :]",
        "same = into[:, None] >= 0 * into[None, :]",
        ("tests/strategies/test_transforms.py::test_edge_weights_by_a_loop",),
    ),
    Mutation(
        "transform: the strongest skip connection is taken away",
        "prdarts_jax/strategies/transforms.py",
        "_, e, o = min(chosen)",
        "_, e, o = max(chosen)",
        ("tests/strategies/test_transforms.py::test_at_most_skips_by_the_rule_of_p_darts",),
    ),
    Mutation(
        "transform: a budget without its fixed part",
        "prdarts_jax/strategies/cost.py",
        "jnp.float32(costs.fixed / unit)",
        "jnp.float32(0.0)",
        ("tests/strategies/test_transforms.py::test_the_multiplier_follows_the_derived_network",),
    ),
    Mutation(
        "transform: an adversary that descends",
        "prdarts_jax/strategies/transforms.py",
        "d + 2 * e / steps * jnp.sign(g)",
        "d - 2 * e / steps * jnp.sign(g)",
        ("tests/strategies/test_transforms.py::test_perturbed_by_an_adversary_goes_to_the_corner",),
    ),
    Mutation(
        "transform: the cell of now at an early stop",
        "prdarts_jax/strategies/stability.py",
        'jax.tree.map(lambda leaf: leaf[half], own["arch"])',
        'jax.tree.map(lambda leaf: leaf[-1], own["arch"])',
        ("tests/strategies/test_transforms.py::test_hessian_stop_returns_the_earlier_cell",),
    ),
    Mutation(
        "transform: the operation is kept that is missed least",
        "prdarts_jax/strategies/perturbation.py",
        "best = min(left, key=",
        "best = max(left, key=",
        ("tests/strategies/test_transforms.py::test_selection_by_perturbation_keeps_what_hurts",),
    ),
    Mutation(
        "probe: the difference of gradients over the radius, not over twice that",
        "prdarts_jax/searching/probe.py",
        "(u - d) / np.float32(2 * step)",
        "(u - d) / np.float32(step)",
        ("tests/searching/test_probe.py::test_hvp_is_the_product_with_jax_hessian",),
    ),
    Mutation(
        "counts: inner edges of a reduction cell at the size of its inputs",
        _COUNTS,
        'size = pixels if stride == 2 or cell.kind == "normal" else -(-pixels // 2)',
        "size = pixels",
        ("tests/strategies/test_transforms.py::test_pair_costs_add_up_to_the_profile",),
    ),
)

MUTATIONS = (
    *_GATE_SLIPS,
    *_PENALTY_SLIPS,
    *_CELL_SLIPS,
    *_KERNEL_SLIPS,
    *_LAYER_SLIPS,
    *_STEP_SLIPS,
    *_DATA_SLIPS,
    *_RUN_SLIPS,
    *_RESULT_SLIPS,
    *_CONTRACT_SLIPS,
)
