"""The flags of a run of several processes: `--distributed`, or `--coordinator` and its companions."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping

from prdarts_jax.devices.launch import Cluster
from prdarts_jax.errors import UserError

FLAGS: Mapping[str, str] = {
    "--distributed": "one process of several, as TPU, Slurm, Open MPI or Kubernetes have started it",
    "--coordinator HOST:PORT": "one process of several, without these: where the first one listens",
    "--num-processes N": "with --coordinator: how many there are",
    "--process-id I": "with --coordinator: which of them this is, 0..N-1",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of FLAGS."""
    parser.add_argument("--distributed", action="store_true")
    parser.add_argument("--coordinator")
    parser.add_argument("--num-processes", "--num_processes")
    parser.add_argument("--process-id", "--process_id")


def cluster(args: argparse.Namespace) -> Cluster | None:
    """What the flags say; None: an ordinary run of one process.

    Raises:
      UserError: half of what is needed, or values that are not possible.

    >>> cluster(argparse.Namespace(distributed=False, coordinator="n1:1234", num_processes="2", process_id="0"))
    Cluster(coordinator='n1:1234', processes=2, process=0)
    """
    given = {
        "--coordinator": args.coordinator,
        "--num-processes": args.num_processes,
        "--process-id": args.process_id,
    }
    missing = [flag for flag, value in given.items() if value is None]
    if len(missing) == len(given):
        return Cluster() if args.distributed else None
    if missing:
        raise UserError(f"{missing[0]}: none is given; allowed: {', '.join(given)} together, or --distributed alone")
    if not re.fullmatch(r"[^\s:]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}", args.coordinator):
        raise UserError(f"--coordinator: {args.coordinator!r} is not possible; allowed: HOST:PORT")
    numbers = {}
    for flag, low in (("--num-processes", 1), ("--process-id", 0)):
        if not re.fullmatch(r"\d{1,9}", given[flag]) or int(given[flag]) < low:
            raise UserError(f"{flag}: {given[flag]!r} is not possible; allowed: a whole number >= {low}")
        numbers[flag] = int(given[flag])
    if numbers["--process-id"] >= numbers["--num-processes"]:
        allowed = f"0..{numbers['--num-processes'] - 1} (--num-processes {numbers['--num-processes']})"
        raise UserError(f"--process-id: {numbers['--process-id']} is not possible; allowed: {allowed}")
    return Cluster(args.coordinator, numbers["--num-processes"], numbers["--process-id"])
