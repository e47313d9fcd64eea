"""The slips in data, runs and results."""

from __future__ import annotations

from slips import Mutation

_AUGMENT = "prdarts_jax/data/augment.py"
_BATCHES = "prdarts_jax/data/batches.py"
_CHECKPOINT = "prdarts_jax/run/checkpoint.py"
_CONFIG = "prdarts_jax/config/search.py"
_COUNTS = "prdarts_jax/network/counts.py"
_DERIVE = "prdarts_jax/space/derive.py"
_EVALUATION = "prdarts_jax/training/evaluation.py"
_GENOTYPE = "prdarts_jax/space/genotype.py"
_GENOTYPE_TEXT = "prdarts_jax/space/genotype_text.py"
_METRICS = "prdarts_jax/run/metrics.py"
_SCHEDULES = "prdarts_jax/schedules.py"
_SCHEMA = "prdarts_jax/config/schema.py"
_SWEEP = "prdarts_jax/searching/sweep.py"
_TRAIN = "prdarts_jax/training/program.py"

DATA_SLIPS = (
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

RUN_SLIPS = (
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

RESULT_SLIPS = (
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
    Mutation(
        "check: a loop counts as one turn",
        "prdarts_jax/accelerators/compiled.py",
        "1 if length is None else length",
        "1",
        ("tests/accelerators/test_compiled.py::test_loops_decisions_and_calls_of_a_text_by_hand",),
    ),
    Mutation(
        "check: branches are added, not averaged",
        "prdarts_jax/accelerators/compiled.py",
        "1 / len(branches)",
        "1.0",
        ("tests/accelerators/test_compiled.py::test_loops_decisions_and_calls_of_a_text_by_hand",),
    ),
    Mutation(
        "precision: that of the training is lost",
        "prdarts_jax/training/program.py",
        "sharding.map_over(mesh, at_precision(problem.precision, program), in_specs",
        "sharding.map_over(mesh, program, in_specs",
        ("tests/ops/test_precision.py::test_every_product_of_a_dispatch_is_lowered_with_it",),
    ),
    Mutation(
        "lowering: the kernels are there whatever a program is lowered for",
        "prdarts_jax/ops/lowering.py",
        'return self.platform in (None, "cpu")',
        "return True",
        ("tests/accelerators/test_lowered.py::test_a_dispatch_is_exported_for_another_platform",),
    ),
)
