"""Kernels in C++ for the CPU, compiled where they run and called through XLA's foreign function interface.

XLA:CPU has no fast depthwise convolution, computes a kernel gradient without vectors, and a separable convolution with
its batch statistics in a dozen passes over memory. `cpu/kernels.cc` does each in one or two. They are compiled on first
use, for the processor at hand, and kept in the user's cache folder if there is one. Without a C++ compiler, or with the
environment variable PRDARTS_CPU_KERNELS=off, everything is computed by XLA: the same values to rounding, more slowly.

The kernels take float32 arrays. Their results do not depend on the number of threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from prdarts_jax.config.places import cache_folder

SWITCH = "PRDARTS_CPU_KERNELS"
_SOURCES = Path(__file__).parent / "cpu"
_KERNELS = (
    "depthwise_forward",
    "depthwise_input_gradient",
    "depthwise_kernel_gradient",
    "batch_moments",
    "inner",
    "norm_sums",
    "separable_forward",
    "separable_backward",
    "separable_input_gradient",
    "term_forward",
    "term_backward",
    "term_input_gradient",
    "add_to_row",
    "unwritten",
)
_FLAGS = ("-std=c++17", "-fPIC", "-pthread")
# Of each file, beginning with what takes longest: all are compiled at the same time. Calls are decoded fast enough.
_OPTIMISED = {"kernels.cc": "-O3", "bindings.cc": "-O1", "loops.cc": "-O3"}
_DILATIONS = {1: (1,), 3: (1, 2), 5: (1, 2), 7: (1,)}  # of each kernel size
_SECONDS = 300  # of a compiler that hangs
_HOW: dict[str, Any] = {"capture_output": True, "text": True, "errors": "replace", "timeout": _SECONDS, "check": True}


class Kernels(NamedTuple):
    """Whether there are kernels, and why or why not: a line for config.json."""

    loaded: bool
    description: str


def _processor() -> str:
    """What tells this processor's instructions from another's."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def _digest(compiler: str) -> str:
    """Of everything that the compiled file depends on."""
    asked = [compiler, "--version"]
    version = subprocess.run(asked, **_HOW).stdout
    parts = [_processor(), version, jax.__version__, *_FLAGS, *_OPTIMISED.values()]
    texts = [path.read_text(encoding="utf-8") for path in sorted(_SOURCES.iterdir()) if path.suffix in (".h", ".cc")]
    return hashlib.sha256("\0".join([*parts, *texts]).encode()).hexdigest()[:16]


def _compile(compiler: str, target: Path) -> None:
    """Compiles beside the target and moves it there: another process may be doing the same."""
    include = ["-isystem", jax.ffi.include_dir()]
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"

    def run(*words: str) -> None:
        command = [compiler, *_FLAGS, native, *include, *words]
        subprocess.run(command, **_HOW)

    with tempfile.TemporaryDirectory(dir=target.parent) as folder, ThreadPoolExecutor() as threads:
        objects = {name: str(Path(folder) / f"{name}.o") for name in _OPTIMISED}
        jobs = [
            threads.submit(run, "-c", level, str(_SOURCES / name), "-o", objects[name])
            for name, level in _OPTIMISED.items()
        ]
        for job in jobs:
            job.result()
        built = Path(folder) / target.name
        run("-shared", *objects.values(), "-o", str(built))
        os.replace(built, target)


def _library() -> tuple[ctypes.CDLL, str]:
    """The compiled file and its digest. OSError or SubprocessError where there can be none."""
    compiler = _compiler()
    if compiler is None:
        raise OSError("no C++ compiler")
    digest = _digest(compiler)
    folder, name = cache_folder("kernels"), f"{digest}.so"
    if folder is not None:
        with contextlib.suppress(OSError):  # there is none yet, or a damaged one
            return ctypes.CDLL(str(folder / name)), digest
        with contextlib.suppress(OSError):  # this user may not write there
            folder.mkdir(parents=True, exist_ok=True)
            _compile(compiler, folder / name)
            return ctypes.CDLL(str(folder / name)), digest
    with tempfile.TemporaryDirectory() as folder_of_now:  # what is loaded stays when its file is gone
        _compile(compiler, Path(folder_of_now) / name)
        return ctypes.CDLL(str(Path(folder_of_now) / name)), digest


@cache
def kernels() -> Kernels:
    """Compiles and registers the kernels. A program that is not lowered for a CPU has no use for them.

    >>> kernels().description != ""
    True
    """
    choice = os.environ.get(SWITCH, "auto")
    if choice == "off":
        return Kernels(False, f"off ({SWITCH})")
    try:
        library, digest = _library()
    except subprocess.CalledProcessError as e:
        return Kernels(False, f"the C++ compiler failed: {(e.stderr or '').strip().splitlines()[:1]}")
    except (OSError, subprocess.SubprocessError) as e:
        return Kernels(False, str(e))
    for name in _KERNELS:
        capsule = jax.ffi.pycapsule(getattr(library, f"prdarts_{name}"))
        jax.ffi.register_ffi_target(f"prdarts_{name}", capsule, platform="cpu")
    return Kernels(True, f"native {digest}")


def serve(*arrays: jax.Array) -> bool:
    """Whether the kernels are there and can take these arrays."""
    return all(a.dtype == jnp.float32 and a.size for a in arrays) and kernels().loaded


def compiled(height: int, width: int, stride: int, dilation: int) -> bool:
    """Whether they compute depthwise convolutions of this geometry.

    >>> compiled(3, 3, 2, 1), compiled(3, 5, 1, 1)
    (True, False)
    """
    return height == width and stride in ((1,) if height == 1 else (1, 2)) and dilation in _DILATIONS.get(height, ())


def lowered(kernel: Callable[..., Any], composed: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel on CPU, its composition elsewhere and for derivatives (which can so be taken again)."""

    @jax.custom_vjp
    def run(*arrays: jax.Array) -> Any:
        return lax.platform_dependent(*arrays, cpu=kernel, default=composed)

    run.defvjp(lambda *arrays: (run(*arrays), arrays), lambda arrays, ct: jax.vjp(composed, *arrays)[1](ct))
    return run


def call(
    name: str,
    shapes: Sequence[tuple[int, ...]],
    *arrays: jax.Array,
    in_place: Mapping[int, int] | None = None,
    **attributes: Any,
) -> list[jax.Array]:
    """Runs a kernel: float32 results of these shapes. A batch of calls (vmap) runs them one after the other.

    Args:
      name: of the kernel.
      shapes: of the results.
      arrays: its arguments.
      in_place: argument -> the result that takes its memory.
      attributes: integers, and arrays or scalars of NumPy.
    """
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    static = {key: np.int64(value) if isinstance(value, int) else value for key, value in attributes.items()}
    run = jax.ffi.ffi_call(
        f"prdarts_{name}", results, vmap_method="sequential", input_output_aliases=dict(in_place or {})
    )
    return list(run(*arrays, **static))


def unwritten(shape: tuple[int, ...], beside: jax.Array) -> jax.Array:
    """A float32 array of which nothing is known.

    `beside`: what tells it from others of its shape; XLA would take two equal calls for one, and copy the result.
    """
    return call("unwritten", [shape], beside)[0]
