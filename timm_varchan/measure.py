"""What the planes of a data set are like: means, deviations and correlations, in one pass."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from timm_varchan.channels import ChannelSet, ChannelSetLike
from timm_varchan.errors import UserError


class ChannelMoments:
    """Sums over pixels in float64, from which means, deviations and correlations follow.

    A correlation is over the pixels where both planes are valid.
    """

    def __init__(self) -> None:
        #: Of each pair of planes: pixels that count, sum of the first, sum of products.
        self._sums = torch.zeros(3, 0, 0, dtype=torch.float64)
        self._num_pixels = 0

    def update(self, values: Tensor, valid: Tensor | None = None) -> None:
        """Add images `(C, H, W)` or `(B, C, H, W)`, and which of their values count (all: None).

        Raises:
            UserError: Another number of planes than before.
        """
        planes = values.detach().to("cpu", torch.float64).movedim(-3, 0).flatten(1)
        size, number = planes.shape
        if valid is None:
            count = planes.new_full((size, size), number)
            total = planes.sum(1, keepdim=True).expand(size, size)
        else:
            mask = valid.expand_as(values).movedim(-3, 0).flatten(1).to(planes)
            planes = planes.masked_fill(mask == 0, 0.0)
            count, total = mask @ mask.T, planes @ mask.T
        if self._num_pixels and size != self._sums.shape[1]:
            raise UserError(
                f"An image has {size} planes, those before had {self._sums.shape[1]}. Measure "
                f"images of one channel set together."
            )
        sums = torch.stack([count, total, planes @ planes.T])
        self._sums = self._sums + sums if self._num_pixels else sums
        self._num_pixels += number

    @property
    def invalid_fraction(self) -> tuple[float, ...]:
        """The fraction of each plane's pixels that did not count."""
        return tuple((1 - self._sums[0].diagonal() / max(1, self._num_pixels)).tolist())

    def result(self, channels: ChannelSetLike | None = None) -> ChannelSet:
        """The channels (anonymous where None) with means, deviations and correlations.

        The deviation of a constant plane is given as 1, so that it normalises to 0, and its
        correlation with others as 0.

        Raises:
            UserError: No images, planes without a valid pixel, values that are not finite, or
                another number of channels than planes.
        """
        count, total, product = self._sums
        if not self._num_pixels:
            raise UserError("Nothing was measured: pass at least one image.")
        nameless = ChannelSet.anonymous(len(count))
        named = nameless if channels is None else ChannelSet.parse(channels)
        if len(named) != len(count):
            raise UserError(
                f"The images have {len(count)} planes, but {named} are {len(named)} channels. "
                f"Name as many as there are planes."
            )
        joint = total / count.clamp(min=1)
        covariance = product / count.clamp(min=1) - joint * joint.T
        mean, std = joint.diagonal(), covariance.diagonal().clamp(min=0).sqrt()
        for wrong, reason in (
            (count.diagonal() == 0, "has no valid pixel. Leave it out."),
            (~std.isfinite(), "holds values that are not finite (no-data pixels?). Write NaN or "
             "numbers in their place."),
        ):  # fmt: skip
            if bool(wrong.any()):
                labels = itertools.compress(named.labels, wrong.tolist())
                raise UserError(f"Channel {', '.join(labels)} {reason}")
        # Rounding leaves about 1e-8 of the mean where the plane is constant.
        constant = std <= 1e-6 * mean.abs()
        std = std.masked_fill(constant, 1.0)
        correlation = (covariance / torch.outer(std, std)).clamp(-1, 1)
        correlation = correlation.masked_fill(constant[:, None] | constant, 0.0)
        correlation.fill_diagonal_(1.0)
        correlation = (correlation + correlation.T) / 2
        return named.with_stats(mean.tolist(), std.tolist(), correlation.tolist())


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
        valid = ~batch.isnan()
        moments.update(batch, None if bool(valid.all()) else valid)
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
        batch = item[0] if isinstance(item, (tuple, list)) and item else item
        if isinstance(item, Mapping):
            batch = next((item[k] for k in ("pixel_values", "image", "x") if k in item), item)
        if not isinstance(batch, Tensor) or batch.dim() not in (3, 4):
            what = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
            raise UserError(
                f"Images came as {what}; needed are tensors (channels, height, width) or (batch, "
                f"channels, height, width), alone, first in (x, y), or as pixel_values, image or x."
            )
        if not batch.is_floating_point():
            raise UserError(
                f"The images are {batch.dtype}; needed are the scaled numbers that the model sees, "
                f"e.g. x.float() / 255."
            )
        yield batch if batch.dim() == 4 else batch[None]
