"""Where a command is run: closed streams, a poor encoding, no home, a window backend, no device, other settings."""

from __future__ import annotations

import io
import json
import os
import pwd
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import search_cases
from search_cases import words

from prdarts_jax import cli
from prdarts_jax.config import schema
from prdarts_jax.config.places import absolute, cache_folder, expanded
from prdarts_jax.config.search import SearchConfig
from prdarts_jax.config.train import TrainConfig
from prdarts_jax.data import cache, sources
from prdarts_jax.devices import sharding
from prdarts_jax.errors import UserError
from prdarts_jax.report import plots
from prdarts_jax.run import provenance
from prdarts_jax.run.output import Steady, steady
from prdarts_jax.run.progress import Progress
from prdarts_jax.run.workdir import atomic_write_json
from prdarts_jax.space.genotype import Genotype

PRDARTS = [sys.executable, "-m", "prdarts_jax"]


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    return search_cases.write_npz(tmp_path_factory.mktemp("data") / "digits.npz")


# Streams


def _ascii() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")


def _bytes(stream: io.TextIOWrapper) -> bytes:
    stream.flush()
    return stream.buffer.getvalue()  # type: ignore[attr-defined]


def test_a_name_that_the_stream_cannot_spell_is_escaped():
    stream = _ascii()
    print("Möwe \u540d \udcff", file=Steady(stream))
    assert _bytes(stream) == rb"M\xf6we \u540d \udcff" + b"\n"


def test_a_broken_pipe_is_said_once_and_holds_nothing_back():
    """What the stream still holds must not fail again when the interpreter flushes it: that is exit status 120."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8") as stream:
        out = Steady(stream)
        for _ in range(3):
            print("x", file=out, flush=True)
        assert isinstance(out.lost, BrokenPipeError)
    # Closing the stream, which flushed it, raised nothing.


@pytest.mark.parametrize("closed", [None, "closed"])
def test_no_stream_at_all(closed):
    stream = None
    if closed:
        stream = _ascii()
        stream.close()
    out = Steady(stream)
    print("x", file=out, flush=True)
    assert not out.isatty()
    with Progress(3, enabled="auto", stream=out) as progress:
        progress.update(1, loss=1.0)
        progress.epoch_line("epoch 0")


def test_the_streams_of_the_caller_are_put_back():
    before = sys.stdout, sys.stderr
    with pytest.raises(ZeroDivisionError), steady():
        raise ZeroDivisionError
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.parametrize(
    ("redirections", "status", "said"),
    [
        ("2>&-", 0, ""),
        (">&-", 0, ""),
        ("<&- >&- 2>&-", 0, ""),
        (">/dev/full", 1, "prdarts: error: stdout: No space left on device; what was printed is lost\n"),
        ("| head -n 1", 0, ""),
    ],
)
def test_a_short_command_and_its_streams(redirections, status, said):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    line = f"set -o pipefail; '{sys.executable}' -m prdarts_jax strategies {redirections}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, said)


def test_a_file_never_gets_the_number_of_a_closed_stream(tmp_path):
    """Else what XLA writes for people on descriptor 2 would be written into it."""
    code = """
        import os, sys
        from prdarts_jax.run.output import steady
        with steady(), open(sys.argv[1], "w") as file:
            file.write(str(file.fileno()))
    """
    command = f"'{sys.executable}' -c \"$CODE\" {tmp_path}/n <&- >&- 2>&-"
    subprocess.run(["bash", "-c", command], env={**os.environ, "CODE": textwrap.dedent(code)}, check=True)
    assert int((tmp_path / "n").read_text()) > 2


@pytest.mark.slow
def test_a_run_that_nobody_reads_in_an_environment_of_a_notebook(npz, tmp_path):
    """The reader of stdout is gone, stderr is closed, the backend of the notebook is absent: it finishes with 0."""
    reading, writing = os.pipe()
    os.close(reading)
    workdir = tmp_path / "wörk"
    environment = os.environ | {
        "MPLBACKEND": "module://absent.backend_inline",
        "PYTHONIOENCODING": "ascii:strict",
        "PWD": str(tmp_path),
    }
    line = shlex.join([*PRDARTS, *words(workdir, npz), "--run.progress=lines"]) + " 2>&-"
    done = subprocess.run(["bash", "-c", line], stdout=writing, env=environment)
    os.close(writing)
    assert done.returncode == 0
    assert (workdir / "genotype.json").is_file()
    assert "<svg" in (workdir / "report.html").read_text(encoding="utf-8")
    assert len(list((workdir / "plots").iterdir())) == 4

    done = subprocess.run([*PRDARTS, *words(workdir, npz)], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert rb"w\xf6rk/report.html" in done.stdout


# Pictures


def test_matplotlib_is_imported_whatever_backend_is_named():
    """A backend that can be had is matplotlib's afterwards, for the figures of the caller."""
    code = "from prdarts_jax.report import plots; import os, matplotlib; print(os.environ['MPLBACKEND'], {})"
    for named, shown in (("module://absent.inline", "0"), ("svg", "matplotlib.rcParams['backend']")):
        environment = os.environ | {"MPLBACKEND": named}
        command = [sys.executable, "-c", code.format(shown)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.stdout.split() == [named, "0" if shown == "0" else named], done.stderr


def test_the_style_of_the_user_changes_no_picture():
    import matplotlib

    expected = plots.to_svg(plots.cell_diagram(Genotype.named("PRDARTS")))
    with matplotlib.rc_context({"text.usetex": True, "font.size": 30.0, "axes.edgecolor": "red"}):
        assert plots.to_svg(plots.cell_diagram(Genotype.named("PRDARTS"))) == expected


# No home


def test_a_user_without_a_home_has_no_cache_and_goes_on(monkeypatch, tmp_path):
    def no_account(_: int) -> None:
        raise KeyError

    for name in ("HOME", "XDG_CACHE_HOME", "TFDS_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_account)
    assert cache_folder("data") is None
    digits = sources._load_digits()
    assert cache.cached("digits", "0" * 64, lambda: digits) is digits
    with pytest.raises(UserError, match=r"run.data_dir: '~/tensorflow_datasets' is in no known home directory"):
        sources.find("tfds:cifar10")
    with pytest.raises(UserError, match=r"^data.source: '~/a.npz' is in no known home"):
        sources.load("npz:~/a.npz")
    assert expanded(tmp_path, "workdir") == tmp_path


def test_kernels_are_compiled_where_no_folder_can_keep_them(monkeypatch, tmp_path):
    from prdarts_jax.ops import kernels

    made: list[Path] = []

    def load(path: str) -> str:
        if Path(path) not in made:
            raise OSError("no such file")
        return path

    monkeypatch.setattr(kernels, "_compile", lambda compiler, target: made.append(target))
    monkeypatch.setattr(kernels.ctypes, "CDLL", load)
    monkeypatch.setattr(kernels, "_compiler", lambda: "c++")
    monkeypatch.setattr(kernels, "_digest", lambda _: "abc")
    (tmp_path / "file").touch()
    for folder in (None, tmp_path / "file" / "kernels"):
        monkeypatch.setattr(kernels, "cache_folder", lambda _, folder=folder: folder)
        assert kernels._library() == (str(made[-1]), "abc")
    assert [path.name for path in made] == ["abc.so"] * 2
    assert not any(path.is_relative_to(tmp_path) for path in made)


# Devices


@pytest.mark.parametrize("platform", ["cuda", "tpu", "nothing"])
def test_no_usable_device_is_one_line(platform, tmp_path):
    """The kind of error differs by platform, and for CUDA without a GPU JAX says nothing."""
    import jax

    if platform in {device.platform for device in jax.devices()}:
        pytest.skip(f"there is a {platform} here")
    command = [*PRDARTS, "search", "--preset", "digits", "--workdir", str(tmp_path / "w")]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": platform}, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"prdarts: error: JAX_PLATFORMS: '{platform}' cannot be used here: ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_driver_that_fails_is_one_line_with_what_jax_says(monkeypatch):
    import jax

    def fails() -> None:
        raise RuntimeError("Unable to initialize backend 'cuda': INTERNAL: CUDA driver version is\n insufficient")

    monkeypatch.setattr(jax, "devices", fails)
    with pytest.raises(UserError, match=r"backend 'cuda': INTERNAL: CUDA driver version is insufficient; allowed: "):
        sharding.visible()


# Settings of JAX


@pytest.mark.parametrize(
    ("name", "value", "redrawn"),
    [
        ("jax_default_matmul_precision", "bfloat16", False),
        ("jax_disable_jit", True, False),
        ("XLA_FLAGS", "--xla_cpu_enable_fast_math=true", False),
        ("jax_default_prng_impl", "rbg", True),
        ("jax_threefry_partitionable", False, True),
    ],
)
def test_a_setting_that_changes_numbers_is_recorded_and_said(monkeypatch, name, value, redrawn):
    import jax

    monkeypatch.delenv("XLA_FLAGS", raising=False)
    before = {"jax": provenance.settings()}
    if name == "XLA_FLAGS":
        monkeypatch.setenv(name, f"{value} --xla_force_host_platform_device_count=3")
        after = {"jax": provenance.settings()}
    else:
        former = getattr(jax.config, name)
        jax.config.update(name, value)
        try:
            after = {"jax": provenance.settings()}
        finally:
            jax.config.update(name, former)
    assert after["jax"][name] == value
    assert json.loads(json.dumps(after)) == after
    for old in (before, {}):  # a config.json of an earlier version says nothing: then the defaults were used
        assert bool(provenance.other_draws(old, after)) == redrawn
        assert bool(provenance.tolerance(old, after)) != redrawn
    assert not provenance.tolerance(before, before) and not provenance.other_draws(before, before)


def test_a_resumed_search_says_which_setting_differs(npz, tmp_path, capsys):
    import jax

    command = words(tmp_path / "w", npz)
    with search_cases.shared_programs(stub=True):
        assert cli.main([*command, "--run.time_limit=1e-9"]) == 0
        for name, value, said in (
            ("jax_default_matmul_precision", "highest", "to float tolerance only"),
            ("jax_default_prng_impl", "rbg", "an uninterrupted search: other random numbers are drawn from here on"),
        ):
            former = getattr(jax.config, name)
            jax.config.update(name, value)
            capsys.readouterr()
            try:
                assert cli.main([*command, "--run.time_limit=1e-9"]) == 0
            finally:
                jax.config.update(name, former)
            out = capsys.readouterr().out
            assert said in out and f"{name} {former} -> {value}" in out and "bit for bit" not in out
        # Back at the settings it began with: what was computed in between stays what it is.
        assert cli.main([*command, "--run.time_limit=1e-9"]) == 0
        out = capsys.readouterr().out
        assert "other random numbers were drawn on the way here (jax_default_prng_impl threefry2x32 -> rbg; " in out
        assert "jax_default_matmul_precision None -> highest" in out
    config = json.loads((tmp_path / "w" / "config.json").read_text())
    config["jax"]["jax_enable_x64"] = True
    (tmp_path / "w" / "config.json").write_text(json.dumps(config))
    search_cases.one_error(capsys, command, 2, "another search (jax_enable_x64: True in the workdir, False now)")


# Paths


def test_every_path_of_a_config_means_the_same_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    search = schema.replace(
        SearchConfig(),
        {
            "data.source": "folder:images",
            "run.workdir": "runs/w",
            "run.data_dir": "~/tfds",
            "space.primitives": "mine.py",
            "method.strategy": "mine.py:factory",
            "weights.transform": "../tx.py:make",
            "arch.transform": "/abs/tx.py:make",
        },
    )
    found = absolute(search)
    assert found.data.source == f"folder:{tmp_path}/images"
    assert (found.run.workdir, found.run.data_dir) == (f"{tmp_path}/runs/w", "/home/me/tfds")
    assert found.space.primitives == f"{tmp_path}/mine.py"
    assert found.method.strategy == f"{tmp_path}/mine.py:factory"
    assert found.weights.transform == f"{tmp_path}/../tx.py:make"
    assert found.arch.transform == "/abs/tx.py:make"
    train = schema.replace(TrainConfig(), {"network.primitives": "ops.py", "data.source": "npz:a:b.npz"})
    found = absolute(train)
    assert found.network.primitives == f"{tmp_path}/ops.py"
    assert found.data.source == f"npz:{tmp_path}/a:b.npz"
    for untouched in (SearchConfig(), TrainConfig(), schema.replace(SearchConfig(), {"method.strategy": "argument:f"})):
        assert absolute(untouched) == untouched


def test_a_name_that_is_no_utf8_is_kept(tmp_path):
    name = os.fsdecode(b"w\xff")
    atomic_write_json(tmp_path / "config.json", {"workdir": name, "ö": "ö"})
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) == {"workdir": name, "ö": "ö"}
