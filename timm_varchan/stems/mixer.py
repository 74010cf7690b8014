"""The part that all mixing stems have in common: C channels in, K virtual channels out.

Axes: B batch, S channel sets at once (1, or B for mixed batches), N rows (different channels), P
places of planes in a table, C channels, K virtual channels, H W pixels, D width.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from timm_varchan.channels import (
    ANONYMOUS,
    RGB,
    Channel,
    ChannelSet,
    ChannelSetLike,
    known_channels,
)
from timm_varchan.errors import UserError
from timm_varchan.stems.prior import PRIORS, SAME_BAND_NM, SCALES, Prior, find_channel

__all__ = ["ChannelsLike", "Mixer"]

#: What `set_channels` takes: a channel set, None for the default rule, or one set a sample.
ChannelsLike = ChannelSetLike | None

#: Tables grow in steps of this many places, so that compiled graphs do not depend on the count.
PLACE_STEP = 16


def _parse_channels(
    channels: ChannelsLike | Sequence[ChannelSet], own: Callable[[], Iterable[Channel]]
) -> ChannelSet | tuple[ChannelSet, ...] | None:
    """Tell the three things that `set_channels` takes apart; own channels are known by name."""
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
    return ChannelSet.parse(channels, own=own())  # type: ignore[arg-type]  # no channel sets in it


def _named_stats(given: ChannelSetLike | None, virtual: ChannelSet) -> ChannelSet | None:
    """Statistics of channels with names; without names they are those of the virtual channels."""
    if given is None:
        return None
    stats = ChannelSet.parse(given)
    if stats.is_anonymous and len(stats) == len(virtual) and not virtual.is_anonymous:
        named = [
            Channel(v.name, v.wavelength_nm, c.mean, c.std)
            for v, c in zip(virtual, stats, strict=True)
        ]
        return ChannelSet(tuple(named), stats.correlation)
    if any(c.is_anonymous for c in stats):
        raise UserError(
            f"The statistics are of {len(stats)} channels without names, and the virtual "
            f"channels are {virtual} ({len(virtual)}). Say what was measured: "
            f"timm_varchan.measure_channels(loader, 'B02+B03+...')."
        )
    return stats


class Mixer(nn.Module):
    """Mixes any number of channels into the K virtual channels that a kernel bank was made for.

    `(B, C, H, W) -> (B, K, H, W)`, for any C, H, W >= 1. This class holds which channels the input
    has, as tables that reach the graph as tensors, and applies the coefficients; subclasses say
    what the coefficients are. On its own it is the fixed prior without learned parts.

    The tables are plain attributes and no buffers: whatever copies, broadcasts, averages or
    materialises buffers leaves them alone. They follow the module to another device or type.

    Args:
        virtual_channels: What the K planes of the kernel bank stand for.
        default_channels: The set that an input with exactly as many channels is taken for, as long
            as `set_channels` says nothing else; inputs with another count are anonymous.
        prior: How an absent virtual channel is made of the others: `measured`, `spectral`,
            `nearest`, `mean` or `zero` (see `Prior`); None: measured where the correlation is
            known, else spectral.
        channel_stats: Mean, deviation and correlation of the planes as the model sees them.
        prior_scale: `plain`, or `matched`: see `Prior`.
        device: Where parameters and tables live.
        dtype: Their type.

    Raises:
        UserError: `virtual_channels` without a count, default channels that the mixer cannot
            serve, another prior or scale, or statistics without names.
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
        prior: str | None = None,
        channel_stats: ChannelSetLike | None = None,
        prior_scale: str = "plain",
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
        self.measured = _named_stats(channel_stats, self.virtual_channels)
        known = self.measured is not None and self.measured.correlation is not None
        self.prior_name = prior or ("measured" if known else "spectral")
        self.prior_scale = prior_scale
        if self.prior_name not in PRIORS or prior_scale not in SCALES:
            raise UserError(
                f"prior is {prior!r} and prior_scale {prior_scale!r}; choose of "
                f"{', '.join(PRIORS)} and of {', '.join(SCALES)}."
            )
        self._check_channels(self.default_channels)
        self.channels: ChannelSet | tuple[ChannelSet, ...] | None = None
        like = torch.empty(0, device=device, dtype=dtype or torch.get_default_dtype())
        self._home = (like.device, like.dtype)
        self.set_channels(None)

    @classmethod
    def table_names(cls) -> tuple[str, ...]:
        """The tensors that `tables` makes; all are derived, none is saved."""
        return ("prior", "present", "num_named", "fallback")

    @torch.jit.ignore
    def set_channels(
        self,
        channels: ChannelsLike | Sequence[ChannelSet],
        present: Tensor | None = None,
    ) -> None:
        """Say which channels the input has from now on.

        Args:
            channels: A channel set in any form that `ChannelSet.parse` takes; `"anonymous"`; None
                for the default rule; or a sequence of `ChannelSet`, one a sample, whose planes
                come first in that sample (what stands in further planes is ignored).
            present: `(B, C)`, bool: which of the channels each sample of the batch has; what stands
                in the other planes is ignored. None: all.

        Raises:
            UserError: Channels that this mixer cannot tell apart, or a mask that does not fit.
        """
        if present is not None and isinstance(channels, ChannelSet) and channels == self.channels:
            self.select(torch.arange(present.shape[-1]).expand_as(present), present)
            return
        parsed = _parse_channels(channels, self._own_channels)
        self._check_channels(parsed)
        self.channels = parsed
        sets = self._sets()
        different = {c.identity: c for s in sets for c in s} or {(None, None): Channel()}
        row_of = {identity: row for row, identity in enumerate(different)}
        longest = max(1, *(len(s) for s in sets))
        with torch.device("cpu"):
            index = torch.zeros(len(sets), longest, dtype=torch.long)
            there = torch.zeros(len(sets), longest, dtype=torch.bool)
            for number, channel_set in enumerate(sets):
                rows = [row_of[c.identity] for c in channel_set]
                index[number, : len(rows)] = torch.tensor(rows, dtype=torch.long)
                there[number, : len(rows)] = True
        self._describe_rows(ChannelSet(tuple(different.values())))
        self.mixed = isinstance(parsed, tuple)
        self._base, self._planes = index, (index, there)
        if present is not None:
            self.select(torch.arange(present.shape[-1]).expand_as(present), present)
        else:
            self._build_tables()

    @torch.jit.ignore
    def _own_channels(self) -> list[Channel]:
        """Channels that this mixer knows by name, those with statistics last."""
        sets = [self.virtual_channels, self.default_channels, *self._sets()]
        sets += [] if self.measured is None else [self.measured]
        known = known_channels()
        words = [known.get(n, Channel(n)) for n in getattr(self, "channel_names", ())]
        return [*words, *(channel for channel_set in sets for channel in channel_set)]

    @torch.jit.ignore
    def select(self, index: Tensor, present: Tensor) -> None:
        """Say which of the channels of the set each sample of the next batches has.

        Args:
            index: `(B, C)`: which channel of the set a plane is; any number where it is absent.
            present: `(B, C)`, bool: whether the plane is there.

        Raises:
            UserError: No channel set with names or count was set, or masks that do not fit it.
        """
        index, present = index.cpu(), present.cpu().bool()
        count = self._base.shape[1]
        if isinstance(self.channels, tuple) or not len(self._sets()[0]):
            raise UserError(
                "Presence masks need one channel set with a count. Call set_channels(model, "
                "'R+G+B+...', present=mask), or give ChannelSet.anonymous(n)."
            )
        if index.shape != present.shape or index.dim() != 2 or index.shape[1] < 1:
            raise UserError(
                f"The masks have shapes {tuple(index.shape)} and {tuple(present.shape)}; needed "
                f"is (batch, channels)."
            )
        if bool(((index < 0) | (index >= count))[present].any()):
            raise UserError(f"A plane is none of the {count} channels of {self._sets()[0]}.")
        if not bool(present.any(1).all()):
            raise UserError("A sample has no channel at all. Leave it out or give it one.")
        index = torch.where(present, index, 0)
        self.mixed = True
        self._planes = (self._base[0][index], present)
        self._build_tables()

    def forward(self, x: Tensor) -> Tensor:
        """Mix.

        Args:
            x: `(B, C, H, W)`.

        Returns:
            `(B, K, H, W)`.

        Raises:
            UserError: The input does not fit the channel set.
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
            rows, _, _ = self.rows(x)
            x = x.masked_fill(self.present[:, rows, None, None] == 0, 0.0)
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
            Place of each channel `(C,)`; whether the tables apply `()` (else the fallback does);
            the number of channels `()`.
        """
        ones = torch.ones(x.shape[1], dtype=self.fallback.dtype, device=x.device)
        count = ones.sum()
        rows = torch.arange(x.shape[1], device=x.device).clamp(max=self.prior.shape[1] - 1)
        named = count >= self.num_named if self.mixed else count == self.num_named
        return rows, named, count

    @torch.jit.unused
    def expected_error(self, channels: ChannelSetLike) -> list[float]:
        """The share of each virtual channel's variance that these channels do not explain.

        Args:
            channels: A channel set.

        Returns:
            K shares: 0 where the channel itself is there, NaN where nothing is known of it.

        Raises:
            UserError: Channels without a count.
        """
        chosen = ChannelSet.parse(channels, own=self._own_channels())
        if not len(chosen):
            raise UserError("The expected error needs to know the channels; name them.")
        with torch.device("cpu"):
            error = self._prior_of(chosen).expected_error(torch.ones(1, len(chosen)))
        return error[0].tolist()

    def _prior_of(self, channels: ChannelSet) -> Prior:
        return Prior(
            channels, self.virtual_channels, self.prior_name, self.measured, self.prior_scale
        )

    def _sets(self) -> tuple[ChannelSet, ...]:
        """The channel sets that the tables describe."""
        if isinstance(self.channels, tuple):
            return self.channels
        return (self.default_channels if self.channels is None else self.channels,)

    @torch.jit.unused
    def _strict(self) -> bool:
        """Whether an input with another count is an error rather than anonymous."""
        return (
            not self.supports_anonymous
            or self.prior_name == "zero"
            or self.mixed
            or self.channels not in (None, ANONYMOUS)
        )

    @torch.jit.unused
    def _describe_rows(self, channels: ChannelSet) -> None:
        """Compute once, when the set changes, what the tables of its subsets are taken from."""
        self._rows = channels
        with torch.device("cpu"):
            self._solver = self._prior_of(channels)
            self._row_tables = self.row_tables(channels)

    @torch.jit.ignore
    def _build_tables(self) -> None:
        """Make the tables of the planes that were declared, then put them where the module is."""
        index, present = self._planes
        with torch.device("cpu"), torch.no_grad():
            count = torch.zeros(len(index), len(self._rows), dtype=torch.float64)
            count.scatter_add_(1, index, present.double())
            made = self.tables(index, present, count)
            num_places = index.shape[1] + int(self.mixed)  # wider batches: the last one is absent
            num_places = math.ceil(num_places / PLACE_STEP) * PLACE_STEP
            padding = num_places - index.shape[1]
            self._tables = {
                "num_named": torch.tensor(float(len(self._sets()[0]) if not self.mixed else 1)),
                "fallback": torch.tensor(math.nan if self._strict() else 1.0),
                **{
                    name: nn.functional.pad(table, [0, 0] * (table.dim() - 2) + [0, padding])
                    if table.dim() > 1
                    else table
                    for name, table in made.items()
                },
            }
        assert set(self._tables) == set(self.table_names())
        self._place_tables(*self._home)

    def tables(self, index: Tensor, present: Tensor, count: Tensor) -> dict[str, Tensor]:
        """What the coefficients need to know of the planes.

        Args:
            index: `(S, C)`, the row of each plane.
            present: `(S, C)`, bool.
            count: `(S, N)`, how many planes each row has.

        Returns:
            The tables by name, `(S, C, ...)` each (those of one axis are not by plane): at least
            `prior` `(S, C, K)` and `present` `(S, C)`.
        """
        place = index[:, :, None].expand(-1, -1, self.num_virtual)
        prior = self.prior_rows(count).gather(1, place) * present[:, :, None]
        by_row = {name: table[index] for name, table in self._row_tables.items()}
        return {"prior": prior, "present": present, **by_row}

    def prior_rows(self, count: Tensor) -> Tensor:
        """The prior `(S, N, K)` of the planes of each row, from the counts of planes `(S, N)`."""
        return self._solver.coefficients(count)

    def row_tables(self, channels: ChannelSet) -> dict[str, Tensor]:
        """What subclasses need to know of each channel, by name, `(N, ...)` each."""
        return {}

    def _place_tables(self, device: torch.device, dtype: torch.dtype) -> None:
        """Assign the tables (in place would break a backward that still needs the old ones)."""
        self._home = (device, dtype)
        for name, table in self._tables.items():
            floating = table.is_floating_point() or table.dtype == torch.bool
            placed = table.to(device, dtype if floating else table.dtype, non_blocking=True)
            setattr(self, name, placed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Mixer":
        """Follow `.to(...)`, `.cuda()`, `to_empty` and their kind."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            device, dtype = self._home
            start = "cpu" if device.type == "meta" else device  # nothing can be copied out of meta
            probe = fn(torch.zeros((), device=start, dtype=dtype))
        if (probe.device, probe.dtype) != self._home:
            self._place_tables(probe.device, probe.dtype)
        return self

    def _check_channels(self, channels: ChannelSet | tuple[ChannelSet, ...] | None) -> None:
        """Refuse channel sets that this mixer cannot serve."""
        sets = channels if isinstance(channels, tuple) else (channels,)
        for channel_set in sets:
            if channel_set is None:
                continue
            if self.prior_name == "zero":
                self._check_places(channel_set)
            if self.supports_anonymous:
                continue
            if not channel_set.channels or any(c.is_anonymous for c in channel_set):
                raise UserError(
                    f"{type(self).__name__} needs to know each channel, but {channel_set} has "
                    f"anonymous ones. Name the channels or give their wavelengths in nm."
                )

    def _check_places(self, channels: ChannelSet) -> None:
        """With zeros for what is absent, a channel that is none of the virtual ones is lost."""
        virtual = self.virtual_channels
        if virtual.is_anonymous and len(channels) == len(virtual):
            return
        lost = [c.label for c in channels if find_channel(c, virtual.channels, SAME_BAND_NM) < 0]
        if lost or not len(channels):
            raise UserError(
                f"prior='zero' has no place for {', '.join(lost) or 'unnamed channels'}: its "
                f"kernels are for {virtual}. Leave them out, or take another prior."
            )

    @torch.jit.ignore
    def _check_input(self, x: Tensor) -> None:
        """Refuse inputs that do not fit the channel set; bring the tables to where they are."""
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
        self._follow(x)
        if self.mixed:
            num_samples, num_planes = self._planes[0].shape
            if x.shape[0] != num_samples or x.shape[1] < num_planes:
                raise UserError(
                    f"The input has {x.shape[0]} samples of {x.shape[1]} channels, but the mixed "
                    f"batch was declared as {num_samples} sets of up to {num_planes} channels. "
                    f"Pad every sample to {num_planes} planes or more and give one set a sample."
                )
            return
        declared = self._sets()[0]
        if self._strict() and x.shape[1] != len(declared):
            raise UserError(
                f"The input has {x.shape[1]} channels, but the channel set is {declared} "
                f"({len(declared)}). Call timm_varchan.set_channels(model, ...) with the "
                f"input's own channels, 'anonymous', or None for the default rule."
            )

    def _follow(self, x: Tensor) -> None:
        """Bring the tables to weights that were assigned without a word (`assign=True`)."""
        if torch.jit.is_tracing():  # type: ignore[no-untyped-call]
            return
        own = next((p for p in self.parameters() if p.is_floating_point()), None)
        home = (x.device, self._home[1] if own is None else own.dtype)
        if home != self._home:
            self._place_tables(*home)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        if self.mixed:
            channels = f"{len(self._planes[0])} sets"
        else:
            channels = (
                f"default {self.default_channels}" if self.channels is None else str(self.channels)
            )
        return f"virtual={self.virtual_channels}, prior={self.prior_name}, channels={channels}"
