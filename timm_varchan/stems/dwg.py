"""The dynamic weight-generating stem: coefficients from each channel's content and identity."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_varchan.channels import RGB, ChannelSet, ChannelSetLike
from timm_varchan.errors import UserError
from timm_varchan.stems.mixer import Mixer

__all__ = ["DWGMixer", "OwnLinear", "fourier_features"]

#: Statistics of a plane that describe its content.
NUM_STATISTICS = 2


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
        virtual_channels: What the K planes of the kernel bank stand for.
        default_channels: The set an input with as many channels is taken for.
        channel_names: Names without a wavelength (stains, polarisations) that the model learns a
            code for.
        width: D, the hidden width.
        gain: Factor of the residual, which sets how fast it leaves zero: an optimizer moves every
            weight by about its learning rate, whatever the size of the coefficients.
        num_frequencies: Fourier frequencies of the wavelength code.
        **kwargs: `prior`, `channel_stats`, `prior_scale`, `device` and `dtype` of `Mixer`.
    """

    content_dependent: ClassVar[bool] = True

    #: Mean and root mean square are clamped to this: no finite input may give NaN.
    value_limit: Final[float] = 1e8
    #: Added to the variance: constant planes need a finite gradient.
    variance_eps: Final[float] = 1e-6

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
        self.gain, self.num_frequencies = gain, num_frequencies
        super().__init__(virtual_channels, default_channels, **kwargs)
        like: dict[str, Any] = {key: kwargs.get(key) for key in ("device", "dtype")}
        self.content = OwnLinear(NUM_STATISTICS, width, **like)
        self.identity = OwnLinear(2 * num_frequencies, width, bias=False, **like)
        # Row 0 is that of channels outside the vocabulary; its gate is always 0.
        words = len(self.channel_names) + 1
        self.vocabulary = nn.Embedding(words, width, **like) if channel_names else None
        self.own = OwnLinear(width, width, **like)
        self.context = OwnLinear(width, width, bias=False, **like)
        self.out = OwnLinear(width, self.num_virtual, **like)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    @classmethod
    def table_names(cls) -> tuple[str, ...]:
        """The tensors that `tables` makes."""
        return (*super().table_names(), "code", "word")

    def row_tables(self, channels: ChannelSet) -> dict[str, Tensor]:
        """The wavelength code `(N, F)` and the vocabulary row `(N,)` of each channel."""
        row_of = {name: row for row, name in enumerate(self.channel_names, start=1)}
        words = [row_of.get(c.name or "", 0) if c.wavelength_nm is None else 0 for c in channels]
        waves = [math.nan if nm is None else nm for nm in channels.wavelengths_nm]
        return {
            "code": fourier_features(torch.tensor(waves).double(), self.num_frequencies),
            "word": torch.tensor(words),
        }

    def coefficients(self, x: Tensor) -> Tensor:
        """The mixing coefficients, `(B, C, K)`."""
        rows, named, count = self.rows(x)
        prior = torch.where(named, self.prior[:, rows], self.fallback / count)
        present = torch.where(named, self.present[:, rows], torch.ones_like(self.fallback))
        present = present.unsqueeze(-1)
        code = torch.where(named, self.code[:, rows], torch.zeros_like(self.fallback))
        token = self.content(self.describe_content(x)) + self.identity(code)
        if self.vocabulary is not None:
            word = torch.where(named, self.word[:, rows], torch.zeros_like(self.word[0, 0]))
            token = token + self.vocabulary(word) * (word > 0).unsqueeze(-1).to(token.dtype)
        token = F.gelu(token)
        num_present = present.sum(1, keepdim=True)
        pooled = (token * present).sum(1, keepdim=True) / num_present
        token = F.gelu(self.own(token) + self.context(pooled))
        return prior + self.gain * self.out(token) * (present / num_present)

    def describe_content(self, x: Tensor) -> Tensor:
        """Describe the content of each plane by spatially global statistics, in float32 at least.

        Args:
            x: `(B, C, H, W)`.

        Returns:
            `(B, C, 2)`: logarithms of the mean (signed) and of the standard deviation.
        """
        planes = x.flatten(2)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        # From the norm rather than from deviations: reductions alone, no copy of the planes.
        norm = torch.linalg.vector_norm(planes, dim=[-1], dtype=dtype)
        mean = planes.mean(-1, dtype=dtype).masked_fill(norm.isinf(), 0.0)
        mean = mean.clamp(-self.value_limit, self.value_limit)
        mean_square = (norm / planes.shape[-1] ** 0.5).clamp(max=self.value_limit).square()
        deviation = ((mean_square - mean.square()).clamp(min=0.0) + self.variance_eps).sqrt()
        described = torch.stack([mean.sign() * mean.abs().log1p(), deviation.log1p()], -1)
        return described.to(self.content.weight.dtype)

    def _check_channels(self, channels: ChannelSet | tuple[ChannelSet, ...] | None) -> None:
        super()._check_channels(channels)
        sets = channels if isinstance(channels, tuple) else (channels,)
        for channel in (c for s in sets if s is not None for c in s):
            if channel.wavelength_nm is None and channel.name is not None:
                if channel.name not in self.channel_names:
                    raise UserError(
                        f"Channel {channel.name!r} has no wavelength and this model has not "
                        f"learned its name (it knows: {', '.join(self.channel_names) or 'none'}). "
                        f"Create the model with channel_names=[{channel.name!r}, ...], give the "
                        f"channel a wavelength in nm, or pass None for an anonymous channel."
                    )
