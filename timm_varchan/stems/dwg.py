"""The dynamic weight-generating stem: coefficients from each channel's content and identity."""

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_varchan.channels import RGB, ChannelSet, ChannelSetLike
from timm_varchan.errors import UserError
from timm_varchan.stems.mixer import Channels, Mixer

#: Numbers that describe the content of a plane.
NUM_CONTENT = 2


def fourier_features(wavelengths_nm: Tensor, num_frequencies: int = 8) -> Tensor:
    """Fourier features of the logarithm of wavelengths.

    Source: the sinusoidal code of DOFA, arXiv:2403.15356; here of the logarithm, so that visible
    light (400 to 700 nm) and radar (10^7 nm) are both resolved, with frequencies in octaves.

    Args:
        wavelengths_nm: Any shape, in nm, NaN where unknown.
        num_frequencies: Sines and cosines each.

    Returns:
        The shape with `2 * num_frequencies` appended; zeros where unknown.
    """
    octaves = math.pi * 2.0 ** torch.arange(-2, num_frequencies - 2, dtype=wavelengths_nm.dtype)
    angles = (wavelengths_nm / 550.0).log()[..., None] * octaves
    return torch.cat([angles.sin(), angles.cos()], -1).nan_to_num(0.0)


class OwnLinear(nn.Linear):
    """A linear layer of a mixer: its own type, so that tools which replace linear layers leave it.

    Quantising the few numbers that say what becomes of the channels saves nothing.
    """


class DWGMixer(Mixer):
    """Generates mixing coefficients for every channel of every sample.

    `a = prior(channel set) + gain * residual(content, identity, set) / C`, where the residual's
    last layer starts at zero, so that a pretrained kernel bank starts as what it was. Convolving
    the mix with the bank equals convolving the channels with the generated kernels
    `W[b, :, c] = sum_k a[b, c, k] bank[:, k]`, at a cost that hardly grows with C.

    Source: the idea of kernels as input-dependent mixtures is dynamic convolution, arXiv:1912.03458
    (there a fixed C and one mixture an image; here one mixture a channel).

    Args:
        channel_names: Names without a wavelength (stains, polarisations) that the model learns a
            code for.
        width: D, the hidden width.
        gain: Factor of the residual, which sets how fast it leaves zero: an optimizer moves every
            weight by about its learning rate, whatever the size of the coefficients.
        num_frequencies: Fourier frequencies of the wavelength code.
        **kwargs: Of `Mixer`, as the channels.
    """

    #: What a plane's mean and root mean square are clamped to: no finite input may give NaN.
    value_limit: Final[float] = 1e8

    code: Tensor
    word: Tensor

    def __init__(
        self,
        virtual_channels: ChannelSetLike = RGB,
        default_channels: ChannelSetLike = RGB,
        *,
        channel_names: Sequence[str] = (),
        width: int = 32,
        gain: float = 8.0,
        num_frequencies: int = 8,
        **kwargs: Any,
    ) -> None:
        self.channel_names = tuple(channel_names)
        self.gain, self.num_frequencies, self.width = gain, num_frequencies, width
        super().__init__(virtual_channels, default_channels, **kwargs)
        like: dict[str, Any] = {key: kwargs.get(key) for key in ("device", "dtype")}
        self.plane = OwnLinear(NUM_CONTENT + 2 * num_frequencies, width, **like)
        # Row 0 is that of channels outside the vocabulary; its gate is always 0.
        words = len(self.channel_names) + 1
        self.vocabulary = nn.Embedding(words, width, **like) if channel_names else None
        # A plane's own part, then its part of the mean over the planes.
        self.exchange = OwnLinear(width, 2 * width, **like)
        self.out = OwnLinear(width, self.num_virtual, **like)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def row_tables(self, channels: ChannelSet) -> dict[str, Tensor]:
        """The wavelength code `(N, F)` and the vocabulary row `(N,)` of each channel."""
        row_of = {name: row for row, name in enumerate(self.channel_names, start=1)}
        words = [row_of.get(c.name or "", 0) if c.wavelength_nm is None else 0 for c in channels]
        waves = [math.nan if nm is None else nm for nm in channels.wavelengths_nm]
        return {
            "code": fourier_features(torch.tensor(waves).double(), self.num_frequencies),
            "word": torch.tensor(words),
        }

    def described(self, x: Tensor) -> dict[str, Tensor]:
        """The prior, the part of each plane in the mean, and what is known of its identity."""
        rows, named, count = self.rows(x)
        ones = torch.ones_like(self.fallback)
        present = torch.where(named, self.present[:, rows], ones).unsqueeze(-1)
        word = torch.where(named, self.word[:, rows], torch.zeros_like(self.word[0, 0]))
        part = present / present.sum(1, keepdim=True)
        return {
            "prior": torch.where(named, self.prior[:, rows], self.fallback / count),
            "present": present,
            "part": part,
            "scale": self.gain * part,
            "code": torch.where(named, self.code[:, rows], torch.zeros_like(ones)),
            "word": word,
            "gate": (word > 0).unsqueeze(-1).to(present.dtype),
        }

    def coefficients(self, x: Tensor) -> Tensor:
        """The mixing coefficients, `(B, C, K)`."""
        tables = self.tables(x)
        B, C = x.shape[0], x.shape[1]
        code = tables["code"].expand(B, C, 2 * self.num_frequencies)
        content = torch.cat([self.describe_content(x).to(code.dtype), code], -1)
        token = self.plane(content.flatten(0, 1)).view(B, C, self.width)
        if self.vocabulary is not None:
            token = token + self.vocabulary(tables["word"]) * tables["gate"]
        token = self.exchange(F.gelu(token).flatten(0, 1)).view(B, C, 2 * self.width)
        plane, shared = token[:, :, : self.width], token[:, :, self.width :]
        if self.mixed:
            pooled = (shared * tables["part"]).sum(1, keepdim=True)
        else:
            pooled = shared.mean(1, keepdim=True)
        residual = self.out(F.gelu(plane + pooled).flatten(0, 1)).view(B, C, self.num_virtual)
        return tables["prior"] + residual * tables["scale"]

    def describe_content(self, x: Tensor) -> Tensor:
        """Describe the content of each plane by spatially global numbers, in float32 at least.

        Args:
            x: `(B, C, H, W)`.

        Returns:
            `(B, C, 2)`: the mean and the root mean square, on a scale that becomes logarithmic
            (asinh). By the norm rather than deviations: no copy of the planes.
        """
        planes = x.flatten(2)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        norm = torch.linalg.vector_norm(planes, dim=[-1], dtype=dtype)
        content = [planes.mean(-1, dtype=dtype), norm / planes.shape[-1] ** 0.5]
        limit = self.value_limit
        return torch.stack(content, -1).nan_to_num(0.0, limit, -limit).asinh()

    def _own_weight(self) -> Tensor:
        return self.out.weight

    def _check_channels(self, channels: Channels) -> None:
        super()._check_channels(channels)
        sets = channels if isinstance(channels, tuple) else (channels or (),)
        for channel in (c for channel_set in sets for c in channel_set):
            if channel.wavelength_nm is None and channel.name not in (None, *self.channel_names):
                raise UserError(
                    f"Channel {channel.name!r} has no wavelength and this model has not "
                    f"learned its name (it knows: {', '.join(self.channel_names) or 'none'}). "
                    f"Create the model with channel_names=[{channel.name!r}, ...], give the "
                    f"channel a wavelength in nm, or pass None for an anonymous channel."
                )
