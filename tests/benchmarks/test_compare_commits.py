"""The comparison of two commits: what it finds in folders that differ in one thing, and that it leaves none behind."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks import compare_commits, race
from benchmarks.compare_commits import SEARCHED, TRAINED, contents, differences

Folders = tuple[Path, Path]
PARTS = tuple(dict.fromkeys((*SEARCHED, *TRAINED)))  # one made-up run has all of them


def _jsonl(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _run(workdir: Path) -> Path:
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps({"run": {"workdir": str(workdir)}}))
    (workdir / "genotype.json").write_text('{"normal": [["skip_connect", 0]]}\n')
    numbers = {"train_loss": 2.25, "grad": float("nan"), "time_epoch_s": 1.5, "images_per_s": 9.0, "memory_peak_gb": 1}
    _jsonl(workdir / "metrics.jsonl", [{"kind": "step", "step": step, **numbers} for step in (10, 20)])
    _jsonl(workdir / "genotypes.jsonl", [{"epoch": epoch, "genotype": {"normal": [epoch]}} for epoch in (0, 1)])
    _jsonl(workdir / "probabilities.jsonl", [{"epoch": epoch, "normal": [[0.125, 0.875]]} for epoch in (0, 1)])
    for step in (9, 20, 100):
        leaf = {"shape": [2], "dtype": "float32", "sha256": f"{step}a"}
        document = {"info": {"step": step}, "leaves": {"state/w/0": leaf, "state/w/1": {**leaf, "sha256": "b"}}}
        (workdir / "checkpoints" / str(step) / "info").mkdir(parents=True)
        (workdir / "checkpoints" / str(step) / "info" / "metadata").write_text(json.dumps(document))
    (workdir / "checkpoints" / "set-aside-300").mkdir()
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.int32)}
    save_file(tensors, workdir / "network.safetensors", {"written": str(workdir)})
    return workdir


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    """Two runs that computed the same, in different places."""
    return _run(tmp_path / "base"), _run(tmp_path / "here")


def _found(folders: Folders, parts: tuple[str, ...] = PARTS) -> list[str]:
    return differences(*(contents(folder, parts) for folder in folders))


def test_nothing_is_found_where_nothing_differs(folders: Folders) -> None:
    assert _found(folders) == []
    content = contents(folders[0], PARTS)
    assert content["metrics.jsonl row 2 train_loss"] == "2.25" and content["metrics.jsonl row 2 grad"] == "NaN"
    assert content["checkpoint number"] == "100" and '"100a"' in content["checkpoint leaf state/w/0"]
    digest = hashlib.sha256(np.arange(6, dtype="<f4").tobytes()).hexdigest()
    assert content["network.safetensors tensor a"] == f"F32[2, 3] {digest}"
    assert {name.split()[0] for name in content} == set(PARTS)


def test_clock_and_memory_are_not_compared(folders: Folders) -> None:
    path = folders[1] / "metrics.jsonl"
    _jsonl(path, [{**row, "time_epoch_s": 7.0, "images_per_s": 1.0, "memory_peak_gb": 3} for row in _rows(path)])
    assert _found(folders) == []
    _jsonl(path, [{**row, "times": 1, "loss_time_": 2} for row in _rows(path)])  # like them in part of the name only
    assert len(_found(folders)) == 4


def _loss(here: Path) -> None:
    path = here / "metrics.jsonl"
    path.write_text("2.2500000000000004".join(path.read_text().rsplit("2.25", 1)))


def _type(here: Path) -> None:
    path = here / "metrics.jsonl"
    path.write_text(path.read_text().replace('"step": 10', '"step": 10.0'))


def _row(here: Path) -> None:
    path = here / "probabilities.jsonl"
    _jsonl(path, _rows(path)[:-1])


def _extra_row(here: Path) -> None:
    path = here / "metrics.jsonl"
    _jsonl(path, [*_rows(path), {"kind": "final"}])


def _digit(here: Path) -> None:
    path = here / "probabilities.jsonl"
    path.write_text(path.read_text().replace("0.875", "0.876", 1))


def _genotype(here: Path) -> None:
    path = here / "genotype.json"
    path.write_text(path.read_text().replace("0", "1"))


def _document(here: Path, old: str, new: str) -> None:
    path = here / "checkpoints" / "100" / "info" / "metadata"
    path.write_text(path.read_text().replace(old, new))


def _tensor(here: Path) -> None:
    path = here / "network.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "loss": (_loss, "metrics.jsonl row 2 train_loss: base 2.25, here 2.2500000000000004"),
    "type": (_type, "metrics.jsonl row 1 step: base 10, here 10.0"),
    "row": (_row, "probabilities.jsonl row 2: base {"),
    "extra row": (_extra_row, 'metrics.jsonl row 3 kind: base has none, here "final"'),
    "digit": (_digit, "probabilities.jsonl row 1: base …"),
    "genotype": (_genotype, "genotype.json text: base …"),
    "leaf": (lambda here: _document(here, '"100a"', '"100c"'), "checkpoint leaf state/w/0: base …"),
    "path of a leaf": (lambda here: _document(here, "state/w/1", "state/v/1"), "checkpoint leaf state/w/1: base {"),
    "epoch": (lambda here: _document(here, '"step": 100', '"step": 99'), "checkpoint info: base"),
    "newest": (lambda here: shutil.rmtree(here / "checkpoints" / "100"), "checkpoint number: base 100, here 20"),
    "tensor": (_tensor, "network.safetensors tensor b: base I32[2] "),
    "file": (lambda here: (here / "genotypes.jsonl").unlink(), "genotypes.jsonl row 1: base {"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_differs_is_found_and_named(folders: Folders, name: str) -> None:
    change, said = CHANGES[name]
    change(folders[1])
    found = _found(folders)
    assert found and found[0].startswith(said), found
    line = compare_commits.Compared("train", 9, found, 1.0).line()
    assert line.startswith(f"train: DIFFERS: {said}") and line.endswith("more)") == (len(found) > 1)


def test_what_neither_side_has_is_not_the_same(folders: Folders) -> None:
    for folder in folders:
        (folder / "genotype.json").unlink()
        shutil.rmtree(folder / "checkpoints")
    assert _found(folders) == ["genotype.json: none in base and here", "checkpoint: none in base and here"]
    nothing = [contents(folder / "nothing", PARTS) for folder in folders]
    assert differences(*nothing) == ["config.json: none in base and here"]


def test_members_of_a_population_are_compared_one_by_one(tmp_path: Path) -> None:
    for side in ("base", "here"):
        for seed in (0, 1):
            _run(tmp_path / side / f"seed={seed}")
        (tmp_path / side / "population.json").write_text('{"members": ["seed=0", "seed=1"]}')
    both = tmp_path / "base", tmp_path / "here"
    assert _found(both) == []
    _loss(tmp_path / "here" / "seed=1")
    assert [line.split(":")[0] for line in _found(both)] == ["seed=1/metrics.jsonl row 2 train_loss"]
    shutil.rmtree(tmp_path / "here" / "seed=1")
    assert len(_found(both)) == len(contents(tmp_path / "base" / "seed=1", PARTS))


def test_a_command_that_fails_is_a_difference(folders: Folders) -> None:
    def make() -> Folders:
        raise compare_commits.Failed("here: prdarts search ended with status 1: no module")

    assert compare_commits._compared("search", SEARCHED, make).differences == [
        "here: prdarts search ended with status 1: no module"
    ]
    assert compare_commits._compared("search", PARTS, lambda: folders).differences == []


def test_the_interval_is_that_of_order_statistics() -> None:
    """Of 30 values the 10th and the 21st enclose the median with 95.7 % (binomial), whatever the distribution."""
    low, high = compare_commits.interval([float(i) for i in range(1, 31)])
    assert abs(low - 10) <= 1 and abs(high - 21) <= 1
    assert (low, high) == compare_commits.interval([float(i) for i in range(1, 31)])
    assert compare_commits.interval([0.5, 1.0, 9.0]) == (0.5, 9.0)


class _Scripted(race.Worker):
    """A side that notes when it was asked."""

    def __init__(self, name: str, asked: list[str], memory_gb: float = 1.0) -> None:
        self.name, self.asked, self.memory_gb = name, asked, memory_gb

    def __exit__(self, *args: object) -> None:
        pass

    def seconds(self, steps: int) -> float:
        self.asked.append(self.name)
        return {"here": 2.0, "base": 1.8}[self.name]

    def memory(self) -> float:
        return self.memory_gb

    def cpu(self) -> float:
        return 0.0


def test_the_tree_that_goes_first_alternates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race.Others, "share", lambda self: 0.0)
    asked: list[str] = []
    found = race.measure(_Scripted("here", asked), _Scripted("base", asked), race.Plan(3, 1, alternate=True))
    assert asked[2:] == ["here", "base", "base", "here", "here", "base"]
    assert found.pairs == [(0.0, 2.0, 1.8)] * 3


def test_a_tree_that_is_slower_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """BASE over the working tree: 1.8 / 2 is below 0.95, and the other way round it is faster."""
    monkeypatch.setattr(race.Others, "share", lambda self: 0.0)
    monkeypatch.setattr(compare_commits, "Worker", lambda side, root, settings: _Scripted(root.name, []))
    base, here = (compare_commits.Tree(name, Path(name), {}) for name in ("base", "here"))
    for first, second, ratio, ok in ((base, here, 0.9, False), (here, base, 1.111, True)):
        found = list(compare_commits.speed(first, second, 3))
        assert [row["case"] for row in found] == ["prdarts-6", "darts-dense-8"]
        assert [(row["speedup"], row["ok"], row["pairs"]) for row in found] == [(ratio, ok, 3)] * 2
        assert ("NOT SHOWN" in compare_commits.speed_line(found[0])) is not ok
        assert "busy" not in compare_commits.speed_line(found[0])
        assert "busy" in compare_commits.speed_line({**found[0], "others": 0.5})


def test_a_process_of_a_tree_finds_the_modules_of_no_other(tmp_path: Path) -> None:
    """An editable install offers `prdarts_jax.cli` also to a tree that has none."""
    package = tmp_path / "tree" / "prdarts_jax"
    package.mkdir(parents=True)
    guard = tmp_path / "guard"
    guard.mkdir()
    with pytest.raises(compare_commits.Failed, match="would come from"):
        compare_commits.tree("base", tmp_path / "tree", guard)
    (package / "__init__.py").touch()
    tree = compare_commits.tree("base", tmp_path / "tree", guard)
    command = [sys.executable, "-c", "import importlib.util; print(importlib.util.find_spec('prdarts_jax.cli'))"]
    settings = {**race.environment(), **tree.settings}
    done = subprocess.run(command, cwd=tree.root, env=settings, capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    if shutil.which("git") is None:
        pytest.skip("no git")
    root = tmp_path / "repository"
    root.mkdir()
    (root / "file").write_text("old")
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    for words in (["init", "-q"], ["add", "file"], [*who, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(root), *words], check=True)
    (root / "file").write_text("new")
    return root


def test_the_worktree_goes_also_after_an_error(repository: Path, tmp_path: Path) -> None:
    def worktrees() -> int:
        listed = ["git", "-C", str(repository), "worktree", "list"]
        return len(subprocess.run(listed, capture_output=True, text=True, check=True).stdout.splitlines())

    with pytest.raises(RuntimeError), compare_commits.checked_out(repository, "HEAD", tmp_path) as path:
        assert (path / "file").read_text() == "old" and worktrees() == 2
        (path / "left").touch()
        raise RuntimeError
    assert not path.exists() and worktrees() == 1
    with pytest.raises(compare_commits.Failed), compare_commits.checked_out(repository, "nothing", tmp_path):
        pass


def test_a_commit_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        compare_commits.main(["no-such-commit"])
    assert ended.value.code == 2 and "BASE: no commit 'no-such-commit'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare_commits.main(["HEAD", "--pairs", "0"])
