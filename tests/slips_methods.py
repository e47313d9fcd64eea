"""The slips in gates, penalties and the steps of a search and a training."""

from __future__ import annotations

from slips import Mutation

_AUGMENT = "prdarts_jax/data/augment.py"
_BILEVEL = "prdarts_jax/bilevel.py"
_COUNTS = "prdarts_jax/network/counts.py"
_GATES = "prdarts_jax/gates.py"
_OPTIMIZERS = "prdarts_jax/optimizers.py"
_PENALTY = "prdarts_jax/regularizers.py"
_PRDARTS = "prdarts_jax/strategies/prdarts.py"
_SEARCH = "prdarts_jax/searching/program.py"
_TRAIN = "prdarts_jax/training/program.py"

GATE_SLIPS = (
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

PENALTY_SLIPS = (
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

STEP_SLIPS = (
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
        "else optax.adam(learning_rate, b1=config.beta1, b2=config.beta2, eps=config.eps)",
        "else optax.adamw(learning_rate, config.beta1, config.beta2, config.eps, weight_decay=weight_decay)",
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

CONTRACT_SLIPS = (
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
        "        state = with_hyperparameter(state, name, value)\n    carry = ",
        "        _ = with_hyperparameter(state, name, value)\n    carry = ",
        ("tests/searching/test_events.py::test_a_rollback_computes_the_epochs_again_with_other_hyperparameters",),
    ),
    Mutation(
        "events: a kept operation takes the row of another edge",
        "prdarts_jax/searching/stages.py",
        "(row, was[op].index(e))",
        "(row, row)",
        ("tests/searching/test_stages.py::test_kept_weights_are_those_of_the_same_edge_and_operation",),
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
