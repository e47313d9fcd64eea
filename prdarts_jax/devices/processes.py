"""Several processes of one run: what they tell each other, always at the same point of the program.

JAX's multi-controller runtime does the work: every process runs the same program on the same values, and the compiled
steps reduce over all devices. The first process alone touches the workdir. What it finds there, what goes wrong on any
process, and the wish to stop are exchanged here, by all processes or by none. With one process nothing is exchanged.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from prdarts_jax.config import schema
from prdarts_jax.devices import sharding
from prdarts_jax.errors import RunError, UserError
from prdarts_jax.ops import kernels

T = TypeVar("T")

# Read where it lies, or different on purpose: not compared between the processes. Any process's time limit ends all.
_OWN_BUSINESS = ("run.workdir", "run.data_dir", "run.progress", "run.time_limit")
_BLOCK = 1024  # bytes; texts of like lengths share one compiled program


def is_first() -> bool:
    """Whether this process writes and speaks for the run; the only process does.

    >>> is_first()
    True
    """
    return jax.process_index() == 0


def share(value: Any) -> list[Any]:
    """A JSON value of each process, in their order. Every process must call it.

    >>> share("alone")
    ['alone']
    """
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([len(data)], np.int32))[:, 0]
    room = -(-int(lengths.max()) // _BLOCK) * _BLOCK
    texts = multihost_utils.process_allgather(np.pad(data, (0, room - len(data))))
    return [json.loads(bytes(row[:length])) for row, length in zip(texts, lengths, strict=True)]


def together(action: Callable[[], T]) -> T:
    """The result of `action`, which every process runs; where it fails on one of them, it fails on all.

    Raises:
      UserError, RunError: what was raised here, or what another process raised, with its number.

    >>> together(lambda: 3)
    3
    """
    if jax.process_count() == 1:
        return action()
    try:
        result = action()
    except Exception as error:
        ours = isinstance(error, UserError | RunError)
        share([isinstance(error, UserError), str(error) if ours else f"{type(error).__name__}: {error}"])
        raise
    for process, failure in enumerate(share(None)):
        if failure:
            raise (UserError if failure[0] else RunError)(f"process {process}: {failure[1]}")
    return result


def prepared(prepare: Callable[[], T]) -> T:
    """`together(prepare)`, between two first meetings: to connect, processes must come within half a minute.

    What connects is an exchange of the host and one over all devices; afterwards they wait for each other as long as
    it takes, to load data or to compile.
    """
    sharding.visible()  # the first use of JAX's backend in a run: what is wrong with it is said here
    if jax.process_count() == 1:
        return prepare()
    share(None)
    result = together(prepare)
    mesh = Mesh(np.array(jax.devices()), ("all",))
    one = jax.make_array_from_callback((), NamedSharding(mesh, PartitionSpec()), lambda _: np.float32(1))
    count = jax.shard_map(
        lambda x: jax.lax.psum(x, "all"),
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    if int(jax.jit(count)(one)) != jax.device_count():
        raise RunError(f"the {jax.device_count()} devices of {jax.process_count()} processes do not add up")
    return result


def on_first(action: Callable[[], Any]) -> Any:
    """The JSON result of `action`, which the first process alone runs, on all of them; so is what it raises.

    >>> on_first(lambda: {"old": None})
    {'old': None}
    """
    return share(together(lambda: action() if is_first() else None))[0]


def same(config: Any, computed: Mapping[str, Any], document: Mapping[str, Any]) -> None:
    """Refuses processes that were started with different values, data, code or packages, or compute differently.

    Processes whose programs differ would pair one's all-reduce with another of the other's, and say nothing.

    Args:
      config: of the run on this process.
      computed: what a resumed run must share with it, see `provenance.compared`.
      document: config.json, for the versions of packages and the platform.

    Raises:
      UserError: on every process, naming the first that differs and its fields.
    """
    if jax.process_count() == 1:
        return
    flat = {path: schema.get(config, path) for path, _, _ in schema.fields(type(config)) if path.startswith("run.")}
    common = {path: value for path, value in flat.items() if path not in _OWN_BUSINESS}
    versions = {f"version of {name}": value for name, value in document["versions"].items()}
    everyone = share({**computed, **common, **versions, **_program(document)})
    for process, values in enumerate(everyone):
        wrong = [n for n in sorted(everyone[0].keys() | values.keys()) if everyone[0].get(n) != values.get(n)]
        if wrong:
            shown = "; ".join(f"{n}: {everyone[0].get(n)!r} on process 0, {values.get(n)!r} there" for n in wrong)
            raise UserError(f"process {process} was started differently ({shown}); give all the same command")


def _program(document: Mapping[str, Any]) -> dict[str, Any]:
    """What decides which program is compiled, beside the config. Kernels of another processor take the same place."""
    platform = document["platform"]
    native = platform["cpu_kernels"].startswith("native ")
    return {
        "backend": platform["backend"],
        f"CPU kernels, of all or ({kernels.SWITCH}=off) of none": "native" if native else "XLA",
        **document["jax"],
    }


class Wish(NamedTuple):
    """Whether the run is to be left early, the same on every process."""

    signum: int | None  # the signal that came to any of them
    over_time: bool

    def __bool__(self) -> bool:
        return self.signum is not None or self.over_time


def agreed(wish: Wish, *, events: Any) -> Wish:
    """The wish of any process as that of all. Called by every process after each dispatch; it costs one small gather.

    Args:
      wish: of this process.
      events: what the strategy has decided so far, as JSON types; all must decide alike.

    Raises:
      RunError: they did not.

    >>> agreed(Wish(None, True), events=[])
    Wish(signum=None, over_time=True)
    """
    if jax.process_count() == 1:
        return wish
    decided = zlib.crc32(json.dumps(events, sort_keys=True).encode()) & 0x7FFFFFFF
    flags = multihost_utils.process_allgather(np.array([wish.signum or 0, wish.over_time, decided], np.int32))
    if len(set(flags[:, 2].tolist())) > 1:
        raise RunError("processes differ in the strategy's events: at_epoch must not depend on clock or machine")
    return Wish(int(flags[:, 0].max()) or None, bool(flags[:, 1].max()))


def fetch(tree: Any) -> Any:
    """Arrays that are split over the devices of all processes, whole, as host arrays on each of them.

    >>> fetch(jax.numpy.arange(2)).tolist()
    [0, 1]
    """
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return jax.tree.map(lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), tree)


# --- joining and leaving ----------------------------------------------------------------------------------------------

_HEARTBEAT = 30  # seconds: a peer that is lost, however quietly, ends the others within a minute
_SHUTDOWN = 60  # seconds the first to leave waits for the last


def initialize(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Joins the processes of a run, before anything else of JAX is used.

    Args:
      coordinator: HOST:PORT on which process 0 listens; None: JAX takes all from TPU, Slurm, Open MPI or Kubernetes.
      processes: how many there are.
      process: which of them this is.

    Raises:
      UserError: no cluster is found.
      RunError: the others cannot be reached.
    """
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            heartbeat_timeout_seconds=_HEARTBEAT,
            shutdown_timeout_seconds=_SHUTDOWN,
        )
    except ValueError as error:
        if coordinator is not None:
            raise
        raise UserError(
            f"--distributed: no cluster is found here ({error}); allowed: in a job of TPU, Slurm, Open MPI or "
            "Kubernetes, or --coordinator HOST:PORT --num-processes N --process-id I"
        ) from error
    except (RuntimeError, jax.errors.JaxRuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        where = coordinator or "the coordinator of this job"
        raise RunError(f"the processes of the run could not be joined by {where}: {reason}") from error


def leave() -> None:
    """Leaves the other processes in order, when all of them do."""
    jax.distributed.shutdown()


_STATUS = re.compile(r"(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): ")


def is_loss(error: Exception) -> bool:
    """Whether an error of a run of several processes means that another one is lost (not: that memory is full).

    >>> is_loss(ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer"))
    True
    >>> is_loss(ValueError("RESOURCE_EXHAUSTED: out of memory")), is_loss(RunError("train_loss is nan"))
    (False, False)
    """
    return isinstance(error, ValueError | jax.errors.JaxRuntimeError) and _STATUS.match(str(error)) is not None
