"""The optax transformations of the two parameter groups, and their hyperparameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    """Adam with coupled L2 (weight decay added to the gradient), as published; before it, clipping by global norm.

    >>> tx = arch_transform(ArchConfig(clip_norm=5.0))
    >>> sorted(tx.init({"normal": jnp.zeros(2)}).hyperparams)
    ['learning_rate', 'weight_decay']
    """
    # Without clipping nothing stands in its place: the state keeps the form that checkpoints have.
    clipping = () if config.clip_norm == float("inf") else (optax.clip_by_global_norm(config.clip_norm),)

    def make(learning_rate: float, weight_decay: float) -> optax.GradientTransformation:
        return optax.chain(
            *clipping,
            optax.add_decayed_weights(weight_decay),
            optax.adam(learning_rate, b1=config.beta1, b2=config.beta2, eps=config.eps),
        )

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


def program_text(tx: optax.GradientTransformation, parameters: Any) -> str:
    """The first state and an update of a transformation as StableHLO: what it computes, its frozen numbers included.

    Args:
      tx: of the caller.
      parameters: their shapes, a tree of `jax.ShapeDtypeStruct`.

    >>> shapes = jax.ShapeDtypeStruct((2,), jnp.float32)
    >>> program_text(optax.sgd(0.1), shapes) == program_text(optax.sgd(0.2), shapes)
    False
    """

    def both(parameters: Any) -> Any:
        state = tx.init(parameters)
        updates, after = tx.update(jax.tree.map(jnp.ones_like, parameters), state, parameters)
        return state, after, optax.apply_updates(parameters, updates)

    return lowered_text(both, parameters)


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
