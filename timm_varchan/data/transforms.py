"""Transforms for any number of planes and any bit depth, on tensors."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tv

from timm_varchan.channels import ChannelSet
from timm_varchan.errors import UserError
from timm_varchan.filling import fill_missing

#: RandAugment at timm's usual strength, 9 of 10 being its strongest; TrivialAugment.
AUTO_AUGMENTS: dict[str, dict[str, Any]] = {
    "rand": {"num_ops": 2, "strength": 0.9},
    "trivial": {"num_ops": 1, "strength": None},
}
_RANGES = {torch.uint8: 255.0, torch.uint16: 65535.0}


def value_range(image: Tensor) -> float:
    """What the stored numbers of an image are divided by: 255, 65535, of floats 1."""
    if image.is_floating_point():
        return 1.0
    if image.dtype not in _RANGES:
        raise UserError(
            f"The image is {image.dtype}, whose range nothing tells. Give uint8, uint16 or floats; "
            f"load_data(value_scale=...) divides other numbers."
        )
    return _RANGES[image.dtype]


def scale_values(image: Tensor) -> Tensor:
    """To float32: 8 bits / 255, 16 bits / 65535, floats as they are; other types are refused."""
    return image.to(torch.float32) / value_range(image)


class NormalizePlanes(nn.Module):
    """Scaled values less each channel's mean, over its deviation: one factor and offset a channel.

    Args:
        channels: The planes, each with mean and std in the units of the scaled values.
        no_data: `mean`, or `predict`: pixels without data (NaN) become what the channels that are
            there say of them, by the channels' correlation.

    Raises:
        UserError: A channel without mean and std, a prediction without a correlation; an image
            with another number of planes.
    """

    factor: Tensor
    offset: Tensor

    def __init__(self, channels: ChannelSet, no_data: str = "mean") -> None:
        super().__init__()
        self.channels, self._predicts = channels, no_data == "predict"
        if self._predicts and channels.correlation is None:
            raise UserError(
                f"The correlation of {channels} is not known, by which --no-data predict fills "
                f"pixels. Measure it (timm-varchan measure), or take --no-data mean."
            )
        if channels.mean is None or channels.std is None:
            without = [c.label for c in channels if c.mean is None or c.std is None]
            raise UserError(
                f"There are no mean and std for the channels {', '.join(without) or channels}. "
                f"Measure them (channels.with_stats(*channel_stats(split))), or give mean and std "
                f"(--mean, --std), one for all or one each, in units of the scaled values."
            )
        means, stds = torch.tensor([channels.mean, channels.std], dtype=torch.float64)
        self.register_buffer("factor", (1 / stds).view(-1, 1, 1))
        self.register_buffer("offset", (-means / stds).float().view(-1, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """`(C, H, W)` of any type to normalised float32; NaN becomes the mean."""
        if image.dim() != 3 or image.shape[0] != len(self.channels):
            raise UserError(
                f"The image has shape {tuple(image.shape)}, but the channels are {self.channels}: "
                f"give ({len(self.channels)}, H, W), or say the channels of this image."
            )
        if self._predicts and image.is_floating_point() and bool(image.isnan().any()):
            image = fill_missing(image[None], ~image[None].isnan(), self.channels)[0]
        factor = (self.factor / value_range(image)).to(torch.float32)
        values = image.to(torch.float32) * factor
        values += self.offset
        return values.nan_to_num_(0.0, math.inf, -math.inf) if image.is_floating_point() else values


class TrainTransform(nn.Module):
    """Crop, flip, normalisation, rotation (the reference report's), and what is usual since.

    Crop, flips and rotation are one interpolation; only where a crop is larger than the result it
    is shrunk with antialiasing first. The report's channel shuffling is done to whole batches.

    Args:
        img_size: Height and width of the result.
        channels: The planes, each with mean and std.
        scale: Share of the area that a crop keeps, least and most.
        ratio: Width over height of a crop, least and most.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip (images from above have no up).
        rotation_degrees: Rotations are drawn from plus to minus this; the corners become the mean.
        auto_augment: Key of `AUTO_AUGMENTS`, or `none`.
        erase_prob: Probability that a rectangle becomes the mean, 0.
        no_data: What pixels without data (NaN) become; see `NormalizePlanes`.
    """

    def __init__(
        self,
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
        no_data: str = "mean",
    ) -> None:
        super().__init__()
        self.normalize, self.others = NormalizePlanes(channels, no_data), nn.Sequential()
        if auto_augment != "none":
            self.others.append(RandomOperations(**AUTO_AUGMENTS[auto_augment]))
        if erase_prob > 0:
            self.others.append(v2.RandomErasing(erase_prob))
        self._img_size, self._scale, self._ratio = img_size, scale, ratio
        self._flips, self._degrees = (hflip, vflip), rotation_degrees

    def forward(self, image: Tensor) -> Tensor:
        """`(C, H, W)` of any type to normalised float32 `(C, img_size, img_size)`."""
        return self.seeded(image, int(torch.randint(2**62, ())))

    def seeded(self, image: Tensor, key: int) -> Tensor:
        """The same, drawn from the key alone; torch's generator is as it was afterwards."""
        rng = random.Random(key)
        x = self.normalize(image)
        top, left, height, width = self._crop(rng, x.shape[1], x.shape[2])
        crop = x[:, top : top + height, left : left + width]
        mirrored, upturned = (rng.random() < chance for chance in self._flips)
        angle = math.radians(rng.uniform(-self._degrees, self._degrees)) if self._degrees else 0.0
        x = self._sample(crop, mirrored, upturned, angle)
        if len(self.others):
            with torch.random.fork_rng(devices=[]):
                # Not torch.manual_seed: it reseeds accelerators too, and in workers queues that.
                torch.default_generator.manual_seed(rng.getrandbits(62))
                x = self.others(x)
        return x

    def _crop(self, rng: random.Random, height: int, width: int) -> tuple[int, int, int, int]:
        """Top, left, height and width, drawn as torchvision's `RandomResizedCrop` does."""
        for _ in range(10):
            area = height * width * rng.uniform(*self._scale)
            aspect = math.exp(rng.uniform(*map(math.log, self._ratio)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return rng.randint(0, height - h), rng.randint(0, width - w), h, w
        low, high = self._ratio
        w = width if width < low * height else min(width, round(height * high))
        h = height if width > high * height else min(height, round(width / low))
        return (height - h) // 2, (width - w) // 2, h, w

    def _sample(self, crop: Tensor, mirrored: bool, upturned: bool, angle: float) -> Tensor:
        size = self._img_size
        shrinks = crop.shape[1] > size or crop.shape[2] > size
        if shrinks:
            crop = F.interpolate(crop[None], (size, size), mode="bilinear", antialias=True)[0]
        if not angle and crop.shape[1:] == (size, size):
            axes = [axis for axis, is_turned in ((2, mirrored), (1, upturned)) if is_turned]
            return crop.flip(axes) if axes else crop.clone()
        across, down = _places(size)
        cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
        x, y = across * cos + down * sin, down * cos - across * sin
        grid = np.empty((1, size, size, 2), np.float32)
        grid[0, ..., 0], grid[0, ..., 1] = (-x if mirrored else x), (-y if upturned else y)
        sampled = F.grid_sample(
            crop[None], torch.from_numpy(grid), padding_mode="border", align_corners=False
        )[0]
        if angle:  # beyond the crop there is the mean
            inside = (np.abs(x) <= 1) & (np.abs(y) <= 1)
            sampled *= torch.from_numpy(inside.astype(np.float32))
        return sampled


@lru_cache(maxsize=8)
def _places(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres of the result's pixels from -1 to 1, across and down."""
    line = (np.arange(size, dtype=np.float32) * 2 + 1) / np.float32(size) - 1
    return line[None, :], line[:, None]


train_transform = TrainTransform  # by the name that goes with `eval_transform`


def eval_transform(
    img_size: int, channels: ChannelSet, *, crop_pct: float = 0.875, no_data: str = "mean"
) -> nn.Module:
    """Resize the shorter side to `img_size / crop_pct`, crop the centre, normalise.

    Args:
        img_size: Height and width of the result.
        channels: The planes, each with mean and std.
        crop_pct: Fraction of the resized image's side that the crop keeps; 1 for small images.
        no_data: What pixels without data (NaN) become; see `NormalizePlanes`.

    Raises:
        UserError: A channel without mean and std, a fraction out of 0..1.
    """
    if not 0 < crop_pct <= 1:
        raise UserError(f"crop_pct is {crop_pct}; it must be above 0 and at most 1.")
    return nn.Sequential(
        NormalizePlanes(channels, no_data),
        v2.Resize(round(img_size / crop_pct), antialias=True),
        v2.CenterCrop(img_size),
    )


# Random operations on planes: RandAugment and TrivialAugment --------------------------------------
#
# They come after the normalisation, so that strengths are in standard deviations
# and mean the same for photographs and for reflectances; 0 is every channel's mean.

Operation = Callable[[Tensor, float], Tensor]


def _affine(x: Tensor, angle: float, across: float, down: float, *shear: float) -> Tensor:
    return tv.affine(
        x, angle=angle, translate=[across * x.shape[2], down * x.shape[1]], scale=1.0,
        shear=list(shear), interpolation=InterpolationMode.BILINEAR, fill=None,
    )  # fmt: skip


def _stretched(x: Tensor, dim: int | tuple[int, int], strength: float) -> Tensor:
    """Differences from the mean over axes, larger or smaller: contrast, colour."""
    mean = x.mean(dim, keepdim=True)
    return mean + (x - mean) * (1 + 0.9 * strength)


def _sharpness(x: Tensor, strength: float) -> Tensor:
    blurred = F.avg_pool2d(x[None], 3, stride=1, padding=1, count_include_pad=False)[0]
    return x + 0.9 * strength * (x - blurred)


def _posterize(x: Tensor, strength: float) -> Tensor:
    """Few levels: steps of up to a standard deviation."""
    step = max(abs(strength), 1e-3)
    return (x / step).round() * step


def _solarize(x: Tensor, strength: float) -> Tensor:
    """What is brighter than a threshold, 0 to 3 deviations above the mean, is mirrored at it."""
    threshold = 3 * (1 - abs(strength))
    return torch.where(x > threshold, 2 * threshold - x, x)


def _standardise(x: Tensor, strength: float) -> Tensor:
    """Every plane to mean 0 and deviation 1: autocontrast without its clipping."""
    mean, std = x.mean((1, 2), keepdim=True), x.std((1, 2), keepdim=True, correction=0)
    return (x - mean) / std.clamp_min(0.05)


#: By name; TrivialAugment's and RandAugment's, without those that need 8 bits. Brightness is of
#: all planes by up to a standard deviation, tint of every plane on its own.
OPERATIONS: dict[str, Operation] = {
    "identity": lambda x, strength: x,
    "rotate": lambda x, strength: _affine(x, 30 * strength, 0, 0, 0, 0),
    "translate_x": lambda x, strength: _affine(x, 0, 0.3 * strength, 0, 0, 0),
    "translate_y": lambda x, strength: _affine(x, 0, 0, 0.3 * strength, 0, 0),
    "shear_x": lambda x, strength: _affine(x, 0, 0, 0, 17 * strength, 0),
    "shear_y": lambda x, strength: _affine(x, 0, 0, 0, 0, 17 * strength),
    "brightness": lambda x, strength: x + strength,
    "contrast": lambda x, strength: _stretched(x, (1, 2), strength),
    "colour": lambda x, strength: _stretched(x, 0, strength),  # saturation, for any planes
    "tint": lambda x, strength: x + strength * (2 * torch.rand(x.shape[0], 1, 1) - 1),
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "standardise": _standardise,
}


class RandomOperations(nn.Module):
    """Some random operations, one after the other, drawn from torch's default generator.

    Source: RandAugment, arXiv:1909.13719 (two operations of one strength); TrivialAugment,
    arXiv:2103.10158 (one operation, its strength uniform: None). Differs: on normalised planes of
    any number; no equalisation.
    """

    def __init__(self, num_ops: int = 1, strength: float | None = None) -> None:
        super().__init__()
        self.num_ops, self.strength = num_ops, strength

    def forward(self, x: Tensor) -> Tensor:
        """`(C, H, W)`, normalised float, to the same shape."""
        operations = list(OPERATIONS.values())
        for _ in range(self.num_ops):
            which, sign, drawn = torch.rand(3).tolist()
            strength = drawn if self.strength is None else self.strength
            operation = operations[int(which * len(operations))]
            x = operation(x, strength if sign < 0.5 else -strength)
        return x
