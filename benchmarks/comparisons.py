"""The comparisons with a peer: the search step, the training step, the depthwise layer. A row a case, batch and peer.

    {case, batch, peer, speedup, speedup_min, speedup_max, memory_ratio, seconds_ours, seconds_peer, ...}

Speedup: seconds of the peer over ours, block by neighbouring block; median, minimum and maximum. Memory ratio: our peak
resident memory over the peer's, each the whole process. Our program is compiled by a process before the one that is
measured, so that the compiler's memory is not counted as that of the steps (startup.jsonl has it). `others` is the
share of the cores that other processes took meanwhile: the ratio of a busy machine is not that of a quiet one, since
PyTorch's threads wait for each other at the end of every operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import cases
from benchmarks.race import Blocks, Plan, Side, Worker, has_torch, measure, summary

Row = dict[str, Any]


class Options(NamedTuple):
    """What of a benchmark is run."""

    scale: str  # smoke | full
    cases: Sequence[str] = ()  # none: all
    batches: Sequence[int] = ()  # none: all
    peers: Sequence[str] = ()  # none: all
    note: Callable[[str], None] = print  # lines for people
    patience: int = 1  # see `race.Plan`

    def wants(self, case: str, batch: int, peer: str) -> bool:
        """Whether a row is asked for."""
        asked = ((self.cases, case), (self.batches, batch), (self.peers, peer))
        return all(not names or name in names for names, name in asked)


def _compare(
    options: Options, case: str, batch: int, ours: Side, peers: Mapping[str, Side], plan: Plan, starts: int = 1
) -> Iterator[Row]:
    """`starts`: pairs of processes a row, where a library's speed differs from start to start."""
    wanted = {peer: side for peer, side in peers.items() if options.wants(case, batch, peer)}
    if not has_torch():
        missing = [peer for peer, side in wanted.items() if side.make.startswith("benchmarks.peers")]
        wanted = {peer: side for peer, side in wanted.items() if peer not in missing}
        if missing:
            options.note(f"{case}, batch {batch}: no torch, so no {', '.join(missing)} (requirements-bench.txt)")
    if not wanted:
        return
    if options.scale == "full":
        with Worker(ours):  # fills the compilation cache
            pass
    plan = plan._replace(patience=options.patience)
    found: dict[str, list[Blocks]] = {name: [] for name in wanted}
    for start in range(starts):
        with Worker(ours) as mine:
            for name, side in wanted.items():
                try:
                    with Worker(side) as peer:
                        found[name].append(measure(mine, peer, plan))
                except RuntimeError as error:  # a worker that died
                    if options.scale == "smoke":
                        raise
                    options.note(f"{case}, batch {batch}, {name}: {error}")
                if found[name] and start + 1 == starts:
                    yield {"case": case, "batch": batch, "peer": name, **summary(found[name])}


_TORCH = "benchmarks.peers.sides:"


def _variants(options: Options) -> dict[str, dict[str, Any]]:
    """PyTorch's settings by the name of the peer."""
    variants: dict[str, dict[str, Any]] = {"torch-channels-last": {}, "torch-default": {"layout": "default"}}
    if options.scale == "full":  # torch.compile takes minutes
        variants["torch-channels-last-compiled"] = {"compiled": True}
    return variants


def search_step(options: Options) -> Iterator[Row]:
    """One bilevel step of a method: PR-DARTS with two executed operations an edge, dense first-order DARTS, others."""
    for name, case in cases.SEARCH[options.scale].items():
        for batch in cases.BATCHES[options.scale]:
            fields = case._replace(batch=batch)._asdict()
            peers = {peer: Side(f"{_TORCH}search", {**extra, **fields}) for peer, extra in _variants(options).items()}
            if case.method in cases.METHODS:  # PyTorch's best setting alone
                peers = {"torch-channels-last": peers["torch-channels-last"]}
            if case.partial > 1:  # what the channels that pass by save
                dense = case._replace(method="darts", partial=1, batch=batch)._asdict()
                peers["dense-darts"] = Side("benchmarks.ours:search", dense)
            # The operations drawn change from step to step, so a block of PR-DARTS has several.
            full = Plan(7, 8) if case.method in ("prdarts", "gdas") else Plan(15, 1)
            plan = Plan(2, 1) if options.scale == "smoke" else full
            yield from _compare(options, name, batch, Side("benchmarks.ours:search", fields), peers, plan)


def train_step(options: Options) -> Iterator[Row]:
    """One SGD step of the derived network, with auxiliary head and drop-path."""
    for name, case in cases.TRAIN[options.scale].items():
        fields = case._asdict()
        peers = {peer: Side(f"{_TORCH}train", {**extra, **fields}) for peer, extra in _variants(options).items()}
        plan = Plan(2, 1) if options.scale == "smoke" else Plan(7, 3)
        yield from _compare(options, name, case.batch, Side("benchmarks.ours:train", fields), peers, plan)


def depthwise(options: Options) -> Iterator[Row]:
    """A depthwise convolution, forward and both gradients."""
    for name, case in cases.DEPTHWISE[options.scale].items():
        fields = case._asdict()
        peers = {
            "flax-conv": Side("benchmarks.ours:depthwise", {"layer": "flax", **fields}),
            "torch-channels-last": Side(f"{_TORCH}depthwise", fields),
            "torch-default": Side(f"{_TORCH}depthwise", {"layout": "default", **fields}),
        }
        plan, starts = (Plan(2, 2), 2) if options.scale == "smoke" else (Plan(5, 50), 4)
        yield from _compare(options, name, case.batch, Side("benchmarks.ours:depthwise", fields), peers, plan, starts)
