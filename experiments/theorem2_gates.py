"""Theorem 2: with independent gates, raising a gate does not raise the validation loss of the trained weights.

    python -m experiments.theorem2_gates --scale smoke     under a minute, anywhere; the figures mean nothing
    python -m experiments.theorem2_gates --scale cpu       about four minutes on one core, 5 seeds
    python -m experiments.theorem2_gates --scale paper     wider and deeper cells, 10 seeds; for a GPU (not run)

The theorem is about F_val(W*(beta), beta), W* the weights trained at the gates beta: raising any gate does not raise
it, and raising a skip before the last node or a convolution into it by eps lowers it by C eps in expectation. C is not
given. Here one gate at a time is raised, and the cell is trained again from the same start

- to the end: Gauss-Newton steps W += J^T (J J^T)^-1 (y - u) until F_train is below the stated tolerance of its start (a
  cell wider than the number of samples fits them all, so W* is the zero of the residual that is nearest to the start,
  to first order; gradient descent ends there too as the width grows);
- for a fixed number of steps of gradient descent with one rate, where a faster cell is further.

Targets are the outputs of another cell of the same kind, standardised. The random output of the start grows with the
gates, and so does the loss that it begins with; in half of the units it is therefore added to the targets, so that the
start counts as zero. A unit is one seed, activation and start.

Expected: from a start of zero and after a fixed number of steps nearly every raise lowers the validation loss, most of
all that of a skip before the last node, as the theorem says. Trained to the end, and from the random start, many
raises raise it. The table is in docs/results.md.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure

from experiments import frame, section3
from experiments.theorem1_rate import group
from prdarts_jax import theory
from prdarts_jax.theory import CellWeights

SHAPE = {"nodes": 4, "channels": 2, "positions": 4, "kernel": 3, "train": 16, "validation": 128, "width": 32}
ACTIVATIONS = ("tanh", "softplus")
STARTS = ("random", "zero")
# scale -> (seeds, architectures, steps of gradient descent by activation, shape)
SCALES: dict[str, tuple[range, int, tuple[int, int], dict[str, int]]] = {
    "smoke": (range(1), 1, (5, 5), {**SHAPE, "nodes": 3, "train": 4, "width": 8}),
    "cpu": (range(5), 4, (10, 100), SHAPE),
    "paper": (range(10), 50, (100, 1000), {**SHAPE, "nodes": 6, "train": 64, "width": 512}),
}
RAISE = 0.1
TOLERANCE = 1e-10  # of F_train, against its start
NEWTON_STEPS = 10


def units(scale: str) -> list[dict[str, Any]]:
    """Every seed, activation and start."""
    seeds, architectures, steps, shape = SCALES[scale]
    return [
        {"seed": seed, "activation": name, "start": start, "architectures": architectures, "steps": number, **shape}
        for seed in seeds
        for name, number in zip(ACTIVATIONS, steps, strict=True)
        for start in STARTS
    ]


def interpolate(
    weights: CellWeights, gates: jax.Array, x: jax.Array, y: jax.Array, *, sigma: theory.Sigma, roots: tuple[int, ...]
) -> tuple[CellWeights, jax.Array]:
    """Weights near the start that fit every sample, by Gauss-Newton steps; and F there over F at the start."""
    flat, unravel = ravel_pytree(weights)

    def residual(flat: jax.Array) -> jax.Array:
        return y - jax.vmap(lambda one: theory.output(unravel(flat), gates, one, sigma=sigma, roots=roots))(x)

    def step(_: int, flat: jax.Array) -> jax.Array:
        left, pull = jax.vjp(residual, flat)
        rows = -jax.vmap(lambda v: pull(v)[0])(jnp.eye(len(y), dtype=y.dtype))
        return flat + rows.T @ jnp.linalg.solve(rows @ rows.T, left)

    end = jax.lax.fori_loop(0, NEWTON_STEPS, step, flat)
    return unravel(end), jnp.sum(residual(end) ** 2) / jnp.sum(residual(flat) ** 2)


@cache
def programs(sigma: theory.Sigma, start: str, steps: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """F_val over many gates: trained to the end, with what is left of F_train; and after some steps of descent."""

    def targets(
        weights: CellWeights, gates: jax.Array, *sets: tuple[jax.Array, jax.Array]
    ) -> list[tuple[jax.Array, jax.Array]]:
        """The sets; with the outputs of the start added to the targets, the start counts as zero."""
        if start == "random":
            return list(sets)
        u = partial(theory.output, weights, gates, sigma=sigma)
        return [(x, y + jax.vmap(u)(x)) for x, y in sets]

    def to_the_end(
        gates: jax.Array, weights: CellWeights, x: jax.Array, y: jax.Array, held: jax.Array, y_held: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        train, validation = targets(weights, gates, (x, y), (held, y_held))
        fitted, left = interpolate(weights, gates, *train, sigma=sigma, roots=(0,))
        return theory.loss(fitted, gates, *validation, sigma=sigma), left

    def some_steps(
        gates: jax.Array,
        weights: CellWeights,
        x: jax.Array,
        y: jax.Array,
        held: jax.Array,
        y_held: jax.Array,
        rate: jax.Array,
    ) -> jax.Array:
        train, validation = targets(weights, gates, (x, y), (held, y_held))
        moved, _ = theory.descend(weights, gates, *train, rate=rate, steps=steps, sigma=sigma)
        return theory.loss(moved, gates, *validation, sigma=sigma)

    ends = jax.jit(jax.vmap(to_the_end, in_axes=(0, *[None] * 5)))
    return ends, jax.jit(jax.vmap(some_steps, in_axes=(0, *[None] * 6)))


def measure(unit: frame.Unit) -> Mapping[str, Any]:
    """Trains at every base and at every base with one gate raised, and compares the validation losses."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(unit["seed"])
        sigma, nodes, n = theory.ACTIVATIONS[unit["activation"]], unit["nodes"], unit["train"]
        x, held_out = section3.samples(rng, n, unit), section3.samples(rng, unit["validation"], unit)
        teacher = section3.weights({**unit, "seed": unit["seed"] + 1000})
        taught = jnp.asarray(section3.independent_gates(rng, 1, nodes)[0])
        raw = [
            np.asarray(jax.vmap(lambda one: theory.output(teacher, taught, one, sigma=sigma))(each))
            for each in (x, held_out)
        ]
        y, y_held_out = (jnp.asarray((each - raw[1].mean()) / raw[1].std()) for each in raw)
        bases = section3.independent_gates(rng, unit["architectures"], nodes)
        places = [(e, column) for e in range(bases.shape[1]) for column in range(3)]
        start = section3.weights(unit)

        gram = section3.mapped(theory.gram, sigma, (0,))
        rate = n / np.linalg.eigvalsh(np.asarray(gram(start, jnp.asarray(bases), x)))[:, -1].max()

        solve, run = programs(sigma, unit["start"], unit["steps"])
        data = (start, x, y, held_out, y_held_out)
        changes: dict[str, dict[str, list[float]]] = {"end": defaultdict(list), "steps": defaultdict(list)}
        losses: dict[str, list[float]] = {"end": [], "steps": []}
        worst = 0.0
        for base in bases:
            raised = np.repeat(base[None], len(places) + 1, axis=0)
            for place, (e, column) in enumerate(places, start=1):
                raised[place, e, column] += RAISE
            end, left = (np.asarray(v) for v in solve(jnp.asarray(raised), *data))
            worst = max(worst, float(left.max()))
            for name, found in (("end", end), ("steps", np.asarray(run(jnp.asarray(raised), *data, rate)))):
                losses[name].append(float(found[0]))
                for place, (e, column) in enumerate(places, start=1):
                    kind = group(theory.edges(nodes)[e], column, nodes)
                    changes[name][kind].append(float((found[place] / found[0] - 1) / RAISE))
        return frame.short(
            {
                "eta": float(rate),
                "tolerance": TOLERANCE,
                "solved": worst <= TOLERANCE,
                "worst_train": worst,
                "losses": losses,
                "change": {when: dict(by_group) for when, by_group in changes.items()},
            }
        )


WHEN = {"end": "to the end", "steps": "some steps"}
NAMED = ("skip before the last node", "convolution into the last node")
GROUPS = (*NAMED, "skip into the last node", "convolution before the last node")
Case = tuple[str, str, str]  # start, when, activation


def by_case(rows: Sequence[frame.Row]) -> dict[Case, list[Mapping[str, list[float]]]]:
    """{(start, when, activation): the changes by group, one entry a seed}."""
    found: dict[Case, list[Mapping[str, list[float]]]] = {}
    for start in STARTS:
        for when in WHEN:
            for activation in ACTIVATIONS:
                some = [row for row in rows if (row["start"], row["activation"]) == (start, activation)]
                if some:
                    found[start, when, activation] = [row["change"][when] for row in some]
    return found


def rose(changes: Sequence[Mapping[str, list[float]]], groups: Sequence[str] = GROUPS) -> float:
    """Share of the raises that raised F_val, in percent."""
    return float(100 * np.mean([value > 0 for change in changes for name in groups for value in change[name]]))


def findings(rows: Sequence[frame.Row]) -> list[str]:
    """Change of the validation loss by group, and how often it rose."""
    cases = by_case(rows)
    lines = []
    for (start, when, activation), changes in cases.items():
        cells = [
            f"{frame.spread([float(np.mean(change[name])) for change in changes], 2)} ({rose(changes, [name]):.0f} %)"
            for name in GROUPS
        ]
        lines.append((f"{start}, {WHEN[when]}, {activation}", len(changes), *cells))
    solved = [row for row in rows if row["solved"]]
    worst = max(row["worst_train"] for row in rows)
    return [
        f"Each gate by itself was raised by {RAISE}. In the table: the relative change of F_val per unit of the "
        "gate, mean over the seeds with half its 95 % confidence interval, and in brackets the share of raises that "
        "raised F_val. Raising a zero operation changes nothing.",
        "",
        *frame.table(("start, trained, activation", "seeds", *GROUPS), lines),
        f"The inner problem was solved to F_train <= {TOLERANCE:g} of its start in {len(solved)} of {len(rows)} "
        f"units (largest: {worst:.1g}). {verdict(cases)}",
        "",
        "The start that counts as zero, and the numbers of steps, were chosen after the random start had contradicted "
        "the claim: what they show is exploratory. Widths are far from the large ones that the proof asks for.",
    ]


def verdict(cases: Mapping[Case, list[Mapping[str, list[float]]]]) -> str:
    """Whether the claim held, from the rows."""
    said = []
    for when, says in (("end", "Trained to the end"), ("steps", "After a fixed number of steps")):
        for start, of in (("zero", "from a start that counts as zero"), ("random", "from the random start")):
            some = [changes for (s, w, _), changes in cases.items() if (s, w) == (start, when)]
            if not some:
                continue
            lowered = []
            for changes in some:
                for name in NAMED:
                    mean, half = frame.interval([float(np.mean(change[name])) for change in changes])
                    lowered.append(mean + half < 0)
            share = rose([change for changes in some for change in changes])
            said.append(
                f"{says}, {of}, {share:.0f} % of the raises raised F_val, and the gates that the theorem names "
                f"lowered it beyond the confidence interval in {sum(lowered)} of {len(lowered)} cases."
            )
    shares = [rose(changes) for changes in cases.values()]
    held = "The first part held." if max(shares) == 0 else "**The first part did not hold in general.**"
    return " ".join([held, *said])


def picture(rows: Sequence[frame.Row]) -> Figure:
    """Change of the validation loss by group, a point a seed."""
    figure, axes = frame.panels(2, 2, width=3.3, height=1.75)
    titles = {"end": "trained to the end", "steps": "after a fixed number of steps"}
    for panel, (start, when) in zip(axes, [(s, w) for s in STARTS for w in WHEN], strict=True):
        for i, activation in enumerate(ACTIVATIONS):
            changes = by_case(rows).get((start, when, activation), [])
            x = [float(np.mean(change[name])) for name in GROUPS for change in changes]
            y = [place + 0.28 * i for place in range(len(GROUPS)) for _ in changes]
            panel.plot(x, y, "o", ms=3.5, alpha=0.7, mew=0, label=activation)
        panel.axvline(0, color="#444444", lw=0.8)
        panel.set_title(f"{'Random start' if start == 'random' else 'Start of zero'}, {titles[when]}", fontsize=8)
        names = GROUPS if when == "end" else [""] * len(GROUPS)
        panel.set_yticks(np.arange(len(GROUPS)) + 0.14, names, fontsize=6.5)
        if start == STARTS[-1]:
            panel.set_xlabel("relative change of F_val per unit of the gate")
    axes[2].legend(fontsize=6.5, frameon=False, loc="lower right")
    return figure


EXPERIMENT = frame.Experiment(
    name="theorem2_gates",
    title="Theorem 2: raising a gate and the validation loss",
    claim="with independent gates, raising any gate does not raise F_val(W*(beta), beta); raising a skip before the "
    "last node or a convolution into it by eps lowers it by C eps in expectation. So the search favours skips.",
    units=units,
    measure=measure,
    findings=findings,
    picture=picture,
    caption="Change of the validation loss when one gate is raised, by kind of gate",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what is missing; returns the exit status."""
    return frame.main(EXPERIMENT, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
