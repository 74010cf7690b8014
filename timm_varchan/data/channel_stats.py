"""Mean and standard deviation of every plane of a split."""

from __future__ import annotations

import torch

from timm_varchan.channels import seeded_rng
from timm_varchan.data.split import ImageSplit
from timm_varchan.data.transforms import scale_values


def channel_stats(
    split: ImageSplit, num_images: int = 1000, seed: int = 0
) -> tuple[list[float], list[float]]:
    """Measure what normalisation needs: `channels.with_stats(*channel_stats(data.train))`.

    Args:
        split: The images.
        num_images: How many of them to look at, drawn at random; all where there are fewer.
        seed: Which ones.

    Returns:
        Mean and standard deviation over all pixels of the scaled values, one each a channel. The
        deviation of a constant plane is given as 1, so that it normalises to 0.

    Raises:
        ValueError: No images, or values that are not finite.
    """
    if len(split) == 0 or num_images < 1:
        raise ValueError(f"Cannot measure {min(len(split), num_images)} images; give at least 1.")
    chosen = seeded_rng("stats", seed).sample(range(len(split)), min(num_images, len(split)))
    total = torch.zeros(len(split.channels), dtype=torch.float64)
    squares, num_pixels = total.clone(), 0
    for index in sorted(chosen):
        values = scale_values(split[index][0]).flatten(1).to(torch.float64)
        total += values.sum(1)
        squares += values.square().sum(1)
        num_pixels += values.shape[1]
    mean = total / num_pixels
    std = (squares / num_pixels - mean.square()).clamp_min(0).sqrt()
    if not bool(mean.isfinite().all() and std.isfinite().all()):
        bad = [
            label for label, m in zip(split.channels.labels, std, strict=True) if not m.isfinite()
        ]
        raise ValueError(
            f"Channel {', '.join(bad)} holds values that are not finite (no-data pixels?). Write "
            f"numbers in their place."
        )
    # Rounding leaves about 1e-8 of the mean where the plane is constant.
    std = torch.where(std > 1e-6 * mean.abs(), std, torch.ones_like(std))
    return mean.tolist(), std.tolist()
