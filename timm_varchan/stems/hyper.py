"""Kernels produced whole from the wavelengths of the channels, by a small transformer."""

from collections.abc import Sequence
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
        device: Where parameters and tables live.
        dtype: Their type.
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.width = width
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(virtual_channels, default_channels, kernel_shape=kernel_shape, **like)
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
        """The buffers that `tables` fills."""
        return (*super().table_names(), "code", "first", "which")

    def tables(
        self, sets: Sequence[ChannelSet], wavelengths_nm: Tensor, present: Tensor
    ) -> dict[str, Tensor]:
        """Add the code `(S, P, D)` of each wavelength, and which samples have the same set.

        Kernels are generated once for each of the U different sets: `first` `(U,)` are samples that
        have them, `which` `(S,)` is the place of each sample's set among them.
        """
        different: dict[ChannelSet, int] = {}
        which = [different.setdefault(channel_set, len(different)) for channel_set in sets]
        first = [sets.index(channel_set) for channel_set in different]
        half = self.width // 2
        frequencies = 10000.0 ** (-torch.arange(half, dtype=wavelengths_nm.dtype) / half)
        angles = wavelengths_nm[:, :, None] * frequencies
        code = torch.cat([angles.sin(), angles.cos()], -1).nan_to_num(0.0)
        return {
            **super().tables(sets, wavelengths_nm, present),
            "code": code,
            "first": torch.tensor(first),
            "which": torch.tensor(which),
        }

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
