"""Whether the tests notice slips: each of `mutations.py` in turn in a copy of the repository, against its tests.

    python tests/mutate.py [NAME ...] [--list]

NAME is any part of a mutation's name; default: all. The exit status is 0 if every mutation made one of its tests fail.
The tests are of the quick suite, and what they compile stays in the cache of the quick suite.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[1]
# What the package, its tests and their settings are made of.
PARTS = ("prdarts_jax", "tests", "benchmarks", "experiments", "docs", "README.md", "Makefile", "pyproject.toml")
SECONDS = 300  # of the tests of one mutation; a slip can also make a loop without an end
_FAILED = re.compile(r"^(?:FAILED|ERROR) (?:tests/)?(\S+?::.*?|\S+)(?: - .*)?$", re.MULTILINE)


class Outcome(NamedTuple):
    """How the tests of a mutation ended."""

    killed: bool
    seconds: float
    said: str  # the first test that failed, or why there is none; of a mutation that survived pytest's last line


def problems(mutations: Sequence[Mutation], root: Path = ROOT) -> list[str]:
    """Why mutations cannot be tried: one line each, which begins with the name."""
    found = []
    for i, one in enumerate(mutations):
        path = root / one.file
        times = path.read_text(encoding="utf-8").count(one.old) if path.is_file() else 0
        if times != 1:
            found.append(f"{one.name}: {one.old!r} is {times} times in {one.file}; wanted: once")
        if one.old == one.new:
            found.append(f"{one.name}: changes nothing")
        if one.name in [other.name for other in mutations[:i]]:
            found.append(f"{one.name}: there are two of this name")
        found += [f"{one.name}: no file {file}" for file in _files(one) if not (root / file).is_file()]
    return found


def _files(mutation: Mutation) -> list[str]:
    return [test.partition("::")[0] for test in mutation.tests]


def copy(to: Path) -> None:
    """The repository without what was compiled of it."""
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, to / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, to / part)


def run(root: Path, tests: Sequence[str], seconds: float | None, *, bytecode: bool = False) -> tuple[int | None, str]:
    """The status of pytest (None: it took too long) and what it printed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    if not bytecode:
        # Python takes a compiled module for that of a source of the same size and second.
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        # A file, not a pipe: a process that a test leaves behind would hold the pipe open. In a session of its own, so
        # that it ends with those that it has started.
        process = subprocess.Popen(
            command, cwd=root, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        status: int | None = None
        try:
            status = process.wait(seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
        output.seek(0)
        return status, output.read()


def judge(status: int | None, text: str, seconds: float) -> Outcome:
    """The outcome of a run of pytest on a mutated copy."""
    lines = text.strip().splitlines() or [""]
    failed = _FAILED.search(text)
    if status is None:
        return Outcome(True, seconds, f"timed out after {SECONDS} s")
    if status == 0:
        return Outcome(False, seconds, lines[-1])
    if failed is not None:
        return Outcome(True, seconds, failed[1])
    ended = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
    return Outcome(True, seconds, f"crashed ({ended}): {lines[-1]}"[:160])


def attempt(root: Path, mutation: Mutation) -> Outcome:
    """Runs the tests of a mutation on the copy, which is then as before."""
    path = root / mutation.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    began = time.monotonic()
    try:
        return judge(*run(root, mutation.tests, SECONDS), time.monotonic() - began)
    finally:
        path.write_text(text, encoding="utf-8")


def main(words: Sequence[str]) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only mutations with this in their name")
    parser.add_argument("--list", action="store_true", help="the mutations and their tests; nothing is run")
    options = parser.parse_args(words)
    chosen = [one for one in MUTATIONS if not options.names or any(name in one.name for name in options.names)]
    unknown = [name for name in options.names if not any(name in one.name for one in MUTATIONS)]
    wrong = [f"{name}: no mutation has this in its name" for name in unknown] + problems(MUTATIONS)
    for line in wrong:
        print(f"mutate: error: {line}", file=sys.stderr)
    if wrong:
        return 2
    if options.list:
        for one in chosen:
            print(f"{one.name} | {one.file} | {', '.join(one.tests)}")
        return 0

    survived = 0
    with tempfile.TemporaryDirectory(prefix="prdarts-mutate-") as folder:
        root = Path(folder)
        copy(root)
        began = time.monotonic()
        tests = list(dict.fromkeys(test for one in chosen for test in one.tests))
        status, text = run(root, tests, None, bytecode=True)
        last = (text.strip().splitlines() or [""])[-1]
        if status != 0:
            print(text, file=sys.stderr)
            print(f"mutate: error: the tests fail without a mutation: {last}", file=sys.stderr)
            return 2
        print(f"without a mutation: {last}", flush=True)
        width = max(len(one.name) for one in chosen)
        files = max(len(one.file) for one in chosen)
        print(f"{'mutation':{width}} | {'file':{files}} | outcome  | seconds | first failing test")
        for one in chosen:
            outcome = attempt(root, one)
            survived += not outcome.killed
            word = "killed" if outcome.killed else "SURVIVED"
            row = f"{one.name:{width}} | {one.file:{files}} | {word:8} | {outcome.seconds:7.1f} | {outcome.said}"
            print(row, flush=True)
        minutes = (time.monotonic() - began) / 60
    print(f"{len(chosen) - survived} of {len(chosen)} killed in {minutes:.1f} minutes")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
