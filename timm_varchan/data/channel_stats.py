"""Mean, standard deviation and correlation of every plane of a split."""

from __future__ import annotations

from timm_varchan.channels import ChannelSet, seeded_rng
from timm_varchan.data.split import ImageSplit
from timm_varchan.data.transforms import scale_values
from timm_varchan.measure import ChannelMoments


def measure_split(
    split: ImageSplit, num_images: int = 1000, seed: int = 0
) -> tuple[ChannelSet, tuple[float, ...]]:
    """Measure scaled values."""
    if len(split) == 0 or num_images < 1:
        raise ValueError(f"Cannot measure {min(len(split), num_images)} images; give at least 1.")
    chosen = seeded_rng("stats", seed).sample(range(len(split)), min(num_images, len(split)))
    moments = ChannelMoments()
    for index in sorted(chosen):
        moments.update(scale_values(split[index][0]))
    return moments.result(split.channels), moments.invalid_share


def channel_stats(
    split: ImageSplit, num_images: int = 1000, seed: int = 0
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation, one each a channel; see `measure_split`."""
    measured, _ = measure_split(split, num_images, seed)
    return list(measured.mean or ()), list(measured.std or ())
