"""What each virtual channel takes from the channels that are there, before anything is learned.

Axes: B samples, N channels of a set, U different ones among them, K virtual channels.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from timm_varchan.channels import Channel, ChannelSet
from timm_varchan.errors import UserError

#: How an absent virtual channel is made of the others.
PRIORS = ("measured", "spectral", "nearest", "mean", "zero")
#: Whether a prediction keeps its own, smaller deviation or is brought to that of the channel.
SCALES = ("plain", "matched")

#: Channels at most so far apart, in nm, are the same band of two sensors.
SAME_BAND_NM = 30.0
#: The same for a channel that is there but not among the measured ones: stains stand closer.
SAME_CHANNEL_NM = 15.0
#: Added to the variances before a solve: what is nearly equal must not be told apart by noise.
NUGGET = 0.01
#: A mix is scaled up by at most the inverse of this.
MIN_DEVIATION = 0.5
#: The prediction of another channel is used for a virtual channel up to this sum of coefficients.
MAX_BORROWED = 3.0
#: Correlation of two bands, `exp(-(|ln(l1 / l2)| / RANGE) ** POWER)`, fitted to natural RGB images.
SPECTRAL_RANGE, SPECTRAL_POWER = 0.665, 1.4


def _apart_nm(channel: Channel, other: Channel, by_name: bool = True) -> float:
    """How far apart two channels are, in nm; infinitely where a wavelength is not known."""
    if by_name and channel.name is not None and channel.name == other.name:
        return 0.0
    if channel.wavelength_nm is None or other.wavelength_nm is None:
        return math.inf
    return abs(channel.wavelength_nm - other.wavelength_nm)


def find_channel(channel: Channel, among: Sequence[Channel], within_nm: float = 0.0) -> int:
    """The place of the same channel: of that name, else wavelength, else the nearest; or -1."""
    names = [c.name for c in among]
    if channel.name is not None and channel.name in names:
        return names.index(channel.name)
    apart = [_apart_nm(channel, c) for c in among]
    nearest = min(range(len(among)), key=apart.__getitem__, default=-1)
    return nearest if nearest >= 0 and apart[nearest] <= within_nm else -1


def _spectral_correlation(distance: Tensor) -> Tensor:
    """Of bands whose wavelengths' logarithms are so far apart."""
    return (-((distance.abs() / SPECTRAL_RANGE) ** SPECTRAL_POWER)).exp()


def correlation_table(channels: ChannelSet) -> Tensor:
    """The correlation `(N, N)` of channels: measured, else from their wavelengths (float64)."""
    if channels.correlation is not None:
        return torch.tensor(channels.correlation, dtype=torch.float64)
    log = torch.tensor(channels.wavelengths_nm, dtype=torch.float64).log()
    return _spectral_correlation(log[:, None] - log)


def _members(keys: Sequence[Hashable]) -> tuple[Tensor, list[Any]]:
    """Which of the different keys each channel has, `(N, U)`, and those keys; None is none."""
    different = [key for key in dict.fromkeys(keys) if key is not None]
    member = torch.zeros(len(keys), len(different), dtype=torch.float64)
    for row, key in enumerate(keys):
        if key is not None:
            member[row, different.index(key)] = 1.0
    return member, different


class _System(NamedTuple):
    """A linear prediction of the virtual channels from U different channels."""

    member: Tensor  # (N, U), 1 where a channel is this one of the different channels
    correlation: Tensor  # (U, U)
    cross: Tensor  # (U, K), of the virtual channels with the different channels
    usable: Tensor  # (K,), which virtual channels it predicts
    borrowed: Tensor  # (K,), which of them are another channel's prediction, for want of their own
    offset: Tensor | None  # (U,), means over deviations; None: coefficients sum to one instead
    offset_virtual: Tensor  # (K,), the same of the virtual channels
    std: Tensor  # (U,), deviations
    std_virtual: Tensor  # (K,), deviations

    def counts(self, count: Tensor) -> Tensor:
        """How many planes `(B, U)` there are of each of the different channels."""
        return count @ self.member

    def solve(self, count: Tensor) -> Tensor:
        """Coefficients `(B, U, K)` in units of the deviations, 0 for absent channels."""
        present = (self.counts(count) > 0).to(self.cross)
        both = present[:, :, None] * present[:, None, :]
        system, right = self.correlation.expand_as(both), self.cross.expand(len(count), -1, -1)
        if self.offset is not None:
            # Second moments instead of covariances: least squares without a bias, which padding
            # with zeros would make unfoldable.
            system = system + torch.outer(self.offset, self.offset)
            right = right + torch.outer(self.offset, self.offset_virtual)
        system = system * both + torch.diag_embed(NUGGET * present + (1 - present))
        right = right * present[:, :, None]
        if self.offset is not None:
            return torch.linalg.solve(system, right)
        # Ordinary kriging: a Lagrange multiplier keeps the sum of the coefficients at one.
        solved = torch.linalg.solve(system, torch.cat([right, present[:, :, None]], -1))
        plain, ones = solved[..., :-1], solved[..., -1:]
        total = (ones * present[:, :, None]).sum(1, keepdim=True).clamp(min=1e-12)
        return plain + ones * (1 - plain.sum(1, keepdim=True)) / total

    def deviation(self, mixed: Tensor) -> Tensor:
        """The deviation `(B, 1, K)` of mixes by coefficients `(B, U, K)`."""
        squared = (mixed * (self.correlation @ mixed)).sum(1, keepdim=True)
        return squared.clamp(min=0).sqrt()

    def per_plane(self, mixed: Tensor, count: Tensor) -> Tensor:
        """From coefficients of the different channels to those `(B, N, K)` of each plane."""
        mixed = mixed * (self.std_virtual / self.std[:, None])
        return self.member @ (mixed / self.counts(count).clamp(min=1)[:, :, None])

    def unexplained(self, planes: Tensor, count: Tensor) -> Tensor:
        """The share of variance `(B, K)` that a mix of the planes `(B, N, K)` does not explain."""
        mixed = self.member.T @ (planes * count[:, :, None])
        mixed = mixed * (self.std[:, None] / self.std_virtual)
        explained = 2 * (mixed * self.cross).sum(1) - self.deviation(mixed)[:, 0].square()
        return (1 - explained).clamp(min=0)


def _measured(
    stats: ChannelSet, ids: Sequence[int], virtual: ChannelSet, virtual_ids: Sequence[int]
) -> _System:
    """The system of the measured correlation, of channels and virtual ones by their place in it."""
    member, rows = _members([i if i >= 0 else None for i in ids])
    table = torch.tensor(stats.correlation, dtype=torch.float64)
    mean = torch.tensor(stats.mean or [0.0] * len(stats), dtype=torch.float64)
    std = torch.tensor(stats.std or [1.0] * len(stats), dtype=torch.float64)
    columns = [max(i, 0) for i in virtual_ids]
    return _System(
        member, table[rows][:, rows], table[rows][:, columns], torch.tensor(virtual_ids) >= 0,
        torch.tensor([find_channel(v, stats.channels) < 0 for v in virtual]),
        (mean / std)[rows], (mean / std)[columns], std[rows], std[columns],
    )  # fmt: skip


def _spectral(channels: ChannelSet, virtual: ChannelSet) -> _System:
    """The system of a correlation that falls with the distance of the wavelengths."""
    # Bands of the same nanometre are one: hundreds of copies would outweigh the nugget.
    waves = [nm if nm is None else round(nm) for nm in channels.wavelengths_nm]
    member, lengths = _members(waves)
    log = torch.tensor(lengths, dtype=torch.float64).log()
    log_virtual = torch.tensor([nm or 1.0 for nm in virtual.wavelengths_nm]).double().log()
    return _System(
        member,
        _spectral_correlation(log[:, None] - log),
        _spectral_correlation(log[:, None] - log_virtual),
        torch.tensor([nm is not None for nm in virtual.wavelengths_nm]),
        torch.zeros(len(virtual), dtype=torch.bool),
        None,
        torch.zeros(len(virtual)),
        torch.ones_like(log),
        torch.ones_like(log_virtual),
    )


class Prior:
    """Coefficients for every subset of a channel set, in closed form.

    A virtual channel whose own channel is there takes it whole: of the same name, the same
    wavelength, or, unless it was measured, the nearest within 30 nm. Another one is the best linear
    prediction from what is there, `(C_SS + 0.01 I)^-1 C_Sv` for the correlation C of the channels:
    `measured` on the data, or `spectral`, a function of the wavelengths, with coefficients that sum
    to one (ordinary kriging). `mean` and `nearest` take the mean of the channels or the nearest
    one, `zero` nothing. What nothing is known of becomes the mean. Identical channels share their
    coefficient.

    Args:
        channels: N channels; the coefficients are for subsets of them.
        virtual_channels: K.
        kind: One of `PRIORS`.
        channel_stats: Mean, deviation and correlation of the planes as the model sees them (without
            mean and deviation: standardised), for `measured`.
        scale: One of `SCALES`: `matched` divides a measured prediction by its deviation, but by no
            less than a half.

    Raises:
        UserError: `measured` without a correlation.
    """

    def __init__(
        self,
        channels: ChannelSet,
        virtual_channels: ChannelSet,
        kind: str,
        channel_stats: ChannelSet | None = None,
        scale: str = "plain",
    ) -> None:
        self.kind, self.scale, self.num_rows = kind, scale, len(channels)
        self.spectral = _spectral(channels, virtual_channels)
        self.measured: _System | None = None
        ids, virtual_ids = [-1] * len(channels), [-1] * len(virtual_channels)
        if channel_stats is not None and channel_stats.correlation is not None:
            among = channel_stats.channels
            ids = [find_channel(c, among, SAME_CHANNEL_NM) for c in channels]
            virtual_ids = [find_channel(v, among, SAME_BAND_NM) for v in virtual_channels]
            self.measured = _measured(channel_stats, ids, virtual_channels, virtual_ids)
        elif kind == "measured":
            raise UserError(
                "prior='measured' needs channel_stats with a correlation: pass "
                "channel_stats=timm_varchan.measure_channels(loader, channels)."
            )
        # Which of the different channels each one is; anonymous ones all differ.
        self.member, _ = _members([
            ("measured", i) if i >= 0 else round(c.wavelength_nm) if c.wavelength_nm is not None
            else c.name or ("anonymous", row)
            for row, (c, i) in enumerate(zip(channels, ids, strict=True))
        ])  # fmt: skip
        self.distance = torch.full((len(channels), len(virtual_channels)), math.inf).double()
        for n, channel in enumerate(channels):
            for k, virtual in enumerate(virtual_channels):
                near = SAME_BAND_NM if kind != "nearest" else math.inf
                if kind == "measured" and virtual_ids[k] >= 0:
                    near = 0.0
                apart = _apart_nm(channel, virtual, by_name=kind != "nearest")
                if apart <= near:
                    self.distance[n, k] = apart
                elif kind == "measured" and virtual_ids[k] == ids[n] >= 0:
                    self.distance[n, k] = 1.0  # another name for it: after the channel itself

    def solve(self, count: Tensor) -> Tensor:
        """How much of each plane of a channel goes to each virtual channel, `(B, N, K)`, float64.

        For the counts `(B, N)` of planes of each channel; 0 for absent ones.
        """
        count = count.double()
        present = (count > 0)[:, :, None]
        planes = self._mean(count) * (self.kind != "zero")
        done = torch.tensor(self.kind not in ("measured", "spectral"))
        systems = [self.spectral] if self.kind == "spectral" else [self.measured, self.spectral]
        for system in systems:
            if system is not None and not bool(done.all()):
                predicted, possible = self._predict(system, count)
                planes = torch.where(possible & ~done, predicted, planes)
                done = done | possible
        distance = self.distance.masked_fill(~present, math.inf)
        nearest = distance.amin(1, keepdim=True)
        chosen = (distance <= nearest + 1e-6) & distance.isfinite()
        whole = chosen / (chosen * count[:, :, None]).sum(1, keepdim=True).clamp(min=1)
        return torch.where(nearest.isfinite(), whole, planes * present)

    def coefficients(self, count: Tensor) -> Tensor:
        """What a stem takes: the same, except that one channel alone is taken by all.

        The prediction of the others from it would be paler and tinted, which costs a network more
        than a gray image does. `zero` stays what it says.
        """
        count = count.double()
        if self.kind == "zero":
            return self.solve(count)
        alone = ((count @ self.member) > 0).sum(1) == 1
        return torch.where(alone[:, None, None], self._mean(count), self.solve(count))

    def _mean(self, count: Tensor) -> Tensor:
        """The mean of the planes that are there, for every virtual channel `(B, N, K)`."""
        weight = (count > 0) / count.sum(1, keepdim=True).clamp(min=1)
        return weight[:, :, None].expand(-1, -1, self.distance.shape[1])

    def _predict(self, system: _System, count: Tensor) -> tuple[Tensor, Tensor]:
        """The prediction `(B, N, K)` of a system, and where it can be used, `(B, 1, K)`."""
        mixed = system.solve(count)
        if self.scale == "matched" and system is self.measured:
            mixed = mixed / system.deviation(mixed).clamp(min=MIN_DEVIATION)
        possible = (system.counts(count) > 0).any(1)[:, None, None] & system.usable
        small = mixed.abs().sum(1, keepdim=True) <= MAX_BORROWED
        return system.per_plane(mixed, count), possible & (small | ~system.borrowed)

    def unexplained_variance(self, count: Tensor) -> Tensor:
        """The part of each virtual channel's variance that the channels do not explain, `(B, K)`.

        0 where the channel itself is there; NaN where nothing is known of it.
        """
        count = count.double()
        planes = self.solve(count)
        error = planes.new_full((len(count), planes.shape[2]), math.nan)
        for system in (self.spectral, self.measured):
            if system is not None:
                possible = (system.counts(count) > 0).any(1)[:, None] & system.usable
                error = torch.where(possible, system.unexplained(planes, count), error)
        distance = self.distance.masked_fill((count == 0)[:, :, None], math.inf)
        return error.masked_fill(distance.amin(1) <= 1.0, 0.0)
