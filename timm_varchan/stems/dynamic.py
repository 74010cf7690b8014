"""Dynamic convolution: attention over several kernels, for a fixed number of channels."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from timm_varchan.channels import RGB, ChannelSetLike
from timm_varchan.stems.kernels import KernelMixer
from timm_varchan.stems.known import KnownMixer

__all__ = ["DynamicMixer"]


class DynamicMixer(KernelMixer, KnownMixer):
    """Adds `sum_n pi_n(x) D_n` to the bank, with attention pi from the channels' means.

    Because the attention sums to one, this is a mixture of the N kernels `bank + D_n`. Takes
    exactly the channels that the bank was made for, in any order that it is told.

    Source: dynamic convolution, arXiv:1912.03458. Differs: the kernels start equal (`D_n = 0`), so
    that pretrained weights are kept, and the temperature stays as it is instead of falling.

    Args:
        virtual_channels: What the K planes of the kernel bank stand for.
        default_channels: The same set, in the order of the input.
        kernel_shape: `(out, kh, kw)` of the bank.
        num_kernels: N.
        temperature: The attention's logits are divided by it.
        **kwargs: `prior`, `channel_stats`, `prior_scale`, `device` and `dtype` of `Mixer`.
    """

    any_count: ClassVar[bool] = False
    content_dependent: ClassVar[bool] = True

    def __init__(
        self,
        virtual_channels: ChannelSetLike = RGB,
        default_channels: ChannelSetLike = RGB,
        *,
        kernel_shape: tuple[int, int, int],
        num_kernels: int = 4,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(virtual_channels, default_channels, kernel_shape=kernel_shape, **kwargs)
        like: dict[str, Any] = {key: kwargs.get(key) for key in ("device", "dtype")}
        self.temperature = temperature
        hidden = max(num_kernels, self.num_virtual // 4)
        self.squeeze = nn.Linear(self.num_virtual, hidden, bias=False, **like)
        self.excite = nn.Linear(hidden, num_kernels, **like)
        out, kh, kw = kernel_shape
        # N x out in one axis: `.to(memory_format=torch.channels_last)` fails on five.
        self.deviations = nn.Parameter(
            torch.zeros(num_kernels * out, self.num_virtual, kh, kw, **like)
        )

    def generated(self, x: Tensor) -> Tensor:
        """The kernels, `(B, out, C, kh, kw)`."""
        placed = self.placed(x)
        means = (x.mean((2, 3))[:, :, None] * placed).sum(1)
        logits = self.excite(self.squeeze(means).relu())
        attention = (logits / self.temperature).softmax(-1)
        deviations = self.deviations.view(attention.shape[1], -1, *self.deviations.shape[1:])
        kernels = torch.einsum("bn,nokij->bokij", attention, deviations)
        return torch.einsum("bck,bokij->bocij", placed.expand(len(x), -1, -1), kernels)
