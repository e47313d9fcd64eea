"""Presets of a search, and the one place where its config is put together: which value wins, and where it came from.

    defaults < the strategy's published settings < the preset's data and scale < flags

Imports no jax until the options of a strategy are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prdarts_jax.config import schema
from prdarts_jax.config.search import OPS, SearchConfig
from prdarts_jax.errors import UserError, unknown
from prdarts_jax.presets.merge import DARTS, OPTIONS, OURS, PAPER, RELEASED, Preset, Resolved, combine
from prdarts_jax.strategies import composition, registry

PRESETS: Mapping[str, Preset] = {
    "paper": Preset("PR-DARTS on CIFAR-10 as published"),
    "released": Preset(
        "PR-DARTS on CIFAR-10 as the program of its authors does it",
        settings={"space.cells": 6, "batch_size": 250},
        method_settings={"space.pool_norm": False},
        options={
            "tau_max": 1.0,
            "straight_through": True,
            "gate_dropout": 0.4,
            "path_reduction": "mean",
            "executed_mask": True,
            "pool_group": True,
            "hinge": 0.2,
            "derive_score": "softmax",
            "distinct_inputs": False,
        },
    ),
    "digits": Preset(
        "the 8x8 digits inside scikit-learn: minutes on two cores, nothing to download",
        settings={
            "data.source": "digits",
            "data.crop_padding": 1,
            "data.flip": False,
            "data.cutout": 0,
            "space.channels": 8,
            "space.cells": 5,
            "epochs": 45,
            "batch_size": 32,
        },
    ),
    "cifar10-small": Preset(
        "CIFAR-10 at a scale for two cores: a fifth of the images, a narrow and shallow network",
        settings={
            "data.source": "tfds:cifar10",
            "data.examples": 10_000,
            "space.channels": 8,
            "space.cells": 5,
            "epochs": 15,
            "batch_size": 64,
        },
    ),
}

# Of the values of PR-DARTS; not named here: ours.
PROVENANCE: Mapping[str, str] = {
    "space.cells": PAPER,
    "space.channels": PAPER,
    "space.nodes": PAPER,
    "space.ops": DARTS,
    "space.head_norm": RELEASED,
    "space.pool_norm": DARTS,
    "method.strategy": PAPER,
    "method.options.tau_max": PAPER,
    "method.options.tau_min": PAPER,
    "method.options.a": PAPER,
    "method.options.b": PAPER,
    "method.options.op_subsample": RELEASED,
    "method.options.executed_ops": PAPER,
    "method.options.straight_through": PAPER,
    "method.options.gate_dropout": PAPER,
    "method.options.lambda1": PAPER,
    "method.options.lambda2": PAPER,
    "method.options.lambda3": PAPER,
    "method.options.path_reduction": PAPER,
    "method.options.executed_mask": PAPER,
    "method.options.pool_group": PAPER,
    "method.options.hinge": PAPER,
    "method.options.derive_score": PAPER,
    "method.options.distinct_inputs": DARTS,
    "method.options.init_scale": DARTS,
    "weights.learning_rate": RELEASED,
    "weights.learning_rate_min": RELEASED,
    "weights.momentum": RELEASED,
    "weights.nesterov": RELEASED,
    "weights.weight_decay": RELEASED,
    "weights.clip_norm": RELEASED,
    "arch.optimizer": RELEASED,
    "arch.learning_rate": RELEASED,
    "arch.beta1": RELEASED,
    "arch.beta2": RELEASED,
    "arch.eps": RELEASED,
    "arch.weight_decay": RELEASED,
    "arch.clip_norm": RELEASED,
    "data.source": PAPER,
    "data.crop_padding": DARTS,
    "data.flip": DARTS,
    "data.cutout": DARTS,
    "epochs": PAPER,
    "batch_size": PAPER,
}


def resolve(
    preset: str = "paper", strategy: str | None = None, flags: Mapping[str, Any] | None = None
) -> Resolved[SearchConfig]:
    """The config of a search, and the source of each of its values.

    A strategy other than the preset's own replaces the whole method section: the preset's options, and what else is
    part of its method, are dropped. The options of the strategy are all filled in, so that the config says everything
    that is computed.

    Args:
      preset: a name of `PRESETS`.
      strategy: a name of the registry or `path.py:factory`; None: the preset's.
      flags: dotted config path (`method.options.NAME` for an option) -> value or command-line string. `space.ops` may
        be a JSON file: a list of names, or {"normal": [[names] an edge], "reduce": [...]} (sets `space.edge_ops` too).

    Raises:
      UserError: an unknown preset, strategy, path or option, or a value that is not possible.

    >>> made = resolve("digits", flags={"space.cells": "6"})
    >>> made.config.space.cells, made.sources["space.cells"], made.sources["data.source"]
    (6, 'flag', 'preset digits')
    """
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    flags = _read_lists(flags or {})
    if strategy is not None:
        flags["method.strategy"] = strategy
    chosen = PRESETS[preset]
    method = flags.get("method.strategy", chosen.method)
    own_method = {**chosen.method_settings, **_as_paths(chosen.options)} if method == chosen.method else {}
    layers = {
        f"strategy {method}": registry.settings(method),
        "default": _as_paths(registry.options(method)),
        f"preset {preset}": {**chosen.settings, **own_method},
        "flag": flags,
    }
    values, sources = combine(SearchConfig, layers)
    options = {path: values.pop(path) for path in list(values) if path.startswith(OPTIONS)}
    named = {path.removeprefix(OPTIONS): value for path, value in options.items() if sources[path] != "default"}
    transforms = values.get("method.transforms", ())
    values["method.transforms"] = [transforms] if isinstance(transforms, str) else transforms
    for text in values["method.transforms"]:
        composition.parse(text)
    values |= {"method.strategy": method, "method.options": registry.resolve_options(method, named)}
    if method == "prdarts":
        for path, source in sources.items():
            if source in ("default", "strategy prdarts"):
                sources[path] = f"{source} ({PROVENANCE.get(path, OURS)})"
    # One replacement at the end: two values that are possible only together may come from different places.
    return Resolved(schema.replace(SearchConfig(), values), sources)


def _as_paths(options: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{OPTIONS}{name}": value for name, value in options.items()}


def _read_lists(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces a JSON file in `space.ops` or `space.edge_ops` by the lists it holds."""
    flags = dict(flags)
    for path in ("space.ops", "space.edge_ops"):
        value = flags.get(path)
        if not isinstance(value, str) or not (value.endswith(".json") or path == "space.edge_ops"):
            continue
        try:
            content = json.loads(Path(value).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: cannot read {value!r}: {error.strerror}") from None
        except ValueError as error:
            raise UserError(f"{path}: {value!r} is not JSON ({error})") from None
        if isinstance(content, list) and path == "space.ops":
            flags[path] = content
            continue
        cells = list(content.values()) if isinstance(content, dict) and set(content) == {"normal", "reduce"} else None
        if not _are_texts(cells, depth=3):
            allowed = 'a list of names, or {"normal": [[names] an edge], "reduce": [...]}'
            raise UserError(f"{path}: {value!r} holds something else; allowed: {allowed}")
        flags["space.edge_ops"] = edges = [content["normal"], content["reduce"]]
        if path == "space.ops":
            names = dict.fromkeys(op for cell in edges for ops in cell for op in ops)
            # The order of the columns of beta is canonical whatever the order in the file; own primitives come last.
            flags[path] = [op for op in OPS if op in names] + [op for op in names if op not in OPS]
    return flags


def _are_texts(value: Any, depth: int) -> bool:
    """Whether these are texts in lists of lists, `depth` lists deep."""
    if depth == 0:
        return isinstance(value, str)
    return isinstance(value, list) and all(_are_texts(item, depth - 1) for item in value)
