"""Genotypes as people have them: what other programs print and save, and what is said of text that is none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from prdarts_jax.errors import UserError
from prdarts_jax.space.genotype import Genotype

# A cell that no two forms can confuse: every node has another pair, every pair another input or operation.
NORMAL = (
    (("skip_connect", 0), ("sep_conv_3x3", 1)),
    (("dil_conv_5x5", 2), ("sep_conv_5x5", 0)),
    (("max_pool_3x3", 1), ("dil_conv_3x3", 3)),
    (("avg_pool_3x3", 4), ("skip_connect", 2)),
)
REDUCE = tuple(tuple(reversed(node)) for node in NORMAL)
CELL = Genotype(NORMAL, (2, 3, 4, 5), REDUCE, (3, 4, 5))
THEIRS = {"sep_conv_3x3": "dua_sepc_3x3", "sep_conv_5x5": "dua_sepc_5x5", "dil_conv_3x3": "dil_sepc_3x3"}
THEIRS["dil_conv_5x5"] = "dil_sepc_5x5"


def weighted(cell: tuple, weight: str = "0.126", index: str = "{}", names: dict | None = None) -> str:
    """A cell with weights, as a search of AutoDL-Projects prints it."""
    pairs = [[f"('{(names or {}).get(op, op)}', {index.format(source)}, {weight})" for op, source in n] for n in cell]
    return f"[{', '.join('(' + ', '.join(node) + ')' for node in pairs)}]"


def printed(**how: object) -> str:
    normal, reduce = (weighted(cell, **how) for cell in (NORMAL, REDUCE))  # type: ignore[arg-type]
    return f"{{'normal': {normal}, 'normal_concat': [2, 3, 4, 5], 'reduce': {reduce}, 'reduce_concat': range(3, 6)}}"


LISTS = {field: getattr(CELL, field) for field in ("normal", "normal_concat", "reduce", "reduce_concat")}
CALL = ", ".join(f"{field}={value!r}" for field, value in LISTS.items())
FORMS = {
    "a dict with weights": printed(),
    "at the end of a log line": f"[2020-11-02 10:11:12] <<<--->>> The 49-th epoch : {printed()}\n[2020-11-02] lr=(0.1",
    "NumPy's weights": printed(weight="np.float32(0.126)"),
    "NumPy's indices": printed(index="np.int64({})"),
    "a tensor's weights": printed(weight="tensor(0.126)"),
    "small, negative and missing weights": printed(weight="-1e-3")
    .replace("-1e-3", "nan", 1)
    .replace("-1e-3", "-inf", 1),
    "a tensor's weights with their gradients": printed(weight="tensor(0.1260, grad_fn=<SelectBackward0>)"),
    "an array's weights": printed(weight="Array(0.126, dtype=float32)"),
    "NumPy's strings": printed().replace("'skip_connect'", "np.str_('skip_connect')"),
    "strings of Python 2": printed().replace("'normal", "u'normal").replace("'reduce", "u'reduce"),
    "AutoDL's names of operations": printed(names=THEIRS),
    "AutoDL's Genotype": f"Genotype({CALL}, connectN=None, connects=None)",
    "connections first": f"Genotype(connects=None, connectN=None, {CALL})",
    "dict(...)": f"dict({CALL})",
    "OrderedDict": f"OrderedDict({list(LISTS.items())!r})",
    "OrderedDict of Python 3.12": f"collections.OrderedDict({LISTS!r})",
    "a Genotype of a dict": f"Genotype(**{LISTS!r})",
    "another order": str(dict(reversed(LISTS.items()))),
    "arrays": f"dict(normal={NORMAL}, reduce={REDUCE}, normal_concat=np.arange(2, 6), reduce_concat=array([3, 4, 5]))",
    "a flat list with weights": "Genotype(normal=["
    + ", ".join(f"('{op}', {s}, 0.5)" for node in NORMAL for op, s in node)
    + f"], normal_concat=range(2, 6), reduce={REDUCE!r}, reduce_concat=[3, 4, 5])",
    "JSON without a version": json.dumps(LISTS),
    "JSON in a row of a log": json.dumps({"epoch": 3, "best": None, "genotype": LISTS}),
    "JSON with weights": json.dumps(LISTS | {"normal": [[[*pair, 0.5] for pair in node] for node in NORMAL]}),
    "JSON of AutoDL": json.dumps(LISTS | {"connectN": None, "connects": None}),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_others_print_is_read(tmp_path: Path, form: str) -> None:
    text = FORMS[form]
    assert Genotype.from_text(text) == CELL
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):  # as Windows writes it
        (tmp_path / "cell.txt").write_text(text, encoding=encoding)
        assert Genotype.load(tmp_path / "cell.txt") == CELL
    if "\n" not in text and text.startswith(("{", "Genotype", "dict", "collections", "Ordered")):
        assert Genotype.load(text) == CELL  # on the command line


def test_our_json_is_read_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "g.json").write_text(CELL.to_json(indent=1), encoding="utf-8-sig")
    assert Genotype.load(tmp_path / "g.json") == Genotype.from_json("\ufeff" + CELL.to_json()) == CELL


def test_our_own_json_keeps_names_of_operations() -> None:
    """An operation of the user may bear the name that another program has for one of ours."""
    node = [[("dua_sepc_3x3", 0)]]
    mine = Genotype(node, [2], node, [2])  # type: ignore[arg-type]
    assert Genotype.from_json(mine.to_json()) == mine


# Several in one file

OTHER = Genotype.named("PDARTS")
SEVERAL = f"""from collections import namedtuple
Genotype = namedtuple('Genotype', 'normal normal_concat reduce reduce_concat')
FIRST = Genotype({CALL})
SECOND : dict = genotypes.{OTHER!r}
BEST = SECOND

def derive(gene):
    return Genotype(normal=gene, normal_concat=concat, reduce=gene, reduce_concat=concat)
"""


def test_one_of_several_is_chosen_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "genotypes.py"
    path.write_text(SEVERAL)
    with pytest.raises(
        UserError, match="2 different ones in the text: FIRST, SECOND; allowed: one of them, as FILE:NAME"
    ):
        Genotype.load(path)
    assert Genotype.load(f"{path}:FIRST") == Genotype.load(f"{path}:3") == CELL
    assert Genotype.load(f"{path}:SECOND") == Genotype.load(f"{path}:BEST") == OTHER
    with pytest.raises(UserError, match="unknown value 'FRIST'; did you mean 'FIRST'\\? allowed: FIRST"):
        Genotype.load(f"{path}:FRIST")
    with pytest.raises(UserError, match="no file or workdir"):
        Genotype.load(f"{tmp_path}/absent.py:FIRST")
    (tmp_path / "all.json").write_text(json.dumps({"a": LISTS, "b": json.loads(OTHER.to_json())}))
    assert Genotype.load(f"{tmp_path}/all.json:a") == CELL
    assert Genotype.load(f"{tmp_path}/all.json:b") == OTHER


def test_one_of_the_epochs_of_a_log_is_chosen_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text(f"epoch 0\ngenotype = {OTHER!r}\ngenotype = {OTHER!r}\nepoch 2\ngenotype = Genotype({CALL})\n")
    with pytest.raises(UserError, match=r"2 different ones in the text: 2, 5; .*\(the last begins in line 5\)"):
        Genotype.load(path)
    assert Genotype.load(f"{path}:5") == CELL
    assert Genotype.load(f"{path}:2") == Genotype.load(f"{path}:3") == OTHER


# What is none

NNI = {"normal_n2_p0": "sepconv3x3", "normal_n2_switch": ["normal_n2_p0"], "reduce_n2_p0": "skipconnect"}
NNI_2 = {"normal/op_2_0": "sep_conv_3x3", "normal/input_2_0": [0], "reduce/op_2_0": "skip_connect"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (json.dumps(NNI), "an export of NNI"),
        (json.dumps(NNI_2, indent=1), "an export of NNI"),
        ("|nor_conv_3x3~0|+|skip_connect~0|none~1|", "a cell of NAS-Bench-201"),
        ("", "the text is empty"),
        (
            "hello",
            "the text lacks normal, normal_concat, reduce, reduce_concat; allowed: Genotype(...), a dict or JSON",
        ),
        ('{"schema_version": 1, "kind": "search"}', "unknown value 'kind'"),
        ('{"kind": "search"}', "the text lacks normal"),
        ('{"normal": [[["none", 0]]], "normal_concat": [2]}', "genotype.reduce: missing"),
        (f"x = {printed()[:-9]}", "is not a complete Python call or dict"),
        (f"x = {{'epoch': 3, {printed()[1:]}", "unknown value 'epoch'"),
        (CALL, "the text names the fields, but holds no call or dict"),
        (printed().replace("[2, 3, 4, 5]", "{2, 3, 4, 5}"), "'{2, 3, 4, 5}' is not possible"),
        (printed().replace("[2, 3, 4, 5]", "[2, 3, ...]"), "'...' is not possible"),
        (printed().replace("'skip_connect'", "b'skip_connect'"), "is not possible"),
        (f"Genotype({CALL}, connectN=3)", "genotype.connectN: connections beside"),
        ("Genotype(normal=gene, normal_concat=[2], reduce=gene, reduce_concat=[2])", "'gene' is not possible"),
        ("dict(normal=__import__('os').system('true'))", "is not possible"),
        (
            "{'normal': [(('a', 0, 'b'), ('c', 1))], 'normal_concat': [2], 'reduce': [], 'reduce_concat': [2]}",
            "not a pair",
        ),
    ],
)
def test_what_is_none_is_refused_by_what_it_lacks(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "cell.txt").write_text(text)
    with pytest.raises(UserError) as caught:
        Genotype.load(tmp_path / "cell.txt")
    assert said in str(caught.value) and "not JSON" not in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}/cell.txt: genotype")
    if text != "hello":  # which may be the name of a file
        with pytest.raises(UserError) as caught:
            Genotype.load(text)  # on the command line
        assert said in str(caught.value)


def test_a_word_longer_than_names_of_files_is_refused(tmp_path: Path) -> None:
    for word in ("x" * 300, f"{tmp_path}/{'x' * 300}", f"{tmp_path}/{'x' * 300}:NAME"):
        with pytest.raises(UserError, match=r"^genotype"):
            Genotype.load(word)


def test_on_the_command_line() -> None:
    command = [sys.executable, "-m", "prdarts_jax", "zoo", f"Genotype({CALL}, connectN=None)", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert Genotype.from_json(done.stdout) == CELL, done.stderr
