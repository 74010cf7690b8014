"""Transforms for any number of planes and any bit depth, on tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from timm_varchan.channels import ChannelSet
from timm_varchan.data.plane_augment import RandomOperations
from timm_varchan.errors import UserError

#: RandAugment at timm's usual strength, 9 of 10 being its strongest; TrivialAugment.
AUTO_AUGMENTS: dict[str, dict[str, Any]] = {
    "rand": {"num_ops": 2, "strength": 0.9},
    "trivial": {"num_ops": 1, "strength": None},
}
_UINT8_MAX, _UINT16_MAX = 255.0, 65535.0


def scale_values(image: Tensor) -> Tensor:
    """To float32: 8 bits / 255, 16 bits / 65535, floats as they are.

    Args:
        image: Any shape; uint8, uint16 or floating point.

    Returns:
        The same shape, float32.

    Raises:
        UserError: Another type, whose range nothing tells.
    """
    if image.dtype == torch.uint8:
        return image.to(torch.float32) / _UINT8_MAX
    if image.dtype == torch.uint16:
        return image.to(torch.float32) / _UINT16_MAX
    if image.is_floating_point():
        return image.to(torch.float32)
    raise UserError(
        f"The image is {image.dtype}, whose range nothing tells. Give uint8, uint16 or floats; "
        f"load_data(value_scale=...) divides other numbers."
    )


class ScaleValues(nn.Module):
    """`scale_values` as a step. torchvision resizes no uint16, so that it comes first."""

    def forward(self, image: Tensor) -> Tensor:
        """`(C, H, W)` to float32."""
        return scale_values(image)


class NormalizeChannels(nn.Module):
    """Subtract every channel's mean and divide by its deviation: by name, in the set's order.

    Args:
        channels: The planes, each with mean and std in the units of the scaled values.

    Raises:
        UserError: A channel without mean and std; an image with another number of planes.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: ChannelSet) -> None:
        super().__init__()
        self.channels = channels
        means, stds = _stats(channels)
        self.register_buffer("mean", torch.tensor(means).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(stds).view(-1, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """`(C, H, W)` scaled values to normalised ones."""
        _check_planes(image, self.channels)
        return (image - self.mean) / self.std


def train_transform(
    img_size: int,
    channels: ChannelSet,
    *,
    scale: tuple[float, float] = (0.35, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    vflip: float = 0.0,
    rotation_degrees: float = 15.0,
    auto_augment: str = "none",
    erase_prob: float = 0.0,
) -> nn.Module:
    """Crop, flip, normalisation, rotation (the reference report's), and what is usual since.

    The report's channel shuffling is done to whole batches: `timm_varchan.training.draw_channels`.

    Args:
        img_size: Height and width of the result.
        channels: The planes, each with mean and std.
        scale: Share of the area that a crop keeps, least and most.
        ratio: Width over height of a crop, least and most.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip (images from above have no up).
        rotation_degrees: Rotations are drawn from plus to minus this; the corners become the mean.
        auto_augment: Key of `AUTO_AUGMENTS`.
        erase_prob: Probability that a rectangle becomes the mean, 0.

    Returns:
        A module from `(C, H, W)` of any type to normalised float32 `(C, img_size, img_size)`.

    Raises:
        UserError: A channel without mean and std.
    """
    steps: list[nn.Module] = [
        ScaleValues(),
        _CheckPlanes(channels),
        v2.RandomResizedCrop(img_size, scale=scale, ratio=ratio, antialias=True),
    ]
    if hflip > 0:
        steps.append(v2.RandomHorizontalFlip(hflip))
    if vflip > 0:
        steps.append(v2.RandomVerticalFlip(vflip))
    steps.append(NormalizeChannels(channels))
    if rotation_degrees > 0:
        # After the normalisation, so that corners are the mean, 0. Not fill=: torchvision blends
        # the rim twice then, and it comes out below both the image and the fill.
        bilinear = InterpolationMode.BILINEAR
        steps.append(v2.RandomRotation(rotation_degrees, interpolation=bilinear, fill=None))
    if auto_augment != "none":
        steps.append(RandomOperations(**AUTO_AUGMENTS[auto_augment]))
    if erase_prob > 0:
        steps.append(v2.RandomErasing(erase_prob))
    return nn.Sequential(*steps)


def eval_transform(
    img_size: int,
    channels: ChannelSet,
    *,
    crop_pct: float = 0.875,
) -> nn.Module:
    """Resize the shorter side to `img_size / crop_pct`, crop the centre, normalise.

    Args:
        img_size: Height and width of the result.
        channels: The planes, each with mean and std.
        crop_pct: Share of the resized image's side that the crop keeps; 1 for small images.

    Returns:
        A module from `(C, H, W)` of any type to normalised float32 `(C, img_size, img_size)`.

    Raises:
        UserError: A channel without mean and std, a share out of 0..1.
    """
    if not 0 < crop_pct <= 1:
        raise UserError(f"crop_pct is {crop_pct}; it must be above 0 and at most 1.")
    steps: list[nn.Module] = [
        ScaleValues(),
        _CheckPlanes(channels),
        v2.Resize(round(img_size / crop_pct), antialias=True),
        v2.CenterCrop(img_size),
        NormalizeChannels(channels),
    ]
    return nn.Sequential(*steps)


class _CheckPlanes(nn.Module):
    """A wrong number of planes said in the words of the channels, before torchvision meets it."""

    def __init__(self, channels: ChannelSet) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, image: Tensor) -> Tensor:
        _check_planes(image, self.channels)
        return image


def _check_planes(image: Tensor, channels: ChannelSet) -> None:
    if image.dim() != 3 or image.shape[0] != len(channels):
        raise UserError(
            f"The image has shape {tuple(image.shape)}, but the channels are {channels}: give "
            f"({len(channels)}, H, W), or say the channels of this image."
        )


def _stats(channels: ChannelSet) -> tuple[Sequence[float], Sequence[float]]:
    mean, std = channels.mean, channels.std
    if mean is None or std is None:
        without = [c.label for c in channels if c.mean is None]
        raise UserError(
            f"Channels {channels}: no mean and std for {', '.join(without) or 'any channel'}. "
            f"Measure them: channels.with_stats(*channel_stats(split))."
        )
    return mean, std
