"""What every kind of run shares, whatever it computes: its workdir, the user's own code, rows an epoch, versions."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

import jax
from jax.sharding import Mesh

from prdarts_jax.config import schema
from prdarts_jax.config.source_digest import uncomparable
from prdarts_jax.data.stream_source import AnyDataset
from prdarts_jax.devices import sharding
from prdarts_jax.errors import warn
from prdarts_jax.ops import kernels

_PACKAGES = ("prdarts-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_ONE_PROCESS = {"processes": 1, "distributed": False}  # where a config.json does not say it
# --- the workdir ------------------------------------------------------------------------------------------------------


# --- the user's own code ----------------------------------------------------------------------------------------------


# --- config.json ------------------------------------------------------------------------------------------------------


def document(
    kind: str,
    config: Any,
    *,
    sources: Mapping[str, str] | None,
    digests: Mapping[str, str],
    dataset: AnyDataset,
    mesh: Mesh,
    **more: Any,
) -> dict[str, Any]:
    """The content of config.json: what is computed, on what, by which versions."""
    return {
        "schema_version": schema.SCHEMA_VERSION,
        "kind": kind,
        "config": schema.to_dict(config),
        "sources": dict(sources or {}),
        "digests": dict(digests),
        "data": {
            "name": dataset.name,
            "classes": list(dataset.class_names),
            "mean": list(dataset.mean),
            "std": list(dataset.std),
        },
        **more,
        "versions": versions(),
        "devices": sharding.describe(mesh),
        "platform": {
            "backend": jax.default_backend(),
            "cores": _cores(),
            "cpu_kernels": kernels.kernels().description,
            "devices": mesh.size,
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
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tolerance(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Why a resumed run may differ in its last bits from one that was not interrupted; empty if it may not.

    >>> tolerance({"platform": {"cores": 2}}, {"platform": {"cores": 4}})
    ['cores 2 -> 4']
    """
    before = {**_ONE_PROCESS, **old.get("versions", {}), **old.get("platform", {})}
    after = {**_ONE_PROCESS, **new.get("versions", {}), **new.get("platform", {})}
    changed = [
        f"{k} {before.get(k)} -> {after.get(k)}" for k in sorted(before | after) if before.get(k) != after.get(k)
    ]
    hidden = {field: uncomparable(digest) for field, digest in new.get("digests", {}).items()}
    return changed + [f"uncomparable: {types} in {field}" for field, types in hidden.items() if types]


# --- small pieces -----------------------------------------------------------------------------------------------------
