"""The optax transformations of the two parameter groups, and their hyperparameters."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from prdarts_jax.config import schema, userfile
from prdarts_jax.config.search import ArchConfig, WeightsConfig
from prdarts_jax.config.train import SCALE_BATCH, TrainConfig
from prdarts_jax.config.userfile import UserObject
from prdarts_jax.errors import UserError


def weight_transform(config: WeightsConfig) -> optax.GradientTransformation:
    """SGD as published: clip by global norm, then coupled L2, then (Nesterov) momentum, then the learning rate.

    Learning rate, weight decay and momentum are hyperparameters of the state, so that searches with other values share
    a compiled step; the step sets the learning rate from `numbers["weight_learning_rate"]`.

    >>> tx = weight_transform(WeightsConfig())
    >>> {name: round(float(value), 6) for name, value in tx.init({"w": jnp.zeros(2)}).hyperparams.items()}
    {'learning_rate': 0.025, 'weight_decay': 0.0005, 'momentum': 0.9}
    """

    def make(learning_rate: float, weight_decay: float, momentum: float) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(config.clip_norm) if config.clip_norm != float("inf") else optax.identity(),
            optax.add_decayed_weights(weight_decay),
            optax.sgd(learning_rate, momentum=momentum, nesterov=config.nesterov),
        )

    return optax.inject_hyperparams(make)(
        learning_rate=config.learning_rate, weight_decay=config.weight_decay, momentum=config.momentum
    )


def arch_transform(config: ArchConfig) -> optax.GradientTransformation:
    """Adam or SGD with coupled L2 (weight decay added to the gradient); before it, clipping by global norm.

    >>> tx = arch_transform(ArchConfig(clip_norm=5.0))
    >>> sorted(tx.init({"normal": jnp.zeros(2)}).hyperparams)
    ['learning_rate', 'weight_decay']
    >>> tx = arch_transform(ArchConfig(optimizer="sgd", learning_rate=0.5, weight_decay=0.0))
    >>> tx.update(jnp.ones(1), tx.init(jnp.ones(1)), jnp.ones(1))[0].item()
    -0.5
    """
    # Without clipping nothing stands in its place: the state keeps the form that checkpoints have.
    clipping = () if config.clip_norm == float("inf") else (optax.clip_by_global_norm(config.clip_norm),)

    def make(learning_rate: float, weight_decay: float) -> optax.GradientTransformation:
        moved = (
            optax.sgd(learning_rate, momentum=config.momentum or None)
            if config.optimizer == "sgd"
            else optax.adam(learning_rate, b1=config.beta1, b2=config.beta2, eps=config.eps)
        )
        return optax.chain(*clipping, optax.add_decayed_weights(weight_decay), moved)

    return optax.inject_hyperparams(make)(learning_rate=config.learning_rate, weight_decay=config.weight_decay)


def set_learning_rate(opt_state: Any, rate: Any) -> Any:
    """Sets the learning rate of an `inject_hyperparams` state; a transformation without one keeps its own."""
    if rate is None or not isinstance(getattr(opt_state, "hyperparams", None), dict):
        return opt_state
    if "learning_rate" not in opt_state.hyperparams:
        return opt_state
    old = opt_state.hyperparams["learning_rate"]
    rate = jnp.asarray(rate, jnp.asarray(old).dtype)
    return opt_state._replace(hyperparams={**opt_state.hyperparams, "learning_rate": rate})


def virtual_step(opt_state: Any, weights: Any, gradient: Any) -> tuple[Any, jax.Array]:
    """The look-ahead of DARTS, w - eta (mu v + grad + d w), from the state of an optimizer; nothing is clipped.

    Args:
      opt_state: its learning rate eta, momentum mu and weight decay d are those of its `hyperparams`, its velocity v is
        that of an `optax.trace` in it; what it does not have counts as 0.
      weights, gradient: trees of one structure.

    Returns:
      (weights after the step, eta).

    Raises:
      UserError: there is no learning rate.

    >>> tx = weight_transform(WeightsConfig(learning_rate=0.5, weight_decay=0.1))
    >>> w = {"w": jnp.ones(1)}
    >>> ahead, rate = virtual_step(tx.init(w), w, w)
    >>> round(float(ahead["w"][0]), 4)  # 1 - 0.5 (1 + 0.1)
    0.45
    """
    known = getattr(opt_state, "hyperparams", {})
    rate = known.get("learning_rate")
    if rate is None:
        raise UserError("weights.transform: the unrolled step needs its learning rate; allowed: inject_hyperparams")
    decay, momentum = known.get("weight_decay", 0.0), known.get("momentum", 0.0)
    traces = [node.trace for node in jax.tree.leaves(opt_state, is_leaf=_is_trace) if _is_trace(node)]
    velocity = traces[0] if traces else jax.tree.map(jnp.zeros_like, weights)
    ahead = jax.tree.map(lambda w, g, v: w - rate * (momentum * v + g + decay * w), weights, gradient, velocity)
    return ahead, rate


def _is_trace(node: Any) -> bool:
    return isinstance(node, optax.TraceState)


def set_hyperparameters(opt_state: Any, tx: optax.GradientTransformation) -> Any:
    """An `inject_hyperparams` state with the hyperparameters of another such transformation; other states as they are.

    >>> tx = weight_transform(WeightsConfig(weight_decay=0.25))
    >>> state = set_hyperparameters(weight_transform(WeightsConfig()).init({"w": jnp.zeros(2)}), tx)
    >>> float(state.hyperparams["weight_decay"])
    0.25
    """
    if not isinstance(getattr(opt_state, "hyperparams", None), dict):
        return opt_state
    return opt_state._replace(hyperparams=tx.init({"any": jnp.zeros((), jnp.float32)}).hyperparams)


def transformation(
    config: Any, group: str, argument: Any, default: Callable[[], optax.GradientTransformation]
) -> UserObject:
    """The optimizer of a group: the caller's, the one `GROUP.transform` names, or the default.

    Args:
      config: of the run; a function of the user is called with it.
      group: the section of the config.
      argument: a transformation, a function of the config, or None.
      default: makes the one of the config's numbers.

    Returns:
      the transformation, and the digest of the user's file if it is from one.

    Raises:
      UserError: no optax transformation came of it.
    """
    spec, field = schema.get(config, f"{group}.transform"), f"{group}.transform"
    if argument is None and not spec:
        return UserObject(default())
    made, digest = userfile.load(spec, field) if argument is None else UserObject(argument)
    if not isinstance(made, optax.GradientTransformation) and callable(made):
        made = userfile.call(made, config, field=field)
    if not isinstance(made, optax.GradientTransformation):
        raise UserError(
            f"{field}: got a {type(made).__name__}; allowed: an optax transformation, or a function of the config"
        )
    return UserObject(made, digest)


class _Slow(NamedTuple):
    """State of a transformation of fast and slow parameters."""

    inner: Any
    slow: Any


def with_extra_arguments(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """A transformation that may be given any arguments by name, and hands on those that it takes.

    optax makes one of a transformation that takes none; others take a few names and refuse the rest (`contrib.sam`).

    >>> tx = optax.GradientTransformationExtraArgs(lambda p: (), lambda g, s, p=None, *, value: (value * g, s))
    >>> with_extra_arguments(tx).update(1.0, (), value=2.0, grad=3.0)
    (2.0, ())
    """
    known = inspect.signature(tx.update).parameters.values()
    if not isinstance(tx, optax.GradientTransformationExtraArgs):
        return optax.with_extra_args_support(tx)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known):
        return tx
    names = {parameter.name for parameter in known}

    def update(gradient: Any, state: Any, parameters: Any = None, **extra: Any) -> tuple[Any, Any]:
        return tx.update(gradient, state, parameters, **{name: extra[name] for name in names & set(extra)})

    return optax.GradientTransformationExtraArgs(tx.init, update)


def on_plain_parameters(tx: optax.GradientTransformation, parameters: Any) -> optax.GradientTransformationExtraArgs:
    """A transformation whose update takes plain parameters, and `value`, `grad`, `value_fn` beside them.

    Most are so already. Of one that moves a pair of fast and slow parameters (`optax.lookahead`) the slow ones go into
    its state: the network has the fast ones, and so have evaluation, probabilities and genotype.

    Args:
      tx: any optax transformation.
      parameters: their shapes, a tree of `jax.ShapeDtypeStruct`.

    >>> shapes = {"w": jax.ShapeDtypeStruct((2,), jnp.float32)}
    >>> tx = on_plain_parameters(optax.lookahead(optax.sgd(0.5), 2, 0.5), shapes)
    >>> w, g = {"w": jnp.ones(2)}, {"w": jnp.ones(2)}
    >>> state = tx.init(w)
    >>> for _ in range(2):  # after two steps to 0, half of the way back to 1
    ...     updates, state = tx.update(g, state, w, value=0.0)
    ...     w = optax.apply_updates(w, updates)
    >>> w["w"].tolist()
    [0.5, 0.5]
    """
    extended = with_extra_arguments(tx)
    absl = logging.getLogger(
        "absl"
    )  # where `lookahead` says that it is not given what it moves: that is found out here
    absl.addFilter(_not_of_fast)
    try:
        _once(extended, parameters)
    except AttributeError as error:
        if "'fast'" not in str(error) and "'slow'" not in str(error):
            raise
    else:
        return extended
    finally:
        absl.removeFilter(_not_of_fast)

    def init(fast: Any) -> _Slow:
        return _Slow(tx.init(optax.LookaheadParams.init_synced(fast)), fast)

    def update(gradient: Any, state: _Slow, fast: Any, **extra: Any) -> tuple[Any, _Slow]:
        updates, inner = extended.update(gradient, state.inner, optax.LookaheadParams(fast, state.slow), **extra)
        return updates.fast, _Slow(inner, optax.apply_updates(state.slow, updates.slow))

    return optax.GradientTransformationExtraArgs(init, update)


def _not_of_fast(record: logging.LogRecord) -> bool:
    return "fast parameters" not in record.getMessage()


def _once(tx: optax.GradientTransformationExtraArgs, parameters: Any) -> Any:
    """Shapes of (first state, state after an update, parameters after it)."""
    return jax.eval_shape(functools.partial(_first_update, tx), parameters)


def _first_update(tx: optax.GradientTransformationExtraArgs, parameters: Any) -> Any:
    state, gradient = tx.init(parameters), jax.tree.map(jnp.ones_like, parameters)

    def value_fn(parameters: Any) -> jax.Array:
        return sum(map(jnp.sum, jax.tree.leaves(parameters)), jnp.zeros((), jnp.float32))

    extra = {"value": value_fn(parameters), "grad": gradient, "value_fn": value_fn}
    updates, after = tx.update(gradient, state, parameters, **extra)
    return state, after, optax.apply_updates(parameters, updates)


def program_text(tx: optax.GradientTransformation, parameters: Any) -> str:
    """The first state and an update of a transformation as StableHLO: what it computes, its frozen numbers included.

    Args:
      tx: of the caller.
      parameters: their shapes, a tree of `jax.ShapeDtypeStruct`.

    >>> shapes = jax.ShapeDtypeStruct((2,), jnp.float32)
    >>> program_text(optax.sgd(0.1), shapes) == program_text(optax.sgd(0.2), shapes)
    False
    """
    return lowered_text(functools.partial(_first_update, with_extra_arguments(tx)), parameters)


def lowered_text(function: Callable[..., Any], *shapes: Any) -> str:
    """A function as StableHLO, with the numbers it has closed over; for a CPU wherever it is called, to be compared."""
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cpu",)).as_text()


def base_rate(config: TrainConfig) -> float:
    """The learning rate the schedule starts from: times batch_size / 128 where `weights.scale_lr` says so.

    >>> base_rate(TrainConfig())
    0.025
    """
    scale = config.batch_size / SCALE_BATCH if config.weights.scale_lr else 1.0
    return config.weights.learning_rate * scale


def sgd(config: TrainConfig) -> optax.GradientTransformation:
    """SGD of the config's numbers, with the learning rate as a hyperparameter of the state.

    >>> print(sgd(TrainConfig()).init({"w": jnp.zeros(2)}).hyperparams["learning_rate"])
    0.025
    """
    weights = config.weights
    return weight_transform(
        WeightsConfig(
            learning_rate=base_rate(config),
            momentum=weights.momentum,
            nesterov=weights.nesterov,
            weight_decay=weights.weight_decay,
            clip_norm=weights.clip_norm,
        )
    )
