"""Objects from a user's file: what is loaded, its digest, and each mistake as one line."""

from __future__ import annotations

import functools
import hashlib
import sys

import pytest

from prdarts_jax.config import userfile
from prdarts_jax.errors import UserError


def _write(path, text):
    path.write_text(text)
    return path


def test_object_and_digest_of_its_source(tmp_path):
    path = _write(tmp_path / "mine.py", "def make():\n    return 41 + 1\n")
    made = userfile.load(f"{path}:make", "weights.transform")
    assert made.value() == 42
    assert made.digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_relative_paths_start_at_the_current_directory(tmp_path, monkeypatch):
    _write(tmp_path / "mine.py", "value = 'here'\n")
    monkeypatch.chdir(tmp_path)
    assert userfile.load("mine.py:value", "f").value == "here"


def test_an_edited_file_is_read_again_and_two_files_of_one_name_do_not_collide(tmp_path):
    (tmp_path / "other").mkdir()
    first = _write(tmp_path / "mine.py", "value = 1\n")
    second = _write(tmp_path / "other" / "mine.py", "value = 1\n")
    a, b = userfile.load(f"{first}:value", "f"), userfile.load(f"{second}:value", "f")
    assert a.digest == b.digest
    _write(first, "value = 2\n")
    edited = userfile.load(f"{first}:value", "f")
    assert edited.value == 2
    assert edited.digest != a.digest
    assert userfile.load(f"{second}:value", "f").value == 1


def test_two_names_of_one_file_share_it(tmp_path):
    path = _write(tmp_path / "mine.py", "class A: ...\ndef make(): return A()\n")
    made, kind = userfile.load(f"{path}:make", "f").value(), userfile.load(f"{path}:A", "g").value
    assert isinstance(made, kind)


def test_dataclasses_with_lazy_annotations_work(tmp_path):
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 3\n"
    )
    path = _write(tmp_path / "mine.py", text)
    assert userfile.load(f"{path}:A", "f").value().x == 3


def test_the_module_name_is_private(tmp_path):
    path = _write(tmp_path / "json.py", "value = __name__\n")
    name = userfile.load(f"{path}:value", "f").value
    assert name.startswith("_prdarts_user_")
    import json

    assert hasattr(json, "dumps")


@pytest.mark.parametrize("spec", ["mine.py", "mine.py:", ":make"])
def test_a_spec_without_file_or_name(spec):
    with pytest.raises(UserError, match=r"^method\.strategy: .* names no object; allowed: path\.py:name$"):
        userfile.load(spec, "method.strategy")


def test_no_such_file(tmp_path):
    with pytest.raises(UserError, match=r"weights\.transform: no file .*absent.py'$"):
        userfile.load(f"{tmp_path / 'absent.py'}:make", "weights.transform")


def test_no_such_name_lists_what_is_there(tmp_path):
    path = _write(tmp_path / "mine.py", "def make(): ...\n_hidden = 1\n")
    with pytest.raises(UserError, match=r"has no 'mak'; it has: make$"):
        userfile.load(f"{path}:mak", "f")


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("x = 1\ny = 1 / 0\n", 2, "ZeroDivisionError: division by zero"),
        ("x = 1\n\ndef f(:\n", 3, "SyntaxError: "),
        ("def f():\n    raise ValueError('two\\nlines')\nf()\n", 2, "ValueError: two lines"),
        ("import not_installed_anywhere\n", 1, "ModuleNotFoundError: No module named 'not_installed_anywhere'"),
    ],
)
def test_an_exception_in_the_file_names_its_line(tmp_path, text, line, said):
    path = _write(tmp_path / "mine.py", text)
    before = set(sys.modules)
    with pytest.raises(UserError) as error:
        userfile.load(f"{path}:f", "arch.transform")
    assert str(error.value).startswith(f"arch.transform: {path}:{line}: {said}")
    assert "\n" not in str(error.value)
    assert {name for name in set(sys.modules) - before if name.startswith("_prdarts_user_")} == set()


# --- the user's functions, called -------------------------------------------------------------------------------------

CODE = """
import json
from prdarts_jax.errors import UserError

def boom(**options):
    raise RuntimeError("boom " + ",".join(options))

def inside_a_library():
    return json.loads("{")

def refuses():
    raise UserError("mine: 3 is not possible; allowed: 4")

class Callable:
    def __call__(self, x):
        return x / 0
"""


def _said(function, *args, field="method.strategy", **kwargs):
    with pytest.raises(UserError) as error:
        userfile.call(function, *args, field=field, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_exception_of_a_function_names_its_line(tmp_path, monkeypatch):
    path = _write(tmp_path / "mine.py", CODE)
    mine = userfile.load_module(str(path), "f").value
    assert _said(mine.boom, tau=1) == f"method.strategy: {path}:6: RuntimeError: boom tau"
    assert _said(functools.partial(mine.boom, field=1)) == f"method.strategy: {path}:6: RuntimeError: boom field"
    assert _said(mine.inside_a_library).startswith(f"method.strategy: {path}:9: JSONDecodeError: ")
    assert _said(mine.Callable(), 1) == f"method.strategy: {path}:16: ZeroDivisionError: division by zero"
    assert _said(mine.inside_a_library, 3).startswith(f"method.strategy: {path}: TypeError: inside_a_library() takes 0")
    assert _said(mine.refuses) == "mine: 3 is not possible; allowed: 4"
    monkeypatch.chdir(tmp_path)
    assert _said(mine.boom, field="arch.transform") == "arch.transform: mine.py:6: RuntimeError: boom"


def test_the_field_is_that_of_the_file_the_exception_passed_last(tmp_path):
    first = userfile.load_module(str(_write(tmp_path / "a.py", "def f(g): return g()\n")), "a").value
    second = userfile.load_module(str(_write(tmp_path / "b.py", "def g(): return 1 / 0\n")), "b").value
    with (
        pytest.raises(UserError, match=r"^b: .*b\.py:1: ZeroDivisionError"),
        userfile.errors_of({"a": (first.f,), "b": (second.g,)}),
    ):
        first.f(second.g)
    with pytest.raises(UserError, match=r"^a \| b: KeyError: 3$"), userfile.errors_of({"a": first.f, "b": second.g}):
        {}[3]


def test_a_long_message_is_cut(tmp_path):
    mine = userfile.load_module(str(_write(tmp_path / "m.py", "def f(): raise ValueError('word ' * 500)\n")), "f").value
    said = _said(mine.f)
    assert "ValueError: word word" in said and said.endswith(" ...") and len(said) < 400 + len(str(tmp_path))
