"""Kernels produced whole from the wavelengths of the channels, by a small transformer."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from timm_varchan.channels import RGB, ChannelSet, ChannelSetLike
from timm_varchan.errors import UserError
from timm_varchan.stems.kernels import KernelMixer

__all__ = ["HyperMixer"]


class HyperMixer(KernelMixer):
    """Produces kernels from wavelengths alone: the same for all images of a channel set.

    Source: the weight generator of DOFA, arXiv:2403.15356. Differs: what it generates starts at
    zero and is added to the pretrained kernel of the nearest virtual channel, and the bias is the
    convolution's own. As there, nothing is divided by the number of channels.

    Args:
        virtual_channels: What the K planes of the kernel bank stand for.
        default_channels: The set an input with as many channels is taken for.
        kernel_shape: `(out, kh, kw)` of the bank.
        width: D, of the tokens.
        num_tokens: Learned tokens beside those of the channels.
        feedforward: Width of the transformer's hidden layer.
        **kwargs: `prior`, `channel_stats`, `prior_scale`, `device` and `dtype` of `Mixer`.
    """

    supports_anonymous: ClassVar[bool] = False

    code: Tensor
    first: Tensor
    which: Tensor

    def __init__(
        self,
        virtual_channels: ChannelSetLike = RGB,
        default_channels: ChannelSetLike = RGB,
        *,
        kernel_shape: tuple[int, int, int],
        width: int = 128,
        num_tokens: int = 128,
        feedforward: int = 2048,
        **kwargs: Any,
    ) -> None:
        self.width = width
        super().__init__(virtual_channels, default_channels, kernel_shape=kernel_shape, **kwargs)
        like: dict[str, Any] = {key: kwargs.get(key) for key in ("device", "dtype")}
        out, kh, kw = kernel_shape
        self.embed = nn.Sequential(
            nn.Linear(width, width, **like), nn.ReLU(), nn.Linear(width, width, **like), nn.ReLU()
        )
        self.tokens = nn.Parameter(torch.empty(1, num_tokens, width, **like).normal_(std=0.02))
        self.encoder = nn.TransformerEncoderLayer(
            width, 4, feedforward, dropout=0.0, activation="gelu", batch_first=True, **like
        )
        self.out = nn.Linear(width, out * kh * kw, **like)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    @classmethod
    def table_names(cls) -> tuple[str, ...]:
        """The tensors that `tables` makes."""
        return (*super().table_names(), "code", "first", "which")

    def row_tables(self, channels: ChannelSet) -> dict[str, Tensor]:
        """The code `(N, D)` of each wavelength."""
        waves = [math.nan if nm is None else nm for nm in channels.wavelengths_nm]
        half = self.width // 2
        frequencies = 10000.0 ** (-torch.arange(half).double() / half)
        angles = torch.tensor(waves).double()[:, None] * frequencies
        return {"code": torch.cat([angles.sin(), angles.cos()], -1).nan_to_num(0.0)}

    def tables(self, index: Tensor, present: Tensor, count: Tensor) -> dict[str, Tensor]:
        """Add which samples have the same planes.

        Kernels are generated once for each of the U different sets: `first` `(U,)` are samples that
        have them, `which` `(S,)` is the place of each sample's set among them.
        """
        sets = torch.where(present, index, -1)
        different, which = torch.unique(sets, dim=0, return_inverse=True)
        first = torch.full((len(different),), len(sets)).scatter_reduce(
            0, which, torch.arange(len(sets)), "amin"
        )
        return {**super().tables(index, present, count), "first": first, "which": which}

    def generated(self, x: Tensor) -> Tensor:
        """The kernels, `(S, out, C, kh, kw)`."""
        rows, _, _ = self.rows(x)
        code, absent = self.code[self.first][:, rows], self.present[self.first][:, rows] == 0
        embedded = code + self.embed(code)
        tokens = self.tokens.expand(len(code), -1, -1)
        hidden = torch.cat([tokens, embedded], 1)
        ignored = torch.cat([absent.new_zeros(tokens.shape[:2]), absent], 1)
        encoded = self.encoder(hidden, src_key_padding_mask=ignored)[:, tokens.shape[1] :]
        kernels = self.out(encoded + embedded).masked_fill(absent[:, :, None], 0.0)
        return kernels.unflatten(2, self.kernel_shape).transpose(1, 2)[self.which]

    def _check_channels(self, channels: ChannelSet | tuple[ChannelSet, ...] | None) -> None:
        super()._check_channels(channels)
        for channel_set in channels if isinstance(channels, tuple) else (channels,):
            dark = [c.label for c in channel_set or () if c.wavelength_nm is None]
            if dark:
                raise UserError(
                    f"Channel {', '.join(dark)} has no wavelength, from which this stem makes its "
                    f"kernels. Give wavelengths in nm or use another stem."
                )
