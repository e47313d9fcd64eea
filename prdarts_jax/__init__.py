"""PR-DARTS and its peers: differentiable architecture search as pure JAX functions.

The public names are imported when they are first used (PEP 562), so that `import prdarts_jax` does not start JAX.

>>> import prdarts_jax
>>> prdarts_jax.SearchConfig().epochs
200
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prdarts_jax.config.pipeline import PipelineConfig
    from prdarts_jax.config.search import SearchConfig
    from prdarts_jax.config.train import TrainConfig
    from prdarts_jax.errors import RunError, UserError
    from prdarts_jax.presets import resolve
    from prdarts_jax.protocol import PipelineResult, run_pipeline
    from prdarts_jax.searching.loop import search
    from prdarts_jax.searching.population import PopulationResult, search_population
    from prdarts_jax.searching.result import SearchResult
    from prdarts_jax.space.genotype import Genotype
    from prdarts_jax.training.evaluation import Evaluation, evaluate
    from prdarts_jax.training.loop import TrainResult, train

__version__ = "0.1.0"
__all__ = [
    "Evaluation",
    "Genotype",
    "PipelineConfig",
    "PipelineResult",
    "PopulationResult",
    "RunError",
    "SearchConfig",
    "SearchResult",
    "TrainConfig",
    "TrainResult",
    "UserError",
    "evaluate",
    "resolve",
    "run_pipeline",
    "search",
    "search_population",
    "train",
]

_HOME = {
    "Evaluation": "training.evaluation",
    "Genotype": "space.genotype",
    "PipelineConfig": "config.pipeline",
    "PipelineResult": "protocol",
    "PopulationResult": "searching.population",
    "RunError": "errors",
    "SearchConfig": "config.search",
    "SearchResult": "searching.result",
    "TrainConfig": "config.train",
    "TrainResult": "training.loop",
    "UserError": "errors",
    "evaluate": "training.evaluation",
    "resolve": "presets",
    "run_pipeline": "protocol",
    "search": "searching.loop",
    "search_population": "searching.population",
    "train": "training.loop",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:  # prdarts_jax.gates and the other modules, without an import line of their own
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
