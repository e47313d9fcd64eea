"""What a workdir holds, read for the report: finished or not, whole or cut off in the middle of a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prdarts_jax.errors import UserError
from prdarts_jax.space.genotype import Genotype

_KINDS = ("search", "train")
POPULATION, POPULATION_SCHEMA = "population.json", 1


@dataclass(frozen=True)
class Run:
    """What a workdir holds, as far as the run has come."""

    path: Path
    kind: str  # search | train
    config: Mapping[str, Any]  # dotted path -> value
    sources: Mapping[str, str]  # dotted path -> where the value comes from
    versions: Mapping[str, Any]
    devices: Sequence[str]
    edges: Sequence[Sequence[int]]
    ops: Sequence[str]
    epochs: Sequence[Mapping[str, Any]]  # the epoch rows of metrics.jsonl
    final: Mapping[str, Any]  # the final row, or nothing
    genotype: Genotype | None  # the result; of an unfinished search, the cell of its last epoch
    finished: bool
    probabilities: Sequence[Mapping[str, Any]]  # rows {"epoch", "normal": [E, O], "reduce": [E, O]}
    processes: int = 1  # over which the devices are spread
    events: Sequence[Mapping[str, Any]] = ()  # of the strategy: new stages, steps back

    @property
    def last(self) -> Mapping[str, Any]:
        """The last epoch's row."""
        return self.epochs[-1] if self.epochs else {}

    @property
    def figures(self) -> Mapping[str, Any]:
        """The last epoch's row and the final row, as one."""
        return {k: v for k, v in {**self.last, **self.final}.items() if k != "kind"}

    @property
    def group(self) -> str:
        """Equal for runs that differ in the seed, or in how they were run, alone."""
        same = {k: v for k, v in self.config.items() if k != "seed" and not k.startswith("run.")}
        # Trained networks are averaged over seeds of one architecture, not over architectures.
        architecture = self.genotype.to_json() if self.kind == "train" and self.genotype else ""
        return json.dumps([self.kind, same, architecture], sort_keys=True)

    @property
    def progress(self) -> str:
        """The epochs so far, and how many were planned: '2 of 3'."""
        planned = self.config.get("epochs")
        return f"{len(self.epochs)}" + ("" if planned is None else f" of {planned}")

    def points(self, field: str) -> list[tuple[int, float]]:
        """(epoch, value) of the epochs that have a number there."""
        return [(row["epoch"], y) for row in self.epochs if (y := number(row.get(field))) is not None]

    def history(self, cell: str) -> tuple[list[int], np.ndarray]:
        """The T epochs whose P of a cell fits the edges and ops, and this P [T, E, O], NaN where there is no number."""
        shape = (len(self.edges), len(self.ops))
        rows = [row for row in self.probabilities if self.edges and _is_matrix(row.get(cell), shape)]
        return [row["epoch"] for row in rows], np.array([row[cell] for row in rows], float).reshape(len(rows), *shape)


def number(value: Any) -> float | None:
    """A number of a row as a float; None for anything else.

    >>> number(3), number(True), number("3"), number(None)
    (3.0, None, None, None)
    """
    return None if isinstance(value, bool) or not isinstance(value, int | float) else float(value)


def grouped(runs: Iterable[Run], key: Callable[[Run], str]) -> list[list[Run]]:
    """The runs of equal key together, groups and runs in the order of their coming."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return list(groups.values())


class Population(NamedTuple):
    """What a population's folder says of its members."""

    swept: tuple[str, ...]  # dotted config paths
    folders: tuple[Path, ...]  # of the members that were started


def population(workdir: str | Path) -> Population | None:
    """The population of a folder, or None if it is not the folder of one.

    Raises:
      UserError: a damaged population.json.
    """
    path = Path(workdir) / POPULATION
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        folders = tuple(path.parent / str(name) for name in document["members"])
        swept = tuple(str(field) for field in document["sweep"])
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: does not name a population ({type(e).__name__}: {e})") from None
    return Population(swept, tuple(folder for folder in folders if (folder / "config.json").is_file()))


def read(workdir: str | Path) -> Run:
    """Read a workdir, finished or not.

    Args:
      workdir: a directory with config.json; metrics.jsonl, genotype.json, genotypes.jsonl and probabilities.jsonl are
        read where they exist. A last line that a killed process left half written is passed over.

    Raises:
      UserError: no workdir, or a file in it that cannot be read; the error names it.
    """
    path = Path(workdir)
    document = path / "config.json"
    if not document.is_file():
        lack = "holds no config.json" if path.is_dir() else "is no directory"
        raise UserError(f"workdir: {str(workdir)!r} {lack}; allowed: the workdir of a search or a training")
    try:
        head = json.loads(document.read_text(encoding="utf-8"))
        kind = head["kind"]
        config = dict(_flat(head["config"]))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{document}: not the config of a workdir ({type(e).__name__}: {e})") from None
    if head.get("schema_version") != 1:
        raise UserError(f"{document}: schema_version {head.get('schema_version')!r} is unknown; allowed: 1")
    if kind not in _KINDS:
        raise UserError(f"{document}: kind {kind!r} is unknown; allowed: {' | '.join(_KINDS)}")
    rows = _lines(path / "metrics.jsonl")
    epochs = {row["epoch"]: row for row in rows if row.get("kind") == "epoch" and "epoch" in row}
    final = [row for row in rows if row.get("kind") == "final"]
    derived = _lines(path / "genotypes.jsonl")
    result = path / "genotype.json"
    genotype = Genotype.load(result) if result.is_file() else None
    finished = bool(final) or (kind == "search" and genotype is not None)
    if genotype is None and derived:
        genotype = Genotype.from_json(derived[-1]["genotype"])
    devices = head.get("devices") or []
    return Run(
        path=path,
        kind=kind,
        config=config,
        sources=head.get("sources") or {},
        versions=head.get("versions") or {},
        devices=[devices] if isinstance(devices, str) else [str(d) for d in devices],
        edges=head.get("edges") or [],
        ops=head.get("ops") or [],
        epochs=[epochs[e] for e in sorted(epochs)],
        final=final[-1] if final else {},
        genotype=genotype,
        finished=finished,
        probabilities=_lines(path / "probabilities.jsonl"),
        processes=(head.get("platform") or {}).get("processes", 1),
        events=_lines(path / "events.jsonl"),
    )


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file, or none if there is no such file."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for at, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if at == len(lines):
                continue
            raise UserError(f"{path}: line {at} is not JSON") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {at} is not a JSON object")
        rows.append(row)
    return rows


def _is_matrix(value: Any, shape: tuple[int, int]) -> bool:
    return isinstance(value, list) and len(value) == shape[0] and all(len(row) == shape[1] for row in value)
