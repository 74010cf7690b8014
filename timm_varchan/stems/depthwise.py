"""Each known channel filtered on its own, then a learned weighted mean."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from timm_varchan.channels import RGB, ChannelSetLike
from timm_varchan.errors import UserError
from timm_varchan.stems.kernels import convolve
from timm_varchan.stems.known import KnownMixer

__all__ = ["DepthwiseMixer"]


class DepthwiseMixer(KnownMixer):
    """Filters each known channel into K planes and takes their weighted mean over the channels.

    `v_k = sum_c alpha_c (F[c, k] * x_c)` with learned 3x3 filters F and `alpha = softmax(w[ids])`.
    A virtual channel starts as K times the identity to its own plane, which with equal weights is
    zero-filling with rescaling; a further one as the identity to all planes.

    Source: the depthwise stem of CHAMMI, arXiv:2310.19224. Differs: no convolution before the
    filters and no normalisation after them; the kernel bank follows instead of a 1x1 convolution.

    Args:
        virtual_channels: What the K planes of the kernel bank stand for.
        default_channels: The set an input with as many channels is taken for.
        channel_names: Further channels that the model learns filters for.
        **kwargs: `prior`, `channel_stats`, `prior_scale`, `device` and `dtype` of `Mixer`.
    """

    def __init__(
        self,
        virtual_channels: ChannelSetLike = RGB,
        default_channels: ChannelSetLike = RGB,
        *,
        channel_names: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        self.channel_names = tuple(channel_names)
        super().__init__(virtual_channels, default_channels, **kwargs)
        like: dict[str, Any] = {key: kwargs.get(key) for key in ("device", "dtype")}
        K, N = self.num_virtual, len(self.known())
        start = torch.zeros(N, K, 3, 3)
        start[:, :, 1, 1] = torch.cat([K * torch.eye(K), torch.ones(N - K, K)])
        self.filters = nn.Parameter(start.to(**like))
        self.weights = nn.Parameter(torch.zeros(N, **like))

    def forward(self, x: Tensor) -> Tensor:
        """Filter and mix, `(B, C, H, W) -> (B, K, H, W)`."""
        x = self.checked(x)
        rows, named, _ = self.rows(x)
        place, absent = self.place[:, rows], self.present[:, rows] == 0
        alpha = self.weights[place].masked_fill(absent, -torch.inf).softmax(1)
        filters = self.filters[place] * alpha[:, :, None, None, None]
        filters = torch.where(named, filters, self.fallback)
        return convolve(x, filters.transpose(1, 2).to(x.dtype), padding=1)

    def coefficients(self, x: Tensor) -> Tensor:
        """There are none: the channels are filtered, not only mixed.

        Raises:
            UserError: Always.
        """
        raise UserError(
            "DepthwiseMixer filters its channels, so it has no mixing coefficients to look at or "
            "to fold. Look at its filters."
        )
