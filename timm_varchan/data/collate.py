"""Batches of images with different channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from timm_varchan.channels import ChannelSet


def collate_padded(
    batch: Sequence[tuple[Tensor, ChannelSet, int]],
) -> tuple[Tensor, list[ChannelSet], Tensor]:
    """Put images with different channels into one batch; absent planes are zero and come last.

    Args:
        batch: Images `(C_i, H, W)`, the channels of each, labels.

    Returns:
        The images `(B, max C_i, H, W)`, their channel sets, the labels `(B,)` int64.

    Raises:
        ValueError: No images, different sizes or types, channels that do not fit an image.
    """
    if not batch:
        raise ValueError("A batch needs at least one image.")
    first = batch[0][0]
    for place, (image, channels, _) in enumerate(batch):
        if image.shape[1:] != first.shape[1:] or image.dtype != first.dtype:
            raise ValueError(
                f"Image {place} of the batch is {tuple(image.shape)} {image.dtype}, the first "
                f"{tuple(first.shape)} {first.dtype}. Bring all to one size and type first "
                f"(train_transform, eval_transform)."
            )
        if image.shape[0] != len(channels):
            raise ValueError(
                f"Image {place} of the batch has {image.shape[0]} planes, its channels are "
                f"{channels} ({len(channels)}). Say one channel a plane."
            )
    num_channels = max(image.shape[0] for image, _, _ in batch)
    images = first.new_zeros(len(batch), num_channels, *first.shape[1:])
    for place, (image, _, _) in enumerate(batch):
        images[place, : image.shape[0]] = image
    labels = torch.tensor([label for _, _, label in batch], dtype=torch.int64)
    return images, [channels for _, channels, _ in batch], labels
