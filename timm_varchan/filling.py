"""Holes in images (clouds, striping, no-data), filled from the channels that are valid there."""

from __future__ import annotations

import torch
from torch import Tensor

from timm_varchan.channels import ChannelSet, ChannelSetLike
from timm_varchan.errors import UserError
from timm_varchan.stems.prior import NUGGET

__all__ = ["fill_missing"]

#: Values of the pixels that are predicted at once: 32 MB in float64.
CHUNK = 1 << 22
#: Numbers that are copied in the time that one more step of a Python loop takes.
LOOP = 1 << 17


@torch.no_grad()
def fill_missing(x: Tensor, valid: Tensor, channels: ChannelSetLike) -> Tensor:
    """Predict each missing value from the values of the same pixel that are valid.

    The best linear prediction under the channels' means, deviations and correlation, as for absent
    channels (see `Prior`), one solve for each pattern of missing channels that occurs. A pixel
    where nothing is valid gets the means. Beside the result it takes 0.2 GB at most, however many
    channels and patterns there are.

    Args:
        x: `(B, C, H, W)` or `(C, H, W)`, floating point; what stands in missing values is ignored,
            NaN too.
        valid: Bool, of x's shape or one that broadcasts to it.
        channels: C channels with mean, deviation and correlation in x's units, from
            `measure_channels` or its file; with a correlation alone, those of standardised planes.

    Returns:
        x's shape: x where it is valid, elsewhere the prediction.

    Raises:
        UserError: Other shapes, integers, or channels whose correlation is not known.
    """
    known = ChannelSet.parse(channels)
    if x.dim() not in (3, 4) or x.shape[-3] != len(known) or not x.is_floating_point():
        raise UserError(
            f"The input is {x.dtype} {tuple(x.shape)}; needed are floating-point images (batch, "
            f"{len(known)}, height, width) of {known}."
        )
    if valid.dtype != torch.bool:
        raise UserError(f"valid is {valid.dtype}; needed is a mask of bool.")
    if known.correlation is None:
        raise UserError(
            f"The correlation of {known} is not known. Measure it, and pass what comes back: "
            f"timm_varchan.measure_channels(loader, channels)."
        )
    filled = x.clone(memory_format=torch.contiguous_format)
    images = filled.view(-1, *x.shape[-3:])
    there = valid.expand(x.shape).reshape(images.shape)
    predict = _Prediction(known, x.device)
    # Without a place in memory for every channel of every hole: the places of the holes alone.
    for places in torch.split((~there.all(1)).nonzero(), max(1, CHUNK // len(known))):
        b, h, w = places.unbind(1)
        images[b, :, h, w] = predict(images[b, :, h, w], there[b, :, h, w])
    return filled


class _Prediction:
    """Missing values of pixels from their valid ones.

    With A the correlation C plus the nugget on the diagonal, the missing M of a pixel follow from
    its valid V as `C_MV A_VV^-1 z_V`. The same is `-(P_MM)^-1 P_MV z_V` with P the inverse of A, so
    that the system to solve is never larger than the half of the channels.
    """

    def __init__(self, channels: ChannelSet, device: torch.device) -> None:
        def place(numbers: object) -> Tensor:
            return torch.tensor(numbers, dtype=torch.float64, device=device)

        self.mean = place(channels.mean or [0.0] * len(channels))
        self.std = place(channels.std or [1.0] * len(channels))
        self.table = place(channels.correlation)
        self.system = self.table + NUGGET * torch.eye(len(channels)).to(self.table)
        self.inverse = torch.linalg.inv(self.system)

    def __call__(self, pixels: Tensor, there: Tensor) -> Tensor:
        """Pixels `(P, C)` with their missing values predicted."""
        z = ((pixels - self.mean) / self.std).masked_fill(~there, 0.0)
        weighted = z @ self.inverse  # of which the missing part is P_MV z_V
        solved = torch.zeros_like(z)
        kinds, which = torch.unique(there, dim=0, return_inverse=True)
        count = kinds.sum(1)
        few_missing = count * 2 >= kinds.shape[1]
        part = kinds ^ few_missing[:, None]  # the smaller one of missing and valid
        for size in part.sum(1).unique().tolist():
            for missing in (False, True):
                alike = ((part.sum(1) == size) & (few_missing == missing)).nonzero()[:, 0]
                matrix, right = (self.inverse, -weighted) if missing else (self.system, z)
                for some in torch.split(alike, max(1, CHUNK // max(1, size * size))):
                    place = part[some].nonzero()[:, 1].view(len(some), size)
                    blocks = torch.linalg.inv(matrix[place[:, :, None], place[:, None, :]])
                    number = torch.full_like(count, -1)
                    number[some] = torch.arange(len(some), device=some.device)
                    rows = (number[which] >= 0).nonzero()[:, 0]
                    kind = number[which[rows]]
                    columns = place[kind]
                    values = _products(blocks, kind, right[rows[:, None], columns])
                    solved[rows[:, None], columns] = values
        predicted = torch.where(few_missing[which, None], solved, solved @ self.table)
        return torch.where(there, pixels, (predicted * self.std + self.mean).to(pixels.dtype))


def _products(blocks: Tensor, kind: Tensor, vectors: Tensor) -> Tensor:
    """`blocks[kind[p]] @ vectors[p]` `(P, S)`, without a copy of the block for every vector."""
    size = max(1, vectors.shape[1])
    if len(vectors) * size * size < len(blocks) * LOOP:
        chunk = max(1, CHUNK // (size * size))
        pairs = zip(torch.split(kind, chunk), torch.split(vectors, chunk), strict=True)
        return torch.cat([torch.bmm(blocks[k], v[:, :, None])[..., 0] for k, v in pairs])
    made = torch.empty_like(vectors)
    groups = torch.split(kind.argsort(), torch.bincount(kind).tolist())
    for block, rows in zip(blocks, groups, strict=True):
        made[rows] = vectors[rows] @ block  # symmetric
    return made
