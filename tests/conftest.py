"""Test settings: forced host devices, a persistent compilation cache, strict promotion, no network."""

from __future__ import annotations

import gc
import importlib
import inspect
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

# Before jax initialises. PJRT_NPROC: with fewer threads than queued collectives the CPU backend deadlocks.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("PJRT_NPROC", "16")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=4"
    " --xla_cpu_collective_call_terminate_timeout_seconds=60"
    " --xla_cpu_collective_call_warn_stuck_timeout_seconds=20"
)
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prdarts_jax" / "tests"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
if not any(map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))):
    os.environ.setdefault("PRDARTS_CPU_KERNELS", "off")  # or every command would say on stderr that there are none

import jax
import jaxtyping
import pytest
from beartype import BeartypeConf, beartype

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Rooms, the lower floors first, whose public functions say shapes and dtypes of their arrays: here these are checked at
# every call and every tracing. Modules that import them later get the checked ones. The library itself does not import
# jaxtyping, so that it runs where that is not installed; its names are put where the signatures are looked up.
TYPED = ("gates", "space.derive", "space.supernet", "regularizers", "network.layers", "strategy")


def _check_shapes() -> None:
    checker = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as everywhere in Python
    names = {name: getattr(jaxtyping, name) for name in ("Bool", "Float", "Int", "PRNGKeyArray", "Real")}
    for module in (importlib.import_module(f"prdarts_jax.{name}") for name in TYPED):
        vars(module).update(names)
        for name, value in list(vars(module).items()):
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_"):
                setattr(module, name, jaxtyping.jaxtyped(value, typechecker=checker))


_check_shapes()

# A quarter of the compile time, and that is most of the time of the quick tests, whose programs run a few times on tiny
# arrays. The long tests compile as users do.
_QUICK_FLAGS = (
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
)


def pytest_configure(config: pytest.Config) -> None:
    """Before anything is compiled; the processes that tests start compile in the same way."""
    if "not slow" in config.option.markexpr:
        os.environ["XLA_FLAGS"] += _QUICK_FLAGS


_LOCAL = {"localhost", "127.0.0.1", "::1", ""}


@pytest.fixture(autouse=True)
def _no_network() -> Iterator[None]:
    """Any attempt to leave the machine fails at once instead of hanging in retries."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address):  # type: ignore[no-untyped-def]
        host = address[0] if isinstance(address, tuple) else ""
        if host not in _LOCAL:
            raise RuntimeError(f"a test tried to reach the network: {address!r}")
        return connect(self, address)

    # Not the test's own monkeypatch: that would then be undone last, after what it was laid upon.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


_MAPS = 25_000  # of the 65,530 that Linux gives a process by default


def _end_programs() -> None:
    """Hundreds of loaded programs exhaust the memory maps a process may have, and the next one to load crashes it."""
    try:
        maps = Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:  # not Linux
        maps = _MAPS
    if maps >= _MAPS:
        jax.clear_caches()
    gc.freeze()  # what stays is large, and each full collection would walk through it


@pytest.fixture(autouse=True, scope="module")
def _programs_end_with_their_module() -> Iterator[None]:
    """Until there are many, the modules of a process share what is traced and compiled."""
    yield
    _end_programs()


@pytest.fixture(autouse=True)
def _long_tests_leave_room(request: pytest.FixtureRequest) -> Iterator[None]:
    """A sweep in one module loads more programs than a process may have."""
    yield
    if request.node.get_closest_marker("slow"):
        _end_programs()
