"""The naive way with missing channels: planes of zeros in their place."""

from collections.abc import Sequence

from torch import Tensor

from timm_varchan.channels import ChannelSet
from timm_varchan.stems.known import KnownMixer

__all__ = ["ZeroFillMixer"]


class ZeroFillMixer(KnownMixer):
    """Puts every known channel in its place, zeros where one is absent, rescaled by K/m.

    m is the number of channels that are there. The rescaling keeps the expected scale of the
    stem's answer, as transform masks of fixed-channel models are tested.

    Source: the fixed-channel baseline of ChannelViT, arXiv:2309.16108, section 4.
    """

    def tables(
        self, sets: Sequence[ChannelSet], wavelengths_nm: Tensor, present: Tensor
    ) -> dict[str, Tensor]:
        """The prior `(S, P, K)`: K/m at a channel's place, else 0."""
        tables = super().tables(sets, wavelengths_nm, present)
        num_present = present.sum(1).clamp(min=1)[:, None, None]
        return {**tables, "prior": tables["prior"] * self.num_virtual / num_present}
