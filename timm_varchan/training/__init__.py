"""Training and evaluation of one run, under `accelerate`. Imported when it is first used."""

import importlib
from typing import TYPE_CHECKING, Any

from timm_varchan.errors import needs

if TYPE_CHECKING:
    from timm_varchan.training.checkpoint import CheckpointError
    from timm_varchan.training.config import RECIPES, EvaluateConfig, TrainConfig
    from timm_varchan.training.train import (
        Interrupted,
        NonFiniteLossError,
        Outcome,
        evaluate,
        run,
    )

__all__ = [
    "RECIPES",
    "CheckpointError",
    "EvaluateConfig",
    "Interrupted",
    "NonFiniteLossError",
    "Outcome",
    "TrainConfig",
    "evaluate",
    "run",
]

#: Where a name lives; what is not listed lives in `train`.
_HOMES = {
    "CheckpointError": "checkpoint",
    "RECIPES": "config",
    "EvaluateConfig": "config",
    "TrainConfig": "config",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needs("train"):
        return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'train')}"), name)
