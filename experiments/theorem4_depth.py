"""Theorem 4: a shallow cell of two branches converges faster than the deep cell with the same gates.

    python -m experiments.theorem4_depth --scale smoke     under a minute, anywhere; the figures mean nothing
    python -m experiments.theorem4_depth --scale cpu       about two minutes on one core, 5 seeds
    python -m experiments.theorem4_depth --scale paper     wider and deeper cells, 10 seeds; for a GPU (not run)

Cell A has nodes 0..h-1, each fed by all before it. In cell B the nodes h/2..h-1 are a branch of their own that begins
at the input, so it lacks the edges between the halves. Gates and starting weights are equal where both cells have
them. The theorem: lambda_B >= lambda_A + (3 c / 4) lambda_min(K) sum_{s>=h/2} (g_{s,3}^(h-1))^2 prod_{h/2<=t<s}
(g_{t,2}^(s))^2 > lambda_A. (As printed the sum runs to s = h-1, for which there is no gate; here it ends at h-2.) The
constant is not given: rates of descent at one eta, and the spectra of the Gram matrices, are compared instead. Gates
are drawn uniformly on (0, 1), each by itself, and also on the simplex of each edge, since a sum of independent gates
makes deep features large, and that alone raises the spectrum of A. A unit is one seed, activation and law of the
gates.

Expected: at one eta the deep cell is the faster one, against the theorem: it has more weights and larger features, and
the smallest eigenvalue of its Gram matrix is two to five times that of the shallow cell. For softplus the Gram matrix
of the shallow cell has the smaller condition number, so that with the largest eta of its own it would be the faster
one.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from experiments import frame, section3
from prdarts_jax import theory
from prdarts_jax.theory import CellWeights

SHAPE = {"nodes": 6, "channels": 8, "positions": 4, "kernel": 3, "samples": 4, "width": 16}
# scale -> (seeds, architectures, steps, shape)
SCALES: dict[str, tuple[range, int, int, dict[str, int]]] = {
    "smoke": (range(1), 4, 40, {**SHAPE, "nodes": 4, "samples": 2, "width": 4}),
    "cpu": (range(5), 20, 400, SHAPE),
    "paper": (range(10), 100, 4000, {**SHAPE, "samples": 16, "width": 256}),
}
ACTIVATIONS = ("tanh", "softplus")
LAWS = {"independent": section3.independent_gates, "simplex": section3.simplex_gates}
CURVE = 25  # points of a loss curve that are kept


def units(scale: str) -> list[dict[str, Any]]:
    """Every seed, activation and law of the gates."""
    seeds, architectures, steps, shape = SCALES[scale]
    return [
        {"seed": seed, "activation": activation, "law": law, "architectures": architectures, "steps": steps, **shape}
        for seed in seeds
        for activation in ACTIVATIONS
        for law in LAWS
    ]


def shared_edges(nodes: int) -> list[int]:
    """The places in the deep cell of the edges that the shallow cell has too, in the order of the shallow cell.

    >>> shared_edges(4)
    [0, 5]
    """
    deep = theory.edges(nodes)
    return [deep.index(edge) for edge in theory.edges(nodes, (0, nodes // 2))]


def starts(unit: frame.Unit) -> tuple[CellWeights, CellWeights]:
    """The weights of the deep and of the shallow cell, equal where both have them."""
    nodes = unit["nodes"]
    deep, two = section3.weights(unit), section3.weights(unit, (0, nodes // 2))
    deep = deep._replace(stems=two.stems[:1], heads=two.heads)
    return deep, two._replace(convs=deep.convs[np.array(shared_edges(nodes))])


def measure(unit: frame.Unit) -> Mapping[str, Any]:
    """Descends with both cells at one rate."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(unit["seed"])
        sigma, nodes, n = theory.ACTIVATIONS[unit["activation"]], unit["nodes"], unit["samples"]
        x, y = section3.samples(rng, n, unit), jnp.asarray(rng.normal(size=n))
        gates = jnp.asarray(LAWS[unit["law"]](rng, unit["architectures"], nodes))
        deep, shallow = starts(unit)
        cells = {
            "deep": ((0,), deep, gates),
            "shallow": ((0, nodes // 2), shallow, gates[:, np.array(shared_edges(nodes))]),
        }
        spectra = {
            name: np.linalg.eigvalsh(np.asarray(section3.mapped(theory.gram, sigma, roots)(start, g, x)))
            for name, (roots, start, g) in cells.items()
        }
        rate = n / max(each[:, -1].max() for each in spectra.values())
        found: dict[str, Any] = {"eta": float(rate)}
        for name, (roots, start, g) in cells.items():
            descend = section3.mapped(theory.descend, sigma, roots, steps=unit["steps"])
            losses = np.asarray(descend(start, g, x, y, rate=rate)[1])
            rates = section3.rates(losses)
            places = np.linspace(0, losses.shape[1] - 1, CURVE).round().astype(int)
            curve = np.log10(losses[:, places] / losses[:, :1]).mean(axis=0)
            eigenvalues = np.exp(np.log(spectra[name]).mean(axis=0))
            found[name] = {
                "late": rates.late,
                "worst": rates.worst,
                "lambda_min": spectra[name][:, 0],
                "condition": spectra[name][:, -1] / spectra[name][:, 0],
                "spectrum": eigenvalues,
                "curve": [[int(p), float(v)] for p, v in zip(places, curve, strict=True)],
            }
        extra = jax.vmap(lambda g: theory.rate_sum(g, nodes, first=nodes // 2))(gates)
        found["extra"] = np.asarray(extra)
        return frame.short(found)


def _ratio(row: frame.Row, name: str) -> np.ndarray:
    """Of the shallow cell over the deep one, an architecture an entry."""
    return np.array(row["shallow"][name]) / np.array(row["deep"][name])


def findings(rows: Sequence[frame.Row]) -> list[str]:
    """Ratios of the shallow cell to the deep one, over seeds."""
    lines, faster = [], []
    for law in LAWS:
        for activation in ACTIVATIONS:
            some = [row for row in rows if (row["law"], row["activation"]) == (law, activation)]
            if not some:
                continue
            share = [float(np.mean(_ratio(row, "late") > 1)) for row in some]
            faster += share
            lines.append(
                (
                    f"{law}, {activation}",
                    frame.spread([float(np.median(_ratio(row, "late"))) for row in some], 2),
                    f"{100 * np.mean(share):.0f} %",
                    frame.spread([float(np.median(_ratio(row, "worst"))) for row in some], 2),
                    frame.spread([float(np.median(_ratio(row, "lambda_min"))) for row in some], 2),
                    frame.spread([float(np.median(_ratio(row, "condition"))) for row in some], 2),
                    frame.spread(
                        [
                            frame.rank_correlation(
                                row["extra"],
                                np.array(row["shallow"]["lambda_min"]) - np.array(row["deep"]["lambda_min"]),
                            )
                            for row in some
                        ],
                        2,
                    ),
                )
            )
    header = (
        "gates, activation",
        "rate, shallow / deep",
        "architectures in which the shallow cell was faster",
        "worst step",
        "lambda_min(G) at the start",
        "condition of G",
        "rank correlation of the theorem's extra sum with lambda_min(G_B) - lambda_min(G_A)",
    )
    return [
        f"{rows[0]['architectures']} architectures a unit, both cells at one eta. Figures are of the shallow cell "
        "over the deep one: medians over the architectures, then the mean over the seeds with half its 95 % "
        "confidence interval.",
        "",
        *frame.table(header, lines),
        verdict(faster, rows),
    ]


def verdict(faster: Sequence[float], rows: Sequence[frame.Row]) -> str:
    """Whether the shallow cell was faster, in words."""
    share = float(np.mean(faster))
    if min(faster) > 0.95:
        held = "The order that the theorem states held."
    elif share < 0.5:
        held = "**The order that the theorem states did not hold** at one eta."
    else:
        held = "The order that the theorem states held more often than not, but not for every architecture."
    better = [float(np.mean(_ratio(row, "condition") < 1)) for row in rows]
    by_activation = ", ".join(
        f"{activation} "
        f"{100 * np.mean([b for b, row in zip(better, rows, strict=True) if row['activation'] == activation]):.0f} %"
        for activation in ACTIVATIONS
        if any(row["activation"] == activation for row in rows)
    )
    return (
        f"{held} The shallow cell was the faster one in {100 * share:.0f} % of the architectures. If each cell had "
        "the largest eta that its own spectrum allows, the smaller condition number of G would decide: it is the "
        f"shallow cell's for {by_activation} of the architectures."
    )


def picture(rows: Sequence[frame.Row]) -> Figure:
    """Loss curves and spectra of both cells, a column for each law and activation."""
    cases = [(law, activation) for law in LAWS for activation in ACTIVATIONS]
    figure, axes = frame.panels(len(cases), 2, width=2.1, height=1.9)
    for column, (law, activation) in enumerate(cases):
        some = [row for row in rows if (row["law"], row["activation"]) == (law, activation)]
        top, bottom = axes[column], axes[len(cases) + column]
        top.set_title(f"{law}, {activation}")
        for cell in ("deep", "shallow"):
            curves = np.array([row[cell]["curve"] for row in some])
            if not len(curves):
                continue
            [line] = top.plot(curves[0, :, 0], curves[:, :, 1].mean(axis=0), lw=1.4, label=cell)
            deviation = curves[:, :, 1].std(axis=0)
            mean = curves[:, :, 1].mean(axis=0)
            top.fill_between(
                curves[0, :, 0], mean - deviation, mean + deviation, color=line.get_color(), alpha=0.2, lw=0
            )
            spectra = np.array([row[cell]["spectrum"] for row in some])
            for spectrum in spectra:
                bottom.semilogy(range(1, len(spectrum) + 1), spectrum, "o-", ms=2.5, lw=0.6, color=line.get_color())
        top.set_xlabel("step")
        bottom.set_xlabel("place in the spectrum of G")
        bottom.yaxis.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel("log10 F / F at the start")
    axes[len(cases)].set_ylabel("eigenvalue")
    axes[0].legend(fontsize=7, frameon=False)
    return figure


EXPERIMENT = frame.Experiment(
    name="theorem4_depth",
    title="Theorem 4: shallow cells and deep cells",
    claim="with equal gates, a cell of two branches of h/2 nodes converges faster than a cell of h nodes in a "
    "chain: lambda_B > lambda_A. So the search favours shallow cells.",
    units=units,
    measure=measure,
    findings=findings,
    picture=picture,
    caption="Training loss of both cells (mean over seeds, standard deviation shaded) and spectra of their Gram "
    "matrices",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what is missing; returns the exit status."""
    return frame.main(EXPERIMENT, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
