"""What the planes of a data set are like: means, deviations and correlations, in one pass."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from timm_varchan.channels import ChannelSet, ChannelSetLike
from timm_varchan.errors import UserError

__all__ = ["ChannelMoments", "batches_of", "measure_channels"]


class ChannelMoments:
    """Sums over pixels, from which means, deviations and correlations follow.

    Kept in float64. A correlation is over the pixels where both planes are valid.
    """

    def __init__(self) -> None:
        self._count = self._sum = self._product = torch.zeros(0, 0, dtype=torch.float64)
        self._num_pixels = 0

    def update(self, values: Tensor, valid: Tensor | None = None) -> None:
        """Add images `(C, H, W)` or `(B, C, H, W)`, and which of their values count (all: None).

        Raises:
            UserError: Another number of planes than before.
        """
        planes = values.detach().to("cpu", torch.float64)
        mask = torch.ones_like(planes) if valid is None else valid.to(planes).expand_as(planes)
        planes = planes if valid is None else planes.masked_fill(mask == 0, 0.0)
        # (C, pixels)
        planes, mask = (t.movedim(-3, 0).flatten(1) for t in (planes, mask))
        if not self._num_pixels:
            zeros = planes.new_zeros(len(planes), len(planes))
            self._count, self._sum, self._product = zeros, zeros.clone(), zeros.clone()
        if len(planes) != len(self._count):
            raise UserError(
                f"An image has {len(planes)} planes, those before had {len(self._count)}. Measure "
                f"images of one channel set together."
            )
        self._num_pixels += planes.shape[1]
        if valid is None:
            self._count = self._count + planes.shape[1]
            self._sum = self._sum + planes.sum(1, keepdim=True)
        else:
            self._count = self._count + mask @ mask.T
            self._sum = self._sum + planes @ mask.T  # [i, j]: plane i where j is valid too
        self._product = self._product + planes @ planes.T

    @property
    def invalid_fraction(self) -> tuple[float, ...]:
        """The fraction of each plane's pixels that did not count."""
        return tuple((1 - self._count.diagonal() / max(1, self._num_pixels)).tolist())

    def result(self, channels: ChannelSetLike | None = None) -> ChannelSet:
        """The channels (anonymous where None) with means, deviations and correlations.

        The deviation of a constant plane is given as 1, so that it normalises to 0, and its
        correlation with others as 0.

        Raises:
            UserError: No images, planes without a valid pixel, values that are not finite, or
                another number of channels than planes.
        """
        if not self._num_pixels:
            raise UserError("Nothing was measured: pass at least one image.")
        nobody = ChannelSet.anonymous(len(self._count))
        wanted = nobody if channels is None else ChannelSet.parse(channels)
        if len(wanted) != len(self._count):
            raise UserError(
                f"The images have {len(self._count)} planes, but {wanted} are {len(wanted)} "
                f"channels. Name as many as there are planes."
            )
        empty = (self._count.diagonal() == 0).tolist()
        if any(empty):
            labels = [label for label, e in zip(wanted.labels, empty, strict=True) if e]
            raise UserError(f"Channel {', '.join(labels)} has no valid pixel. Leave it out.")
        count = self._count.clamp(min=1)
        joint = self._sum / count
        covariance = self._product / count - joint * joint.T
        mean, std = joint.diagonal(), covariance.diagonal().clamp(min=0).sqrt()
        if not bool(mean.isfinite().all() and std.isfinite().all()):
            bad = [label for label, s in zip(wanted.labels, std, strict=True) if not s.isfinite()]
            raise UserError(
                f"Channel {', '.join(bad)} holds values that are not finite (no-data pixels?). "
                f"Write NaN or numbers in their place."
            )
        # Rounding leaves about 1e-8 of the mean where the plane is constant.
        constant = std <= 1e-6 * mean.abs()
        std = std.masked_fill(constant, 1.0)
        correlation = (covariance / torch.outer(std, std)).clamp(-1, 1)
        correlation = correlation.masked_fill(constant[:, None] | constant, 0.0)
        correlation.fill_diagonal_(1.0)
        correlation = (correlation + correlation.T) / 2
        return wanted.with_stats(mean.tolist(), std.tolist(), correlation.tolist())


def measure_channels(
    images: Iterable[Any], channels: ChannelSetLike | None = None, num_batches: int | None = None
) -> ChannelSet:
    """Measure the planes of images as the model sees them, before they are normalised.

    Args:
        images: A tensor `(C, H, W)` or `(B, C, H, W)`, or a loader, data set or list of such
            images: alone, first in a tuple `(x, y)`, or in a dictionary under `pixel_values`,
            `image` or `x`. NaN is left out.
        channels: What the planes are; anonymous where None.
        num_batches: How many items to look at; all where None.

    Returns:
        The channels with mean, deviation and correlation, e.g. for `adapt(channel_stats=)`.

    Raises:
        UserError: No images, integers, or what `ChannelMoments.result` refuses.
    """
    moments = ChannelMoments()
    for batch in itertools.islice(batches_of(images), num_batches):
        there = ~batch.isnan()
        moments.update(batch, None if bool(there.all()) else there)
    return moments.result(channels)


def batches_of(images: Iterable[Any]) -> Iterator[Tensor]:
    """Floating-point images `(B, C, H, W)` of all that `measure_channels` takes.

    Raises:
        UserError: Something else.
    """
    if isinstance(images, (Tensor, Mapping)):  # one batch
        images = [images]
    elif not hasattr(images, "__iter__") and hasattr(images, "__getitem__"):  # a data set
        images = map(images.__getitem__, range(len(images)))  # type: ignore[arg-type]
    for item in images:
        batch = images_of(item)
        if not isinstance(batch, Tensor) or batch.dim() not in (3, 4):
            what = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
            raise UserError(
                f"Images came as {what}; needed are tensors (channels, height, width) or (batch, "
                f"channels, height, width), alone or first in (x, y)."
            )
        if not batch.is_floating_point():
            raise UserError(
                f"The images are {batch.dtype}; needed are the scaled numbers that the model sees, "
                f"e.g. x.float() / 255."
            )
        yield batch if batch.dim() == 4 else batch[None]


def images_of(batch: Any) -> Any:
    """The images of a batch as loaders of this field give it."""
    if isinstance(batch, Mapping):
        found = next((key for key in ("pixel_values", "image", "x") if key in batch), None)
        if found is None:
            raise UserError(f"The batch has no images: its keys are {', '.join(map(str, batch))}.")
        return batch[found]
    return batch[0] if isinstance(batch, (tuple, list)) else batch
