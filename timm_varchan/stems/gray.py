"""The naive way with any channels: their mean, as a gray image."""

from torch import Tensor

from timm_varchan.stems.mixer import Mixer

__all__ = ["GrayMixer"]


class GrayMixer(Mixer):
    """Gives every virtual channel the mean of the channels, whatever they are."""

    def prior_rows(self, count: Tensor) -> Tensor:
        """The prior `(S, N, K)`: 1/m for each of the m planes."""
        share = 1 / count.sum(1).clamp(min=1)
        return share[:, None, None].expand(-1, count.shape[1], self.num_virtual)
