"""Training and evaluation of one run, under `accelerate`."""

from timm_varchan.errors import needs

with needs("train"):
    from timm_varchan.training.checkpoint import CheckpointError
    from timm_varchan.training.config import RECIPES, TrainConfig, parse_args
    from timm_varchan.training.launch import stop
    from timm_varchan.training.loop import Interrupted, NonFiniteLossError
    from timm_varchan.training.report import closing
    from timm_varchan.training.run import Outcome, SetupError, run
    from timm_varchan.views import CHANNEL_AUGS, DrawKey, draw_channels

__all__ = [
    "CHANNEL_AUGS",
    "RECIPES",
    "CheckpointError",
    "DrawKey",
    "Interrupted",
    "NonFiniteLossError",
    "Outcome",
    "SetupError",
    "TrainConfig",
    "closing",
    "draw_channels",
    "parse_args",
    "run",
    "stop",
]
