"""The naive way with any channels: their mean, as a gray image."""

from collections.abc import Sequence

from torch import Tensor

from timm_varchan.channels import ChannelSet
from timm_varchan.stems.mixer import Mixer

__all__ = ["GrayMixer"]


class GrayMixer(Mixer):
    """Gives every virtual channel the mean of the channels, whatever they are."""

    def tables(
        self, sets: Sequence[ChannelSet], wavelengths_nm: Tensor, present: Tensor
    ) -> dict[str, Tensor]:
        """The prior `(S, P, K)`: 1/m for each of the m channels."""
        share = present.to(wavelengths_nm.dtype) / present.sum(1, keepdim=True).clamp(min=1)
        return {"prior": share[:, :, None].expand(-1, -1, self.num_virtual)}
