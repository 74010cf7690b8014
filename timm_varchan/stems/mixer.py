"""The part that all mixing stems have in common: C channels in, K virtual channels out.

Axes: B batch, S channel sets at once (1, or B for mixed batches), P rows of a table, C channels,
K virtual channels, H W pixels, D width.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from timm_varchan.channels import ANONYMOUS, RGB, ChannelSet, ChannelSetLike
from timm_varchan.errors import UserError
from timm_varchan.stems.prior import nearest_prior

__all__ = ["ChannelsLike", "Mixer"]

#: What `set_channels` takes: a channel set, None for the default rule, or one set a sample.
ChannelsLike = ChannelSetLike | None

#: Tables grow in steps of this many rows, so that compiled graphs do not depend on the count.
ROW_STEP = 16


def _parse_channels(
    channels: ChannelsLike | Sequence[ChannelSet],
) -> ChannelSet | tuple[ChannelSet, ...] | None:
    """Tell the three things that `set_channels` takes apart."""
    if channels is None:
        return None
    if isinstance(channels, (list, tuple)) and channels:
        sets = tuple(s for s in channels if isinstance(s, ChannelSet))
        if len(sets) == len(channels):
            if not all(len(s) for s in sets):
                raise UserError(
                    "In a mixed batch every sample's set needs a count: use "
                    "ChannelSet.anonymous(n) in place of 'anonymous'."
                )
            return sets
    return ChannelSet.parse(channels)  # type: ignore[arg-type]  # no channel sets in it


class Mixer(nn.Module):
    """Mixes any number of channels into the K virtual channels that a kernel bank was made for.

    `(B, C, H, W) -> (B, K, H, W)`, for any C, H, W >= 1. This class holds which channels the input
    has, as tables that reach the graph as tensors, and applies the coefficients; subclasses say
    what the coefficients are. On its own it is the fixed prior without learned parts.

    Args:
        virtual_channels: What the K planes of the kernel bank stand for.
        default_channels: The set that an input with exactly as many channels is taken for, as long
            as `set_channels` says nothing else; inputs with another count are anonymous.
        device: Where parameters and tables live.
        dtype: Their type.

    Raises:
        UserError: `virtual_channels` without a count, or default channels that the mixer cannot
            serve.
    """

    # What a stem can; what it cannot, it refuses with a ValueError.
    #: Takes sets of different sizes.
    any_count: ClassVar[bool] = True
    #: Takes channels that have neither name nor wavelength.
    supports_anonymous: ClassVar[bool] = True
    #: Takes wavelengths that it was not made for.
    supports_unseen: ClassVar[bool] = True
    #: Treats images of different content differently.
    content_dependent: ClassVar[bool] = False

    # No postponed annotations in this package: TorchScript reads these as types.
    prior: Tensor
    present: Tensor
    num_named: Tensor
    fallback: Tensor

    def __init__(
        self,
        virtual_channels: ChannelSetLike = RGB,
        default_channels: ChannelSetLike = RGB,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.virtual_channels = ChannelSet.parse(virtual_channels)
        self.default_channels = ChannelSet.parse(default_channels)
        if not len(self.virtual_channels):
            raise UserError(
                "virtual_channels needs a count: name them, or use ChannelSet.anonymous(K)."
            )
        self.num_virtual = len(self.virtual_channels)
        self._check_channels(self.default_channels)
        self.mixed = False
        self.channels: ChannelSet | tuple[ChannelSet, ...] | None = None
        dtype = dtype or torch.get_default_dtype()
        for name in self.table_names():
            empty = torch.empty(0, device=device, dtype=dtype)
            self.register_buffer(name, empty, persistent=False)
        self._build_tables()

    @classmethod
    def table_names(cls) -> tuple[str, ...]:
        """The buffers that `tables` fills; all are derived, none is saved."""
        return ("prior", "present", "num_named", "fallback")

    def set_channels(self, channels: ChannelsLike | Sequence[ChannelSet]) -> None:
        """Say which channels the input has from now on.

        Args:
            channels: A channel set in any form that `ChannelSet.parse` takes; `"anonymous"`; None
                for the default rule; or a sequence of `ChannelSet`, one a sample, whose planes
                come first in that sample (what stands in further planes is ignored).

        Raises:
            UserError: Channels that this mixer cannot tell apart.
        """
        parsed = _parse_channels(channels)
        self._check_channels(parsed)
        self.channels, self.mixed = parsed, isinstance(parsed, tuple)
        self._build_tables()

    def init_non_persistent_buffers(self) -> None:
        """Fill the tables again, after `to_empty` (the name is timm's convention)."""
        self._build_tables()

    def forward(self, x: Tensor) -> Tensor:
        """Mix.

        Args:
            x: `(B, C, H, W)`, floating point.

        Returns:
            `(B, K, H, W)`.

        Raises:
            UserError: The input does not fit the channel set (eager mode; compiled and exported
                graphs answer with NaN).
        """
        x = self.checked(x)
        weights = self.coefficients(x).to(x.dtype)
        B, C, H, W = x.shape
        mixed = torch.bmm(weights.expand(B, C, self.num_virtual).transpose(1, 2), x.flatten(2))
        return mixed.view(B, self.num_virtual, H, W)

    def checked(self, x: Tensor) -> Tensor:
        """The input, refused if it does not fit; absent planes of a mixed batch are zeros."""
        if not torch.jit.is_scripting():
            self._check_input(x)
        if self.mixed:
            absent = self.present[:, : x.shape[1], None, None] == 0
            x = x.masked_fill(absent, 0.0)
        return x

    def coefficients(self, x: Tensor) -> Tensor:
        """The mixing coefficients `a[b, c, k]`.

        Args:
            x: `(B, C, H, W)`.

        Returns:
            `(B or 1, C, K)`: how much of channel c goes to virtual channel k.
        """
        rows, named, count = self.rows(x)
        return torch.where(named, self.prior[:, rows], self.fallback / count)

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where the channels of an input stand in the tables, as tensor arithmetic.

        An `if` on the number of channels would be frozen by export and compilation.

        Args:
            x: `(B, C, H, W)`.

        Returns:
            Row of each channel `(C,)`; whether the tables apply `()` (else the fallback does); the
            number of channels `()`.
        """
        ones = torch.ones(x.shape[1], dtype=self.fallback.dtype, device=x.device)
        count = ones.sum()
        rows = torch.arange(x.shape[1], device=x.device).clamp(max=self.prior.shape[1] - 1)
        return rows, count == self.num_named, count

    def _sets(self) -> tuple[ChannelSet, ...]:
        """The channel sets that the tables describe."""
        if isinstance(self.channels, tuple):
            return self.channels
        return (self.default_channels if self.channels is None else self.channels,)

    @torch.jit.unused
    def _strict(self) -> bool:
        """Whether an input with another count is an error rather than anonymous."""
        return not self.supports_anonymous or self.channels not in (None, ANONYMOUS)

    @torch.jit.ignore
    def _build_tables(self) -> None:
        """Assign new table tensors (in place would break a backward that still needs the old)."""
        like = self.fallback
        sets = self._sets()
        num_named = max(len(s) for s in sets)
        num_rows = max(1, math.ceil(num_named / ROW_STEP)) * ROW_STEP
        wavelengths = torch.full((len(sets), num_rows), math.nan, dtype=torch.float64)
        present = torch.zeros((len(sets), num_rows), dtype=torch.bool)
        for row, channel_set in enumerate(sets):
            present[row, : len(channel_set)] = True
            for column, nm in enumerate(channel_set.wavelengths_nm):
                if nm is not None:
                    wavelengths[row, column] = nm
        tables = {
            "present": present,
            "num_named": torch.tensor(float(num_named)),
            "fallback": torch.tensor(math.nan if self._strict() else 1.0),
            **self.tables(sets, wavelengths, present),
        }
        assert set(tables) == set(self.table_names())
        for name, table in tables.items():
            dtype = like.dtype if table.is_floating_point() or table.dtype == torch.bool else None
            setattr(self, name, table.to(device=like.device, dtype=dtype))

    def tables(
        self, sets: Sequence[ChannelSet], wavelengths_nm: Tensor, present: Tensor
    ) -> dict[str, Tensor]:
        """Compute what the coefficients need to know of the channel sets.

        Args:
            sets: The channel sets, S of them.
            wavelengths_nm: `(S, P)`, in nm, NaN where unknown.
            present: `(S, P)`, bool.

        Returns:
            The tables by name, at least `prior`, `(S, P, K)`.
        """
        virtual_nm = torch.tensor(
            [math.nan if nm is None else nm for nm in self.virtual_channels.wavelengths_nm],
            dtype=wavelengths_nm.dtype,
        )
        prior = nearest_prior(wavelengths_nm, present, virtual_nm)
        return {"prior": prior.nan_to_num(0.0)}

    def _check_channels(self, channels: ChannelSet | tuple[ChannelSet, ...] | None) -> None:
        """Refuse channel sets that this mixer cannot serve."""
        sets = channels if isinstance(channels, tuple) else (channels,)
        for channel_set in sets:
            if channel_set is None or self.supports_anonymous:
                continue
            if not channel_set.channels or any(c.is_anonymous for c in channel_set):
                raise UserError(
                    f"{type(self).__name__} needs to know each channel, but {channel_set} has "
                    f"anonymous ones. Name the channels or give their wavelengths in nm."
                )

    @torch.jit.ignore
    def _check_input(self, x: Tensor) -> None:
        """Refuse inputs that do not fit the channel set."""
        if torch.compiler.is_compiling():
            return
        if x.dim() != 4 or 0 in x.shape[1:]:
            raise UserError(
                f"The input has shape {tuple(x.shape)}; needed is (batch, channels, height, width) "
                f"with at least one channel and pixel. Add missing axes with x[None] or x[:, None]."
            )
        if not x.is_floating_point():
            raise UserError(
                f"The input is {x.dtype}; needed are floating-point planes. Scale and normalise "
                f"them first, e.g. x.float() / 255."
            )
        if isinstance(self.channels, tuple):
            longest = max(len(s) for s in self.channels)
            if x.shape[0] != len(self.channels) or x.shape[1] != longest:
                raise UserError(
                    f"The input has {x.shape[0]} samples of {x.shape[1]} channels, but the mixed "
                    f"batch was declared as {len(self.channels)} sets of up to {longest} channels. "
                    f"Pad every sample to {longest} planes and give one set a sample."
                )
            return
        declared = self._sets()[0]
        if self._strict() and x.shape[1] != len(declared):
            raise UserError(
                f"The input has {x.shape[1]} channels, but the channel set is {declared} "
                f"({len(declared)}). Call timm_varchan.set_channels(model, ...) with the "
                f"input's own channels, 'anonymous', or None for the default rule."
            )

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        if isinstance(self.channels, tuple):
            channels = f"{len(self.channels)} sets"
        else:
            channels = (
                f"default {self.default_channels}" if self.channels is None else str(self.channels)
            )
        return f"virtual={self.virtual_channels}, channels={channels}"
