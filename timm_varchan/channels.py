"""Channels and channel sets: what the planes of an input are, apart from what they contain.

No tensors and no modules here: a channel set is plain, hashable, JSON-serialisable data that the
stems, the data sets, the evaluation and the configuration files all read. `ChannelSet.parse` is the
one place where what people write becomes channels.
"""

from __future__ import annotations

import difflib
import itertools
import json
import os
import random
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Real
from pathlib import Path
from typing import Any, Union

import numpy as np

from timm_varchan.errors import UserError
from timm_varchan.products import PRODUCT_BANDS_NM, PRODUCTS

#: Wavelengths below this, in nm, are refused: they are almost always micrometres.
MIN_WAVELENGTH_NM = 100.0
#: Of the serial form.
VERSION = 1
#: Names that an error lists, at most.
MAX_NAMES = 8


def _is_finite(value: object) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    # NaN is not; an int may be larger than any float
    return bool(abs(value) <= sys.float_info.max)  # type: ignore[operator]


@dataclass(frozen=True)
class Channel:
    """One input plane, described by a name, a centre wavelength, both, or neither (anonymous).

    Args:
        name: How people call it (`"R"`, `"B08"`, `"DNA"`).
        wavelength_nm: Centre wavelength in nm, at least 100.
        mean: Mean of the channel in the units of the scaled input (8-bit images scaled to 0..1).
        std: Standard deviation in the same units, above 0.

    Raises:
        UserError: A value that is not finite, a wavelength in micrometres, a deviation of 0.
    """

    name: str | None = None
    wavelength_nm: float | None = None
    mean: float | None = None
    std: float | None = None

    def __post_init__(self) -> None:
        name = self.name
        if name is not None and not (isinstance(name, str) and re.fullmatch(r"[^\s+,]+", name)):
            raise UserError(
                f"Channel name {name!r} is no text, empty or contains a space, '+' or ',', "
                f"which separate channels. Use letters, digits, '-' and '_'."
            )
        for number in ("wavelength_nm", "mean", "std"):
            value = getattr(self, number)
            if value is not None and not _is_finite(value):
                raise UserError(
                    f"Channel {self.label}: {number} is {value!r}, not a finite number."
                )
        if self.wavelength_nm is not None and self.wavelength_nm < MIN_WAVELENGTH_NM:
            raise UserError(
                f"Channel {self.label}: wavelength {self.wavelength_nm:g} nm is below "
                f"{MIN_WAVELENGTH_NM:g} nm. Wavelengths are in nanometres: for micrometres "
                f"multiply by 1000 ({self.wavelength_nm * 1000:g})."
            )
        if self.std is not None and self.std <= 0:
            raise UserError(f"Channel {self.label}: std is {self.std}, it must be above 0.")
        if (self.mean is None) != (self.std is None):
            raise UserError(f"Channel {self.label}: give mean and std together, or neither.")

    @property
    def is_anonymous(self) -> bool:
        """Whether nothing tells this channel from another."""
        return self.name is None and self.wavelength_nm is None

    @property
    def identity(self) -> tuple[str | None, float | None]:
        """What tells it from other channels: name and wavelength."""
        return self.name, self.wavelength_nm

    @property
    def label(self) -> str:
        """Short text for tables and errors: the name, else the wavelength, else `?`."""
        if self.name is not None:
            return self.name
        if not _is_finite(self.wavelength_nm):  # unknown, or what an error has to show
            return "?"
        return f"{self.wavelength_nm:g}nm"


# Names --------------------------------------------------------------------------------------------

# ImageNet's mean and deviation; of gray those of BT.601's luminance of natural images.
_IMAGENET = {
    "R": (0.485, 0.229), "G": (0.456, 0.224), "B": (0.406, 0.225), "gray": (0.459, 0.22),
}  # fmt: skip
# Centre wavelengths in nm. R, G, B are those of a camera's sensor; gray is where luminance (CIE
# 1931) peaks, PAN the panchromatic band of Landsat 8: one such plane alone is taken whole by every
# virtual channel, beside others it stands for the middle of what is visible. Sentinel-2 as in the
# user guide of its instrument (S2A); Landsat as in the handbooks of OLI and TIRS.
_WAVELENGTHS_NM = {
    "R": 660.0, "G": 550.0, "B": 470.0, "NIR": 850.0, "SWIR1": 1610.0, "SWIR2": 2200.0,
    "gray": 555.0, "PAN": 589.5,
    "B01": 442.7, "B02": 492.4, "B03": 559.8, "B04": 664.6, "B05": 704.1, "B06": 740.5,
    "B07": 782.8, "B08": 832.8, "B8A": 864.7, "B09": 945.1, "B10": 1373.5, "B11": 1613.7,
    "B12": 2202.4,
}  # fmt: skip
_LANDSAT_NM = (443.0, 482.0, 561.5, 654.5, 865.0, 1608.5, 2200.5, 589.5, 1373.5, 10895.0, 12005.0)

_registry: dict[str, Channel] = {
    name: Channel(name, nm, *_IMAGENET.get(name, (None, None)))
    for name, nm in {
        **_WAVELENGTHS_NM,
        **{f"L{n}_B{band}": nm for n in (8, 9) for band, nm in enumerate(_LANDSAT_NM, start=1)},
        **PRODUCT_BANDS_NM,
    }.items()
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
        mean: Of the scaled input, with `std`.
        std: Of the scaled input, with `mean`.
        overwrite: Replace a channel that is known by this name.

    Raises:
        UserError: The name is taken by another channel, or reads as something else: a row of
            known letters (`"GB"` would no longer be green and blue), a product, a file.
    """
    channel = Channel(name, wavelength_nm, mean, std)
    if not overwrite and _registry.get(name, channel) != channel:
        raise UserError(
            f"Channel {name!r} is known already ({_registry[name]}). Pass overwrite=True."
        )
    if len(name) > 1 and all(letter in _registry for letter in name):
        raise UserError(
            f"Channel name {name!r} already reads as {'+'.join(name)}; choose another one."
        )
    if name.lower() == "anonymous" or name.lower() in PRODUCTS or name.endswith(".json"):
        raise UserError(f"Channel name {name!r} is reserved for a whole set; choose another one.")
    _registry[name] = channel
    return channel


def _unknown(name: str, names: Sequence[str] = ()) -> UserError:
    """An error that says what was perhaps meant, among others of these names of the owner."""
    if not name:
        return UserError("A channel without a name: nothing stands before or after a '+'.")
    if "," in name:
        joined = "+".join(part.strip() for part in name.split(","))
        return UserError(f"Channels are joined by '+', not by ',': say {joined!r}.")
    if near := _near(name, names):
        hint = f": did you mean {', '.join(near)}?"
    else:
        some = [*names, "R", "G", "B", "NIR", "gray", "B02", "eurosat", "sentinel2-l2a"]
        hint = f". Known are, among others: {', '.join(some[:MAX_NAMES])} (timm-varchan channels)."
    new = name.partition("@")[0] or "NAME"
    return UserError(
        f"Unknown channel {name!r}{hint} Declare a new one where you name it, as {new}@461nm, or "
        f"{new}= without a wavelength, take every new name with --new-names (new_names=True), or "
        f"register it by timm_varchan.register_channel({name!r}, wavelength_nm=...)."
    )


def _near(name: str, names: Sequence[str]) -> list[str]:
    """Names and products that are written much like this one."""

    def key(text: str) -> str:  # B2, b02 and B02 alike
        return re.sub(r"(?<!\d)0+(?=\d)", "", text.lower())

    by_key: dict[str, list[str]] = {}
    for text in dict.fromkeys((*names, *_registry, *PRODUCTS)):
        by_key.setdefault(key(text), []).append(text)
    wanted, letters = key(name), name.upper()
    found = [letters] if len(name) > 1 and all(letter in _registry for letter in letters) else []
    keys = [wanted] if wanted in by_key else [
        k for k in difflib.get_close_matches(wanted, by_key, MAX_NAMES)
        if abs(len(k) - len(wanted)) <= len(name) // 3 or k.startswith(wanted)
    ]  # fmt: skip
    return [*found, *itertools.chain.from_iterable(by_key[k] for k in keys)][:MAX_NAMES]


def seeded_rng(*key: int | str) -> random.Random:
    """A generator that depends on the key alone: the same on every process and every machine."""
    return random.Random(":".join(str(part) for part in key))


# Sets ---------------------------------------------------------------------------------------------

ChannelLike = Union[Channel, str, float, int, None]
Correlation = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class ChannelSet:
    """The ordered tuple of channels of one input, and what is known of its numbers.

    An empty tuple is the set `ANONYMOUS`: any number of channels, nothing known about them.

    Args:
        channels: The channels in the order of the planes.
        correlation: C rows of C correlations between the planes, or None where it is not known.
        value_scale: What stored numbers are divided by before mean and deviation hold; None: by
            their type's own range.
        value_offset: What is added to stored numbers before, in their units.

    Raises:
        UserError: A name comes twice, a correlation that is none, a scale that is not above 0.
    """

    channels: tuple[Channel, ...] = ()
    correlation: Correlation | None = field(default=None, hash=False, repr=False)
    value_scale: float | None = field(default=None, compare=False, repr=False)
    value_offset: float = field(default=0.0, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.correlation is not None:
            object.__setattr__(self, "correlation", _checked(self.correlation, len(self.channels)))
        names = [c.name for c in self.channels if c.name is not None]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise UserError(
                f"Channel {', '.join(doubled)} comes more than once in {self}. Every name stands "
                f"for one plane; call further planes None (anonymous) or by another name."
            )
        scale = self.value_scale
        if scale is not None and not (_is_finite(scale) and scale > 0):
            raise UserError(f"value_scale is {scale!r}; it must be a number above 0, as 10000.")
        if not _is_finite(self.value_offset):
            raise UserError(f"value_offset is {self.value_offset!r}, not a finite number.")

    @classmethod
    def parse(
        cls, spec: ChannelSetLike, *, own: Iterable[Channel] = (), new_names: bool = False
    ) -> ChannelSet:
        """Read a channel set from what people write.

        Args:
            spec: A text of parts joined by `+`, each a known name, one that is declared where it
                stands (`DNA@461nm`, `phase=` without a wavelength, `461nm` without a name), or a
                row of known single letters (`"RGB"`, `"GB+NIR"`, `"B02+B08"`); a product
                (`"eurosat"`, see `timm_varchan.products`); `"anonymous"`; the path of a `.json`
                file of `write_channels`; what `to_dict` gave; or a sequence of names, wavelengths
                in nm, `Channel` objects and None (anonymous), also mixed.
            own: Channels that a model or data knows, before all others. Of a channel set their
                means, deviations, correlation and value scale hold for what is chosen of it.
            new_names: Take a name that nobody knows for a channel without a wavelength.

        Raises:
            UserError: Unknown or doubled names, no channels, wavelengths in micrometres, a file
                that holds no channels.
        """
        if isinstance(spec, ChannelSet):
            return spec
        if isinstance(spec, os.PathLike) or (isinstance(spec, str) and spec.endswith(".json")):
            return _read(Path(spec))
        if isinstance(spec, Mapping):
            return cls.from_dict(spec)
        if not isinstance(spec, Iterable):
            raise UserError(
                f"A channel set is a text such as 'RGB' or 'B02+B08', or a list of names, "
                f"wavelengths in nm and None, not {type(spec).__name__} ({spec!r})."
            )
        if isinstance(spec, str) and spec.strip().lower() == "anonymous":
            return ANONYMOUS
        if not isinstance(own, ChannelSet):  # the last one of a name
            own = cls(tuple({c.name or i: c for i, c in enumerate(own)}.values()))
        names = known_channels() | {c.name: c for c in own if c.name is not None}
        if isinstance(spec, str):
            channels = _parse_text(spec, names, own, new_names)
        else:
            channels = [_channel(item, names, own, new_names) for item in spec]
        if not channels:
            raise UserError("A channel set needs at least one channel.")
        return _as_owned(channels, own)

    @classmethod
    def anonymous(cls, num_channels: int) -> ChannelSet:
        """A set of exactly `num_channels` channels without identity."""
        if num_channels < 1:
            raise UserError(f"A channel set needs at least one channel, not {num_channels}.")
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
        return ("" if all(len(label) == 1 for label in self.labels) else "+").join(self.labels)

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
        found = tuple(c.mean for c in self if c.mean is not None)
        return found if found and len(found) == len(self) else None

    @property
    def std(self) -> tuple[float, ...] | None:
        """The channels' standard deviations, or None if one is unknown."""
        found = tuple(c.std for c in self if c.std is not None)
        return found if found and len(found) == len(self) else None

    def with_stats(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        correlation: Sequence[Sequence[float]] | None = None,
    ) -> ChannelSet:
        """The same channels with C means, C standard deviations and C x C correlations or None."""
        if len(mean) != len(self) or len(std) != len(self):
            raise UserError(
                f"{self} has {len(self)} channels, but {len(mean)} means and {len(std)} deviations "
                f"came. Give one of each a channel."
            )
        channels = tuple(
            replace(c, mean=float(m), std=float(s))
            for c, m, s in zip(self.channels, mean, std, strict=True)
        )
        table = None if correlation is None else _checked(correlation, len(self))
        return replace(self, channels=channels, correlation=table)

    def with_scale(
        self, value_scale: float | None, value_offset: float | None = None
    ) -> ChannelSet:
        """The same channels of stored numbers that are scaled so; None changes nothing.

        Raises:
            UserError: The means and deviations hold for another scale.
        """
        before = (self.value_scale, self.value_offset)
        scale = before[0] if value_scale is None else value_scale
        offset = before[1] if value_offset is None else value_offset
        if self.mean and (scale, offset) != before != (None, 0.0):
            old, new = (f"{s:g}" if s else "their type's range" for s in (before[0], scale))
            more = "" if offset == before[1] else f" with another offset ({offset:g})"
            raise UserError(
                f"The means and deviations of {self} hold for numbers divided by {old}, not by "
                f"{new}{more}. Leave value_scale (--value-scale) out, or measure the channels anew."
            )
        return replace(self, value_scale=scale, value_offset=offset)

    def without_identity(self) -> ChannelSet:
        """The same planes, means and deviations with no names and no wavelengths."""
        return replace(self, channels=tuple(Channel(mean=c.mean, std=c.std) for c in self))

    def without_correlation(self) -> ChannelSet:
        """The same channels, means and deviations, with nothing said of their correlation."""
        return replace(self, correlation=None)

    def standardised(self) -> ChannelSet:
        """The statistics of the planes after normalisation by mean and deviation: 0 and 1."""
        return replace(self, channels=tuple(Channel(c.name, c.wavelength_nm) for c in self))

    def take(self, indices: Iterable[int]) -> ChannelSet:
        """The channels at these positions, in this order, with their part of the correlation."""
        chosen = tuple(indices)
        table = self.correlation
        part = table and tuple(tuple(table[i][j] for j in chosen) for i in chosen)
        return replace(self, channels=tuple(self.channels[i] for i in chosen), correlation=part)

    def index(self, other: ChannelSetLike) -> tuple[int, ...]:
        """Positions in this set of another set's channels, in the other's order.

        Raises:
            UserError: The other set has a channel that this one lacks, or an anonymous one.
        """
        wanted = ChannelSet.parse(other, own=self.channels)
        free = [None if c.is_anonymous else c.identity for c in self]
        places, missing = [], []
        for channel in wanted:
            if channel.is_anonymous or channel.identity not in free:
                missing.append(channel.label)
            else:
                places.append(free.index(channel.identity))
                free[places[-1]] = None  # taken
        if missing or not wanted.channels:
            raise UserError(
                f"Channel {', '.join(dict.fromkeys(missing)) or 'anonymous'} is not among {self}, "
                f"or not so often. Choose from: {', '.join(self.labels)}."
            )
        return tuple(places)

    def subset_indices(self, size: int | None = None) -> list[tuple[int, ...]]:
        """Positions of every subset, largest first, or of those with `size` channels."""
        sizes = range(len(self), 0, -1) if size is None else (size,)
        if size is not None and not 1 <= size <= len(self):
            raise UserError(f"{self} has subsets of 1 to {len(self)} channels, not of {size}.")
        return [s for n in sizes for s in itertools.combinations(range(len(self)), n)]

    def to_dict(self) -> dict[str, Any]:
        """The JSON-serialisable form; `from_dict` reads it, also where a name is not registered.

        `correlation` is its upper triangle without the diagonal, row by row, with four digits.
        """
        return {
            "version": VERSION,
            "channels": [
                {key: value for key, value in asdict(c).items() if value is not None} for c in self
            ],
            "value_scale": self.value_scale,
            "value_offset": self.value_offset,
            "correlation": self.correlation
            and [round(v, 4) for i, row in enumerate(self.correlation) for v in row[i + 1 :]],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ChannelSet:
        """The channel set that `to_dict` wrote.

        Raises:
            UserError: A later version, or another content.
        """
        listed = values.get("channels") if isinstance(values, Mapping) else None
        if not isinstance(listed, Sequence) or isinstance(listed, str):
            raise UserError(f"A saved channel set needs a list of channels, not {listed!r:.40}.")
        if values.get("version") != VERSION:
            raise UserError(
                f"The channel set is of version {values.get('version')!r}; this release reads "
                f"{VERSION}. Measure or save it anew."
            )
        keys = [field.name for field in fields(Channel)]
        for entry in listed:
            if not isinstance(entry, Mapping) or not set(entry) <= set(keys):
                raise UserError(f"A channel is described by {', '.join(keys)}, not {entry!r:.60}.")
        channels = tuple(Channel(**entry) for entry in listed)
        triangle = values.get("correlation")
        table = None if triangle is None else _square(triangle, len(channels))
        return cls(channels, table, values.get("value_scale"), values.get("value_offset", 0.0))


ChannelSetLike = Union[ChannelSet, str, Path, Sequence[ChannelLike], Mapping[str, Any]]


# Parts of the parser ------------------------------------------------------------------------------


def _parse_text(
    text: str, names: Mapping[str, Channel], own: ChannelSet, new_names: bool
) -> list[Channel]:
    product = PRODUCTS.get(text.strip().lower())
    if product is not None and text.strip() not in names:
        bands = [names[name] for name in product.bands]
        # A product's statistics depend on the data: only its owner knows them.
        return [c if c in own.channels else Channel(c.name, c.wavelength_nm) for c in bands]
    if "," in text:
        raise _unknown(text)
    channels: list[Channel] = []
    for part in (part.strip() for part in text.split("+")):
        if part not in names and part and all(letter in names for letter in part):
            channels += [names[letter] for letter in part]
        else:
            channels.append(_channel(part, names, own, new_names))
    return channels


def _channel(
    item: ChannelLike, names: Mapping[str, Channel], own: ChannelSet, new_names: bool
) -> Channel:
    if isinstance(item, Channel):
        return item
    if item is None:
        return Channel()
    if isinstance(item, str):
        found = names.get(item) or _declared(item)
        if found is None and new_names and item and "," not in item:
            found = Channel(item)
        if found is None:
            raise _unknown(item, [name for name in own.names if name])
        return found
    if isinstance(item, Real) and not isinstance(item, bool):
        return Channel(wavelength_nm=float(item))
    raise UserError(
        f"A channel is a name, a wavelength in nm, None or a Channel, not {type(item).__name__} "
        f"({item!r})."
    )


def _declared(part: str) -> Channel | None:
    """The channel that `name@461nm`, `name=` or `461nm` declares, or None."""
    if part.endswith("="):
        return Channel(part[:-1])
    found = re.fullmatch(r"(?:([^@]+)@)?(\d+(?:\.\d+)?)nm", part)
    return None if found is None else Channel(found[1], float(found[2]))


def _as_owned(channels: Sequence[Channel], own: ChannelSet) -> ChannelSet:
    """Channels, those that somebody owns with all that is known of them."""
    place = {c.identity: i for i, c in enumerate(own) if not c.is_anonymous}
    taken, places = list(channels), []
    for i, channel in enumerate(channels):
        theirs = place.get(channel.identity)
        # What comes with a mean and deviation of its own keeps these.
        if theirs is not None and channel.mean in (None, own.channels[theirs].mean):
            taken[i] = own.channels[theirs]
            places.append(theirs)
    if len(set(places)) == len(channels):
        return own.take(places)
    scale = (own.value_scale, own.value_offset) if places else (None, 0.0)
    return ChannelSet(tuple(taken), None, *scale)


# Parts of the serial form -------------------------------------------------------------------------


def _checked(correlation: Sequence[Sequence[float]], count: int) -> Correlation:
    """The correlation as tuples, refused if it cannot be one."""
    table = np.array([[float(value) for value in row] for row in correlation], ndmin=2)
    if table.shape != (count, count):
        raise UserError(
            f"The correlation of {count} channels needs {count} rows of {count} numbers, not "
            f"{' x '.join(map(str, table.shape))}."
        )
    wrong = ~(abs(table) <= 1 + 1e-6) | ~(abs(table - table.T) <= 1e-6)
    wrong |= np.eye(count, dtype=bool) & ~(abs(table - 1) <= 1e-6)
    for row, column in np.argwhere(wrong)[:1]:
        raise UserError(
            f"{table[row, column]:g} in row {row}, column {column} is no correlation: they are "
            f"symmetric, from -1 to 1, and 1 on the diagonal."
        )
    return tuple(map(tuple, table.tolist()))


def _square(triangle: Sequence[float], count: int) -> Correlation:
    """The correlation whose upper triangle without the diagonal this is."""
    number = count * (count - 1) // 2
    if not isinstance(triangle, Sequence) or len(triangle) != number:
        raise UserError(f"{count} channels have {number} correlations, not {triangle!r:.40}")
    if not all(map(_is_finite, triangle)):
        raise UserError(f"{triangle!r:.40} holds what is no correlation.")
    table = np.zeros((count, count))
    table[np.triu_indices(count, 1)] = triangle
    return tuple(map(tuple, (table + table.T + np.eye(count)).tolist()))


def write_channels(channels: ChannelSet, path: str | Path) -> Path:
    """Write a channel set with all that is known of it as JSON, for `ChannelSet.parse`.

    Returns:
        The path.
    """
    lines = ",\n".join(f'  "{k}": {json.dumps(v)}' for k, v in channels.to_dict().items())
    text = lines.replace("[{", "[\n    {").replace("}, {", "},\n    {").replace("}]", "}\n  ]")
    Path(path).write_text("{\n" + text + "\n}\n", encoding="utf-8")
    return Path(path)


def _read(path: Path) -> ChannelSet:
    """Read what `write_channels` wrote."""
    try:
        found = ChannelSet.from_dict(json.loads(path.read_text(encoding="utf-8")))
        if not found.channels:
            raise UserError("it needs a list of channels, not an empty one")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} holds no channels ({str(error).rstrip('.')}). Make it with: timm-varchan "
            f"measure DATA --output {path}"
        ) from error
    return found


#: Any number of channels about which nothing is known.
ANONYMOUS = ChannelSet()
#: The channels that timm's weights were trained on.
RGB = ChannelSet.parse("RGB")
