"""What config.json says of a run: what is computed, on what, by which versions; and what resume compares."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

import jax

from prdarts_jax.config import places, schema
from prdarts_jax.data.stream_source import AnyDataset
from prdarts_jax.devices import sharding
from prdarts_jax.errors import warn
from prdarts_jax.ops import kernels

_PACKAGES = ("prdarts-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# Settings of JAX, from its environment or a caller's jax.config.update, that change numbers; and their defaults, for a
# config.json that does not say them. Another width of types is another state; other draws are another run from there
# on; the rest changes the last bits.
X64 = "jax_enable_x64"
_DRAWS: Mapping[str, Any] = {
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_high_dynamic_range_gumbel": False,
    "jax_random_seed_offset": 0,
}
_LAST_BITS: Mapping[str, Any] = {
    "jax_default_matmul_precision": None,
    "jax_disable_jit": False,
    "jax_softmax_custom_jvp": False,
    "jax_exec_time_optimization_effort": 0.0,
    "jax_optimization_level": "UNKNOWN",
    "jax_disable_most_optimizations": False,
    "XLA_FLAGS": "",
}
_HARMLESS = ("host_platform_device_count", "timeout", "dump", "log")  # in the names of flags of XLA
_BEFORE = {"processes": 1, "distributed": False, "lowering": "auto"}  # where a config.json does not say it


def settings() -> dict[str, Any]:
    """The settings of JAX that change numbers, as they are now.

    >>> settings()["jax_enable_x64"]
    False
    """
    defaults = {X64: False, **_DRAWS, **_LAST_BITS}
    found = {name: getattr(jax.config, name, default) for name, default in defaults.items()}
    flags = os.environ.get("XLA_FLAGS", "").split()
    found["XLA_FLAGS"] = " ".join(sorted(flag for flag in flags if not any(part in flag for part in _HARMLESS)))
    return {name: value if isinstance(value, str | int | float | None) else str(value) for name, value in found.items()}


def document(kind: str, config: Any, inputs: Any, sources: Mapping[str, str] | None, **more: Any) -> dict[str, Any]:
    """The content of config.json: what is computed, on what, by which versions.

    Args:
      kind: search | train.
      config: of the run.
      inputs: its parts: digests, dataset, mesh.
      sources: where each value of the config comes from.
      **more: what else this kind of run keeps.
    """
    dataset: AnyDataset = inputs.dataset
    lowering = sharding.lowering_of(inputs.mesh)
    return {
        "schema_version": schema.SCHEMA_VERSION,
        "kind": kind,
        "config": schema.to_dict(places.absolute(config)),  # read from other directories too
        "sources": dict(sources or {}),
        "digests": dict(inputs.digests),
        "data": {
            "name": dataset.name,
            "classes": list(dataset.class_names),
            "mean": list(dataset.mean),
            "std": list(dataset.std),
        },
        **more,
        "versions": versions(),
        "jax": settings(),
        "devices": sharding.describe(inputs.mesh),
        "platform": {
            "backend": lowering.platform,
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            "cpu_kernels": kernels.kernels().description if lowering.own_kernels else "no CPU",
            "devices": inputs.mesh.size,
            "lowering": getattr(config.run, "lowering", "auto"),  # of mixed cells, which a training has none of
            "processes": jax.process_count(),
            # On CPU other collectives are used then, of one process as of many: their sums have another order.
            "distributed": jax.distributed.is_initialized(),
        },
    }


@functools.cache
def warn_without_kernels(why: str) -> None:
    """One line, once, where a computer could have the CPU kernels and has not."""
    if not why.startswith(("native ", "off ")) and why != "no CPU":
        warn(f"no CPU kernels ({why}): steps take twice as long or more; {kernels.SWITCH}=off says no more of it")


def compared(document: Mapping[str, Any], kind: type, files: Iterable[str]) -> dict[str, Any]:
    """The flat fields of a config.json that a resumed run must share: what is computed.

    Args:
      document: content of config.json.
      kind: the config class.
      files: fields that say where something lies; what lies there is compared by its digest.
    """
    flat = schema.computed(schema.from_dict(kind, document["config"]))
    flat[X64] = document.get("jax", {}).get(X64, False)
    for field in files:
        flat.pop(field)
    if flat["local_batch_norm"]:  # then how the batch is split decides what is computed
        flat["devices of local_batch_norm"] = document["platform"]["devices"]
    return flat | {f"digest of {name}": value for name, value in document["digests"].items()}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that compute."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def tolerance(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Why a resumed run may differ in its last bits from one that was not interrupted; empty if it may not.

    >>> tolerance({"platform": {"cores": 2}}, {"platform": {"cores": 4}})
    ['cores 2 -> 4']
    """
    return [text for text in _changes(old, new) if text.split()[0] not in _DRAWS]


def other_draws(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Why a resumed run draws other random numbers than one that was not interrupted; empty if it does not.

    >>> other_draws({}, {"jax": {"jax_default_prng_impl": "rbg"}})
    ['jax_default_prng_impl threefry2x32 -> rbg']
    """
    return [text for text in _changes(old, new) if text.split()[0] in _DRAWS]


def _flat(document: Mapping[str, Any]) -> dict[str, Any]:
    """Everything beside the config that decides the bits, by name."""
    found = {**_BEFORE, **_DRAWS, **_LAST_BITS}
    for section in ("versions", "platform", "jax"):
        found |= document.get(section, {})
    return found


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    before, after = _flat(old), _flat(new)
    names = sorted((before | after).keys() - {X64})
    return [f"{name} {before.get(name)} -> {after.get(name)}" for name in names if before.get(name) != after.get(name)]
