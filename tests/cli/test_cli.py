"""The command line: flags to config, exit statuses, one error line, nothing created on wrong input."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import prdarts_jax
from prdarts_jax import cli
from prdarts_jax.cli import commands
from prdarts_jax.cli.flags import split
from prdarts_jax.cli.search import SEARCH
from prdarts_jax.config import schema
from prdarts_jax.config.search import OPS, SearchConfig
from prdarts_jax.errors import RunError
from prdarts_jax.space.genotype import Genotype

PRDARTS = Genotype.named("PRDARTS")


@dataclass
class _Search:
    """Stands in for the search: keeps what it was called with, and answers."""

    status: str = "finished"
    signum: int | None = None
    error: BaseException | None = None
    config: SearchConfig | None = None
    workdir: Path | None = None
    sources: dict = field(default_factory=dict)
    genotype: Genotype = PRDARTS

    def __call__(self, config, workdir, *, sources=None, **_):
        self.config, self.workdir, self.sources = config, workdir, sources
        if self.error is not None:
            raise self.error
        return types.SimpleNamespace(
            genotype=self.genotype,
            workdir=workdir,
            report=workdir / "report.html",
            metrics={},
            status=self.status,
            signum=self.signum,
        )


@pytest.fixture
def search(monkeypatch, tmp_path):
    """No search runs, and the current directory is an empty one."""
    stand_in = _Search()
    module = types.ModuleType("prdarts_jax.searching.loop")
    module.search = stand_in
    monkeypatch.setitem(sys.modules, "prdarts_jax.searching.loop", module)
    monkeypatch.setattr("prdarts_jax.searching.loop", module, raising=False)
    monkeypatch.chdir(tmp_path)
    return stand_in


def test_a_cell_without_an_operation_is_said(search, capsys):
    assert cli.main(["search", "--preset", "digits"]) == 0
    assert "no operation" not in capsys.readouterr().err
    search.genotype = Genotype([[], []], [2, 3], [[("skip_connect", 0)], []], [2, 3])
    assert cli.main(["search", "--preset", "digits"]) == 0
    assert capsys.readouterr().err.endswith(
        "prdarts: note: the normal cell has no operation: no network can be trained of it\n"
    )


def _error(capsys, words, status=2):
    """The one line a command fails with."""
    assert cli.main(words) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("prdarts: error: ")
    assert captured.err.endswith("\n")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("prdarts: error: ").strip()


# Flags


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        ([], "epochs", 200),
        (["--epochs", "3"], "epochs", 3),
        (["--epochs=3"], "epochs", 3),
        (["--epochs", "3", "--epochs", "4"], "epochs", 4),
        (["--batch-size", "8"], "batch_size", 8),
        (["--batch_size", "8"], "batch_size", 8),
        (["--cells", "5"], "space.cells", 5),
        (["--space.cells", "5"], "space.cells", 5),
        (["--space.head-norm=false"], "space.head_norm", False),
        (["--space.head_norm", "no"], "space.head_norm", False),
        (["--no-space.head_norm"], "space.head_norm", False),
        (["--space.no-head-norm"], "space.head_norm", False),
        (["--overwrite"], "run.overwrite", True),
        (["--overwrite", "--seed", "1"], "run.overwrite", True),
        (["--no-overwrite"], "run.overwrite", False),
        (["--tensorboard"], "run.tensorboard", True),
        (["--data", "digits"], "data.source", "digits"),
        (["--data-dir", "/x"], "run.data_dir", "/x"),
        (["--devices", "2"], "run.devices", "2"),
        (["--dtype", "bfloat16"], "dtype", "bfloat16"),
        (["--precision", "tf32"], "precision", "tf32"),
        (["--checkpoint-every", "2"], "run.checkpoint_every", 2),
        (["--checkpoint-minutes", "0.5"], "run.checkpoint_minutes", 0.5),
        (["--steps-per-dispatch", "1"], "run.steps_per_dispatch", 1),
        (["--time-limit", "2"], "run.time_limit", 2.0),
        (["--progress", "off"], "run.progress", "off"),
        (["--weight-tx", "t.py:make"], "weights.transform", "t.py:make"),
        (["--arch-tx", "t.py:make"], "arch.transform", "t.py:make"),
        (["--arch.learning-rate", "1e-3"], "arch.learning_rate", 0.001),
        (["--weights.clip_norm", "inf"], "weights.clip_norm", float("inf")),
        (["--space.ops", "skip_connect,sep_conv_3x3"], "space.ops", ("skip_connect", "sep_conv_3x3")),
        (["--method.options.lambda1", "10"], "method.options.lambda1", 10.0),
        (["--method.lambda1", "10"], "method.options.lambda1", 10.0),
        (["--method.a", "-2e-1"], "method.options.a", -0.2),
        (["--method.tau-max", "1"], "method.options.tau_max", 1.0),
        (["--method.straight-through"], "method.options.straight_through", True),
        (["--method.straight_through=true"], "method.options.straight_through", True),
        (["--method.no-distinct-inputs"], "method.options.distinct_inputs", False),
        (["--no-method.options.distinct_inputs"], "method.options.distinct_inputs", False),
        (["--strategy", "darts"], "method.strategy", "darts"),
        (["--method.strategy", "darts"], "weights.nesterov", False),
    ],
)
def test_a_flag_reaches_its_field(search, words, path, value):
    assert cli.main(["search", *words]) == 0
    found = schema.get(search.config, path)
    assert found == value
    assert type(found) is type(value)
    if words and path != "weights.nesterov":
        assert search.sources[path] == "flag"


def test_every_field_has_a_flag():
    for path, _, _ in schema.fields(SearchConfig):
        if path != "method.options":
            value = ["x"] if path == "method.transforms" else "x"  # of these there may be several
            assert split([f"--{path}=x"], SEARCH)[:2] == ({path: value}, [])
            assert split([f"--{path.replace('_', '-')}", "x"], SEARCH)[:2] == ({path: value}, [])
    assert set(SEARCH.aliases.values()) <= {path for path, _, _ in schema.fields(SearchConfig)}


def test_ops_from_a_file(search, tmp_path):
    (tmp_path / "ops.json").write_text('["sep_conv_3x3", "skip_connect"]')
    assert cli.main(["search", "--space.ops", "ops.json"]) == 0
    assert search.config.space.ops == ("sep_conv_3x3", "skip_connect")
    assert search.config.space.edge_ops == ()


@pytest.mark.parametrize("flag", ["--space.ops", "--space.edge_ops"])
def test_ops_an_edge_from_a_file(search, tmp_path, flag):
    normal, reduce = [["sep_conv_3x3", "none"], ["skip_connect"]], [["none", "skip_connect"], ["dil_conv_3x3"]]
    (tmp_path / "s.json").write_text(json.dumps({"normal": normal, "reduce": reduce}))
    assert cli.main(["search", flag, "s.json", "--space.nodes", "1"]) == 0
    assert search.config.space.edge_ops == (
        (("sep_conv_3x3", "none"), ("skip_connect",)),
        (("none", "skip_connect"), ("dil_conv_3x3",)),
    )
    union = ("none", "skip_connect", "sep_conv_3x3", "dil_conv_3x3")
    assert search.config.space.ops == (union if flag == "--space.ops" else OPS)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "space.ops: cannot read 's.json': No such file or directory"),
        ("{", "space.ops: 's.json' is not JSON"),
        ('{"normal": []}', "space.ops: 's.json' holds something else; allowed: a list of names, or"),
        ('{"normal": [], "reduce": [["none", 3]]}', "space.ops: 's.json' holds something else"),
        ("[3]", "space.ops[0]: 3 is not possible; allowed: a text"),
        ('{"normal": [["none", "skip_connect"]], "reduce": [["none"]]}', "space.edge_ops.normal: 1 is not possible"),
    ],
)
def test_a_wrong_ops_file_is_one_line(search, capsys, tmp_path, content, line):
    if content is not None:
        (tmp_path / "s.json").write_text(content)
    assert _error(capsys, ["search", "--space.ops", "s.json"]).startswith(line)
    assert search.config is None


# Errors


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "no command; allowed: search | "),
        (["serch"], "command: unknown value 'serch'; did you mean 'search'?"),
        (["search", "--epoch", "3"], "flag: unknown --epoch; did you mean --epochs?"),
        (["search", "--space.cels=3"], "flag: unknown --space.cels; did you mean --space.cells?"),
        (["search", "--pres", "paper"], "flag: unknown --pres; did you mean --preset?"),
        (["search", "--wrkdir", "x"], "flag: unknown --wrkdir; did you mean --workdir?"),
        (["search", "--zzzzzz"], "flag: unknown --zzzzzz; (prdarts search --help lists all)"),
        (["search", "--no-epochs"], "epochs: --no-epochs takes no value; allowed: a true | false field"),
        (["search", "--seed"], "seed: --seed needs a value"),
        (["search", "--seed", "--cells", "5"], "seed: --seed needs a value"),
        (["search", "--preset"], "argument --preset: expected one argument"),
        (["search", "--preset", "papr"], "preset: unknown value 'papr'; did you mean 'paper'?"),
        (["search", "digits"], "unexpected 'digits'"),
        (["search", "--strategy", "dartz"], "method.strategy: unknown value 'dartz'; did you mean 'darts'?"),
        (["search", "--strategy", "absent.py:make"], "method.strategy: no file 'absent.py'"),
        (["search", "--method.lamda1", "1"], "method.options.lamda1: unknown value 'lamda1'; did you mean 'lambda1'?"),
        (["search", "--method.lambda1"], "method.options.lambda1: True is not possible; allowed: a number"),
        (["search", "--cells", "2"], "space.cells: 2 is not possible; allowed: >= 3"),
        (["search", "--epochs", "0"], "epochs: 0 is not possible; allowed: >= 1"),
        (["search", "--epochs", "x"], "epochs: 'x' is not possible; allowed: a whole number"),
        (["search", "--overwrite", "maybe"], "run.overwrite: 'maybe' is not possible; allowed: true | false"),
        (["search", "--data", "cifar"], "data.source: 'cifar' is not a source; allowed: digits | tfds:NAME"),
        (["search", "--batch-size", "9", "--devices", "2"], "batch_size: 9 is not possible; allowed: a multiple of 2"),
        (["search", "--json"], "flag: --json goes with --print-config"),
        (["derive"], "the following arguments are required: WORKDIR"),
        (["derive", "absent"], "WORKDIR: no directory 'absent'"),
        (["report", "absent"], "WORKDIR: no directory 'absent'"),
        (["report", "--ot", "x", "y"], "flag: unknown --ot; did you mean --out?"),
        (["strategies", "more"], "unexpected 'more'"),
        (["zoo", "PRDART"], "genotype: unknown value 'PRDART'; did you mean 'PRDARTS'?"),
        (["data", "fetch", "x"], "argument action: invalid choice: 'fetch'"),
        (
            ["data", "prepare", "cifar", "--archive", "a", "--data-dir", "d"],
            "NAME: unknown value 'cifar'; did you mean",
        ),
        (["data", "prepare", "cifar10", "--archive", "a", "--data-dir", "d"], "--archive: no file 'a'"),
    ],
)
def test_a_mistake_is_one_line_with_status_2_and_leaves_nothing(search, capsys, tmp_path, words, line):
    assert _error(capsys, words).startswith(line)
    assert search.config is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (RunError("val_loss: NaN at step 7"), 1, "val_loss: NaN at step 7"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 1, "runs/x: No space left on device (free some"),
        (KeyError("two\nlines"), 1, "internal: KeyError: "),
    ],
)
def test_a_failed_run_is_one_line(search, capsys, monkeypatch, error, status, line):
    monkeypatch.delenv("PRDARTS_TRACEBACK", raising=False)
    search.error = error
    assert _error(capsys, ["search"], status).startswith(line)


def test_the_traceback_of_an_internal_error_on_request(search, capsys, monkeypatch):
    search.error = ZeroDivisionError("oops")
    assert "PRDARTS_TRACEBACK=1" in _error(capsys, ["search"], 1)
    monkeypatch.setenv("PRDARTS_TRACEBACK", "1")
    assert cli.main(["search"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


# The end of a search


@pytest.mark.parametrize(
    ("status", "signum", "code", "said"),
    [
        ("finished", None, 0, "report: "),
        ("already-finished", None, 0, "--overwrite"),
        ("time-limit", None, 0, "to go on: prdarts search --seed 3"),
        ("interrupted", signal.SIGINT, 130, "to go on: prdarts search --seed 3"),
        ("interrupted", signal.SIGTERM, 143, "to go on: prdarts search --seed 3"),
    ],
)
def test_status_of_a_search(search, capsys, status, signum, code, said):
    search.status, search.signum = status, signum
    assert cli.main(["search", "--seed", "3"]) == code
    out = capsys.readouterr().out
    assert said in out
    assert (PRDARTS.to_json() in out) == (status != "interrupted")
    assert (f"report: {search.workdir / 'report.html'}" in out) == (status != "interrupted")


@pytest.mark.parametrize("status", ["time-limit", "already-finished"])
@pytest.mark.parametrize(
    "flags",
    [
        ["--time-limit", "2"],
        ["--time-limit=2", "--overwrite"],
        ["--time_limit", "2", "--run.overwrite=true"],
        ["--run.time_limit", "2", "--overwrite", "true"],
        ["--run.time-limit=2", "--no-overwrite"],
    ],
)
def test_what_is_for_one_start_is_not_suggested_again(search, capsys, status, flags):
    search.status = status
    assert cli.main(["search", "--preset", "digits", *flags, "--seed", "3", "--no-data.flip"]) == 0
    said = capsys.readouterr().out.splitlines()[0].removesuffix(" --overwrite")
    assert said.endswith(": prdarts search --preset digits --seed 3 --no-data.flip")


def test_the_diagram_is_named(search, capsys, tmp_path):
    (tmp_path / "w" / "plots").mkdir(parents=True)
    (tmp_path / "w" / "plots" / "genotype.svg").touch()
    assert cli.main(["search", "--workdir", "w"]) == 0
    assert "diagram: w/plots/genotype.svg" in capsys.readouterr().out


def test_default_workdir_names_preset_and_seed(search):
    assert cli.main(["search"]) == 0
    assert search.workdir == Path("runs/search-paper-seed0")
    assert cli.main(["search", "--preset", "digits", "--seed=4"]) == 0
    assert search.workdir == Path("runs/search-digits-seed4")
    assert search.config.run.workdir == "runs/search-digits-seed4"
    assert cli.main(["search", "--workdir", "here"]) == 0
    assert search.workdir == Path("here")


def test_the_compilation_cache_is_the_users_unless_he_says_otherwise(search, monkeypatch):
    names = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    for name in names:
        monkeypatch.setenv(name, "")  # so that monkeypatch restores what the command sets
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cli.main(["search"]) == 0
    assert os.environ[names[0]] == "/somewhere/prdarts_jax/jax"
    assert float(os.environ[names[1]]) <= 1
    monkeypatch.setenv(names[0], "/mine")
    assert cli.main(["search"]) == 0
    assert os.environ[names[0]] == "/mine"


# Printing


def test_print_config_as_json_is_complete_and_runs_nothing(search, capsys, tmp_path):
    assert cli.main(["search", "--preset", "released", "--cells", "5", "--print-config", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    options = {path for path in shown if path.startswith("method.options.")}
    assert set(shown) - options == {path for path, _, _ in schema.fields(SearchConfig)} - {"method.options"}
    assert shown["space.cells"] == {"value": 5, "source": "flag"}
    assert shown["method.options.hinge"] == {"value": 0.2, "source": "preset released"}
    assert shown["arch.beta1"] == {"value": 0.5, "source": "strategy prdarts (released program)"}
    assert search.config is None
    assert list(tmp_path.iterdir()) == []


def test_print_config_as_text_has_a_line_a_value(search, capsys):
    assert cli.main(["search", "--preset=digits", "--print-config"]) == 0
    rows = {}
    for line in capsys.readouterr().out.splitlines():
        path, _, rest = line.partition(" = ")
        value, _, source = rest.rpartition("  # ")
        rows[path.strip()] = (value.strip(), source)
    assert rows["data.flip"] == ("false", "preset digits")
    assert rows["space.ops"] == (",".join(OPS), "default (DARTS)")
    assert rows["method.options.lambda1"] == ("0.01", "default (paper)")
    assert rows["run.workdir"] == ("runs/search-digits-seed0", "default (ours)")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--method.options.tau_max=-1"], "method.options.tau_max: -1.0 is not possible; allowed: "),
        (["--method.options.executed_ops=9"], "method.options.executed_ops: 9 is not possible; allowed: 1 to 8"),
        (["--strategy=darts", "--method.options.init_scale=inf"], "method.options.init_scale: inf is not possible"),
        (["--space.ops=none,skip"], "space.ops"),
    ],
)
def test_print_config_refuses_a_method_or_space_that_the_search_would_refuse(search, capsys, flags, said):
    assert cli.main(["search", "--preset=digits", "--print-config", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert captured.err.count("\n") == 1


def test_help_has_a_line_a_field_with_default_and_comment(capsys):
    assert cli.main(["search", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    comments = schema.comments(SearchConfig)
    for path, comment in comments.items():
        if path == "method.options":
            continue
        shown = [line for line in lines if comment in line and path.replace("_", "-") in line.replace("_", "-")]
        assert len(shown) == 1, path
    assert any("--cells, --space.cells" in line and "(default: 8)" in line for line in lines)
    for preset in ("paper", "released", "digits", "cifar10-small"):
        assert any(line.strip().startswith(preset) for line in lines)


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([name, "--help"] for name in commands._COMMANDS)])
def test_help_of_every_command(capsys, words):
    assert cli.main(words) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "prdarts" in captured.out


def test_help_errors_and_import_leave_jax_alone():
    code = (
        "import sys, prdarts_jax\n"
        "from prdarts_jax import cli, SearchConfig\n"
        "dir(prdarts_jax)\n"
        "mistakes = (['search', '--epoch', '1'], ['search', '--preset', 'papr'], ['report', 'absent'])\n"
        "got = [cli.main(words) for words in (['--help'], ['search', '--help'], *mistakes)]\n"
        "assert got == [0, 0, 2, 2, 2], got\n"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_python_m_returns_the_status():
    done = subprocess.run([sys.executable, "-m", "prdarts_jax", "serch"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("prdarts: error: command: ")


def test_public_names():
    assert prdarts_jax.Genotype is Genotype
    assert set(prdarts_jax.__all__) <= set(dir(prdarts_jax))
    assert prdarts_jax.optimizers.weight_transform is not None
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        prdarts_jax.absent
    assert not hasattr(prdarts_jax, "__wrapped__")
