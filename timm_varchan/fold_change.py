"""What folding a stem changed: logits, first classes and accuracy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from timm_varchan.channels import ChannelSet, ChannelSetLike
from timm_varchan.errors import UserError
from timm_varchan.evaluation import Difference, paired_difference, predicted_classes
from timm_varchan.models import share

__all__ = ["FoldChange", "measure_change"]


@dataclass(frozen=True)
class FoldChange:
    """What folding changed, measured on `num_images` images.

    Args:
        max_logit: Largest absolute change of a logit; mean_logit is the mean.
        logit_std: Standard deviation of the model's own logits, to compare with.
        agreement: Share of images with the same first class.
        accuracy: Share of images that the model has right, folded_accuracy that the folded one has;
            None without labels.
        difference: Folded minus the model's accuracy, with interval and p-value.
    """

    num_images: int
    max_logit: float
    mean_logit: float
    logit_std: float
    agreement: float
    accuracy: float | None = None
    folded_accuracy: float | None = None
    difference: Difference | None = None


@torch.no_grad()
def measure_change(
    model: nn.Module,
    folded: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    channels: ChannelSetLike,
) -> FoldChange:
    """Compare a folded model with the model that it came from.

    Args:
        model: The model with stems; it is not changed.
        folded: What `fold` made of it for these channels.
        batches: Normalised batches `(B, C, H, W)`, other ones than those of the calibration, and
            their labels `(B,)` or None.
        channels: The channel set.

    Returns:
        The change of logits, first classes and, with labels, accuracy.

    Raises:
        UserError: No images.
    """
    twin, folded = share(model, ChannelSet.parse(channels)).eval(), folded.eval()
    before, after, labels = [], [], []
    for x, label in batches:
        before.append(twin(x).float())
        after.append(folded(x).float())
        if label is not None:
            labels.append(label)
    if not before:
        raise UserError("There are no images to compare on: give at least one batch.")
    a, b = torch.cat(before), torch.cat(after)
    accuracy: dict[str, Any] = {}
    if labels:
        truth = torch.cat(labels).to(a.device)
        right, folded_right = ((predicted_classes(y) == truth).cpu().numpy() for y in (a, b))
        accuracy = {
            "accuracy": float(right.mean()),
            "folded_accuracy": float(folded_right.mean()),
            "difference": paired_difference(folded_right, right),
        }
    return FoldChange(
        num_images=len(a),
        max_logit=(a - b).abs().max().item(),
        mean_logit=(a - b).abs().mean().item(),
        logit_std=a.std().item(),
        agreement=(predicted_classes(a) == predicted_classes(b)).float().mean().item(),
        **accuracy,
    )
