"""Kernels produced whole by a small network from the content of the channels."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_varchan.channels import RGB, ChannelSetLike
from timm_varchan.stems.kernels import KernelMixer

__all__ = ["GeneratorMixer"]

#: Planes are averaged to this many pixels in height and width before the network sees them.
POOLED = 8


class GeneratorMixer(KernelMixer):
    """Produces every weight of every channel's kernel by a network of two layers.

    The dearest form of weight generation: `hidden * out * kh * kw` parameters, where mixing stems
    need `width * K`. The generated kernels are divided by the number of channels.

    Source: the form of the dynamic weight-generating convolution in Chia-Ming Lee, Deep Learning
    Assignment II, which does not print its network; so this is one of that kind, not the same.

    Args:
        virtual_channels: What the K planes of the kernel bank stand for.
        default_channels: The set an input with as many channels is taken for.
        kernel_shape: `(out, kh, kw)` of the bank.
        hidden: Width of the hidden layer.
        **kwargs: `prior`, `channel_stats`, `prior_scale`, `device` and `dtype` of `Mixer`.
    """

    content_dependent: ClassVar[bool] = True

    def __init__(
        self,
        virtual_channels: ChannelSetLike = RGB,
        default_channels: ChannelSetLike = RGB,
        *,
        kernel_shape: tuple[int, int, int],
        hidden: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(virtual_channels, default_channels, kernel_shape=kernel_shape, **kwargs)
        like: dict[str, Any] = {key: kwargs.get(key) for key in ("device", "dtype")}
        out, kh, kw = kernel_shape
        self.content = nn.Linear(POOLED * POOLED, hidden, **like)
        self.out = nn.Linear(hidden, out * kh * kw, **like)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def generated(self, x: Tensor) -> Tensor:
        """The kernels, `(B, out, C, kh, kw)`."""
        rows, named, _ = self.rows(x)
        present = torch.where(named, self.present[:, rows], torch.ones_like(self.fallback))
        pooled = F.adaptive_avg_pool2d(x, POOLED).flatten(2).to(self.out.weight.dtype)
        kernels = self.out(F.gelu(self.content(pooled)))
        kernels = kernels * (present / present.sum(1, keepdim=True))[:, :, None]
        return kernels.unflatten(2, self.kernel_shape).transpose(1, 2)
