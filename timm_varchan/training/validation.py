"""What a model keeps on some channel sets after every epoch."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from timm_varchan.channels import ChannelSet
from timm_varchan.evaluation import MODES, SetView, choose_sets
from timm_varchan.models import has_stems
from timm_varchan.training.configuration import TrainConfig

__all__ = ["Validation", "Validator"]


class Validation(NamedTuple):
    """Cross entropy and accuracy on all channels, and the accuracy on every set that was tested."""

    loss: float = math.nan
    accuracy: float = math.nan
    sets: dict[str, float] = {}  # noqa: RUF012 - never written to


class Validator:
    """Tests a model on the validation images.

    Args:
        config: Which sets, and whether the model is told the channels.
        accelerator: Gathers over the processes.
        loader: Normalised batches with all channels, prepared; None without validation images.
        channels: What the planes are.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        loader: DataLoader[Any] | None,
        channels: ChannelSet,
    ) -> None:
        self._accelerator, self._loader, self._channels = accelerator, loader, channels
        self._anonymous = config.channel_identity == "anonymous" or channels.is_anonymous
        self._indices = _spread(channels, max(1, config.val_max_sets))

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> Validation:
        """Loss and accuracies of a model, which is in evaluation mode afterwards."""
        if self._loader is None:
            return Validation()
        model.eval()
        mode = "mask" if not has_stems(model) else "anonymous" if self._anonymous else "named"
        views = [SetView(self._channels, i, mode, "in order") for i in self._indices]
        rows = []
        for x, labels in self._loader:
            table = self._rows(model, views, x, labels)
            rows.append(self._accelerator.gather_for_metrics(table))
        loss, *accuracies = torch.cat(rows).double().mean(0).tolist()
        named = {str(view.channel_set): a for view, a in zip(views, accuracies, strict=True)}
        return Validation(loss, accuracies[0], named)

    def _rows(self, model: nn.Module, views: list[SetView], x: Tensor, labels: Tensor) -> Tensor:
        """Loss on all channels, and whether each set was right, `(B, 1 + sets)`."""
        columns: list[Tensor] = []
        for view in views:
            with self._accelerator.autocast():
                logits = MODES[view.mode](model, x, view, range(len(x)))
            if not columns:
                columns.append(F.cross_entropy(logits.float(), labels, reduction="none"))
            columns.append((logits.argmax(-1) == labels).float())
        return torch.stack(columns, dim=1)


def _spread(channels: ChannelSet, count: int) -> list[tuple[int, ...]]:
    """At most so many channel sets, all channels first, the others spread over the sizes."""
    chosen = choose_sets(channels)
    count = min(count, len(chosen))
    steps = max(1, count - 1)
    return [chosen[round(i * (len(chosen) - 1) / steps)] for i in range(count)]
