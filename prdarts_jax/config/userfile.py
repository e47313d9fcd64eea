"""Objects from a user's own Python file, named as `path.py:name`, and what is said when their code fails."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import os
import sys
import textwrap
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from prdarts_jax.errors import UserError

T = TypeVar("T")
_PACKAGE = Path(__file__).parents[1]


class UserObject(NamedTuple):
    """An object from a user's file, and the digest of the source it came from."""

    value: Any
    digest: str = ""  # SHA-256 of the file, hexadecimal: compared on resume; empty: it came from no file of the user


def is_path(spec: str) -> bool:
    """Whether a text means an object in a user's file rather than a name of the library.

    >>> is_path("mine.py:factory"), is_path("prdarts"), is_path("mine.py")
    (True, False, True)
    """
    return ":" in spec or spec.endswith(".py")


def load(spec: str, field: str) -> UserObject:
    """The object `name` of the Python file `path.py`, for the spec `path.py:name`.

    The file runs once per content and process, as a private module, so two specs of one file share its objects.

    Args:
      spec: `path.py:name`; the path is absolute or relative to the current directory.
      field: dotted path of the config field the spec came from, named in errors.

    Raises:
      UserError: no colon, no such file, an exception while the file runs, or no such name in it.

    >>> load("mine.py", "method.strategy")
    Traceback (most recent call last):
    ...
    prdarts_jax.errors.UserError: method.strategy: 'mine.py' names no object; allowed: path.py:name
    """
    file, colon, name = spec.rpartition(":")
    if not colon or not file or not name:
        raise UserError(f"{field}: {spec!r} names no object; allowed: path.py:name")
    module, digest = load_module(file, field)
    if not hasattr(module, name):
        public = [n for n in vars(module) if not n.startswith("_")]
        raise UserError(f"{field}: {file!r} has no {name!r}; it has: {' | '.join(public) or 'nothing public'}")
    return UserObject(getattr(module, name), digest)


def load_module(file: str, field: str) -> UserObject:
    """A user's Python file as a module.

    Args:
      file: path, absolute or relative to the current directory.
      field: as in `load`.

    Raises:
      UserError: no such file, or an exception while it runs; the error names the line and the exception.

    >>> load_module("absent.py", "space.primitives")
    Traceback (most recent call last):
    ...
    prdarts_jax.errors.UserError: space.primitives: no file 'absent.py'
    """
    try:
        path = Path(file).expanduser()
        source = path.resolve().read_bytes()
    except RuntimeError:
        raise UserError(f"{field}: {file!r} is in no known home directory; allowed: a path without ~") from None
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{field}: no file {file!r}") from None
    except OSError as error:
        raise UserError(f"{field}: cannot read {file!r}: {error.strerror}") from None
    digest = hashlib.sha256(source).hexdigest()
    # The digest is part of the name: an edited file is a new module, and two files of one name do not collide.
    name = f"_prdarts_user_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}_{digest[:16]}"
    if name not in sys.modules:
        module = types.ModuleType(name)
        module.__file__ = str(path.resolve())
        sys.modules[name] = module  # before it runs: dataclasses and pickle look their module up there
        try:
            exec(compile(source, module.__file__, "exec"), vars(module))
        except Exception as error:
            del sys.modules[name]
            raise UserError(f"{field}: {_where(error, file, module.__file__)}: {_said(error)}") from error
    return UserObject(sys.modules[name], digest)


def call(function: Callable[..., T], *args: Any, field: str, **kwargs: Any) -> T:
    """What a user's function returns for these arguments.

    Args:
      function: the function, or a `functools.partial` of it (whose arguments may be called `field`).
      *args, **kwargs: its arguments.
      field: dotted path of the config field it came from, named in errors.

    Raises:
      UserError: it raised an exception: `FIELD: FILE:LINE: RuntimeError: boom`, the line being of the user's file.

    >>> call(max, 1, 2, field="method.strategy")
    2
    """
    with errors_of({field: function}):
        return function(*args, **kwargs)


@contextlib.contextmanager
def errors_of(parts: Mapping[str, Any]) -> Iterator[None]:
    """A block that runs code of the user: an exception in it becomes a UserError as in `call`.

    Args:
      parts: config field -> what came of it: a function or a (named) tuple of functions. The field that an error names
        is the one whose file the exception passed last; all of them, if it passed none.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        files: dict[str, list[str]] = {}
        for field, value in parts.items():
            for file in sorted(_files(value)):
                files.setdefault(file, []).append(field)
        passed = [frame.filename for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
        culprits = passed[-1:] or (list(files) if len(files) == 1 else [])
        fields = files[culprits[0]] if culprits else list(parts)
        where = f"{_where(error, _shown(culprits[0]), culprits[0])}: " if culprits else ""
        raise UserError(f"{' | '.join(fields)}: {where}{_said(error)}") from error


def _files(value: Any) -> set[str]:
    """The files outside this package that a function, or the functions of a tuple, are written in."""
    if isinstance(value, tuple):
        return set().union(*map(_files, value))
    while isinstance(value, functools.partial):
        value = value.func
    if not callable(value):
        return set()
    value = inspect.unwrap(value)
    for candidate in (value, type(value)):  # an object with __call__ is written where its class is
        with contextlib.suppress(TypeError, OSError):
            file = inspect.getfile(candidate)
            return set() if Path(file).is_relative_to(_PACKAGE) else {file}
    return set()


def is_users(file: str) -> bool:
    """Whether code of this file is the user's: neither this library's nor an installed one's.

    >>> is_users(__file__), is_users("mine.py")
    (False, True)
    """
    path = Path(file)
    libraries = {"site-packages", "dist-packages", f"python{sys.version_info.major}.{sys.version_info.minor}"}
    return not path.is_relative_to(_PACKAGE) and not libraries & set(path.parts)


def _shown(file: str) -> str:
    """A path as short as it can be said: relative below the current directory."""
    near = os.path.relpath(file)
    return file if near.startswith(os.pardir) else near


def _where(error: Exception, shown: str, full: str) -> str:
    """file:line of the innermost frame in the user's file."""
    if isinstance(error, SyntaxError) and error.filename == full:
        return f"{shown}:{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == full]
    return f"{shown}:{lines[-1]}" if lines else shown


def _said(error: Exception) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    # The errors of jax about traced values are pages long; they begin with what is wrong.
    return textwrap.shorten(f"{type(error).__name__}: {text}", 300, placeholder=" ...")


def user_primitives(file: str, field: str) -> UserObject:
    """PRIMITIVES of a user's file: name -> primitive; empty without a file.

    Raises:
      UserError: no such dict in it.
    """
    if not file:
        return UserObject({})
    module, digest = load_module(file, field)
    table = getattr(module, "PRIMITIVES", None)
    if not isinstance(table, Mapping):
        raise UserError(f"{field}: {file!r} has no dict PRIMITIVES; allowed: name -> Primitive")
    return UserObject(table, digest)
