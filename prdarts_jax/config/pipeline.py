"""The protocol as one config: searches over seeds, short trainings of what they found, full trainings of the best cell.

Imports neither jax nor numpy.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from prdarts_jax.config import schema
from prdarts_jax.config.schema import SEED, require
from prdarts_jax.config.search import DataConfig, SearchConfig
from prdarts_jax.config.train import TrainConfig, TrainDataConfig, TrainRunConfig

STAGES = ("search", "short", "full")
HOLDOUT = 0.1  # of the training images, unless a preset or a flag says otherwise
_SAME = ("source", "holdout", "holdout_seed")  # of the data of search and short training
# What the protocol sets for each stage: field -> where it is said instead.
_COMMON = {name: name for name in ("run.workdir", "run.overwrite", "run.time_limit")}
_ELSEWHERE = {
    "search": {**_COMMON, "seed": "search_seeds"},
    "short": _COMMON,
    "full": {**_COMMON, "seed": "train_seeds"},
}


@dataclass(frozen=True)
class PipelineConfig:
    """Search with several seeds -> short training of each cell -> choice -> full training with several seeds -> test.

    >>> PipelineConfig().search.data.holdout == PipelineConfig().short.data.holdout
    True
    >>> PipelineConfig(search_seeds=(1, 1))
    Traceback (most recent call last):
    ...
    prdarts_jax.errors.UserError: search_seeds: (1, 1) is not possible; allowed: different seeds, at least one
    """

    search: SearchConfig = field(default_factory=lambda: SearchConfig(data=DataConfig(holdout=HOLDOUT)))
    short: TrainConfig = field(
        default_factory=lambda: TrainConfig(
            epochs=100, evaluate_every=0, data=TrainDataConfig(cutout=16, holdout=HOLDOUT)
        )
    )
    full: TrainConfig = field(default_factory=TrainConfig)
    run: TrainRunConfig = field(default_factory=TrainRunConfig)
    search_seeds: tuple[int, ...] = (0, 1, 2)  # of the searches, each of which finds a cell
    train_seeds: tuple[int, ...] = (0, 1)  # of the full trainings of the chosen cell

    def __post_init__(self) -> None:
        for name in ("search_seeds", "train_seeds"):
            seeds = getattr(self, name)
            require(0 < len(seeds) == len(set(seeds)), name, seeds, "different seeds, at least one")
            require(all(map(SEED.holds, seeds)), name, seeds, f"seeds in {SEED.allowed}")
        for stage, elsewhere in _ELSEWHERE.items():
            for path, instead in elsewhere.items():
                value = schema.get(getattr(self, stage), path)
                require(not value, f"{stage}.{path}", value, f"{instead}, which says it for the stages")
        search, short, full = self.search.data, self.short.data, self.full.data
        for name in _SAME:
            value, other = getattr(short, name), getattr(search, name)
            require(value == other, f"short.data.{name}", value, f"that of search.data.{name} ({other!r})")
        require(
            full.source == search.source, "full.data.source", full.source, f"that of the search ({search.source!r})"
        )
        allowed = "> 0: the images by which a cell is chosen"
        require(short.holdout > 0, "short.data.holdout", short.holdout, allowed)
        every = self.short.evaluate_every
        require(every == 0, "short.evaluate_every", every, "0: no cell is chosen by its test images")
        require(self.full.evaluate_every > 0, "full.evaluate_every", self.full.evaluate_every, ">= 1")
