"""python -m benchmarks.compare_commits BASE [--bits] [--speed]: the working tree against a commit of this repository.

For a change that must not change what is computed, nor how fast. BASE is checked out into a temporary folder, and both
trees are run by this interpreter on the CPU, one process at a time.

--bits: the same command lines in both trees must leave the same numbers, bit for bit: the rows of the metrics without
those of clock and memory, the genotypes, the probabilities, the digest of every leaf of the newest checkpoint, and of
every tensor of a trained network. A search that BASE began must end in the working tree with the same bits too. Both
trees use one cache of compiled programs, so a program that is the same in both is compiled once.

--speed: steps of two searches, in a process a tree, block by neighbouring block; which tree goes first alternates. The
ratio of a pair is seconds of BASE over those of the working tree, above 1 where the working tree is faster. The
interval is the percentile bootstrap of the median: the pairs are drawn again with replacement 10 000 times, and the
middle 95 % of the medians lie within it. It must begin at 0.95 or above. It says nothing of how the speed of a process
differs from start to start.

The exit status is 0 if all of it holds, 1 if not, 2 for a command line that is not possible.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import cases
from benchmarks.race import QUIET, ROOT, Plan, Side, Worker, environment, measure, summary

LEAST = 0.95  # of the ratio: what the interval must not go below
SPEED = ("prdarts-6", "darts-dense-8")
PATIENCE = 4  # see `race.Plan`
MOMENT = "1e-9"  # minutes: over as soon as the first dispatch is
INTERRUPTED = ("metrics.jsonl", "checkpoint")
SEARCHED = ("metrics.jsonl", "genotype.json", "genotypes.jsonl", "probabilities.jsonl", "checkpoint")
TRAINED = ("metrics.jsonl", "genotype.json", "checkpoint", "network.safetensors")
SEARCH = ("search", "--preset=digits", "--seed=0", "--epochs=3")

# An editable install answers for modules that a tree has not: what one tree has moved away would be found in another.
# Python imports a module of this name when it starts.
GUARD = """import sys

sys.meta_path[:] = [
    finder
    for finder in sys.meta_path
    if "prdarts_jax" not in getattr(sys.modules.get(getattr(finder, "__module__", "")), "MAPPING", ())
]
"""


class Run(NamedTuple):
    """A command line that both trees run, and what each must leave in its workdir."""

    name: str
    words: tuple[str, ...]
    parts: tuple[str, ...]


RUNS = (
    Run("search prdarts", SEARCH, SEARCHED),  # the first: the interrupted ones are compared with it
    Run("search darts", (*SEARCH, "--strategy=darts"), SEARCHED),
    Run("train", ("train", "--genotype=PRDARTS", "--preset=digits", "--epochs=2", "--drop-path=0.2"), TRAINED),
    Run("population", ("search", "--preset=digits", "--population=2", "--epochs=2"), SEARCHED),
)


class Tree(NamedTuple):
    """A checkout."""

    name: str  # base | here
    root: Path
    settings: Mapping[str, str]  # of the environment of its processes


class Compared(NamedTuple):
    """The verdict about one run."""

    name: str
    values: int  # that were compared
    differences: list[str]
    seconds: float

    def line(self) -> str:
        if not self.differences:
            return f"{self.name}: same ({self.values} values, {self.seconds:.0f} s)"
        more = f" (and {len(self.differences) - 1} more)" if len(self.differences) > 1 else ""
        return f"{self.name}: DIFFERS: {self.differences[0]}{more}"


class Failed(Exception):
    """A tree that does not do what it is told to; the message says which, and what it said last."""


# --- the two trees ----------------------------------------------------------------------------------------------------


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"git {words[0]}: {' '.join(done.stderr.split())}")
    return done.stdout.strip()


@contextlib.contextmanager
def checked_out(root: Path, commit: str, folder: Path) -> Iterator[Path]:
    """A commit of the repository of `root` as a worktree in `folder`, which goes again however this is left."""
    path = folder / "tree"
    _git(root, "worktree", "add", "--detach", str(path), commit)
    try:
        yield path
    finally:
        _git(root, "worktree", "remove", "--force", str(path))


def tree(name: str, root: Path, guard: Path) -> Tree:
    """A checkout whose processes find its own modules and no others.

    Args:
      name: of the tree.
      root: where it lies.
      guard: a folder, which receives GUARD.

    Raises:
      Failed: its processes would import the package from elsewhere.
    """
    (guard / "sitecustomize.py").write_text(GUARD, encoding="utf-8")
    given = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join(p for p in (str(guard), str(root), given) if p)
    made = Tree(name, root, {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"})
    asked = "import importlib.util; print(getattr(importlib.util.find_spec('prdarts_jax'), 'origin', None))"
    done = _python(made, "-c", asked)
    if Path(done.stdout.strip()).resolve() != (root / "prdarts_jax" / "__init__.py").resolve():
        raise Failed(f"{name}: prdarts_jax would come from {done.stdout.strip() or done.stderr.strip()}, not {root}")
    return made


def _python(tree: Tree, *words: str) -> subprocess.CompletedProcess[str]:
    command, settings = [sys.executable, *words], {**environment(), **tree.settings}
    return subprocess.run(command, cwd=tree.root, env=settings, capture_output=True, text=True)


def prdarts(tree: Tree, workdir: Path, *words: str) -> Path:
    """Runs a command line of the package in a tree; its workdir."""
    done = _python(tree, "-m", "prdarts_jax", *words, f"--workdir={workdir}", "--progress=off")
    if done.returncode:
        said = " | ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-3:])
        raise Failed(f"{tree.name}: prdarts {' '.join(words)} ended with status {done.returncode}: {said}")
    return workdir


# --- what a run has computed ------------------------------------------------------------------------------------------


def _timed(name: str) -> bool:
    """Whether a field of the metrics is one of clock or memory. Written here again: neither tree may decide it."""
    return name.startswith(("time_", "memory_")) or name.endswith("_per_s")


def _metrics(path: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        # As text, for which NaN is equal to itself, and 1 is not 1.0.
        fields = {name: json.dumps(value) for name, value in json.loads(line).items() if not _timed(name)}
        found |= {f"row {number} {name}": value for name, value in fields.items()}
    return found


def _lines(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return {f"row {number}": line for number, line in enumerate(lines, start=1)}


def _text(path: Path) -> dict[str, str]:
    return {"text": path.read_text(encoding="utf-8")}


def _checkpoint(path: Path) -> dict[str, str]:
    """The newest one's step, the caller's info, and shape, dtype and SHA-256 of each leaf, from its JSON document."""
    newest = max((int(step.name) for step in path.iterdir() if re.fullmatch(r"\d+", step.name)), default=None)
    if newest is None:
        return {}
    document = json.loads((path / str(newest) / "info" / "metadata").read_text(encoding="utf-8"))
    found = {"number": str(newest), "info": json.dumps(document["info"], sort_keys=True)}
    return found | {f"leaf {name}": json.dumps(leaf, sort_keys=True) for name, leaf in document["leaves"].items()}


def _tensors(path: Path) -> dict[str, str]:
    """Shape, dtype and SHA-256 of each tensor: eight bytes say how long the JSON is that says where each lies."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    found: dict[str, str] = {}
    for name in sorted(set(header) - {"__metadata__"}):
        begin, end = header[name]["data_offsets"]
        digest = hashlib.sha256(content[start + begin : start + end]).hexdigest()
        found[f"tensor {name}"] = f"{header[name]['dtype']}{header[name]['shape']} {digest}"
    return found


_READERS: Mapping[str, tuple[str, Callable[[Path], dict[str, str]]]] = {
    "metrics.jsonl": ("metrics.jsonl", _metrics),
    "genotype.json": ("genotype.json", _text),
    "genotypes.jsonl": ("genotypes.jsonl", _lines),
    "probabilities.jsonl": ("probabilities.jsonl", _lines),
    "checkpoint": ("checkpoints", _checkpoint),
    "network.safetensors": ("network.safetensors", _tensors),
}
LISTED = "population.json"  # of a population: its members


def contents(workdir: Path, parts: Sequence[str]) -> dict[str, str]:
    """All that a run has computed, as text by name, in an order in which what is computed first comes first.

    Args:
      workdir: of a run, or of a population, whose members' names then begin with their folder.
      parts: what there must be; one that is not there, or empty, is an empty text.
    """
    members = sorted(path.parent for path in workdir.rglob("config.json"))
    found = {} if members else {"config.json": ""}
    if (workdir / LISTED).is_file():
        found |= {LISTED: (workdir / LISTED).read_text(encoding="utf-8")}
    for member in members:
        prefix = "" if member == workdir else f"{member.relative_to(workdir).as_posix()}/"
        for part in parts:
            name, read = _READERS[part]
            there = read(member / name) if (member / name).exists() else {}
            found |= {f"{prefix}{part} {key}": value for key, value in there.items()} or {f"{prefix}{part}": ""}
    return found


def differences(base: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """What is not the same in two `contents`, or is missing, one line each, the first computed first.

    >>> differences({"metrics.jsonl row 1 train_loss": "0.5"}, {"metrics.jsonl row 1 train_loss": "0.25"})
    ['metrics.jsonl row 1 train_loss: base 0.5, here 0.25']
    """
    found = []
    for name in dict.fromkeys((*base, *here)):
        texts = base.get(name, ""), here.get(name, "")
        if not any(texts):
            sides = (side for side, content in (("base", base), ("here", here)) if name in content)
            found.append(f"{name}: none in {' and '.join(sides)}")
        elif texts[0] != texts[1]:
            found.append(f"{name}: base {_excerpt(*texts)}, here {_excerpt(*reversed(texts))}")
    return found


def _excerpt(text: str, other: str) -> str:
    """A text from shortly before where it begins to differ from another one."""
    same = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    start = max(0, same - 20)
    cut = ("…" if start else "") + " ".join(text[start : start + 60].split()) + ("…" if text[start + 60 :] else "")
    return cut or "has none"


# --- --bits -----------------------------------------------------------------------------------------------------------


def _compared(name: str, parts: Sequence[str], make: Callable[[], tuple[Path, Path]]) -> Compared:
    """Compares the two workdirs that `make` gives; a tree that fails is a difference."""
    began = time.perf_counter()
    try:
        base, here = (contents(workdir, parts) for workdir in make())
    except Failed as error:
        return Compared(name, 0, [str(error)], time.perf_counter() - began)
    return Compared(name, len(base), differences(base, here), time.perf_counter() - began)


def bits(base: Tree, here: Tree, folder: Path) -> Iterator[Compared]:
    """Each run of RUNS, and a search that is interrupted and goes on, in both trees and from one to the other."""

    def both(name: str, *words: str) -> tuple[Path, Path]:
        first, second = (prdarts(tree, folder / tree.name / name, *words) for tree in (base, here))
        return first, second

    def interrupted() -> tuple[Path, Path]:
        for workdir in (found := both("resumed", *SEARCH, f"--time-limit={MOMENT}")):
            if (workdir / "genotype.json").exists():
                raise Failed(f"{workdir.parent.name}: the time limit did not interrupt the search")
        shutil.copytree(found[0], folder / "across")
        return found

    def across() -> tuple[Path, Path]:
        if not (folder / "across").is_dir():
            raise Failed("base: there is no interrupted search to go on with")
        return folder / base.name / whole, prdarts(here, folder / "across", *SEARCH)

    for run in RUNS:
        yield _compared(run.name, run.parts, partial(both, run.name.replace(" ", "-"), *run.words))
    whole = RUNS[0].name.replace(" ", "-")
    yield _compared("search interrupted", INTERRUPTED, interrupted)
    yield _compared("search resumed", SEARCHED, partial(both, "resumed", *SEARCH))
    not_interrupted = folder / here.name / whole, folder / here.name / "resumed"
    yield _compared("search resumed, against uninterrupted", SEARCHED, lambda: not_interrupted)
    yield _compared("search of base resumed here, against uninterrupted", SEARCHED, across)


# --- --speed ----------------------------------------------------------------------------------------------------------


def interval(ratios: Sequence[float], resamples: int = 10_000) -> tuple[float, float]:
    """The 95 % interval of the median of pairs by the percentile bootstrap; the same for the same pairs.

    Of fewer than 6 pairs even the smallest and the largest do not enclose the median with 95 %.

    >>> interval([1.0, 1.0, 1.0])
    (1.0, 1.0)
    """
    drawn = np.random.default_rng(0).choice(np.asarray(ratios), (resamples, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return float(low), float(high)


def speed(base: Tree, here: Tree, pairs: int) -> Iterator[dict[str, Any]]:
    """A row a case of SPEED: `speedup` is the median of the ratios, `low` and `high` their interval."""
    for name in SPEED:
        began, case = time.perf_counter(), cases.SEARCH["full"][name]
        side = Side("benchmarks.ours:search", case._asdict())

        def start(tree: Tree, side: Side = side) -> Worker:
            return Worker(side, root=tree.root, settings=tree.settings)

        for tree in (base, here):  # so that neither of the measured processes has compiled its program
            with start(tree):
                pass
        # The operations drawn change from step to step, so a block of PR-DARTS has several; both trees draw the same.
        plan = Plan(pairs, 8 if case.method == "prdarts" else 1, PATIENCE, alternate=True)
        with start(here) as ours, start(base) as peer:
            found = measure(ours, peer, plan)
        ratios = [theirs / mine for _, mine, theirs in found.pairs]
        low, high = interval(ratios)
        row = {"case": name, "pairs": len(ratios), **summary([found]), "low": round(low, 4), "high": round(high, 4)}
        row |= {"ratios": [round(ratio, 4) for ratio in ratios], "ok": low >= LEAST}
        yield row | {"seconds": round(time.perf_counter() - began, 1)}


def speed_line(row: Mapping[str, Any]) -> str:
    """A row of `speed` for people."""
    what = f"{row['case']}: seconds of base over here: median {row['speedup']:.3f}"
    how = f"95 % interval {row['low']:.3f} to {row['high']:.3f}, {row['pairs']} pairs, others {row['others']:.0%}"
    took = f"{row['seconds_peer']} s and {row['seconds_ours']} s a step"
    busy = " (the machine was busy: run it again)" if row["others"] > QUIET else ""
    return f"{what} ({how}; {took}): {'as fast' if row['ok'] else f'NOT SHOWN to be at least {LEAST}'}{busy}"


def main(argv: Sequence[str] | None = None) -> int:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.compare_commits", description=__doc__, formatter_class=about)
    parser.add_argument("base", metavar="BASE", help="a commit of this repository")
    parser.add_argument("--bits", action="store_true", help="compare what is computed (neither flag: both)")
    parser.add_argument("--speed", action="store_true", help="compare how fast")
    parser.add_argument("--pairs", type=int, default=30, help="of blocks, with --speed (default: 30; 6 or more)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write what was found there too")
    args = parser.parse_args(argv)
    if args.pairs < 1:
        parser.error(f"--pairs: {args.pairs} is not possible; allowed: >= 1")
    everything = not args.bits and not args.speed
    try:
        commit = _git(ROOT, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{args.base}^{{commit}}")
    except Failed:
        parser.error(f"BASE: no commit {args.base!r} in the repository of {ROOT}")
    from benchmarks import rows  # imports jax

    document: dict[str, Any] = {"base": commit, **rows.facts(), "bits": [], "speed": []}
    good = True
    try:
        with tempfile.TemporaryDirectory() as name, checked_out(ROOT, commit, Path(name)) as path:
            folder = Path(name)
            (folder / "guard").mkdir()
            base, here = tree("base", path, folder / "guard"), tree("here", ROOT, folder / "guard")
            for found in bits(base, here, folder / "runs") if args.bits or everything else ():
                print(found.line(), flush=True)
                document["bits"].append(found._asdict())
                good = good and not found.differences
            for row in speed(base, here, args.pairs) if args.speed or everything else ():
                print(speed_line(row), flush=True)
                document["speed"].append(row)
                good = good and row["ok"]
    except (Failed, RuntimeError) as error:  # RuntimeError: a worker that died
        print(f"compare_commits: {error}", file=sys.stderr)
        document["error"], good = str(error), False
    if args.out:
        args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the worktree goes then too
    sys.exit(main())
