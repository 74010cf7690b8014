"""Kernels as learned mixtures of templates, one mixture a known channel."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from timm_varchan.channels import RGB, ChannelSetLike
from timm_varchan.stems.known import KnownMixer

__all__ = ["TemplateMixer"]


class TemplateMixer(KnownMixer):
    """Learns for each known channel how its kernel mixes the templates: `W[:, c] = a_c . bank`.

    The bank's K kernels are the templates. A virtual channel starts as its own template, a further
    one as the mean of all.

    Source: TemplateMixing of CHAMMI, arXiv:2310.19224, there with 16 or 128 templates and
    orthogonal mixtures to start with; here the pretrained kernels are the templates (a model built
    with `in_chans=` has more).

    Args:
        virtual_channels: What the K planes of the kernel bank stand for.
        default_channels: The set an input with as many channels is taken for.
        channel_names: Further channels that the model learns a mixture for.
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
        K = self.num_virtual
        start = torch.cat([torch.eye(K), torch.full((len(self.known()) - K, K), 1 / K)])
        self.mixtures = nn.Parameter(start.to(**like))

    def coefficients(self, x: Tensor) -> Tensor:
        """The mixing coefficients, `(S, C, K)`."""
        rows, named, _ = self.rows(x)
        mixtures = self.mixtures[self.place[:, rows]] * self.present[:, rows, None]
        return torch.where(named, mixtures, self.fallback)
