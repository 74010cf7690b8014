"""Random operations on images of any number of planes: RandAugment and TrivialAugment.

They come after the normalisation, so that strengths are in standard deviations of a channel and
mean the same for 8-bit photographs and for reflectances; 0 is every channel's mean.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as v2

__all__ = ["OPERATIONS", "RandomOperations"]

#: An operation takes a normalised image `(C, H, W)` and a strength in -1..1.
Operation = Callable[[Tensor, float], Tensor]


def _affine(
    x: Tensor, angle: float, shift: tuple[float, float], shear: tuple[float, float]
) -> Tensor:
    return v2.affine(
        x,
        angle=angle,
        translate=[shift[0] * x.shape[2], shift[1] * x.shape[1]],
        scale=1.0,
        shear=list(shear),
        interpolation=InterpolationMode.BILINEAR,
        fill=None,
    )


def _identity(x: Tensor, strength: float) -> Tensor:
    return x


def _rotate(x: Tensor, strength: float) -> Tensor:
    return _affine(x, 30 * strength, (0, 0), (0, 0))


def _translate_x(x: Tensor, strength: float) -> Tensor:
    return _affine(x, 0, (0.3 * strength, 0), (0, 0))


def _translate_y(x: Tensor, strength: float) -> Tensor:
    return _affine(x, 0, (0, 0.3 * strength), (0, 0))


def _shear_x(x: Tensor, strength: float) -> Tensor:
    return _affine(x, 0, (0, 0), (17 * strength, 0))


def _shear_y(x: Tensor, strength: float) -> Tensor:
    return _affine(x, 0, (0, 0), (0, 17 * strength))


def _brightness(x: Tensor, strength: float) -> Tensor:
    """All planes lighter or darker by up to a standard deviation."""
    return x + strength


def _contrast(x: Tensor, strength: float) -> Tensor:
    mean = x.mean((1, 2), keepdim=True)
    return mean + (x - mean) * (1 + 0.9 * strength)


def _colour(x: Tensor, strength: float) -> Tensor:
    """The planes' differences from their mean, larger or smaller: saturation for any planes."""
    grey = x.mean(0, keepdim=True)
    return grey + (x - grey) * (1 + 0.9 * strength)


def _tint(x: Tensor, strength: float) -> Tensor:
    """Every plane lighter or darker on its own."""
    return x + strength * (2 * torch.rand(x.shape[0], 1, 1) - 1)


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


#: By name; TrivialAugment's and RandAugment's, without those that need 8 bits.
OPERATIONS: dict[str, Operation] = {
    "identity": _identity,
    "rotate": _rotate,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "brightness": _brightness,
    "contrast": _contrast,
    "colour": _colour,
    "tint": _tint,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "standardise": _standardise,
}


class RandomOperations(nn.Module):
    """Some random operations, one after the other, drawn from torch's default generator.

    Source: RandAugment, arXiv:1909.13719 (two operations of one strength); TrivialAugment,
    arXiv:2103.10158 (one operation, its strength uniform). Differs: on normalised planes of any
    number; no equalisation.

    Args:
        num_ops: How many an image.
        strength: 0..1; None draws it anew for every operation.
    """

    def __init__(self, num_ops: int = 1, strength: float | None = None) -> None:
        super().__init__()
        self.num_ops, self.strength = num_ops, strength
        self._operations = tuple(OPERATIONS.values())

    def forward(self, x: Tensor) -> Tensor:
        """`(C, H, W)`, normalised float, to the same shape."""
        for _ in range(self.num_ops):
            which, sign, drawn = torch.rand(3).tolist()
            strength = drawn if self.strength is None else self.strength
            operation = self._operations[int(which * len(self._operations))]
            x = operation(x, strength if sign < 0.5 else -strength)
        return x
