"""Stems that ours is compared with, registered under names of their own.

`dynamic` is attention over kernels (dynamic convolution), the kind that the reference report
begins with; `dofa` generates kernels from wavelengths. Both make whole kernels, so their stem runs
a convolution of its own instead of mixing channels.
"""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from timm_varchan import register_stem
from timm_varchan.channels import ChannelSet, ChannelSetLike
from timm_varchan.errors import UserError
from timm_varchan.stems import Mixer, Stem
from timm_varchan.stems.mixer import Channels

__all__ = ["DofaMixer", "DynamicMixer", "KernelMixer", "KernelStem", "KnownMixer"]


class KnownMixer(Mixer):
    """Serves only the channels that it was made for, each in its place among them."""

    supports_anonymous: bool = False
    place: Tensor

    def __init__(self, virtual_channels: ChannelSetLike, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("prior", "zero")
        super().__init__(virtual_channels, *args, **kwargs)

    def row_tables(self, channels: ChannelSet) -> dict[str, Tensor]:
        """The place `(N,)` of each channel among the virtual ones."""
        row_of = {c.identity: row for row, c in enumerate(self.virtual_channels)}
        return {"place": torch.tensor([row_of.get(c.identity, -1) for c in channels])}

    def _check_channels(self, channels: Channels) -> None:
        super()._check_channels(channels)
        known = {c.identity for c in self.virtual_channels}
        for one in channels if isinstance(channels, tuple) else (channels,):
            unknown = [c.label for c in one or () if c.identity not in known]
            if unknown:
                raise UserError(
                    f"{type(self).__name__} has no place for {', '.join(unknown)}: it was made "
                    f"for {self.virtual_channels}."
                )


@register_notrace_module
class KernelStem(Stem):
    """A first layer whose convolution runs with kernels of each sample's own."""

    def forward(self, x: Tensor) -> Tensor:
        """Generate kernels, then convolve."""
        bank = cast(nn.Conv2d, self.bank)
        if type(bank) is not nn.Conv2d or bank.groups != 1 or bank.padding_mode != "zeros":
            raise UserError(f"Whole kernels need an ordinary first convolution, not {bank}.")
        x = self.mixer.checked(x)
        kernels = self.generated_kernels(x).to(x.dtype)
        how: dict[str, Any] = {name: getattr(bank, name) for name in ("stride", "padding")}
        if len(kernels) == 1:
            return F.conv2d(x, kernels[0], bank.bias, **how)
        B, _, H, W = x.shape
        bias = None if bank.bias is None else bank.bias.repeat(B)
        y = F.conv2d(x.reshape(1, -1, H, W), kernels.flatten(0, 1), bias, groups=B, **how)
        return y.view(B, kernels.shape[1], *y.shape[2:])

    def generated_kernels(self, x: Tensor) -> Tensor:
        """The kernels `(B or 1, out, C, kh, kw)`."""
        mixer, bank = cast(KernelMixer, self.mixer), cast(nn.Conv2d, self.bank)
        return mixer.kernels(x, bank.weight)


class KernelMixer(Mixer):
    """Makes the kernels of a `KernelStem`.

    Args:
        kernel_shape: `(out, kh, kw)` of the bank.
    """

    stem_type = KernelStem

    def __init__(self, *args: Any, kernel_shape: tuple[int, int, int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kernel_shape = kernel_shape

    @classmethod
    def before(cls, bank: nn.Module, *args: Any, **kwargs: Any) -> Mixer:
        """A mixer that knows the shape of the bank's kernels."""
        weight = cast(Tensor, bank.weight)
        return cls(*args, kernel_shape=(len(weight), *weight.shape[2:]), **kwargs)

    def placed(self, x: Tensor) -> Tensor:
        """How much of each channel goes to each virtual channel, `(S, C, K)`."""
        return super().coefficients(x)

    def coefficients(self, x: Tensor) -> Tensor:
        """There are none: a whole kernel is no mixture of the bank's.

        Raises:
            UserError: Always.
        """
        raise UserError(f"{type(self).__name__} generates whole kernels, so nothing is mixed.")

    def kernels(self, x: Tensor, bank: Tensor) -> Tensor:
        """The kernels `(B or 1, out, C, kh, kw)` for an input and the bank's weight."""
        raise NotImplementedError


class DynamicMixer(KernelMixer, KnownMixer):
    """The bank's kernels plus `sum_n pi_n(x) D_n`, with attention pi from the channels' means.

    Because the attention sums to one, this is a mixture of the N kernels `bank + D_n`. For the
    channels that the bank was made for, in any order; an absent one is zero.

    Source: dynamic convolution, arXiv:1912.03458. Differs: the kernels start equal (`D_n = 0`), so
    that pretrained weights are kept, and the temperature stays as it is instead of falling.

    Args:
        num_kernels: N.
        temperature: The attention's logits are divided by it.
    """

    def __init__(
        self, *args: Any, num_kernels: int = 4, temperature: float = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        like: dict[str, Any] = {key: kwargs.get(key) for key in ("device", "dtype")}
        self.temperature = temperature
        hidden = max(num_kernels, self.num_virtual // 4)
        self.squeeze = nn.Linear(self.num_virtual, hidden, bias=False, **like)
        self.excite = nn.Linear(hidden, num_kernels, **like)
        out, kh, kw = self.kernel_shape
        # N x out in one axis: `.to(memory_format=torch.channels_last)` fails on five.
        shape = (num_kernels * out, self.num_virtual, kh, kw)
        self.deviations = nn.Parameter(torch.zeros(shape, **like))

    def kernels(self, x: Tensor, bank: Tensor) -> Tensor:
        """The kernels, `(B, out, C, kh, kw)`."""
        placed = self.placed(x).expand(len(x), -1, -1)
        means = (x.mean((2, 3))[:, :, None] * placed).sum(1)
        attention = (self.excite(self.squeeze(means).relu()) / self.temperature).softmax(-1)
        deviations = self.deviations.view(attention.shape[1], *bank.shape)
        kernels = bank + torch.einsum("bn,nokij->bokij", attention, deviations)
        return torch.einsum("bck,bokij->bocij", placed, kernels)


class DofaMixer(KernelMixer):
    """Generates a kernel for each channel from its wavelength by a small transformer; no bank.

    Source: the weight generator of DOFA, arXiv:2403.15356. Differs: the bias is the convolution's
    own. As there, nothing is divided by the number of channels.

    Args:
        width: D, of the tokens.
        num_tokens: Learned tokens beside those of the channels.
        feedforward: Width of the transformer's hidden layer.
    """

    supports_anonymous: bool = False
    code: Tensor

    def __init__(
        self,
        *args: Any,
        width: int = 128,
        num_tokens: int = 128,
        feedforward: int = 2048,
        **kwargs: Any,
    ) -> None:
        self.width = width
        super().__init__(*args, **kwargs)
        like: dict[str, Any] = {key: kwargs.get(key) for key in ("device", "dtype")}
        out, kh, kw = self.kernel_shape
        self.embed = nn.Sequential(
            nn.Linear(width, width, **like), nn.ReLU(), nn.Linear(width, width, **like), nn.ReLU()
        )
        self.tokens = nn.Parameter(torch.empty(1, num_tokens, width, **like).normal_(std=0.02))
        self.encoder = nn.TransformerEncoderLayer(
            width, 4, feedforward, dropout=0.0, activation="gelu", batch_first=True, **like
        )
        self.out = nn.Linear(width, out * kh * kw, **like)

    def row_tables(self, channels: ChannelSet) -> dict[str, Tensor]:
        """The code `(N, D)` of each wavelength."""
        waves = [math.nan if nm is None else nm for nm in channels.wavelengths_nm]
        half = self.width // 2
        frequencies = 10000.0 ** (-torch.arange(half).double() / half)
        angles = torch.tensor(waves).double()[:, None] * frequencies
        return {"code": torch.cat([angles.sin(), angles.cos()], -1).nan_to_num(0.0)}

    def kernels(self, x: Tensor, bank: Tensor) -> Tensor:
        """The kernels, `(S, out, C, kh, kw)`, generated once for each different set."""
        rows, _, _ = self.rows(x)
        absent = self.present[:, rows] == 0
        which = torch.zeros(1, dtype=torch.long, device=absent.device)
        if len(absent) > 1:  # not of one, so that shapes can be computed on the meta device
            absent, which = torch.unique(absent, dim=0, return_inverse=True)
        code = self.code[:, rows].expand(len(absent), -1, -1)
        embedded = code + self.embed(code)
        tokens = self.tokens.expand(len(code), -1, -1)
        ignored = torch.cat([absent.new_zeros(tokens.shape[:2]), absent], 1)
        hidden = torch.cat([tokens, embedded], 1)
        encoded = self.encoder(hidden, src_key_padding_mask=ignored)[:, tokens.shape[1] :]
        kernels = self.out(encoded + embedded).masked_fill(absent[:, :, None], 0.0)
        return kernels.unflatten(2, self.kernel_shape).transpose(1, 2)[which]

    def _check_channels(self, channels: Channels) -> None:
        super()._check_channels(channels)
        if isinstance(channels, tuple):
            raise UserError("DofaMixer takes one set with masks, not a set for each sample.")
        dark = [c.label for c in channels or () if c.wavelength_nm is None]
        if dark:
            raise UserError(f"Channel {', '.join(dark)} has no wavelength to make kernels from.")


register_stem("dynamic", DynamicMixer)
register_stem("dofa", DofaMixer)
