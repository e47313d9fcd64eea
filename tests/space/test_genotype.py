"""Genotypes: the two text forms, the zoo, every error line, counts on cells worked out by hand."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from prdarts_jax.errors import UserError
from prdarts_jax.space import genotype, genotype_text
from prdarts_jax.space.genotype import Genotype, names

DARTS_V2_TEXT = """
DARTS_V2 = Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 1),
  ('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), ('dil_conv_3x3', 2)], normal_concat=[2, 3, 4, 5],
  reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1), ('max_pool_3x3', 0),
  ('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)], reduce_concat=range(2, 6))
"""
LOG = f"07/03 09:15:02 PM (loss 0.31) genotype = {DARTS_V2_TEXT.split('=', 1)[1].strip()}\n07/03 09:15:03 PM valid :) ("
NODE = [["skip_connect", 0]]


def fields(**changes: object) -> dict[str, object]:
    good = {"schema_version": 1, "normal": [NODE], "normal_concat": [2], "reduce": [NODE], "reduce_concat": [2]}
    return good | changes


@pytest.mark.parametrize("name", names())
def test_json_round_trip(name: str) -> None:
    g = Genotype.named(name)
    assert Genotype.from_json(g.to_json()) == g
    assert Genotype.from_json(json.loads(g.to_json(indent=2))) == g
    assert len({g, Genotype.from_json(g.to_json())}) == 1


def test_golden_counts_name_zoo_entries() -> None:
    golden = json.loads((Path(__file__).parents[1] / "golden_genotypes.json").read_text())
    assert golden and set(golden) <= set(names())


def test_zoo_holds_the_shapes_that_differ_from_darts() -> None:
    assert len(names()) == len(set(names())) == 25
    nasnet = Genotype.named("NASNet_A")
    assert len(nasnet.normal) == 5 and nasnet.reduce_concat == (4, 5, 6)
    assert nasnet.normal[3] == (("avg_pool_3x3", 0), ("avg_pool_3x3", 0))
    assert Genotype.named("FairDARTS_g").normal[1] == ()
    assert len(Genotype.named("BayesNAS_0.01").normal[0]) == 5
    assert Genotype.named("AmoebaNet_A").count("conv_7x1_1x7", "reduce") == 1


@pytest.mark.parametrize(
    "text", [DARTS_V2_TEXT, LOG, DARTS_V2_TEXT * 2, DARTS_V2_TEXT.replace("range", "list(range")[:-2] + "))"]
)
def test_text_form_equals_the_zoo(text: str) -> None:
    assert Genotype.from_text(text) == Genotype.named("DARTS_V2")


@pytest.mark.parametrize("name", names())
def test_nested_text_form(name: str) -> None:
    g = Genotype.named(name)
    nested = [list(map(list, cell)) for cell in (g.normal, g.reduce)]
    text = f"g.Genotype({nested[0]!r}, {g.normal_concat!r}, reduce={nested[1]!r}, reduce_concat={g.reduce_concat!r})"
    assert Genotype.from_text(text) == g


def test_text_is_never_evaluated(tmp_path: Path) -> None:
    victim = tmp_path / "made"
    with pytest.raises(UserError, match="is not possible in Genotype"):
        Genotype.from_text(f"Genotype(normal=[('none', 0), ('none', open({str(victim)!r}, 'w'))], normal_concat=[2])")
    assert not victim.exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{", "genotype: not JSON (line 1, column 2"),
        ("[]", "genotype: a JSON list; allowed: an object with schema_version, normal"),
        ({}, "genotype.normal: missing; allowed: all of normal, normal_concat, reduce, reduce_concat"),
        (fields(schema_version=2), "genotype.schema_version: 2 is unknown; allowed: 1"),
        (fields(schema_version=True), "genotype.schema_version: True is unknown; allowed: 1"),
        (fields(normal_concatt=[2]), "unknown value 'normal_concatt'; did you mean 'normal_concat'?"),
        ({"schema_version": 1, "normal": [NODE]}, "genotype.normal_concat: missing"),
        (fields(normal=3), "genotype.normal: 3 is a int; allowed: a list of nodes"),
        (fields(normal=["x"]), "genotype.normal[0]: 'x' is a string; allowed: a list of pairs"),
        (fields(normal=[[["none"]]]), "genotype.normal[0]: ['none'] is not a pair; allowed: [op name, input number]"),
        (fields(normal=[[["", 0]]]), "genotype.normal[0]: ['', 0] is not a pair"),
        (fields(normal=[[["none", True]]]), "genotype.normal[0]: ['none', True] is not a pair"),
        (fields(reduce=[[["none", 2]]]), "genotype.reduce[0]: input 2 of 'none' is out of range; allowed: 0..1"),
        (
            fields(reduce=[NODE, [["none", -1]]]),
            "genotype.reduce[1]: input -1 of 'none' is out of range; allowed: 0..2",
        ),
        (
            fields(normal_concat=[]),
            "genotype.normal_concat: empty, the cell has no output; allowed: different numbers in 2..2",
        ),
        (
            fields(normal_concat=[1]),
            "genotype.normal_concat: node 1 is out of range; allowed: different numbers in 2..2",
        ),
        (fields(reduce_concat=[2, 3]), "genotype.reduce_concat: node 3 is out of range"),
        (fields(reduce_concat=[2, 2]), "genotype.reduce_concat: node 2 is there twice"),
        (fields(reduce_concat="2"), "genotype.reduce_concat: '2' is not a list of node numbers"),
        (fields(reduce=[], reduce_concat=[2]), "the cell has no node"),
    ],
)
def test_json_errors(source: object, message: str) -> None:
    with pytest.raises(UserError) as e:
        Genotype.from_json(source)  # type: ignore[arg-type]
    assert message in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Genotyp(normal=[])", "genotype: the text lacks normal_concat, reduce, reduce_concat; allowed: "),
        (
            "Genotype = namedtuple('Genotype', 'normal')",
            "genotype: the text lacks normal_concat, reduce, reduce_concat",
        ),
        ("Genotype(normal=[('a', 0)", "is not a complete Python call"),
        (
            "Genotype([('a', 0)], [2], [], [2])",
            "genotype.normal: a flat list of 1 pairs; allowed: (op, input) pairs, two a node",
        ),
        ("Genotype([('a', 0), 3], [2], [], [2])", "genotype.normal: 3 among pairs is none"),
        ("Genotype([], range(10**9), [], [2])", "'10 ** 9' is not possible in Genotype(...)"),
        ("Genotype([], range(2, 999999999), [], [2])", "'range(2, 999999999)' is not possible in Genotype(...)"),
        ("Genotype([], range(2, 6, 0), [], [2])", "'range(2, 6, 0)' is not possible in Genotype(...)"),
        ("Genotype(**x)", "genotype: Genotype(...) takes normal, normal_concat"),
        ("Genotype([], [2], [], [2], [3])", "genotype.connectN: connections beside the pairs of a cell are not read"),
        ("Genotype([], [2], [], [2], None, None, 3)", "genotype: Genotype(...) takes normal, normal_concat"),
        ("Genotype([], normal=[])", "genotype.normal: given twice"),
        ("Genotype(normals=[])", "did you mean 'normal'?"),
        ("Genotype(normal=[])", "genotype.normal_concat: missing"),
        (
            "Genotype([[('a', 0)]], [2], [[]], [2]) Genotype([[('b', 0)]], [2], [[]], [2])",
            "genotype: 2 different ones in the text: 1, 1; allowed: one of them, as FILE:NAME or FILE:LINE",
        ),
    ],
)
def test_text_errors(text: str, message: str) -> None:
    with pytest.raises(UserError) as e:
        Genotype.from_text(text)
    assert message in str(e.value) and "\n" not in str(e.value)


def test_unknown_names() -> None:
    with pytest.raises(UserError, match="genotype: unknown value 'PRDART'; did you mean 'PRDARTS'"):
        Genotype.named("PRDART")
    with pytest.raises(UserError, match=r"cell: unknown value 'reduction'.*allowed: normal \| reduce"):
        Genotype.named("PRDARTS").depth("reduction")
    with pytest.raises(UserError, match=r"genotype.normal\[1\]: unknown value 'dil_conv_3x3'"):
        Genotype.named("PRDARTS").validate_ops(["skip_connect", "sep_conv_3x3"])
    Genotype.named("PRDARTS").validate_ops({op for cell in ("normal", "reduce") for op in OPS_OF_PRDARTS[cell]})


OPS_OF_PRDARTS = {
    "normal": ["skip_connect", "sep_conv_3x3", "dil_conv_3x3"],
    "reduce": ["avg_pool_3x3", "dil_conv_5x5", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3"],
}


def test_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    g = Genotype.named("PDARTS")
    (tmp_path / "g.json").write_text(g.to_json(indent=1))
    (tmp_path / "g.txt").write_text(LOG)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "genotype.json").write_text(g.to_json())
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text('{"schema_version": 9}')
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "PDARTS").write_text("a file beside the zoo")
    assert Genotype.load("PDARTS") == Genotype.load("g.json") == Genotype.load(tmp_path / "run") == g
    assert Genotype.load("g.txt") == Genotype.named("DARTS_V2")
    for name, message in {
        "empty": "'empty' holds no genotype.json",
        "bad.json": "bad.json: genotype.schema_version: 9 is unknown",
        "binary": "cannot read 'binary': not UTF-8 text",
        "absent.json": "genotype: no file or workdir 'absent.json'",
        "a/b": "genotype: no file or workdir 'a/b'",
        "PDART": "did you mean 'PDARTS'?",
    }.items():
        with pytest.raises(UserError) as e:
            Genotype.load(name)
        assert message in str(e.value)
    with pytest.raises(
        UserError, match="PDARTS: genotype: the text lacks normal, normal_concat, reduce, reduce_concat; allowed: "
    ):
        Genotype.load("./PDARTS")


def test_lists_are_frozen() -> None:
    pairs = [["none", 0]]
    g = Genotype([pairs], range(2, 3), [pairs], [2])  # type: ignore[arg-type]
    pairs.append(["none", 1])
    assert g.normal == ((("none", 0),),) and g.normal_concat == (2,)


def brute_depth(nodes: tuple, concat: tuple) -> int:  # type: ignore[type-arg]
    """All paths written out, from each output back to an input."""

    def paths(state: int) -> list[int]:
        if state < 2:
            return [0]
        return [1 + p for op, source in nodes[state - 2] if op != "none" for p in paths(source)]

    return max((p for state in concat for p in paths(state)), default=0)


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("cell", ["normal", "reduce"])
def test_depth_is_the_longest_path(name: str, cell: str) -> None:
    g = Genotype.named(name)
    assert g.depth(cell) == brute_depth(*g.cell(cell))


# (width in channels, depth with the edge to the output) of the normal cells as Shu, Wang and Cai (2020) give them.
@pytest.mark.parametrize(
    ("name", "width", "depth"),
    [("NASNet_A", 5, 2), ("AmoebaNet_A", 4, 4), ("ENASNet", 5, 2), ("DARTS_V2", 3.5, 3), ("SNAS_mild", 4, 2)],
)
def test_published_widths_and_depths(name: str, width: float, depth: int) -> None:
    assert (Genotype.named(name).width(), Genotype.named(name).depth() + 1) == (width, depth)


def test_depth_and_skips_by_hand() -> None:
    # 2 <- 0; 3 has no pair; 4 <- 3 (dead) and 1; 5 <- none from 4, skip from 2; 6 <- 5 but 6 is not in the concat
    normal = [
        [("skip_connect", 0)],
        [],
        [("skip_connect", 3), ("conv", 1)],
        [("none", 4), ("skip_connect", 2)],
        [("conv", 5)],
    ]
    g = Genotype(normal, [2, 3, 4, 5], [[("none", 0)]], [2])  # type: ignore[arg-type]
    assert (g.depth(), g.skips(), g.count("conv"), g.width()) == (2, 3, 2, 1 + 0.5)
    assert (g.depth("reduce"), g.skips("reduce"), g.width("reduce")) == (0, 0, 0.0)
    assert Genotype(normal, [6], [[("none", 0)]], [2]).depth() == 3  # type: ignore[arg-type]
    assert (Genotype.named("PRDARTS").depth(), Genotype.named("PRDARTS").skips()) == (4, 1)
    assert (Genotype.named("DARTS_V1").skips("normal"), Genotype.named("DARTS_V1").skips("reduce")) == (3, 3)


@pytest.mark.parametrize("module", [genotype, genotype_text])
def test_the_module_itself_imports_the_standard_library_alone(module: ModuleType) -> None:
    """A function that draws imports what draws when it is called."""
    tree = ast.parse(Path(module.__file__).read_text())
    absolute = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    absolute |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    own = {m for m in absolute if m.partition(".")[0] not in sys.stdlib_module_names}
    assert own <= {"prdarts_jax.errors", "prdarts_jax.space", "prdarts_jax.pictures"}
