"""SHA-256 of states and of folders: what proves that a checkpoint came back as it was saved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np


class HostLeaf(NamedTuple):
    """One leaf of a state, in host memory."""

    value: np.ndarray  # a copy, never a view of a device buffer; the key data where the leaf is a typed key
    dtype: str  # the dtype of the leaf itself, "key<fry>" for a typed key
    shape: tuple[int, ...]  # the shape of the leaf itself

    def kind(self) -> dict[str, Any]:
        """Shape and dtype, for JSON."""
        return {"shape": list(self.shape), "dtype": self.dtype}

    def record(self) -> dict[str, Any]:
        """Shape, dtype and SHA-256 over dtype, shape and bytes, for JSON."""
        digest = hashlib.sha256(f"{self.dtype}{list(self.shape)}".encode())
        digest.update(np.ascontiguousarray(self.value).reshape(-1).view(np.uint8).data)
        return {**self.kind(), "sha256": digest.hexdigest()}


def is_key(leaf: Any) -> bool:
    """Whether a leaf, concrete or abstract, is a typed PRNG key."""
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def dtype_name(leaf: Any) -> str:
    """The dtype of an array, an abstract array, a typed key or a Python number.

    >>> dtype_name(np.float32(1.0)), dtype_name(jax.random.key(0)), dtype_name(1.0)
    ('float32', 'key<fry>', 'float64')
    """
    return str(leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype)


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their path.

    Raises:
        ValueError: two leaves have one path (a key that contains a slash).

    >>> by_path({"weights": {"normal": [1.0, 2.0]}})
    {'weights/normal/0': 1.0, 'weights/normal/1': 2.0}
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in leaves:
            raise ValueError(f"two leaves of the state have the path {name!r}; rename one of their keys")
        leaves[name] = leaf
    return leaves


def host_leaves(state: Any) -> dict[str, HostLeaf]:
    """Copies of all leaves in host memory, by path; waits for the computation that makes them.

    Raises:
        TypeError: a leaf is neither an array nor a number.
    """
    leaves = by_path(state)
    for leaf in leaves.values():
        if isinstance(leaf, jax.Array) and not is_key(leaf) and leaf.is_fully_addressable:
            leaf.copy_to_host_async()  # all transfers are under way before the first one is waited for
    host = {}
    for path, leaf in leaves.items():
        value = np.array(jax.random.key_data(leaf) if is_key(leaf) else leaf)
        if value.dtype.kind in "OUSMm":
            raise TypeError(f"state leaf {path!r} is a {type(leaf).__name__}, not an array or a number")
        host[path] = HostLeaf(value, dtype_name(leaf), tuple(np.shape(leaf)))
    return host


def flatten_digests(state: Any) -> dict[str, str]:
    """SHA-256 of each leaf over dtype, shape and bytes, by path: equal digests mean equal bits.

    Args:
        state: any pytree of arrays (any dtype, typed keys included) and Python numbers.

    >>> a = flatten_digests({"w": np.float32([0.0, 1.0])})
    >>> list(a), len(a["w"])
    (['w'], 64)
    >>> a == flatten_digests({"w": np.float32([-0.0, 1.0])})
    False
    """
    return {path: leaf.record()["sha256"] for path, leaf in host_leaves(state).items()}


def json_digest(document: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON document, whatever the order of its keys, without its own entry `sha256`.

    >>> json_digest({"a": 1, "b": 2}) == json_digest({"b": 2, "a": 1, "sha256": "..."})
    True
    """
    content = {key: value for key, value in document.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sums(root: Path, files: Iterable[Path]) -> str:
    """What `sha256sum` run in `root` prints for these files."""
    lines = []
    for file in sorted(files):
        with file.open("rb") as stream:
            lines.append(f"{hashlib.file_digest(stream, 'sha256').hexdigest()}  {file.relative_to(root).as_posix()}\n")
    return "".join(lines)


def wrong_files(root: Path, name: str) -> list[str]:
    """The files that `root/name` (written by `sums`) lists and that are missing or changed.

    Files that it does not list are not looked at. A damaged list names itself or a file.
    """
    *lines, rest = (root / name).read_bytes().decode("utf-8", "replace").split("\n")
    if rest or not lines:
        return [name]
    present = set(sums(root, (path for path in root.rglob("*") if path.is_file())).splitlines())
    return [line.partition("  ")[2] or name for line in lines if line not in present]
