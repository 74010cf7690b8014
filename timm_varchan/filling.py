"""Holes in images (clouds, striping, no-data), filled from the channels that are valid there."""

from __future__ import annotations

import torch
from torch import Tensor

from timm_varchan.channels import ChannelSet, ChannelSetLike
from timm_varchan.errors import UserError
from timm_varchan.stems.prior import NUGGET

#: Values of the pixels that are predicted at once: 32 MB in float64.
CHUNK = 1 << 22


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
    stats = ChannelSet.parse(channels)
    if x.dim() not in (3, 4) or x.shape[-3] != len(stats) or not x.is_floating_point():
        raise UserError(
            f"The input is {x.dtype} {tuple(x.shape)}; needed are floating-point images (batch, "
            f"{len(stats)}, height, width) of {stats}."
        )
    if valid.dtype != torch.bool:
        raise UserError(f"valid is {valid.dtype}; needed is a mask of bool.")
    if stats.correlation is None:
        raise UserError(
            f"The correlation of {stats} is not known. Measure it, and pass what comes back: "
            f"timm_varchan.measure_channels(loader, channels)."
        )
    filled = x.clone(memory_format=torch.contiguous_format)
    images = filled.view(-1, *x.shape[-3:])
    valid = valid.expand(x.shape).reshape(images.shape)
    predict = _Prediction(stats, x.device)
    # Without a place in memory for every channel of every hole: the places of the holes alone.
    for places in torch.split((~valid.all(1)).nonzero(), max(1, CHUNK // len(stats))):
        b, h, w = places.unbind(1)
        images[b, :, h, w] = predict(images[b, :, h, w], valid[b, :, h, w])
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

    def __call__(self, pixels: Tensor, valid: Tensor) -> Tensor:
        """Pixels `(P, C)` with their missing values predicted."""
        z = ((pixels - self.mean) / self.std).masked_fill(~valid, 0.0)
        weighted = z @ self.inverse  # of which the missing part is P_MV z_V
        solved = torch.zeros_like(z)
        few_missing = valid.sum(1) * 2 >= valid.shape[1]
        part = valid ^ few_missing[:, None]  # the smaller one of missing and valid
        sizes = part.sum(1)
        for missing in (False, True):
            matrix, right = (self.inverse, -weighted) if missing else (self.system, z)
            for size in sorted(set(sizes[few_missing == missing].tolist())):
                rows = ((sizes == size) & (few_missing == missing)).nonzero()[:, 0]
                # Patterns that are alike stand together, so that each is solved once a piece.
                kinds, kind = torch.unique(part[rows], dim=0, return_inverse=True)
                place = kinds.nonzero()[:, 1].view(len(kinds), size)
                order = kind.argsort(stable=True)
                for some in torch.split(order, max(1, CHUNK // max(1, size * size))):
                    used, which = torch.unique(kind[some], return_inverse=True)
                    grid = place[used]
                    blocks = torch.linalg.inv(matrix[grid[:, :, None], grid[:, None, :]])
                    columns = place[kind[some]]
                    values = right[rows[some, None], columns]
                    values = torch.bmm(blocks[which], values[:, :, None])[:, :, 0]
                    solved[rows[some, None], columns] = values
        predicted = torch.where(few_missing[:, None], solved, solved @ self.table)
        return torch.where(valid, pixels, (predicted * self.std + self.mean).to(pixels.dtype))
