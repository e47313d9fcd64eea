"""Where things lie: the paths that a user names, and the folder of what can be made again. No jax, no numpy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from prdarts_jax.config import schema
from prdarts_jax.errors import UserError

_FOLDERS = ("run.workdir", "run.data_dir")
_FILES = ("space.primitives", "network.primitives")
_SOURCE = "data.source"
_OBJECTS = ("method.strategy", "weights.transform", "arch.transform")  # path.py:name, or a name of the library


def cache_folder(name: str) -> Path | None:
    """The user's folder for what can be made again: `$XDG_CACHE_HOME/prdarts_jax/NAME` or `~/.cache/prdarts_jax/NAME`.

    None where the user has no home directory, as a user id without an account: then it is made again each time.
    """
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return base / "prdarts_jax" / name


def expanded(path: str | Path, field: str) -> Path:
    """A path with `~` and `~user` replaced.

    Args:
      path: of the user.
      field: that errors name.

    Raises:
      UserError: there is no such home directory.

    >>> expanded("~nobody-of-this-name/x", "workdir")
    Traceback (most recent call last):
    ...
    prdarts_jax.errors.UserError: workdir: '~nobody-of-this-name/x' is in no known home directory; allowed: a path without ~
    """  # noqa: E501 (the message is one line)
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{field}: {str(path)!r} is in no known home directory; allowed: a path without ~") from None


def absolute(config: Any) -> Any:
    """A config whose paths mean the same from any directory; the names of the library in it stay as they are.

    >>> from prdarts_jax.config.search import DataConfig, SearchConfig
    >>> absolute(SearchConfig(data=DataConfig("npz:a.npz"))).data.source == f"npz:{Path.cwd()}/a.npz"
    True
    """

    def whole(path: str, field: str) -> str:
        return str(expanded(path, field).absolute()) if path else path

    found: dict[str, str] = {}
    for field, _, _ in schema.fields(type(config)):
        name, value = (
            ".".join(field.split(".")[-2:]),
            schema.get(config, field),
        )  # of a part of a config as of a whole one
        head, colon, rest = value.partition(":") if name == _SOURCE else (value, "", "")
        if name in (*_FOLDERS, *_FILES):
            found[field] = whole(value, field)
        elif name == _SOURCE and head in ("npz", "folder"):
            found[field] = f"{head}{colon}{whole(rest, field)}"
        elif name in _OBJECTS:
            file, colon, name = value.rpartition(":")
            if file and file != "argument":  # what the caller passed as an object is no file
                found[field] = f"{whole(file, field)}{colon}{name}"
    return schema.replace(config, found)
