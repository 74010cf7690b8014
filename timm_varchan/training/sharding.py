"""Models whose weights are divided over the processes (ZeRO-3, FSDP), put together again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from timm.utils import unwrap_model
from torch import nn

from timm_varchan.errors import UserError
from timm_varchan.training.configuration import TrainConfig
from timm_varchan.training.launch import is_sharded

__all__ = ["check_sharding", "whole_model"]


def check_sharding(config: TrainConfig, accelerator: Accelerator) -> None:
    """Refuse what needs all weights on every process, where none has them.

    Raises:
        UserError: Names the flag.
    """
    if is_sharded(accelerator) and config.ema_decay is not None:
        raise UserError(
            "--ema-decay needs all weights on every process, which ZeRO-3 and FSDP divide. Add "
            "--ema-decay none, or use ZeRO-2."
        )


@torch.no_grad()
def whole_model(
    accelerator: Accelerator, model: nn.Module, build: Callable[[], nn.Module]
) -> nn.Module:
    """The trained model, unwrapped, with all its weights on every process.

    Args:
        accelerator: Prepared the model.
        model: The trained model.
        build: Makes an equal one with other weights, which takes them up if they are divided.
    """
    if not is_sharded(accelerator):
        return unwrap_model(model)
    weights = accelerator.get_state_dict(model)  # all of them, on the main process alone
    whole = build()
    if accelerator.is_main_process:
        whole.load_state_dict(weights)
    whole.to(accelerator.device)
    for tensor in whole.state_dict().values():
        tensor.copy_(broadcast(tensor))
    return whole
