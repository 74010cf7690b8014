"""An average of the weights over the updates, which is tested and saved in their place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

__all__ = ["WeightAverage"]

_PREFIX = "average."


class WeightAverage:
    """Exponential moving average of weights and BatchNorm statistics.

    The decay rises with the updates, so that short runs average too. The model's channel tables
    are not part of it: tell the average its channels before it is used.

    Source: timm's `ModelEmaV3`.

    Args:
        model: Not wrapped.
        decay: Of one update, once many are done.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._ema = ModelEmaV3(model, decay=decay, use_warmup=True)

    @property
    def model(self) -> nn.Module:
        """The model with the averaged weights."""
        return self._ema.module

    def update(self, model: nn.Module, num_updates: int) -> None:
        """Take up the weights after an update."""
        self._ema.update(model, step=num_updates)

    def state(self, buffers_only: bool) -> dict[str, Tensor]:
        """What a checkpoint keeps of it."""
        parameters = dict(self.model.named_parameters())
        return {
            _PREFIX + name: tensor
            for name, tensor in self.model.state_dict().items()
            if not (buffers_only and name in parameters)
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""
        own = {k.removeprefix(_PREFIX): v for k, v in state.items() if k.startswith(_PREFIX)}
        self.model.load_state_dict(own)
