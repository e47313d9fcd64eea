"""`python -m benchmarks report`: docs/performance.md from the rows in benchmarks/results and notes written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import bench_growth
from benchmarks.rows import RESULTS, ROOT, read

PAGE = ROOT / "docs" / "performance.md"
NOTES = ROOT / "docs" / "performance_notes.md"
GROWTH_PICTURE = ROOT / "docs" / "pictures" / "growth.svg"
NAMES = ("search_step", "train_step", "depthwise", "startup", "overhead", "growth", "population", "scaling", "gpu")
BUSY = 0.05  # of the cores

Row = Mapping[str, Any]
Rows = Mapping[str, Sequence[Row]]


class Target(NamedTuple):
    """A number that was aimed at, for every row that `concerns` selects."""

    says: str
    benchmark: str
    concerns: Callable[[Row], bool]
    field: str
    limit: float
    least: bool  # whether the limit is a least or a most
    unit: str = ""

    def reached(self, row: Row) -> bool:
        """Whether a row meets it."""
        return row[self.field] >= self.limit if self.least else row[self.field] <= self.limit

    @property
    def aim(self) -> str:
        """The limit as it is written."""
        return f"{'at least' if self.least else 'at most'} {self.limit:g}{self.unit}"


def _is(prefix: str = "", *, peer: str | None = None, cache: str | None = None) -> Callable[[Row], bool]:
    def concerns(row: Row) -> bool:
        return row["case"].startswith(prefix) and row.get("peer") == peer and row.get("cache") == cache

    return concerns


_BEST = "torch-channels-last"
TARGETS = (
    Target("PR-DARTS step, speedup", "search_step", _is("prdarts", peer=_BEST), "speedup", 2.0, True),
    Target(
        "PR-DARTS step, memory against PyTorch's", "search_step", _is("prdarts", peer=_BEST), "memory_ratio", 1, False
    ),
    Target("dense DARTS step, speedup", "search_step", _is("darts-", peer=_BEST), "speedup", 2.5, True),
    *(
        Target(f"{name} step, speedup", "search_step", _is(f"{case}-", peer=_BEST), "speedup", 2.0, True)
        for name, case in (
            ("second-order DARTS", "darts2"),
            ("SNAS", "snas"),
            ("GDAS", "gdas"),
            ("PC-DARTS", "pc-darts"),
            ("Fair DARTS", "fair-darts"),
        )
    ),
    Target(
        "PC-DARTS step, speedup over our dense DARTS",
        "search_step",
        _is("pc", peer="dense-darts"),
        "speedup",
        2.0,
        True,
    ),
    Target("training step, speedup", "train_step", _is(peer=_BEST), "speedup", 1.3, True),
    Target("depthwise layer, speedup over flax", "depthwise", _is(peer="flax-conv"), "speedup", 10.0, True),
    Target("depthwise layer, speedup over PyTorch", "depthwise", _is(peer=_BEST), "speedup", 1.0, True),
    Target("search, cold start to first step", "startup", _is("prdarts-8", cache="cold"), "total_s", 45, False, " s"),
    Target("search, warm start to first step", "startup", _is("prdarts-8", cache="warm"), "total_s", 15, False, " s"),
    Target("training, cold start to first step", "startup", _is("derived", cache="cold"), "total_s", 60, False, " s"),
    Target("training, warm start to first step", "startup", _is("derived", cache="warm"), "total_s", 20, False, " s"),
    Target("an epoch's overhead over its steps", "overhead", _is(), "overhead_full", 0.03, False),
)


def load(folder: Path = RESULTS) -> dict[str, list[dict[str, Any]]]:
    """The rows of every benchmark; none where it has not been run."""
    return {name: read(folder / f"{name}.jsonl") for name in NAMES}


def _table(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> list[str]:
    found = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    return [*found, *(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines), ""]


def _commit(row: Row) -> str:
    return f"{row['commit']}{' (busy)' if row.get('others', 0.0) > BUSY else ''}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def _targets(rows: Rows) -> list[str]:
    lines = []
    for target in TARGETS:
        concerned = [row for row in rows[target.benchmark] if target.concerns(row)]
        if not concerned:
            lines.append((target.says, "-", target.aim, "not measured yet", "-"))
        for row in concerned:
            where = f"`{row['case']}`, batch {row['batch']}"
            verdict = "reached" if target.reached(row) else "**not reached**"
            spread = f" ({row['speedup_min']:.2f} to {row['speedup_max']:.2f})" if target.field == "speedup" else ""
            lines.append((target.says, where, target.aim, f"{row[target.field]:g}{target.unit}{spread}", verdict))
    return _table(("target", "case", "aim", "measured", ""), lines)


def _comparison(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return ["Not measured yet.", ""]
    lines = [
        (
            f"`{row['case']}`",
            row["batch"],
            row["peer"],
            f"{row['speedup']:.2f} ({row['speedup_min']:.2f} to {row['speedup_max']:.2f})",
            _seconds(row["seconds_ours"]),
            _seconds(row["seconds_peer"]),
            f"{row['memory_ratio']:.2f} ({row['memory_ours_gb']:.2f} / {row['memory_peer_gb']:.2f} GB)",
            _commit(row),
        )
        for row in rows
    ]
    return _table(("case", "batch", "peer", "speedup", "ours", "peer's", "memory, ours / peer's", "commit"), lines)


_STAGES = tuple(
    f"{name}_s"
    for name in ["python", "import", "kernels", "prepare", "init", "trace", "compile", "first_step", "total"]
)


def _startup(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return ["Not measured yet.", ""]
    header = ("case", "cache", *(name.removesuffix("_s").replace("_", " ") for name in _STAGES), "peak GB", "commit")
    return _table(
        header,
        [
            (f"`{r['case']}`", r["cache"], *(f"{r[name]:.1f}" for name in _STAGES), r["memory_gb"], r["commit"])
            for r in rows
        ],
    )


def _overhead(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return ["Not measured yet.", ""]
    header = (
        "case",
        "batch",
        "step",
        "loading a step",
        "between dispatches",
        "once an epoch",
        "overhead",
        "full epoch",
        "commit",
    )
    return _table(
        header,
        [
            (
                f"`{r['case']}`",
                r["batch"],
                _seconds(r["step_s"]),
                _seconds(r["loading_s"]),
                _seconds(r["between_dispatches_s"]),
                _seconds(r["once_an_epoch_s"]),
                f"{r['overhead']:.1%} ({r['steps']} steps)",
                f"{r['overhead_full']:.1%}",
                _commit(r),
            )
            for r in rows
        ],
    )


def _growth(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return ["Not measured yet.", ""]
    lines = []
    for row in rows:
        says = bench_growth.AXES["full"][row["axis"]].says
        spread = f"{_seconds(row['seconds'])} ({_seconds(row['seconds_min'])} to {_seconds(row['seconds_max'])})"
        compiling = f"{row['trace_s']:.1f} + {row['compile_s']:.1f} s"
        memory = f"{row['memory_gb']:.2f} GB"
        lines.append((says, row["value"], spread, compiling, memory, _commit(row)))
    picture = ["![Step time, compilation and memory against each axis](pictures/growth.svg)", ""]
    header = ("what is changed", "value", "a step", "tracing + cold compilation", "peak memory", "commit")
    return [*picture, *_table(header, lines)]


def _population(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return ["Not measured yet.", ""]
    header = (
        "searches",
        "population",
        "single starts",
        "of these the first",
        "compiling or loading",
        "of the single ones",
        "memory",
        "memory of one",
        "speedup",
        "commit",
    )
    return _table(
        header,
        [
            (
                r["members"],
                f"{r['seconds']:.0f} s",
                f"{r['seconds_singles']:.0f} s",
                f"{r['seconds_first']:.0f} s",
                f"{r['compile_s']:.0f} s",
                f"{r['compile_singles_s']:.0f} s",
                f"{r['memory_gb']:.2f} GB",
                f"{r['memory_single_gb']:.2f} GB",
                f"{r['speedup']:.2f}",
                _commit(r),
            )
            for r in rows
        ],
    )


def _scaling(rows: Sequence[Row]) -> list[str]:
    timed = [row for row in rows if row["kind"] == "time"]
    if not timed:
        return ["Not measured yet.", ""]
    header = ("case", "devices", "batch", "a step", "efficiency", "commit")
    lines = []
    for r in timed:
        spread = f"{_seconds(r['seconds'])} ({_seconds(r['seconds_min'])} to {_seconds(r['seconds_max'])})"
        batch, efficiency = f"{r['batch']} ({r['mode']})", f"{r['efficiency']:.2f}"
        lines.append((f"`{r['case']}`", r["devices"], batch, spread, efficiency, _commit(r)))
    return _table(header, lines)


def _gpu(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return ["Not measured yet: `make bench-gpu` runs unattended on a machine with one; again, it goes on.", ""]
    lines = [
        (r["device"], r["section"], r["what"], f"{r['value']:.4g} {r['unit']}")
        for r in rows
        if r.get("value") is not None and not r["what"].startswith("section ")
    ]
    failed = [f"- {r['what']}: {r['failure']}" for r in rows if "failure" in r]
    return [*_table(("device", "section", "what", "measured"), lines), *failed, ""]


def _machines(rows: Rows) -> list[str]:
    devices = sorted({row["device"] for name in NAMES if name != "gpu" for row in rows[name]})
    versions = sorted(
        {f"jax {v['jax']}, torch {v.get('torch', '-')}" for n in NAMES for r in rows[n] if (v := r["versions"])}
    )
    if not devices:
        return []
    return [f"Measured on: {'; '.join(devices)}. Versions: {'; '.join(versions)}.", ""]


_PREFACE = (
    "A speedup is the seconds of the peer over ours: both run blocks of steps in turn on the same machine, each",
    "library in its own process. The first number is the median over the pairs of neighbouring blocks, in brackets",
    "are the extremes. The gates and the executed operations are drawn afresh in each step on both sides. Memory is",
    "the peak of the whole process; ours loads a program that was compiled before. `busy` marks rows during which",
    f"other work took more than {BUSY:.0%} of the cores; a commit with + had changes that were not committed.",
)


def page(rows: Rows, notes: str) -> str:
    """The page as text."""
    parts = [
        "# Performance",
        "",
        "Written by `python -m benchmarks report` from the rows in `benchmarks/results` and from",
        "[performance_notes.md](performance_notes.md); do not edit it. `make bench-full` measures anew.",
        "",
        *_machines(rows),
        *_PREFACE,
        "",
        "## Targets",
        "",
        *_targets(rows),
        notes.strip(),
        "",
        "## One bilevel search step",
        "",
        *_comparison(rows["search_step"]),
        "## One training step of the derived network",
        "",
        *_comparison(rows["train_step"]),
        "## A depthwise convolution, forward and both gradients",
        "",
        *_comparison(rows["depthwise"]),
        "## From the start of the process to the first step",
        "",
        "Seconds of each stage on images in memory. Cold: nothing compiled before, not even our kernels; warm: again.",
        "",
        *_startup(rows["startup"]),
        "## What an epoch takes beside its steps",
        "",
        "Loading is gathering and augmenting the two batches inside the program. The last column spreads what happens",
        "once an epoch (checkpoint, rows) over the 195 steps of a CIFAR-10 epoch at batch 128.",
        "",
        *_overhead(rows["overhead"]),
        "## Growth",
        "",
        *_growth(rows["growth"]),
        "## A population against single starts",
        "",
        "The same searches of the digits preset, 6 epochs each, one after the other on the same machine. Both sides",
        "begin with an empty compilation cache; single searches after the first find its programs.",
        "",
        *_population(rows["population"]),
        "## Several devices",
        "",
        "Forced CPU devices share the cores: what is measured is the cost of splitting a step.",
        "[scaling.md](scaling.md) has a model for accelerators.",
        "",
        *_scaling(rows["scaling"]),
        "## GPU",
        "",
        *_gpu(rows["gpu"]),
    ]
    return "\n".join(parts).rstrip() + "\n"


def write() -> None:
    """The page and its picture, in docs."""
    rows = load()
    if rows["growth"]:
        bench_growth.plot(rows["growth"], GROWTH_PICTURE)
    PAGE.write_text(page(rows, NOTES.read_text(encoding="utf-8")), encoding="utf-8")
