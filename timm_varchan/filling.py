"""Holes in images (clouds, striping, no-data), filled from the channels that are valid there."""

from __future__ import annotations

import torch
from torch import Tensor

from timm_varchan.channels import Channel, ChannelSet
from timm_varchan.errors import UserError
from timm_varchan.stems.prior import Prior

__all__ = ["fill_missing"]

#: Pixels whose coefficients are gathered at once.
CHUNK = 1 << 16


@torch.no_grad()
def fill_missing(x: Tensor, valid: Tensor, channels: ChannelSet) -> Tensor:
    """Predict each missing value from the values of the same pixel that are valid.

    The best linear prediction under the channels' means, deviations and correlation, as for absent
    channels (see `Prior`), one solve for each pattern of missing channels that occurs. A pixel
    where nothing is valid gets the means.

    Args:
        x: `(B, C, H, W)`, floating point; what stands in missing values is ignored, NaN too.
        valid: Bool, of x's shape or one that broadcasts to it.
        channels: C channels with mean, deviation and correlation in x's units; with a correlation
            alone, those of standardised planes.

    Returns:
        `(B, C, H, W)`: x where it is valid, elsewhere the prediction.

    Raises:
        UserError: Other shapes, integers, or channels whose correlation is not known.
    """
    if x.dim() != 4 or x.shape[1] != len(channels) or not x.is_floating_point():
        raise UserError(
            f"The input is {x.dtype} {tuple(x.shape)}; needed are floating-point images (batch, "
            f"{len(channels)}, height, width) of {channels}."
        )
    if valid.dtype != torch.bool:
        raise UserError(f"valid is {valid.dtype}; needed is a mask of bool.")
    if channels.correlation is None:
        raise UserError(
            f"The correlation of {channels} is not known. Measure it: "
            f"timm_varchan.measure_channels(loader, channels)."
        )
    planes = x.movedim(1, -1).flatten(0, -2)
    there = valid.expand_as(x).movedim(1, -1).flatten(0, -2)
    holes = ~there.all(1)
    if not bool(holes.any()):
        return x.clone()
    filled = planes.clone()
    filled[holes] = _predicted(planes[holes], there[holes], channels).to(x.dtype)
    shape = (x.shape[0], *x.shape[2:], x.shape[1])
    return filled.view(shape).movedim(-1, 1).contiguous()


def _predicted(pixels: Tensor, there: Tensor, channels: ChannelSet) -> Tensor:
    """Pixels `(P, C)` with their missing values predicted."""
    dtype = torch.promote_types(pixels.dtype, torch.float32)
    mean = torch.tensor(channels.mean or (0.0,) * len(channels)).to(pixels.device, dtype)
    std = torch.tensor(channels.std or (1.0,) * len(channels)).to(pixels.device, dtype)
    deviations = ((pixels.to(dtype) - mean) / std).masked_fill(~there, 0.0)
    patterns, which = torch.unique(there, dim=0, return_inverse=True)
    # Numbers for names: here every channel is itself, whatever it is called.
    numbered = ChannelSet(tuple(Channel(str(i)) for i in range(len(channels))))
    known = ChannelSet(numbered.channels, channels.correlation)
    prior = Prior(numbered, numbered, "measured", known)
    table = prior.solve(patterns.cpu()).to(pixels.device, dtype)
    mixed = torch.empty_like(deviations)
    for start in range(0, len(pixels), CHUNK):
        rows = slice(start, start + CHUNK)
        mixed[rows] = torch.bmm(deviations[rows, None], table[which[rows]])[:, 0]
    return torch.where(there, pixels.to(dtype), mixed * std + mean)
