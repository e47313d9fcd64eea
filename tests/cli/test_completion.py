"""`prdarts completion`: the script is run by bash, and completes what the command line takes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from prdarts_jax import cli, presets
from prdarts_jax.cli import commands
from prdarts_jax.config import schema
from prdarts_jax.config.search import SearchConfig
from prdarts_jax.space import genotype
from prdarts_jax.strategies import composition, registry


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("completion")
    with pytest.MonkeyPatch.context() as patch, (folder / "script").open("w") as out:
        patch.setattr("sys.stdout", out)
        assert cli.main(["completion", "bash"]) == 0
    (folder / "here").mkdir()
    (folder / "here" / "photos").mkdir()
    (folder / "here" / "cell.json").touch()
    return folder / "script"


def completed(script: Path, *words: str) -> set[str]:
    """What bash offers for the last of the words."""
    program = (
        f"source {script}; cd {script.parent}/here; COMP_WORDS=(prdarts {' '.join(map(repr, words))}); "
        f"COMP_CWORD={len(words)}; COMP_TYPE=9; "
        'f=$(complete -p prdarts | grep -oP "(?<=-F )\\S+"); $f; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


@needs_bash
def test_commands_flags_and_names_are_offered(script: Path) -> None:
    assert completed(script, "") >= set(commands._COMMANDS)
    assert completed(script, "se") == {"search"}
    flags = completed(script, "search", "--")
    fields = [(path, hint) for path, hint, _ in schema.fields(SearchConfig) if path != "method.options"]
    assert {f"--{path}" for path, _ in fields} <= flags
    assert {f"--no-{path}" for path, hint in fields if hint is bool} <= flags
    assert {"--preset", "--with", "--sweep", "--cells", "--print-config"} <= flags
    assert completed(script, "search", "--preset", "") >= set(presets.PRESETS)
    assert completed(script, "search", "--strategy", "") >= {row.name for row in registry.rows()}
    assert completed(script, "search", "--with", "") >= set(composition.TRANSFORMS)
    assert completed(script, "train", "--genotype", "PRD") == {n for n in genotype.names() if n.startswith("PRD")}


@needs_bash
def test_files_and_folders_are_offered(script: Path) -> None:
    assert "photos" in {name.rstrip("/") for name in completed(script, "derive", "")}
    assert "cell.json" in completed(script, "zoo", "ce")
    assert {name.rstrip("/") for name in completed(script, "search", "--workdir", "ph")} == {"photos"}


def test_every_flag_that_is_offered_is_one(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A config flag that the command line would not take is never completed."""
    for command, kind in (("search", SearchConfig),):
        for path, hint, _ in schema.fields(kind):
            if hint is bool:
                assert cli.main([command, "--preset", "digits", f"--no-{path}", "--print-config"]) == 0
    capsys.readouterr()


def test_zsh(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "zsh"]) == 0
    said = capsys.readouterr()
    assert "prdarts" in said.out and "--print-config" in said.out and said.err == ""


def test_another_shell_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "fish"]) == 2
    assert capsys.readouterr().err.startswith("prdarts: error: argument SHELL: invalid choice: 'fish'")
