"""A digest of objects of the caller, code and state, by which a resumed run knows whether they are the same.

It is equal in every process that builds the same objects with the same versions, so nothing in it comes from an
address, from the order of a set or from a `repr`.
"""

from __future__ import annotations

import dataclasses
import dis
import enum
import functools
import hashlib
import sys
import types
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

import jax
import numpy as np

_UNCOMPARABLE = "; uncomparable: "
_DEPTH = 64  # nested objects; each takes a few frames of Python's 1000
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE
_NAMED = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
)


def source_digest(value: Any) -> str:
    """SHA-256 of an object's code and state, followed by the types in it that no one can see into.

    Functions count with their bytecode, defaults, closures and, where they are the user's, the globals they read;
    containers, partial functions, dataclasses and other Python objects with what they hold; numbers and arrays with
    their bits; modules, and classes of libraries, with their name (the versions are kept beside the digest).
    An attribute read from a module of the user's is not followed.

    Args:
      value: a transformation, a Strategy, a function, or anything else.

    Returns:
      64 hexadecimal digits; where something in it is opaque (a lock, an open file), also its types.

    >>> source_digest(functools.partial(max, 1)) == source_digest(functools.partial(max, 2))
    False
    >>> source_digest([iter(())])[64:]
    '; uncomparable: builtins.tuple_iterator'
    """
    walk = _Walk()
    digest = walk.digest(value).hex()
    return digest + (_UNCOMPARABLE + ", ".join(sorted(walk.opaque)) if walk.opaque else "")


def uncomparable(digest: str) -> str:
    """The types that a digest of `source_digest` could not see into, as text; empty if there are none.

    >>> uncomparable(source_digest([iter(())])), uncomparable(source_digest([1]))
    ('builtins.tuple_iterator', '')
    """
    return digest.partition(_UNCOMPARABLE)[2]


def _name(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', getattr(thing, '__name__', '?'))}"


def _is_users(module: str | None, file: str) -> bool:
    """Whether code is not of a library: a library's version stands for what its functions refer to."""
    root = (module or "").partition(".")[0]
    libraries = {"site-packages", "dist-packages"}
    # __main__ and a folder of the user's are neither.
    return root not in sys.stdlib_module_names | {"prdarts_jax"} and not libraries & set(PurePath(file).parts)


def _globals_read(code: types.CodeType) -> set[str]:
    names = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    nested = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return names.union(*map(_globals_read, nested))


class _Walk:
    """One walk over an object; each object in it is hashed once."""

    def __init__(self) -> None:
        self.opaque: set[str] = set()
        self._known: dict[int, bytes] = {}
        self._within: dict[int, int] = {}  # objects being walked -> their depth
        self._kept: list[Any] = []  # an id stays that of one object

    def digest(self, value: Any) -> bytes:
        """Hash of an object; one that contains itself is, inside itself, its depth."""
        plain = self._plain(value)
        if plain is not None:
            return self._hash(*plain)
        key = id(value)
        if key in self._known:
            return self._known[key]
        if key in self._within:
            return self._hash("cycle", str(self._within[key]))
        if len(self._within) >= _DEPTH:
            return self._opaque(value)
        self._within[key] = len(self._within)
        self._kept.append(value)
        found = self._compound(value)
        del self._within[key]
        self._known[key] = found
        return found

    def _hash(self, kind: str | bytes, *parts: str | bytes) -> bytes:
        found = hashlib.sha256()
        for part in (kind, *parts):
            content = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
            found.update(b"%d:" % len(content))  # where a part ends is a part of it
            found.update(content)
        return found.digest()

    def _opaque(self, value: Any) -> bytes:
        self.opaque.add(_name(type(value)))
        return self._hash("opaque", _name(type(value)))

    def _all(self, kind: str, values: Iterable[Any]) -> bytes:
        return self._hash(kind, *map(self.digest, values))

    def _table(self, kind: str, table: Iterable[tuple[Any, Any]]) -> bytes:
        return self._hash(kind, *sorted(self.digest(key) + self.digest(value) for key, value in table))

    def _plain(self, value: Any) -> tuple[str | bytes, ...] | None:
        """Kind and content of what holds no other object."""
        if value is None or value is Ellipsis or value is NotImplemented or type(value) in (bool, complex):
            return type(value).__name__, repr(value)
        if type(value) is int:
            return "int", f"{value:x}"
        if type(value) is float:
            return "float", value.hex()
        if type(value) in (str, bytes):
            return type(value).__name__, value
        if isinstance(value, PurePath):
            return "path", str(value)
        if isinstance(value, np.dtype):
            return "dtype", str(value)
        if isinstance(value, types.ModuleType):
            return "module", value.__name__
        if isinstance(value, np.ufunc):
            return "ufunc", value.__name__
        return None

    def _compound(self, value: Any) -> bytes:
        if isinstance(value, np.ndarray | np.generic | jax.Array):
            return self._array(value)
        if isinstance(value, enum.Enum):
            return self._hash("enum", _name(type(value)), value.name, self.digest(value.value))
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.CodeType):
            return self._code(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return self._all("method", (value.__func__, value.__self__))
        if isinstance(value, _NAMED):
            return self._hash("named", _name(value), self.digest(getattr(value, "__self__", None)))
        if isinstance(value, functools.partial):
            return self._all("partial", (type(value), value.func, value.args, value.keywords))
        if isinstance(value, staticmethod | classmethod):
            return self._all(type(value).__name__, (value.__func__,))
        if isinstance(value, property):
            return self._all("property", (value.fget, value.fset, value.fdel))
        if isinstance(value, range | slice):
            return self._all(type(value).__name__, (value.start, value.stop, value.step))
        if isinstance(value, types.GenericAlias | types.UnionType):
            return self._all("alias", (getattr(value, "__origin__", None), value.__args__))
        if isinstance(value, tuple | list):
            return self._all("sequence", (type(value), *value))
        if isinstance(value, set | frozenset):
            return self._hash("set", self.digest(type(value)), *sorted(map(self.digest, value)))
        if isinstance(value, dict | types.MappingProxyType):
            return self._hash("mapping", self.digest(type(value)), self._table("items", value.items()))
        return self._object(value)

    def _array(self, value: Any) -> bytes:
        if isinstance(value, jax.core.Tracer):
            return self._opaque(value)
        kind, shape = str(value.dtype), str(value.shape)
        if isinstance(value, jax.Array):
            if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
                value = jax.random.key_data(value)
            if not value.is_fully_addressable or value.is_deleted():
                return self._opaque(value)
        host = np.asarray(value)
        if host.dtype.hasobject:
            return self._hash("objects", kind, shape, self.digest(host.tolist()))
        return self._hash("array", kind, shape, host.tobytes())

    def _class(self, value: type) -> bytes:
        if value.__module__ == "builtins":
            return self._hash("class", _name(value))
        file = getattr(sys.modules.get(value.__module__), "__file__", None) or ""
        if not _is_users(value.__module__, file):
            return self._hash("class", _name(value))
        kinds = types.FunctionType | staticmethod | classmethod | property | functools.cached_property
        # What a class defines beside methods is compared where it is plain: the rest is bookkeeping of Python.
        own = {
            name: item.func if isinstance(item, functools.cached_property) else item
            for name, item in vars(value).items()
            if isinstance(item, kinds)
            or (not name.startswith("_") and isinstance(item, int | float | str | bytes | tuple))
        }
        return self._hash("class", _name(value), self.digest(value.__bases__), self._table("own", own.items()))

    def _code(self, code: types.CodeType) -> bytes:
        shape = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        names = (code.co_name, code.co_names, code.co_freevars, code.co_cellvars)
        return self._all("code", (*shape, *names, code.co_code, code.co_exceptiontable, code.co_consts))

    def _function(self, function: types.FunctionType) -> bytes:
        cells = []
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                cells.append((name, cell.cell_contents))
            except ValueError:  # not assigned yet
                cells.append((name, NotImplemented))
        read: dict[str, Any] = {}
        if _is_users(function.__module__, function.__code__.co_filename):
            known = function.__globals__
            read = {name: known[name] for name in _globals_read(function.__code__) if name in known}
        state = (function.__defaults__, function.__kwdefaults__, vars(function))
        return self._hash(
            "function",
            function.__qualname__,
            self.digest(function.__code__),
            *map(self.digest, state),
            self._table("closure", cells),
            self._table("globals", read.items()),
        )

    def _object(self, value: Any) -> bytes:
        kind = type(value)
        if dataclasses.is_dataclass(value):
            held = {f.name: getattr(value, f.name, NotImplemented) for f in dataclasses.fields(value)}
        elif isinstance(value, jax.stages.Wrapped) and hasattr(value, "__wrapped__"):  # jitted: its own fields are C's
            held = {"__wrapped__": value.__wrapped__}
        elif _is_python(kind):
            slots = [slot for base in kind.__mro__ for slot in _slots(base) if hasattr(value, slot)]
            held = {slot: getattr(value, slot) for slot in slots} | getattr(value, "__dict__", {})
            # Whether a cached property was read yet says nothing.
            cached = functools.cached_property
            held = {name: item for name, item in held.items() if not isinstance(getattr(kind, name, None), cached)}
        elif callable(getattr(value, "__wrapped__", None)):  # a cached function
            held = {"__wrapped__": value.__wrapped__}
        else:
            return self._opaque(value)
        return self._hash("object", self.digest(kind), self._table("held", held.items()))


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__") and not name.startswith("__"))


def _is_python(kind: type) -> bool:
    """Whether instances hold only what Python code gave them: those of C types may hide a state of their own."""
    own = ("__dict__", "__slots__")  # a class statement makes one of them, a C type of the heap neither
    return all(base.__flags__ & _HEAP_TYPE and any(name in vars(base) for name in own) for base in kind.__mro__[:-1])
