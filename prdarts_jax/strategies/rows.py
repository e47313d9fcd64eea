"""The table of search methods: a row a method. Its page is docs/methods/NAME.md, and the README names it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_ROOM = "prdarts_jax.strategies"


@dataclass(frozen=True)
class Row:
    """A search method: where its factory is, what it does in a step, and the settings it was published with."""

    name: str
    factory: str  # module:function, takes `space` and keyword options
    summary: str  # one line
    reference: str
    settings: Mapping[str, Any]  # dotted path of a config field -> the method's published value
    source: str  # where the settings were read
    competes: str  # what shares one budget, so that one grows at the cost of another
    executed: str  # operations an edge executes in a forward pass
    passes: str  # forward-backward passes through the search network in a step of both groups
    made_of: tuple[str, ...] = ()  # transforms it consists of, the innermost first
    not_claimed: str = ""  # in which points it is not, or is not known to be, what was published
    arrays: tuple[str, ...] = ()  # options that enter the compiled step through `schedule` alone: a sweep may name them


_DARTS: Mapping[str, Any] = {
    "epochs": 50,
    "batch_size": 64,
    "space.cells": 8,
    "space.channels": 16,
    "space.nodes": 4,
    "space.head_norm": False,
    "space.pool_norm": True,
    "weights.learning_rate": 0.025,
    "weights.learning_rate_min": 0.001,
    "weights.momentum": 0.9,
    "weights.nesterov": False,
    "weights.weight_decay": 3e-4,
    "weights.clip_norm": 5.0,
    "arch.learning_rate": 3e-4,
    "arch.beta1": 0.5,
    "arch.beta2": 0.999,
    "arch.eps": 1e-8,
    "arch.weight_decay": 1e-3,
}
_OF_AN_EDGE = "the operations of an edge"

ROWS = (
    Row(
        name="prdarts",
        factory=f"{_ROOM}.prdarts:prdarts",
        summary="independent hard-concrete gates, group-structured penalties and a path-depth term",
        reference=(
            "Zhou, Xiong, Socher, Hoi: Theory-Inspired Path-Regularized Differential Network Architecture Search, "
            "NeurIPS 2020"
        ),
        settings={
            **_DARTS,
            "epochs": 200,
            "batch_size": 128,
            "space.head_norm": True,
            "weights.nesterov": True,
            "weights.weight_decay": 5e-4,
        },
        source="arXiv 2006.16537; where it is silent, the program its authors released",
        competes="skip connections as a group with the other operations as a group",
        executed="2",
        passes="2",
        arrays=("tau_max", "tau_min", "lambda1", "lambda2", "lambda3", "gate_dropout"),
    ),
    Row(
        name="darts",
        factory=f"{_ROOM}.darts:darts",
        summary="a softmax mixture of all operations on every edge, of first or second order",
        reference="Liu, Simonyan, Yang: DARTS: Differentiable Architecture Search, ICLR 2019",
        settings=_DARTS,
        source="the program its authors released (quark0/darts)",
        competes=_OF_AN_EDGE,
        executed="all",
        passes="2; 5 with order=2",
        not_claimed="the exact second order (exact=True) is ours: the published one is the finite difference",
    ),
)
