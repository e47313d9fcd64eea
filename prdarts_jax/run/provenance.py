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

from prdarts_jax.config import schema
from prdarts_jax.data.stream_source import AnyDataset
from prdarts_jax.devices import sharding
from prdarts_jax.errors import warn
from prdarts_jax.ops import kernels

_PACKAGES = ("prdarts-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_ONE_PROCESS = {"processes": 1, "distributed": False}  # where a config.json does not say it


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
    return {
        "schema_version": schema.SCHEMA_VERSION,
        "kind": kind,
        "config": schema.to_dict(config),
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
        "devices": sharding.describe(inputs.mesh),
        "platform": {
            "backend": jax.default_backend(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            "cpu_kernels": kernels.kernels().description,
            "devices": inputs.mesh.size,
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
    before = {**_ONE_PROCESS, **old.get("versions", {}), **old.get("platform", {})}
    after = {**_ONE_PROCESS, **new.get("versions", {}), **new.get("platform", {})}
    names = sorted(before | after)
    return [f"{name} {before.get(name)} -> {after.get(name)}" for name in names if before.get(name) != after.get(name)]
