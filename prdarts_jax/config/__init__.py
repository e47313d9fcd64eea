"""What is computed and how it is run: dataclasses, their checks, and objects of the user's own files."""

from prdarts_jax.config.pipeline import PipelineConfig
from prdarts_jax.config.search import (
    ArchConfig,
    DataConfig,
    MethodConfig,
    RunConfig,
    SearchConfig,
    SpaceConfig,
    WeightsConfig,
)
from prdarts_jax.config.train import NetworkConfig, SgdConfig, TrainConfig, TrainDataConfig, TrainRunConfig

__all__ = [
    "ArchConfig",
    "DataConfig",
    "MethodConfig",
    "NetworkConfig",
    "PipelineConfig",
    "RunConfig",
    "SearchConfig",
    "SgdConfig",
    "SpaceConfig",
    "TrainConfig",
    "TrainDataConfig",
    "TrainRunConfig",
    "WeightsConfig",
]
