"""What stems have in common that generate whole kernels instead of mixing coefficients."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, pad_same
from timm.models import register_notrace_module
from torch import Tensor, nn

from timm_varchan.channels import RGB, ChannelSetLike
from timm_varchan.errors import UserError
from timm_varchan.stems.mixer import Mixer
from timm_varchan.stems.stem import Stem

__all__ = ["KernelMixer", "KernelStem", "convolve"]


def convolve(x: Tensor, kernels: Tensor, bias: Tensor | None = None, **kwargs: Any) -> Tensor:
    """Convolve each sample with its own kernels.

    Args:
        x: `(B, C, H, W)`.
        kernels: `(B, out, C, kh, kw)`, or `(1, out, C, kh, kw)` for all samples alike.
        bias: `(out,)`.
        **kwargs: `stride`, `padding` and `dilation` of `conv2d`.

    Returns:
        `(B, out, H', W')`.
    """
    if len(kernels) == 1:
        return F.conv2d(x, kernels[0], bias, **kwargs)
    B, _, H, W = x.shape
    repeated = None if bias is None else bias.repeat(B)
    y = F.conv2d(x.reshape(1, -1, H, W), kernels.flatten(0, 1), repeated, groups=B, **kwargs)
    return y.view(B, kernels.shape[1], *y.shape[2:])


class KernelMixer(Mixer):
    """Generates the kernels of a `KernelStem`: the bank's, placed by the prior, plus its own.

    `W[b, :, c] = sum_k prior[c, k] bank[:, k] + generated[b, :, c]`. The generated part starts at
    zero, so that pretrained kernels are kept as they are by mixing stems.

    Args:
        virtual_channels: What the K planes of the kernel bank stand for.
        default_channels: The set an input with as many channels is taken for.
        kernel_shape: `(out, kh, kw)` of the bank.
        **kwargs: `prior`, `channel_stats`, `prior_scale`, `device` and `dtype` of `Mixer`.
    """

    def __init__(
        self,
        virtual_channels: ChannelSetLike = RGB,
        default_channels: ChannelSetLike = RGB,
        *,
        kernel_shape: tuple[int, int, int],
        **kwargs: Any,
    ) -> None:
        super().__init__(virtual_channels, default_channels, **kwargs)
        self.kernel_shape = kernel_shape

    def placed(self, x: Tensor) -> Tensor:
        """How much of each channel goes to each virtual channel, `(S, C, K)`."""
        return super().coefficients(x)

    def coefficients(self, x: Tensor) -> Tensor:
        """There are none: a whole kernel is no mixture of the bank's.

        Raises:
            UserError: Always.
        """
        raise UserError(
            f"{type(self).__name__} generates whole kernels, so it has no mixing coefficients to "
            f"look at or to fold. Look at generated_kernels(x) of its stem."
        )

    def generated(self, x: Tensor) -> Tensor:
        """The generated kernels `(B or S, out, C, kh, kw)` for an input `(B, C, H, W)`."""
        raise NotImplementedError


@register_notrace_module
class KernelStem(Stem):
    """A first layer whose convolution runs with generated kernels.

    Args:
        mixer: Generates the kernels.
        bank: The original convolution.

    Raises:
        UserError: A bank that is no ordinary convolution.
    """

    def __init__(
        self, mixer: KernelMixer, bank: nn.Module, anchors: nn.Conv2d | None = None
    ) -> None:
        if anchors is not None:
            raise UserError(
                f"{type(mixer).__name__} generates whole kernels; further virtual channels are for "
                f"stems that mix, such as 'dwg'."
            )
        if (
            type(bank) not in (nn.Conv2d, Conv2dSame)
            or bank.groups != 1
            or (bank.padding_mode != "zeros")
        ):
            raise UserError(
                f"{type(mixer).__name__} needs an ordinary first convolution, but this one is a "
                f"{type(bank).__name__}. Use a stem that mixes, such as 'dwg'."
            )
        super().__init__(mixer, bank)

    def forward(self, x: Tensor) -> Tensor:
        """Generate kernels, then convolve."""
        bank = cast(nn.Conv2d, self.bank)
        x = self.mixer.checked(x)
        kernels = self.generated_kernels(x).to(x.dtype)
        padding: Any = bank.padding
        if isinstance(bank, Conv2dSame):
            size, stride, dilation = map(list, (bank.kernel_size, bank.stride, bank.dilation))
            x, padding = pad_same(x, size, stride, dilation), 0
        return convolve(
            x, kernels, bank.bias, stride=bank.stride, padding=padding, dilation=bank.dilation
        )

    def with_bank(self, bank: nn.Conv2d) -> "KernelStem":
        """A stem with the same mixer and another convolution.

        Raises:
            UserError: Kernels of another size than those that the mixer generates.
        """
        shape = cast(KernelMixer, self.mixer).kernel_shape
        if shape != (bank.out_channels, *bank.kernel_size):
            raise UserError(
                f"{type(self.mixer).__name__} generates kernels of {shape}, so the first "
                f"convolution cannot change its size. Build the model at that size."
            )
        return KernelStem(cast(KernelMixer, self.mixer), bank)

    def generated_kernels(self, x: Tensor) -> Tensor:
        """The kernels that the stem applies to the channels of an input.

        Args:
            x: `(B, C, H, W)`.

        Returns:
            `(B or 1, out, C, kh, kw)`.
        """
        mixer, bank = cast(KernelMixer, self.mixer), cast(nn.Conv2d, self.bank)
        start = torch.einsum("sck,okij->socij", mixer.placed(x), bank.weight)
        return start + mixer.generated(x)
