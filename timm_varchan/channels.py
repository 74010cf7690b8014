"""Channels and channel sets: what the planes of an input are, apart from what they contain.

No tensors and no modules here: a channel set is plain, hashable, JSON-serialisable data that the
stems, the data sets, the evaluation and the configuration files all read.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Union

__all__ = [
    "ANONYMOUS",
    "RGB",
    "Channel",
    "ChannelLike",
    "ChannelSet",
    "ChannelSetLike",
    "known_channels",
    "register_channel",
    "seeded_rng",
]

#: Wavelengths below this, in nm, are refused: they are almost always micrometres.
MIN_WAVELENGTH_NM = 100.0


@dataclass(frozen=True)
class Channel:
    """One input plane, described by a name, a centre wavelength, both, or neither (anonymous).

    Args:
        name: How people call it (`"R"`, `"B08"`, `"DNA"`).
        wavelength_nm: Centre wavelength in nm, at least 100.
        mean: Mean of the channel in the units of the scaled input (8-bit images scaled to 0..1).
        std: Standard deviation in the same units, above 0.

    Raises:
        ValueError: A value that is not finite, a wavelength in micrometres, a deviation of 0.
    """

    name: str | None = None
    wavelength_nm: float | None = None
    mean: float | None = None
    std: float | None = None

    def __post_init__(self) -> None:
        if self.name is not None and (not self.name or re.search(r"[\s+,]", self.name)):
            raise ValueError(
                f"Channel name {self.name!r} is empty or contains a space, '+' or ',', which "
                f"separate channels. Use letters, digits, '-' and '_'."
            )
        for field in ("wavelength_nm", "mean", "std"):
            value = getattr(self, field)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"Channel {self.label}: {field} is {value}, not a finite number.")
        if self.wavelength_nm is not None and self.wavelength_nm < MIN_WAVELENGTH_NM:
            raise ValueError(
                f"Channel {self.label}: wavelength {self.wavelength_nm:g} nm is below "
                f"{MIN_WAVELENGTH_NM:g} nm. Wavelengths are in nanometres: for micrometres "
                f"multiply by 1000 ({self.wavelength_nm * 1000:g})."
            )
        if self.std is not None and self.std <= 0:
            raise ValueError(f"Channel {self.label}: std is {self.std}, it must be above 0.")
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"Channel {self.label}: give mean and std together, or neither.")

    @property
    def is_anonymous(self) -> bool:
        """Whether nothing tells this channel from another."""
        return self.name is None and self.wavelength_nm is None

    @property
    def label(self) -> str:
        """Short text for tables and errors: the name, else the wavelength, else `?`."""
        if self.name is not None:
            return self.name
        return "?" if self.wavelength_nm is None else f"{self.wavelength_nm:g}nm"


ChannelLike = Union[Channel, str, float, int, None]

_IMAGENET = {"R": (0.485, 0.229), "G": (0.456, 0.224), "B": (0.406, 0.225)}

# Centre wavelengths in nm. R, G, B are those of a camera's sensor; Sentinel-2 as in the user
# guide of its instrument (S2A); Landsat as in the handbooks of OLI and TIRS.
_WAVELENGTHS_NM = {
    "R": 660.0, "G": 550.0, "B": 470.0, "NIR": 850.0, "SWIR1": 1610.0, "SWIR2": 2200.0,
    "B01": 442.7, "B02": 492.4, "B03": 559.8, "B04": 664.6, "B05": 704.1, "B06": 740.5,
    "B07": 782.8, "B08": 832.8, "B8A": 864.7, "B09": 945.1, "B10": 1373.5, "B11": 1613.7,
    "B12": 2202.4,
}  # fmt: skip
_LANDSAT_NM = (443.0, 482.0, 561.5, 654.5, 865.0, 1608.5, 2200.5, 589.5, 1373.5, 10895.0, 12005.0)

_registry: dict[str, Channel] = {
    name: Channel(name, nm, *_IMAGENET.get(name, (None, None)))
    for name, nm in _WAVELENGTHS_NM.items()
} | {
    f"L{satellite}_B{band}": Channel(f"L{satellite}_B{band}", nm)
    for satellite in (8, 9)
    for band, nm in enumerate(_LANDSAT_NM, start=1)
}


def known_channels() -> dict[str, Channel]:
    """Every channel that can be named in a specification, by name."""
    return dict(_registry)


def register_channel(
    name: str,
    wavelength_nm: float | None = None,
    *,
    mean: float | None = None,
    std: float | None = None,
    overwrite: bool = False,
) -> Channel:
    """Make a further name known to `ChannelSet.parse`: a stain, a radar polarisation, a band.

    Args:
        name: The name; case matters.
        wavelength_nm: Centre wavelength in nm, or None where light has no part in it.
        mean: Mean of the scaled input, with `std`.
        std: Standard deviation of the scaled input, with `mean`.
        overwrite: Replace a channel that is known by this name.

    Returns:
        The channel.

    Raises:
        ValueError: The name is taken by another channel, or is a row of known letters
            (`"GB"` would no longer be green and blue).
    """
    channel = Channel(name, wavelength_nm, mean, std)
    known = _registry.get(name)
    if known is not None and known != channel and not overwrite:
        raise ValueError(f"Channel {name!r} is known already ({known}). Pass overwrite=True.")
    if len(name) > 1 and all(letter in _registry for letter in name):
        raise ValueError(
            f"Channel name {name!r} already reads as {'+'.join(name)}; choose another one."
        )
    if name.lower() == "anonymous":
        raise ValueError("The name 'anonymous' is reserved for channels without identity.")
    _registry[name] = channel
    return channel


def _unknown(name: str) -> ValueError:
    return ValueError(
        f"Unknown channel {name!r}. Known: {', '.join(_registry)}. Make a name known by "
        f"timm_varchan.register_channel({name!r}, wavelength_nm=...), or give a wavelength in nm."
    )


def _channel(item: ChannelLike) -> Channel:
    if isinstance(item, Channel):
        return item
    if item is None:
        return Channel()
    if isinstance(item, str):
        if item not in _registry:
            raise _unknown(item)
        return _registry[item]
    if isinstance(item, (int, float)) and not isinstance(item, bool):
        return Channel(wavelength_nm=float(item))
    raise ValueError(
        f"A channel is a name, a wavelength in nm, None or a Channel, not {type(item).__name__} "
        f"({item!r})."
    )


def _parse_text(text: str) -> list[Channel]:
    channels: list[Channel] = []
    for part in re.split(r"[+,]", text):
        part = part.strip()
        if part in _registry:
            channels.append(_registry[part])
        elif part and all(letter in _registry for letter in part):
            channels.extend(_registry[letter] for letter in part)
        else:
            raise _unknown(part)
    return channels


def seeded_rng(*key: int | str) -> random.Random:
    """A generator that depends on the key alone: the same on every process and every machine."""
    return random.Random(":".join(str(part) for part in key))


@dataclass(frozen=True)
class ChannelSet:
    """The ordered tuple of channels of one input.

    An empty tuple is the set `ANONYMOUS`: any number of channels, nothing known about them.

    Args:
        channels: The channels in the order of the planes.

    Raises:
        ValueError: A name comes twice.
    """

    channels: tuple[Channel, ...] = ()

    def __post_init__(self) -> None:
        names = [c.name for c in self.channels if c.name is not None]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(
                f"Channel {', '.join(doubled)} comes more than once in {self}. Every name stands "
                f"for one plane; call further planes None (anonymous) or by another name."
            )

    @classmethod
    def parse(cls, spec: ChannelSetLike) -> ChannelSet:
        """Read a channel set from what people write.

        Args:
            spec: A text (`"RGB"`, `"GB"`, `"B02+B08"`, `"R,G,NIR"`; split at `+` or `,`, a part is
                a known name, else a row of known single letters), `"anonymous"`, or a sequence of
                names, wavelengths in nm, `Channel` objects and None (anonymous), also mixed.

        Returns:
            The channel set.

        Raises:
            ValueError: Unknown or doubled names, no channels, wavelengths in micrometres.
        """
        if isinstance(spec, ChannelSet):
            return spec
        if isinstance(spec, str):
            if spec == "anonymous":
                return ANONYMOUS
            return cls(tuple(_parse_text(spec)))
        if not isinstance(spec, Iterable):
            raise ValueError(
                f"A channel set is a text such as 'RGB' or 'B02+B08', or a list of names, "
                f"wavelengths in nm and None, not {type(spec).__name__} ({spec!r})."
            )
        channels = tuple(_channel(item) for item in spec)
        if not channels:
            raise ValueError("A channel set needs at least one channel.")
        return cls(channels)

    @classmethod
    def anonymous(cls, num_channels: int) -> ChannelSet:
        """A set of exactly `num_channels` channels without identity."""
        if num_channels < 1:
            raise ValueError(f"A channel set needs at least one channel, not {num_channels}.")
        return cls((Channel(),) * num_channels)

    def __len__(self) -> int:
        return len(self.channels)

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Channel]:
        return iter(self.channels)

    def __str__(self) -> str:
        if not self.channels:
            return "anonymous"
        labels = self.labels
        return ("" if all(len(label) == 1 for label in labels) else "+").join(labels)

    @property
    def is_anonymous(self) -> bool:
        """Whether no channel has a name or a wavelength."""
        return all(c.is_anonymous for c in self.channels)

    @property
    def labels(self) -> tuple[str, ...]:
        """One short text a channel."""
        return tuple(c.label for c in self.channels)

    @property
    def names(self) -> tuple[str | None, ...]:
        """The names, None where a channel has none."""
        return tuple(c.name for c in self.channels)

    @property
    def wavelengths_nm(self) -> tuple[float | None, ...]:
        """The centre wavelengths in nm, None where a channel has none."""
        return tuple(c.wavelength_nm for c in self.channels)

    @property
    def mean(self) -> tuple[float, ...] | None:
        """The channels' means, or None if one is unknown."""
        means = [c.mean for c in self.channels]
        return None if not means or None in means else tuple(m for m in means if m is not None)

    @property
    def std(self) -> tuple[float, ...] | None:
        """The channels' standard deviations, or None if one is unknown."""
        stds = [c.std for c in self.channels]
        return None if not stds or None in stds else tuple(s for s in stds if s is not None)

    def with_stats(self, mean: Sequence[float], std: Sequence[float]) -> ChannelSet:
        """The same channels with these means and standard deviations, one each."""
        if len(mean) != len(self) or len(std) != len(self):
            raise ValueError(
                f"{self} has {len(self)} channels, but {len(mean)} means and {len(std)} deviations "
                f"came. Give one of each a channel."
            )
        return ChannelSet(
            tuple(
                replace(c, mean=float(m), std=float(s))
                for c, m, s in zip(self.channels, mean, std, strict=True)
            )
        )

    def without_identity(self) -> ChannelSet:
        """The same planes, means and deviations with no names and no wavelengths."""
        return ChannelSet(tuple(Channel(mean=c.mean, std=c.std) for c in self.channels))

    def take(self, indices: Iterable[int]) -> ChannelSet:
        """The channels at these positions, in this order."""
        return ChannelSet(tuple(self.channels[i] for i in indices))

    def index(self, other: ChannelSetLike) -> tuple[int, ...]:
        """Positions in this set of another set's channels, in the other's order.

        Raises:
            ValueError: The other set has a channel that this one lacks, or an anonymous one.
        """
        positions = {(c.name, c.wavelength_nm): i for i, c in enumerate(self.channels)}
        wanted = ChannelSet.parse(other)
        missing = [
            c.label for c in wanted if c.is_anonymous or (c.name, c.wavelength_nm) not in positions
        ]
        if missing or not wanted.channels:
            raise ValueError(
                f"Channel {', '.join(missing) or 'anonymous'} is not among {self}. Choose from: "
                f"{', '.join(self.labels)}."
            )
        return tuple(positions[c.name, c.wavelength_nm] for c in wanted)

    def subset_indices(self, size: int | None = None) -> list[tuple[int, ...]]:
        """Positions of every subset, largest first, or of those with `size` channels."""
        sizes = range(len(self), 0, -1) if size is None else (size,)
        if size is not None and not 1 <= size <= len(self):
            raise ValueError(f"{self} has subsets of 1 to {len(self)} channels, not of {size}.")
        return [s for n in sizes for s in itertools.combinations(range(len(self)), n)]

    def subsets(self, size: int | None = None) -> list[ChannelSet]:
        """Every subset, largest first, or those with `size` channels."""
        return [self.take(indices) for indices in self.subset_indices(size)]

    def sample_indices(self, rng: random.Random) -> tuple[int, ...]:
        """Hierarchical channel sampling: draw the size uniformly, then the subset uniformly.

        Source: ChannelViT, arXiv:2309.16108, section 3.3. The order of the planes is kept.
        """
        size = rng.randint(1, len(self))
        return tuple(sorted(rng.sample(range(len(self)), size)))

    def shuffled_indices(self, rng: random.Random) -> tuple[int, ...]:
        """All positions in random order (channel shuffling)."""
        return tuple(rng.sample(range(len(self)), len(self)))

    def to_config(self) -> list[dict[str, Any]]:
        """A JSON-serialisable form; `from_config` reads it, also where a name is not registered."""
        return [
            {key: value for key, value in asdict(c).items() if value is not None}
            for c in self.channels
        ]

    @classmethod
    def from_config(cls, config: Sequence[dict[str, Any]]) -> ChannelSet:
        """The channel set that `to_config` wrote."""
        return cls(tuple(Channel(**entry) for entry in config))


ChannelSetLike = Union[ChannelSet, str, Sequence[ChannelLike]]

#: Any number of channels about which nothing is known.
ANONYMOUS = ChannelSet()
#: The channels that timm's weights were trained on.
RGB = ChannelSet.parse("RGB")
