"""The naive way with missing channels: planes of zeros in their place."""

from torch import Tensor

from timm_varchan.stems.known import KnownMixer

__all__ = ["ZeroFillMixer"]


class ZeroFillMixer(KnownMixer):
    """Puts every known channel in its place, zeros where one is absent, rescaled by K/m.

    m is the number of channels that are there. The rescaling keeps the expected scale of the
    stem's answer, as transform masks of fixed-channel models are tested.

    Source: the fixed-channel baseline of ChannelViT, arXiv:2309.16108, section 4.
    """

    def prior_rows(self, count: Tensor) -> Tensor:
        """The prior `(S, N, K)`: K/m at a channel's place, else 0."""
        num_present = count.sum(1).clamp(min=1)[:, None, None]
        return super().prior_rows(count) * self.num_virtual / num_present
