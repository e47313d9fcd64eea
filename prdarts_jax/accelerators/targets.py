"""Devices that are not here, as XLA's compilers take them: `cuda:h100:8`, `tpu:v5e:4x4`.

The compiler of a platform is a plugin of JAX. It needs no device: of a GPU it reads the figures below, of a TPU the
name of its topology.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from prdarts_jax.errors import UserError, brief

if TYPE_CHECKING:
    import jax

GIB = 2**30
GPUS_OF_A_HOST = 8


class Gpu(NamedTuple):
    """Published figures of an NVIDIA GPU."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    lanes: int  # float32 operations a cycle of a multiprocessor, a fused multiply-add being one
    clock_ghz: float
    memory: int  # bytes
    bandwidth: float  # bytes a second
    cache: int  # bytes of L2
    shared: int  # bytes of a multiprocessor's shared memory; 1 KiB of it is the system's

    def description(self) -> str:
        """What XLA:GPU is told of the device."""
        major, minor = self.capability
        # Hopper and Blackwell have instructions that only code for this very architecture may use.
        own = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {self.shared - 1024}
  shared_memory_per_core: {self.shared} registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: {self.multiprocessors} fpus_per_core: {self.lanes} clock_rate_ghz: {self.clock_ghz}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {self.bandwidth:.0f} l2_cache_size: {self.cache} device_memory_size: {self.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} {own} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{self.name}"
"""


class Tpu(NamedTuple):
    """Published figures of a TPU."""

    memory: int  # bytes of a chip
    axes: int  # of the torus of chips

    def smallest(self) -> str:
        """The least topology that XLA:TPU takes: a single chip is one of its devices."""
        return "x".join(("2", "2", "1")[: self.axes])


# NVIDIA's data sheets and the tables of the CUDA programming guide; the memory is what a program can have.
GPUS: Mapping[str, Gpu] = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 1.41, 79 * GIB, 2.039e12, 40 * 2**20, 164 * 1024),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 1.98, 79 * GIB, 3.35e12, 50 * 2**20, 228 * 1024),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 128, 1.98, 139 * GIB, 4.8e12, 50 * 2**20, 228 * 1024),
}
# Google's tables of key specifications.
TPUS: Mapping[str, Tpu] = {
    "v4": Tpu(32 * GIB, 3),
    "v5e": Tpu(16 * GIB, 2),
    "v5p": Tpu(95 * GIB, 3),
    "v6e": Tpu(32 * GIB, 2),
}
KNOWN = f"cuda:{' | '.join(GPUS)}, with :N GPUs; tpu:{' | '.join(TPUS)}, with :AxB chips (v4 and v5p: AxBxC)"
_INSTALL = {
    "cuda": "pip install --no-deps jax-cuda13-plugin=={0} jax-cuda13-pjrt=={0} nvidia-cuda-nvcc",
    "tpu": 'pip install "jax[tpu]=={0}"',
}
_PLUGINS = {"cuda": ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"), "tpu": ("libtpu",)}


class Target(NamedTuple):
    """Devices that a program is compiled for."""

    platform: str  # cuda | tpu
    kind: str  # of GPUS or TPUS
    topology: tuple[int, ...]  # N GPUs, or the chips along each axis; (1,): a single one

    def __str__(self) -> str:
        return f"{self.platform}:{self.kind}:{'x'.join(map(str, self.topology))}"

    @property
    def size(self) -> int:
        """How many devices there are."""
        return math.prod(self.topology)

    @property
    def memory(self) -> int:
        """Bytes that a program can have on each device."""
        return (GPUS if self.platform == "cuda" else TPUS)[self.kind].memory


def parse(text: str) -> Target:
    """The target that `PLATFORM:KIND[:TOPOLOGY]` names; without a topology a single device.

    Raises:
      UserError: a platform, kind or topology that is not known.

    >>> parse("tpu:v5e:4x4").size, str(parse("cuda:h100"))
    (16, 'cuda:h100:1')
    >>> parse("cuda:h1000")
    Traceback (most recent call last):
    ...
    prdarts_jax.errors.UserError: target: 'cuda:h1000' is not known; allowed: cuda:a100 | h100 | h200, with :N GPUs; \
tpu:v4 | v5e | v5p | v6e, with :AxB chips (v4 and v5p: AxBxC)
    """
    platform, _, rest = text.partition(":")
    kind, _, topology = rest.partition(":")
    kinds: Mapping[str, Any] = {"cuda": GPUS, "tpu": TPUS}.get(platform, {})
    if kind not in kinds or not re.fullmatch(r"([1-9]\d{0,4})(x[1-9]\d{0,4})*|", topology) or rest.endswith(":"):
        raise UserError(f"target: {text!r} is not known; allowed: {KNOWN}")
    target = Target(platform, kind, tuple(int(n) for n in (topology or "1").split("x")))
    if platform == "cuda":
        whole = target.size <= GPUS_OF_A_HOST or target.size % GPUS_OF_A_HOST == 0
        if len(target.topology) > 1 or not whole:
            allowed = f"1..{GPUS_OF_A_HOST}, or a multiple of {GPUS_OF_A_HOST}"
            raise UserError(f"target: {topology} GPUs of {text!r} are not possible; allowed: {allowed}")
    elif target.size > 1 and len(target.topology) != TPUS[kind].axes:
        axes = "x".join("ABC"[: TPUS[kind].axes])
        raise UserError(f"target: {topology} chips of {text!r} are not possible; allowed: 1 | {axes}")
    return target


def before_jax() -> None:
    """Settings of a process that compiles and computes nothing; JAX and libtpu read them when they start."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # a plugin without its device is an error where it may be the default
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # what a compilation takes is one of the figures
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no server of a TPU machine has to be asked
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it would be in
        return False


def devices(target: Target) -> list[jax.Device]:
    """The devices of a target: to lower and compile for, not to compute on.

    Raises:
      UserError: the compiler is not installed, or does not know the topology.
    """
    import jax
    from jax.experimental import topologies

    if not any(map(_installed, _PLUGINS[target.platform])):
        install = _INSTALL[target.platform].format(jax.__version__)
        raise UserError(f"target: {target} needs XLA's compiler for it, which is not installed; install: {install}")
    options: dict[str, Any] = {}
    if target.platform == "cuda":
        hosts, each = divmod(target.size, GPUS_OF_A_HOST) if target.size > GPUS_OF_A_HOST else (1, target.size)
        each = each or GPUS_OF_A_HOST
        options = {"topology": f"1x{hosts}x{each}", "target_config": GPUS[target.kind].description()}
        name = target.kind
    else:
        axes = "x".join(map(str, target.topology)) if target.size > 1 else TPUS[target.kind].smallest()
        name = f"{target.kind}:{axes}"
    try:
        found = topologies.get_topology_desc(platform=target.platform, topology_name=name, **options).devices
    except Exception as error:
        raise UserError(f"target: {target} is not possible: {brief(error)}; allowed: {KNOWN}") from error
    return list(found)[: target.size]
