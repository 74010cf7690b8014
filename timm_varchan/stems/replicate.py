"""The naive way with missing channels: others in their place."""

from collections.abc import Sequence

import torch
from torch import Tensor

from timm_varchan.channels import ChannelSet, ChannelSetLike
from timm_varchan.errors import UserError
from timm_varchan.stems.mixer import Mixer

__all__ = ["ReplicateMixer"]

FILLS = ("mean", "nearest")


class ReplicateMixer(Mixer):
    """Fills absent virtual channels with the mean of the channels, or with the nearest of them.

    `fill="nearest"` is the fixed prior (`stem="prior"`). By the mean, a virtual channel that is
    there takes itself, and channels that are no virtual ones enter through the mean alone. One
    channel is replicated in either way.

    Args:
        virtual_channels: What the K planes of the kernel bank stand for.
        default_channels: The set an input with as many channels is taken for.
        fill: `mean` or `nearest`.
        device: Where the tables live.
        dtype: Their type.

    Raises:
        UserError: Another `fill`.
    """

    def __init__(
        self,
        virtual_channels: ChannelSetLike = "RGB",
        default_channels: ChannelSetLike = "RGB",
        *,
        fill: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if fill not in FILLS:
            raise UserError(f"fill is {fill!r}; choose one of: {', '.join(FILLS)}.")
        self.fill = fill
        super().__init__(virtual_channels, default_channels, device=device, dtype=dtype)

    def tables(
        self, sets: Sequence[ChannelSet], wavelengths_nm: Tensor, present: Tensor
    ) -> dict[str, Tensor]:
        """The prior `(S, P, K)`, summing to 1 over the channels of each set."""
        if self.fill == "nearest":
            return super().tables(sets, wavelengths_nm, present)
        prior = torch.zeros((*present.shape, self.num_virtual), dtype=wavelengths_nm.dtype)
        for row, channel_set in enumerate(sets):
            row_of = {(c.name, c.wavelength_nm): i for i, c in enumerate(channel_set)}
            for k, wanted in enumerate(self.virtual_channels):
                place = row_of.get((wanted.name, wanted.wavelength_nm))
                if place is None or wanted.is_anonymous:
                    prior[row, : len(channel_set), k] = 1 / max(1, len(channel_set))
                else:
                    prior[row, place, k] = 1.0
        return {"prior": prior}
