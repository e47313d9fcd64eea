"""Update rules: how a step moves the weights w and the architecture a. A rule knows losses and optimizers, no method.

    alternating   w <- w - opt grad_w L_train(w, a);  a <- a - opt grad_a L_val(w, a)          one after the other
    joint         (w, a) <- (w, a) - opt grad_(w,a) L(w, a)                                     one batch, one pass
    unrolled      a <- a - opt grad_a L_val(w - eta (mu v + grad_w L_train + d w), a);  then w   DARTS, second order
    mixed_level   a <- a - opt [grad_a L_val + scale grad_a CE_train];  then w                  MiLeNAS
    weights_alone w <- w - opt grad_w L_train(w, a);  nothing moves a                           judges of whole cells

Each group is a constant in the other's gradient unless the equation says otherwise. A step is a pure per-device
function; `sharding.map_over` maps it over a mesh, and gradients, batch statistics and metrics are means over the axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
import optax

from prdarts_jax.data.batches import Batch
from prdarts_jax.devices.sharding import mean_over
from prdarts_jax.gates import Gates
from prdarts_jax.optimizers import set_learning_rate, virtual_step

if TYPE_CHECKING:
    from jaxtyping import Float, Int, PRNGKeyArray

__all__ = [
    "Batch",
    "Batches",
    "Evaluated",
    "Loss",
    "Losses",
    "Optimizers",
    "Rule",
    "SearchState",
    "alternating",
    "half_of",
    "joint",
    "mixed_level",
    "unrolled",
    "weights_alone",
]

Metrics = dict[str, jax.Array]
Numbers = Mapping[str, Any]
RADIUS = 0.01  # of the finite difference of DARTS, over the norm of the gradient


@flax.struct.dataclass
class SearchState:
    """Everything a bilevel step changes."""

    step: Int[jax.Array, ""]  # int32, steps done since the start of the search
    weights: Any  # float32 tree, see supernet.init
    arch: Any  # float32 tree, see Strategy.init
    weight_opt: Any  # state of the optimizer of the weights
    arch_opt: Any  # state of the optimizer of the architecture
    memory: Any = ()  # of the method, see Strategy.memory


class Batches(NamedTuple):
    """The two batches of a step."""

    train: Batch
    val: Batch


class Optimizers(NamedTuple):
    """Of the two groups; neither sees the other group's gradients or state."""

    weights: optax.GradientTransformationExtraArgs
    arch: optax.GradientTransformationExtraArgs


class Evaluated(NamedTuple):
    """A loss at one point, with its gradients; means over the devices."""

    value: Float[jax.Array, ""]  # what is differentiated
    ce: Float[jax.Array, ""]  # the cross-entropy in it
    accuracy: Float[jax.Array, ""]
    weights: Any  # gradient, or None where it was not asked for
    arch: Any  # gradient, or None
    terms: Metrics  # what the objective adds to the cross-entropy, by name
    norms: Metrics  # norm of the gradient in arch of the cross-entropy and of each term
    stats: Metrics  # scalars the sample of the gates brings along


@dataclasses.dataclass(frozen=True)
class Loss:
    """objective(CE(w, g), a, g) with gates g drawn at a: a function of both groups, and its gradients.

    Attributes:
      gates: (weights, arch, memory, batch, key, numbers) -> Gates.
      network: (weights, gates, batch, key, numbers) -> (cross-entropy, accuracy).
      objective: (ce, arch, gates, memory, numbers) -> (scalar, {name: scalar}); None: the cross-entropy itself.
      axis_name: mapped axis over which batches are split; None on one device.
    """

    gates: Callable[..., Gates]
    network: Callable[..., tuple[jax.Array, jax.Array]]
    objective: Callable[..., tuple[jax.Array, Metrics]] | None = None
    axis_name: str | None = None

    def __call__(
        self, weights: Any, arch: Any, memory: Any, batch: Batch, key: PRNGKeyArray, numbers: Numbers
    ) -> Float[jax.Array, ""]:
        """The loss, a float32 scalar, the same on all devices."""
        gates = self.gates(weights, arch, memory, batch, key, numbers)
        ce = mean_over(self.axis_name, self.network(weights, gates, batch, key, numbers)[0])
        return ce if self.objective is None else self.objective(ce, arch, gates, memory, numbers)[0]

    def gradient(
        self,
        wrt: tuple[str, ...],
        weights: Any,
        arch: Any,
        memory: Any,
        batch: Batch,
        key: jax.Array,
        numbers: Numbers,
    ) -> Evaluated:
        """The loss and its gradients, in one forward and one backward pass through the network.

        That pass gives dCE/dw and dCE/dg, which are averaged over the devices. The rest is the chain rule through the
        objective and the sample of the gates, on a few hundred numbers, once for the gradient and once a term.

        Args:
          wrt: some of "weights", "arch".
          weights, arch, memory, batch, key, numbers: as the loss takes them.
        """

        def multipliers(arch: Any) -> tuple[Any, Gates]:
            gates = self.gates(weights, arch, memory, batch, key, numbers)
            return (gates.ops, gates.edges), gates

        def network(weights: Any, parts: Any) -> tuple[jax.Array, jax.Array]:
            ops, edges = parts
            return self.network(weights, dataclasses.replace(gates, ops=ops, edges=edges), batch, key, numbers)

        if "arch" in wrt:
            parts, pull, gates = jax.vjp(multipliers, arch, has_aux=True)
        else:
            parts, gates = multipliers(arch)
        of = tuple(i for i, group in enumerate(("weights", "arch")) if group in wrt)
        (ce, accuracy), slopes = jax.value_and_grad(network, of, has_aux=True)(weights, parts)
        ce, accuracy, slopes = mean_over(self.axis_name, (ce, accuracy, slopes))
        d_weights, d_parts = slopes[0] if 0 in of else None, slopes[-1] if 1 in of else None
        stats = {name: stat for name, stat in gates.stats.items() if isinstance(stat, jax.Array) and stat.ndim == 0}

        objective = self.objective
        if objective is None:
            d_arch = pull(d_parts)[0] if 1 in of else None
            norms = {"cross_entropy": optax.global_norm(d_arch)} if 1 in of else {}
            return Evaluated(ce, ce, accuracy, d_weights, d_arch, {}, norms, stats)

        def whole(ce: jax.Array, arch: Any, parts: Any) -> tuple[jax.Array, Metrics]:
            ops, edges = parts
            return objective(ce, arch, dataclasses.replace(gates, ops=ops, edges=edges), memory, numbers)

        if 1 not in of:
            (value, terms), by_ce = jax.value_and_grad(whole, has_aux=True)(ce, arch, parts)
            d_weights = jax.tree.map(lambda slope: by_ce * slope, d_weights)
            return Evaluated(value, ce, accuracy, d_weights, None, terms, {}, stats)
        (value, terms), (by_ce, direct, by_parts) = jax.value_and_grad(whole, (0, 1, 2), has_aux=True)(ce, arch, parts)
        through = jax.tree.map(lambda slope, own: by_ce * slope + own, d_parts, by_parts)
        d_arch = jax.tree.map(jnp.add, pull(through)[0], direct)
        if d_weights is not None:
            d_weights = jax.tree.map(lambda slope: by_ce * slope, d_weights)
        norms = {"cross_entropy": optax.global_norm(pull(d_parts)[0])}
        if terms:
            # A term sees the cross-entropy as a linear function of the gates, which has its value and its gradient.
            def each(arch: Any) -> Metrics:
                drawn, _ = multipliers(arch)
                moved = jax.tree.map(lambda d, new, old: jnp.vdot(d, new - old), d_parts, drawn, parts)
                return whole(ce + sum(jax.tree.leaves(moved)), arch, drawn)[1]

            norms |= {name: optax.global_norm(slope) for name, slope in jax.jacrev(each)(arch).items()}
        return Evaluated(value, ce, accuracy, d_weights, d_arch, terms, norms, stats)


class Losses(NamedTuple):
    """The losses of a search; their gates are sampled anew for each key."""

    plain: Loss  # the cross-entropy, gates sampled for the architecture
    full: Loss  # what the architecture descends: the objective of the method
    weight: Loss  # what the weights descend, gates sampled for them
    twice: Loss  # `weight` by plain automatic differentiation alone: it has second derivatives, and is slow to compile
    own: Callable[[Any], Any] = lambda arch: arch  # the part of architecture or gradient that is the method's own

    @property
    def gated(self) -> Callable[..., tuple[jax.Array, jax.Array]]:
        """(weights, gates, batch, key, numbers) -> (cross-entropy, accuracy), for rules that move gates themselves."""
        return self.plain.network


Step = Callable[[SearchState, Batches, jax.Array, Numbers], tuple[SearchState, Metrics]]
Rule: TypeAlias = Callable[[Losses, Optimizers], Step]
_Half = Callable[[SearchState, Batches, jax.Array, Numbers], tuple[SearchState, Metrics]]
_ArchGradient = Callable[[SearchState, Batches, jax.Array, jax.Array, Numbers], Evaluated]

_WEIGHT_METRICS = ("train_loss", "train_accuracy", "gradient_norm/weights", "update_norm/weights")


def half_of(metric: str) -> str:
    """The half of a step that a metric is of: "weights" or "arch".

    >>> half_of("train_loss"), half_of("penalty/skip")
    ('weights', 'arch')
    """
    return "weights" if metric in _WEIGHT_METRICS else "arch"


def alternating(first: str = "weights", weight_steps: int = 1) -> Rule:
    """One group after the other: w - opt grad_w L_train(w, a) on a train batch, a - opt grad_a L_val(w, a) on another.

    Args:
      first: "weights" or "arch": who moves first in a step; the other sees it moved.
      weight_steps: weight steps an architecture step; the architecture moves in every so-many-th step alone.

    Raises:
      ValueError: another name, or less than one step.
    """
    if first not in ("weights", "arch") or weight_steps < 1:
        raise ValueError(f"alternating(first={first!r}, weight_steps={weight_steps!r}); allowed: weights | arch, >= 1")

    def rule(losses: Losses, optimizers: Optimizers) -> Step:
        def gradient(
            state: SearchState, batches: Batches, weight_key: jax.Array, key: jax.Array, numbers: Numbers
        ) -> Evaluated:
            del weight_key
            return losses.full.gradient(("arch",), state.weights, state.arch, state.memory, batches.val, key, numbers)

        return _halves(losses, optimizers, gradient, first, weight_steps)

    return rule


def unrolled(exact: bool = False) -> Rule:
    """DARTS, second order: a - opt grad_a L_val(w'(a), a), w' = w - eta (mu v + grad_w L_train(w, a) + d w); then w.

    With g = grad_w' L_val(w', a) the gradient is grad_a L_val(w', a) - eta (d/da grad_w L_train(w, a)) g. The last
    product is [grad_a L_train(w + e g, a) - grad_a L_train(w - e g, a)] / 2e with e = 0.01/|g| as published, or exact.
    eta is the learning rate of the weights, mu, v and d are momentum, velocity and weight decay of their optimizer; the
    virtual step does not clip. (Liu et al. 2019, eq. 7 and 8.)

    Args:
      exact: the product by reverse over reverse; the network is then unrolled into plain JAX operations, without
        kernels: for small spaces.
    """

    def rule(losses: Losses, optimizers: Optimizers) -> Step:
        def gradient(
            state: SearchState, batches: Batches, weight_key: jax.Array, key: jax.Array, numbers: Numbers
        ) -> Evaluated:
            weights, arch, memory = state.weights, state.arch, state.memory
            train = (memory, batches.train, weight_key, numbers)
            slope = losses.weight.gradient(("weights",), weights, arch, *train).weights
            # A transformation that keeps a rate of its own does not move by that of the numbers, and is refused.
            opt = set_learning_rate(state.weight_opt, numbers.get("weight_learning_rate"))
            ahead, rate = virtual_step(opt, weights, slope)
            found = losses.full.gradient(("weights", "arch"), ahead, arch, memory, batches.val, key, numbers)
            g = found.weights
            if exact:

                def along(arch: Any) -> jax.Array:
                    inner = jax.grad(lambda weights: losses.twice(weights, arch, *train))(weights)
                    return sum(map(jnp.vdot, jax.tree.leaves(inner), jax.tree.leaves(g)), jnp.zeros(()))

                product = mean_over(losses.twice.axis_name, jax.grad(along)(arch))
            else:
                e = RADIUS / optax.global_norm(g)
                ends = [jax.tree.map(lambda w, d, s=s: w + s * e * d, weights, g) for s in (1, -1)]
                up, down = (losses.weight.gradient(("arch",), end, arch, *train).arch for end in ends)
                product = jax.tree.map(lambda u, d: (u - d) / (2 * e), up, down)
            return found._replace(arch=jax.tree.map(lambda a, p: a - rate * p, found.arch, product))

        return _halves(losses, optimizers, gradient, "arch", 1)

    return rule


def mixed_level(scale: float = 1.0) -> Rule:
    """MiLeNAS: a - opt [grad_a L_val(w, a) + scale grad_a CE_train(w, a)]; then w as in `alternating`.

    Source: He et al., MiLeNAS, CVPR 2020, first order.
    """

    def rule(losses: Losses, optimizers: Optimizers) -> Step:
        def gradient(
            state: SearchState, batches: Batches, weight_key: jax.Array, key: jax.Array, numbers: Numbers
        ) -> Evaluated:
            point = (state.weights, state.arch, state.memory)
            found = losses.full.gradient(("arch",), *point, batches.val, key, numbers)
            train = losses.plain.gradient(("arch",), *point, batches.train, weight_key, numbers)
            norms = found.norms | {"train_cross_entropy": train.norms["cross_entropy"]}
            return found._replace(arch=jax.tree.map(lambda v, t: v + scale * t, found.arch, train.arch), norms=norms)

        return _halves(losses, optimizers, gradient, "arch", 1)

    return rule


def weights_alone(losses: Losses, optimizers: Optimizers) -> Step:
    """The weights descend their loss, the architecture is no gradient's: a rule, of methods that judge whole cells."""

    def step(state: SearchState, batches: Batches, key: jax.Array, numbers: Numbers) -> tuple[SearchState, Metrics]:
        rest = (state.arch, state.memory, batches.train, key, numbers)
        found = losses.weight.gradient(("weights",), state.weights, *rest)
        state, metrics = _move_weights(optimizers, state, found, numbers, lambda w: losses.weight(w, *rest))
        return _counted(state), metrics

    return step


def joint(observe: Callable[[SearchState, Evaluated, Batch], Any] | None = None) -> Rule:
    """Single level: w and a descend one loss on one batch (the train batch), from one backward pass.

    Both move at once: neither sees the other moved. The loss is that of the architecture, `Losses.full`. Where
    `arch_on` or `weights_on` is 0 that group stays where it is.

    Args:
      observe: (state before the step, loss and gradients, batch) -> memory after it, for a method that keeps what it
        sees of the gradients; None: the memory stays.
    """

    def rule(losses: Losses, optimizers: Optimizers) -> Step:
        def step(state: SearchState, batches: Batches, key: jax.Array, numbers: Numbers) -> tuple[SearchState, Metrics]:
            w, a, rest = state.weights, state.arch, (state.memory, batches.train, key, numbers)
            found = losses.full.gradient(("weights", "arch"), w, a, *rest)

            def weights(state: SearchState) -> tuple[SearchState, Metrics]:
                return _move_weights(optimizers, state, found, numbers, lambda w: losses.full(w, a, *rest))

            def arch(state: SearchState) -> tuple[SearchState, Metrics]:
                after, moved = _move_arch(optimizers, state, found, numbers, lambda a: losses.full(w, a, *rest))
                return after, _terms(found) | moved

            memory = state.memory if observe is None else observe(state, found, batches.train)
            state, weight_metrics = _skippable("weights", weights, numbers.get("weights_on"))(state)
            state, arch_metrics = _skippable("arch", arch, numbers.get("arch_on"))(state)
            return _counted(dataclasses.replace(state, memory=memory)), weight_metrics | arch_metrics

        return step

    return rule


# --- halves of a step -------------------------------------------------------------------------------------------------


def _halves(losses: Losses, optimizers: Optimizers, gradient: _ArchGradient, first: str, weight_steps: int) -> Step:
    """A step of the weights on the train batch and one of the architecture, in this order or the other."""

    def step(state: SearchState, batches: Batches, key: jax.Array, numbers: Numbers) -> tuple[SearchState, Metrics]:
        weight_key, arch_key = jax.random.split(key)

        def weights(state: SearchState) -> tuple[SearchState, Metrics]:
            rest = (state.arch, state.memory, batches.train, weight_key, numbers)
            found = losses.weight.gradient(("weights",), state.weights, *rest)
            return _move_weights(optimizers, state, found, numbers, lambda w: losses.weight(w, *rest))

        def arch(state: SearchState) -> tuple[SearchState, Metrics]:
            found = gradient(state, batches, weight_key, arch_key, numbers)
            rest = (state.memory, batches.val, arch_key, numbers)
            after, moved = _move_arch(optimizers, state, found, numbers, lambda a: losses.full(state.weights, a, *rest))
            return after, {"val_loss": found.ce, "val_accuracy": found.accuracy} | _terms(found) | moved

        arch_on = numbers.get("arch_on")
        if weight_steps > 1:
            due = (state.step + 1) % weight_steps == 0
            arch_on = (due if arch_on is None else due & (arch_on > 0)).astype(jnp.float32)
        half = {
            "weights": _skippable("weights", weights, numbers.get("weights_on")),
            "arch": _skippable("arch", arch, arch_on),
        }
        metrics: Metrics = {}
        for group in (first, "arch" if first == "weights" else "weights"):
            state, found = half[group](state)
            metrics |= found
        return _counted(state), metrics

    return step


def _skippable(
    group: str, half: Callable[[SearchState], tuple[SearchState, Metrics]], on: Any
) -> Callable[[SearchState], tuple[SearchState, Metrics]]:
    """A half that is left out, not computed, where `on` is 0; None: always there.

    A half that may be left out counts itself in `steps/GROUP`, so that its metrics are averaged over the steps it ran.
    """
    if on is None:
        return half

    def maybe(state: SearchState) -> tuple[SearchState, Metrics]:
        _, shapes = jax.eval_shape(half, state)
        nothing = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}
        runs = jnp.asarray(on) > 0
        state, metrics = jax.lax.cond(runs, half, lambda state: (state, nothing), state)
        return state, metrics | {f"steps/{group}": runs.astype(jnp.float32)}

    return maybe


def _counted(state: SearchState) -> SearchState:
    return dataclasses.replace(state, step=state.step + 1)


def _moved(
    tx: optax.GradientTransformationExtraArgs,
    opt: Any,
    parameters: Any,
    gradient: Any,
    value: jax.Array,
    loss: Callable[[Any], jax.Array],
    rate: Any,
) -> tuple[Any, Any, jax.Array]:
    """(parameters, state of their optimizer, norm of the update) after a step; `loss` is a function of them."""
    extra = {"value": value, "grad": gradient, "value_fn": loss}
    updates, opt = tx.update(gradient, set_learning_rate(opt, rate), parameters, **extra)
    return optax.apply_updates(parameters, updates), opt, optax.global_norm(updates)


def _move_weights(
    optimizers: Optimizers,
    state: SearchState,
    found: Evaluated,
    numbers: Numbers,
    loss: Callable[[Any], jax.Array],
) -> tuple[SearchState, Metrics]:
    given = (state.weight_opt, state.weights, found.weights, found.value, loss, numbers.get("weight_learning_rate"))
    weights, opt, norm = _moved(optimizers.weights, *given)
    metrics = {
        "train_loss": found.ce,
        "train_accuracy": found.accuracy,
        "gradient_norm/weights": optax.global_norm(found.weights),
        # Not finite when the new weights are not: they may be saved before anything is computed with them.
        "update_norm/weights": norm,
    }
    return dataclasses.replace(state, weights=weights, weight_opt=opt), metrics


def _move_arch(
    optimizers: Optimizers,
    state: SearchState,
    found: Evaluated,
    numbers: Numbers,
    loss: Callable[[Any], jax.Array],
) -> tuple[SearchState, Metrics]:
    given = (state.arch_opt, state.arch, found.arch, found.value, loss, numbers.get("arch_learning_rate"))
    arch, opt, norm = _moved(optimizers.arch, *given)
    return dataclasses.replace(state, arch=arch, arch_opt=opt), {"update_norm/arch": norm}


def _terms(found: Evaluated) -> Metrics:
    """What the architecture's half logs of its loss: terms, the norms of their gradients, numbers of the gates."""
    metrics = {f"gradient_norm/{name}": norm for name, norm in found.norms.items()}
    metrics |= {f"penalty/{name}": value for name, value in found.terms.items()}
    metrics["penalty/total"] = sum(found.terms.values(), jnp.zeros(()))
    return metrics | {f"gates/{name}": stat for name, stat in found.stats.items()}
