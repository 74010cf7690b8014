"""Channel sets: what the planes of an input are, apart from what they contain.

No tensors and no modules here: a channel set is plain, hashable, JSON-serialisable data that the
stems, the data sets, the evaluation and the configuration files all read.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from numbers import Real
from typing import Any, Union

from timm_varchan.bands import Channel, known_channels, register_channel
from timm_varchan.products import product_channels

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

ChannelLike = Union[Channel, str, float, int, dict[str, Any], None]


def _unknown(name: str) -> ValueError:
    return ValueError(
        f"Unknown channel {name!r}. Known: {', '.join(known_channels())}. Make a name known by "
        f"timm_varchan.register_channel({name!r}, wavelength_nm=...), or give a wavelength in nm."
    )


def _channel_of(entry: dict[str, Any]) -> Channel:
    known = [field.name for field in fields(Channel)]
    if not isinstance(entry, dict) or not set(entry) <= set(known):
        raise ValueError(f"A channel is described by {', '.join(known)}, not by {entry!r}.")
    return Channel(**entry)


def _channel(item: ChannelLike) -> Channel:
    if isinstance(item, Channel):
        return item
    if item is None:
        return Channel()
    if isinstance(item, dict):  # an entry of `ChannelSet.to_config`, as model arguments hold it
        return _channel_of(item)
    if isinstance(item, str):
        known = known_channels()
        if item not in known:
            raise _unknown(item)
        return known[item]
    if isinstance(item, Real) and not isinstance(item, bool):
        return Channel(wavelength_nm=float(item))
    raise ValueError(
        f"A channel is a name, a wavelength in nm, None or a Channel, not {type(item).__name__} "
        f"({item!r})."
    )


def _parse_text(text: str) -> list[Channel]:
    known = known_channels()
    channels: list[Channel] = []
    for part in re.split(r"[+,]", text):
        part = part.strip()
        if part in known:
            channels.append(known[part])
        elif part and all(letter in known for letter in part):
            channels.extend(known[letter] for letter in part)
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
                a known name, else a row of known single letters), a product (`"eurosat"`, see
                `timm_varchan.products`), `"anonymous"`, or a sequence of names, wavelengths in nm,
                `Channel` objects and None (anonymous), also mixed.

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
            return cls(product_channels(spec) or tuple(_parse_text(spec)))
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
        return cls(tuple(_channel_of(entry) for entry in config))


ChannelSetLike = Union[ChannelSet, str, Sequence[ChannelLike]]

#: Any number of channels about which nothing is known.
ANONYMOUS = ChannelSet()
#: The channels that timm's weights were trained on.
RGB = ChannelSet.parse("RGB")
