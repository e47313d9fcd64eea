"""Presets, and the one place where a config is put together: which value wins, and where it came from.

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
from prdarts_jax.presets.merge import Preset, Resolved
from prdarts_jax.strategies import registry

OPTIONS = "method.options."
_OPS_FILES = ("space.ops", "space.edge_ops")  # may be given as a JSON file


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

# Where a value of PR-DARTS that nobody chose comes from. `paper`: stated or meant there. `released program`: the paper
# is silent and its authors' program has it. `DARTS`: the convention the paper says it follows. Not named here: ours.
_PAPER = "paper"
_RELEASED = "released program"
_DARTS = "DARTS"
PROVENANCE: Mapping[str, str] = {
    "space.cells": _PAPER,
    "space.channels": _DARTS,
    "space.nodes": _DARTS,
    "space.ops": _DARTS,
    "space.head_norm": _RELEASED,
    "space.pool_norm": _PAPER,
    "method.strategy": _PAPER,
    "method.options.tau_max": _PAPER,
    "method.options.tau_min": _PAPER,
    "method.options.a": _PAPER,
    "method.options.b": _PAPER,
    "method.options.op_subsample": _RELEASED,
    "method.options.executed_ops": _PAPER,
    "method.options.straight_through": _PAPER,
    "method.options.gate_dropout": _PAPER,
    "method.options.lambda1": _PAPER,
    "method.options.lambda2": _PAPER,
    "method.options.lambda3": _PAPER,
    "method.options.path_reduction": _PAPER,
    "method.options.executed_mask": _PAPER,
    "method.options.pool_group": _PAPER,
    "method.options.hinge": _PAPER,
    "method.options.derive_score": _PAPER,
    "method.options.distinct_inputs": _DARTS,
    "method.options.init_scale": _DARTS,
    "weights.learning_rate": _RELEASED,
    "weights.learning_rate_min": _RELEASED,
    "weights.momentum": _RELEASED,
    "weights.nesterov": _RELEASED,
    "weights.weight_decay": _RELEASED,
    "weights.clip_norm": _RELEASED,
    "arch.learning_rate": _RELEASED,
    "arch.beta1": _RELEASED,
    "arch.beta2": _RELEASED,
    "arch.eps": _RELEASED,
    "arch.weight_decay": _RELEASED,
    "data.source": _PAPER,
    "data.crop_padding": _DARTS,
    "data.flip": _DARTS,
    "data.cutout": _DARTS,
    "epochs": _PAPER,
    "batch_size": _PAPER,
}


def resolve(preset: str = "paper", strategy: str | None = None, flags: Mapping[str, Any] | None = None) -> Resolved:
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
    chosen = PRESETS[preset]
    flags = _read_lists(flags or {})
    strategy = flags.pop("method.strategy", None) if strategy is None else strategy
    method = chosen.method if strategy is None else strategy
    own = method == chosen.method
    preset_options = chosen.options if own else {}
    preset_settings = {**chosen.settings, **(chosen.method_settings if own else {})}
    flag_options = {path.removeprefix(OPTIONS): flags.pop(path) for path in list(flags) if path.startswith(OPTIONS)}

    config = SearchConfig()
    sources = {path: "default" for path, _, _ in schema.fields(SearchConfig) if path != "method.options"}
    layers = (
        (f"strategy {method}", registry.settings(method)),
        (f"preset {preset}", preset_settings),
        ("flag", flags),
    )
    merged: dict[str, Any] = {}
    for source, values in layers:
        merged |= values
        sources |= dict.fromkeys(values, source)

    options = registry.resolve_options(method, {**preset_options, **flag_options})
    for name in options:
        source = "flag" if name in flag_options else f"preset {preset}" if name in preset_options else "default"
        sources[f"{OPTIONS}{name}"] = source
    # One replacement at the end: two values that are possible only together may come from different layers.
    config = schema.replace(config, {**merged, "method.strategy": method, "method.options": options})
    sources["method.strategy"] = "default" if strategy is None else "flag"
    if method == "prdarts":
        sources = {path: _with_provenance(path, source) for path, source in sources.items()}
    return Resolved(config, sources)


def _with_provenance(path: str, source: str) -> str:
    if source not in ("default", "strategy prdarts"):
        return source
    return f"{source} ({PROVENANCE.get(path, 'ours')})"


def table(resolved: Resolved) -> list[tuple[str, Any, str]]:
    """Every (dotted path, value, source), in the order of the config's fields, the strategy's options in their place.

    >>> table(resolve("digits"))[0]
    ('space.cells', 5, 'preset digits')
    """
    rows: list[tuple[str, Any, str]] = []
    for path, _, _ in schema.fields(SearchConfig):
        if path == "method.options":
            options = resolved.config.method.options
            rows += [
                (f"{OPTIONS}{name}", value, resolved.sources[f"{OPTIONS}{name}"]) for name, value in options.items()
            ]
        else:
            rows.append((path, schema.get(resolved.config, path), resolved.sources[path]))
    return rows


def _read_lists(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces a JSON file in `space.ops` or `space.edge_ops` by the lists it holds."""
    flags = dict(flags)
    for path in _OPS_FILES:
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
        edges = _edge_lists(content, f"{path}: {value!r}")
        flags["space.edge_ops"] = edges
        if path == "space.ops":
            named = dict.fromkeys(op for cell in edges for names in cell for op in names)
            # The order of the columns of beta is canonical whatever the order in the file; own primitives come last.
            flags[path] = [op for op in OPS if op in named] + [op for op in named if op not in OPS]
    return flags


def _edge_lists(content: Any, where: str) -> list[list[list[str]]]:
    allowed = 'allowed: a list of names, or {"normal": [[names] an edge], "reduce": [...]}'
    if not isinstance(content, dict) or set(content) != {"normal", "reduce"}:
        raise UserError(f"{where} holds something else; {allowed}")
    for cell in content.values():
        if not isinstance(cell, list) or not all(
            isinstance(names, list) and all(isinstance(op, str) for op in names) for names in cell
        ):
            raise UserError(f"{where} holds something else; {allowed}")
    return [content["normal"], content["reduce"]]
