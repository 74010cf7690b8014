"""The naive way with missing channels: planes of zeros in their place."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from timm_varchan.channels import ChannelSet
from timm_varchan.stems.mixer import Mixer

__all__ = ["ZeroFillMixer"]


class ZeroFillMixer(Mixer):
    """Puts every known channel in its place, zeros where one is absent, rescaled by K/m.

    m is the number of channels that have a place. The rescaling keeps the expected scale of the
    stem's answer, as transform masks of fixed-channel models are tested.

    Source: the fixed-channel baseline of ChannelViT, arXiv:2309.16108, section 4.
    """

    supports_anonymous: ClassVar[bool] = False

    def tables(
        self, sets: Sequence[ChannelSet], wavelengths_nm: Tensor, present: Tensor
    ) -> dict[str, Tensor]:
        """The prior `(S, P, K)`: K/m where names agree, else 0."""
        prior = torch.zeros((*present.shape, self.num_virtual), dtype=wavelengths_nm.dtype)
        places = {c: k for k, c in enumerate(self.virtual_channels)}
        for row, channel_set in enumerate(sets):
            placed = [(p, places[c]) for p, c in enumerate(channel_set) if c in places]
            for position, place in placed:
                prior[row, position, place] = self.num_virtual / len(placed)
        return {"prior": prior}

    def _check_channels(self, channels: ChannelSet | tuple[ChannelSet, ...] | None) -> None:
        super()._check_channels(channels)
        for channel_set in channels if isinstance(channels, tuple) else (channels,):
            if channel_set is None:
                continue
            unknown = [c.label for c in channel_set if c not in self.virtual_channels.channels]
            if unknown:
                raise ValueError(
                    f"A zero-filled model has no place for {', '.join(unknown)}: it was made for "
                    f"{self.virtual_channels}. Leave them out or use another stem."
                )
