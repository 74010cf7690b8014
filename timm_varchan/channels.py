"""Channel sets: what the planes of an input are, apart from what they contain.

No tensors and no modules here: a channel set is plain, hashable, JSON-serialisable data that the
stems, the data sets, the evaluation and the configuration files all read.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple, Union

from timm_varchan.bands import Channel, known_channels, register_channel
from timm_varchan.errors import UserError
from timm_varchan.products import product_channels

__all__ = [
    "ANONYMOUS",
    "RGB",
    "Channel",
    "ChannelFile",
    "ChannelLike",
    "ChannelSet",
    "ChannelSetLike",
    "known_channels",
    "read_channel_file",
    "read_channels",
    "register_channel",
    "seeded_rng",
    "write_channels",
]

ChannelLike = Union[Channel, str, float, int, dict[str, Any], None]
Correlation = tuple[tuple[float, ...], ...]

#: Of the JSON form of a channel set with statistics; 1 was a bare list of channels.
FILE_VERSION = 2
#: Files hold the correlation of at most so many channels in text, of more in a tensor file.
MAX_TEXT_CHANNELS = 32


def _unknown(name: str, own: Iterable[str]) -> UserError:
    theirs, new = ", ".join(own), name.partition("@")[0] or "NAME"
    return UserError(
        f"Unknown channel {name!r}. Known: {theirs and theirs + ' (its own), '}"
        f"{', '.join(known_channels())}. Declare a new one where you name it, as "
        f"{new}@461nm, or {new}= without a wavelength, or once by "
        f"timm_varchan.register_channel({name!r}, wavelength_nm=...)."
    )


def _channel_of(entry: dict[str, Any]) -> Channel:
    known = [field.name for field in fields(Channel)]
    if not isinstance(entry, dict) or not set(entry) <= set(known):
        raise UserError(f"A channel is described by {', '.join(known)}, not by {entry!r}.")
    return Channel(**entry)


def _channel(item: ChannelLike, own: Mapping[str, Channel]) -> Channel:
    if isinstance(item, Channel):
        return item
    if item is None:
        return Channel()
    if isinstance(item, dict):  # an entry of `ChannelSet.to_config`, as model arguments hold it
        return _channel_of(item)
    if isinstance(item, str):
        known = own.get(item) or known_channels().get(item) or _declared(item)
        if known is None:
            raise _unknown(item, own)
        return known
    if isinstance(item, Real) and not isinstance(item, bool):
        return Channel(wavelength_nm=float(item))
    raise UserError(
        f"A channel is a name, a wavelength in nm, None or a Channel, not {type(item).__name__} "
        f"({item!r})."
    )


def _parse_text(text: str, own: Mapping[str, Channel], new_names: bool) -> list[Channel]:
    known = known_channels() | dict(own)
    channels: list[Channel] = []
    for part in (part.strip() for part in re.split(r"[+,]", text)):
        if part in known:
            channels.append(known[part])
        elif (declared := _declared(part)) is not None:
            channels.append(declared)
        elif part and all(letter in known for letter in part):
            channels.extend(known[letter] for letter in part)
        elif part and new_names:
            channels.append(Channel(part))
        else:
            raise _unknown(part, own)
    return channels


def _declared(part: str) -> Channel | None:
    """The channel that `name@461nm`, `name=` or `461nm` declares, or None."""
    if part.endswith("="):
        return Channel(part[:-1])
    found = re.fullmatch(r"(?:([^@]+)@)?(\d+(?:\.\d+)?)nm", part)
    return None if found is None else Channel(found[1], float(found[2]))


def seeded_rng(*key: int | str) -> random.Random:
    """A generator that depends on the key alone: the same on every process and every machine."""
    return random.Random(":".join(str(part) for part in key))


@dataclass(frozen=True)
class ChannelSet:
    """The ordered tuple of channels of one input.

    An empty tuple is the set `ANONYMOUS`: any number of channels, nothing known about them.

    Args:
        channels: The channels in the order of the planes.
        correlation: C rows of C correlations between the planes, or None where it is not known.
        value_scale: What stored numbers are divided by before mean and deviation hold, where a
            file of channels says so; None: their type's own range.

    Raises:
        UserError: A name comes twice, or a correlation that is none.
    """

    channels: tuple[Channel, ...] = ()
    correlation: Correlation | None = field(default=None, hash=False, repr=False)
    value_scale: float | None = field(default=None, compare=False, repr=False)

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

    @classmethod
    def parse(
        cls, spec: ChannelSetLike, *, own: Iterable[Channel] = (), new_names: bool = False
    ) -> ChannelSet:
        """Read a channel set from what people write.

        Args:
            spec: A text (`"RGB"`, `"GB"`, `"B02+B08"`, `"R,G,NIR"`; split at `+` or `,`, a part is
                a known name, one that is declared where it stands (`DNA@461nm`, `phase=` without a
                wavelength, `461nm` without a name), else a row of known single letters),
                a product (`"eurosat"`, see `timm_varchan.products`), `"anonymous"`, or a sequence
                of names, wavelengths in nm, `Channel` objects and None (anonymous), also mixed.
            own: Channels that a model or data knows, before all others.
            new_names: Take a name that nobody knows for a channel without a wavelength.

        Returns:
            The channel set.

        Raises:
            UserError: Unknown or doubled names, no channels, wavelengths in micrometres.
        """
        if isinstance(spec, ChannelSet):
            return spec
        if isinstance(spec, dict):
            return cls.from_config(spec)
        own_names = {c.name: c for c in own if c.name is not None}
        if isinstance(spec, str):
            if spec == "anonymous":
                return ANONYMOUS
            product = product_channels(spec) or ()
            bands = tuple(own_names.get(band.name or "", band) for band in product)
            return cls(bands or tuple(_parse_text(spec, own_names, new_names)))
        if not isinstance(spec, Iterable):
            raise UserError(
                f"A channel set is a text such as 'RGB' or 'B02+B08', or a list of names, "
                f"wavelengths in nm and None, not {type(spec).__name__} ({spec!r})."
            )
        channels = tuple(_channel(item, own_names) for item in spec)
        if not channels:
            raise UserError("A channel set needs at least one channel.")
        return cls(channels)

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

    def with_stats(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        correlation: Sequence[Sequence[float]] | None = None,
    ) -> ChannelSet:
        """The same channels with these means and standard deviations, one each.

        Args:
            mean: C means.
            std: C standard deviations, above 0.
            correlation: C rows of C correlations, or None: not known.
        """
        if len(mean) != len(self) or len(std) != len(self):
            raise UserError(
                f"{self} has {len(self)} channels, but {len(mean)} means and {len(std)} deviations "
                f"came. Give one of each a channel."
            )
        return ChannelSet(
            tuple(
                replace(c, mean=float(m), std=float(s))
                for c, m, s in zip(self.channels, mean, std, strict=True)
            ),
            correlation,  # type: ignore[arg-type]  # checked and turned into tuples
        )

    def scale_with(self, value_scale: float | None) -> float | None:
        """What stored numbers are divided by: as somebody asks, else as the statistics need it.

        Raises:
            UserError: The two differ.
        """
        if value_scale is None or self.value_scale in (None, value_scale):
            return self.value_scale if value_scale is None else value_scale
        raise UserError(
            f"The means and deviations of {self} hold for numbers divided by "
            f"{self.value_scale:g}, not by {value_scale:g}. Leave value_scale (--value-scale) out, "
            f"or measure the channels anew."
        )

    def without_identity(self) -> ChannelSet:
        """The same planes, means and deviations with no names and no wavelengths."""
        return ChannelSet(
            tuple(Channel(mean=c.mean, std=c.std) for c in self.channels),
            self.correlation,
            self.value_scale,
        )

    def without_correlation(self) -> ChannelSet:
        """The same channels, means and deviations, with nothing said of their correlation."""
        return ChannelSet(self.channels, value_scale=self.value_scale)

    def standardised(self) -> ChannelSet:
        """The statistics of the planes after normalisation by mean and deviation: 0 and 1."""
        return ChannelSet(
            tuple(Channel(c.name, c.wavelength_nm) for c in self.channels), self.correlation
        )

    def take(self, indices: Iterable[int]) -> ChannelSet:
        """The channels at these positions, in this order, with their part of the correlation."""
        chosen = tuple(indices)
        correlation = self.correlation and tuple(
            tuple(self.correlation[i][j] for j in chosen) for i in chosen
        )
        return ChannelSet(tuple(self.channels[i] for i in chosen), correlation, self.value_scale)

    def index(self, other: ChannelSetLike) -> tuple[int, ...]:
        """Positions in this set of another set's channels, in the other's order.

        Raises:
            UserError: The other set has a channel that this one lacks, or an anonymous one.
        """
        wanted = ChannelSet.parse(other)
        free: dict[tuple[str | None, float | None], list[int]] = {}
        for position, channel in enumerate(self.channels):
            free.setdefault(channel.identity, []).append(position)
        missing = [
            c.label
            for c in dict.fromkeys(wanted)
            if c.is_anonymous
            or len(free.get(c.identity, ())) < sum(c.identity == w.identity for w in wanted)
        ]
        if missing or not wanted.channels:
            raise UserError(
                f"Channel {', '.join(missing) or 'anonymous'} is not among {self}, or not so "
                f"often. Choose from: {', '.join(self.labels)}."
            )
        return tuple(free[c.identity].pop(0) for c in wanted)

    def subset_indices(self, size: int | None = None) -> list[tuple[int, ...]]:
        """Positions of every subset, largest first, or of those with `size` channels."""
        sizes = range(len(self), 0, -1) if size is None else (size,)
        if size is not None and not 1 <= size <= len(self):
            raise UserError(f"{self} has subsets of 1 to {len(self)} channels, not of {size}.")
        return [s for n in sizes for s in itertools.combinations(range(len(self)), n)]

    def subsets(self, size: int | None = None) -> list[ChannelSet]:
        """Every subset, largest first, or those with `size` channels."""
        return [self.take(indices) for indices in self.subset_indices(size)]

    def to_config(self) -> list[dict[str, Any]]:
        """A JSON-serialisable form; `from_config` reads it, also where a name is not registered."""
        return [
            {key: value for key, value in asdict(c).items() if value is not None}
            for c in self.channels
        ]

    def to_dict(self, value_scale: float | None = None) -> dict[str, Any]:
        """A JSON-serialisable form with the correlation; `from_config` reads it.

        Args:
            value_scale: What stored numbers were divided by before they were measured.

        Returns:
            `version`, `channels`, `value_scale` and `correlation`: its upper triangle without the
            diagonal, row by row, with four digits, or None.
        """
        triangle = self.correlation and [
            round(value, 4) for i, row in enumerate(self.correlation) for value in row[i + 1 :]
        ]
        return {
            "version": FILE_VERSION,
            "channels": self.to_config(),
            "value_scale": value_scale,
            "correlation": triangle,
        }

    @classmethod
    def from_config(cls, config: Sequence[dict[str, Any]] | dict[str, Any]) -> ChannelSet:
        """The channel set that `to_config` or `to_dict` wrote.

        Raises:
            UserError: A later version, or another content.
        """
        if not isinstance(config, dict):
            return cls(tuple(_channel_of(entry) for entry in config))
        if config.get("version") != FILE_VERSION:
            raise UserError(
                f"version is {config.get('version')!r}; this release reads {FILE_VERSION} and "
                f"plain lists of channels"
            )
        channels = tuple(_channel_of(entry) for entry in config["channels"])
        triangle = config.get("correlation")
        return cls(channels, None if triangle is None else _square(triangle, len(channels)))


def _checked(correlation: Sequence[Sequence[float]], count: int) -> Correlation:
    """The correlation as tuples, refused if it cannot be one."""
    rows = tuple(tuple(float(value) for value in row) for row in correlation)
    if len(rows) != count or any(len(row) != count for row in rows):
        raise UserError(
            f"The correlation of {count} channels needs {count} rows of {count} numbers, not "
            f"{len(rows)} of {len(rows[0]) if rows else 0}."
        )
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            wanted = 1.0 if i == j else rows[j][i]
            if not (abs(value) <= 1 + 1e-6 and abs(value - wanted) <= 1e-6):
                raise UserError(
                    f"{value:g} in row {i}, column {j} is no correlation: they are symmetric, "
                    f"from -1 to 1, and 1 on the diagonal."
                )
    return rows


def _square(triangle: Sequence[float], count: int) -> Correlation:
    """The correlation whose upper triangle without the diagonal this is."""
    if len(triangle) != count * (count - 1) // 2:
        raise UserError(
            f"{count} channels have {count * (count - 1) // 2} correlations, not {len(triangle)}"
        )
    rows = [[1.0] * count for _ in range(count)]
    for (i, j), value in zip(itertools.combinations(range(count), 2), triangle, strict=True):
        rows[i][j] = rows[j][i] = float(value)
    return tuple(map(tuple, rows))


class ChannelFile(NamedTuple):
    """What a file of channels holds.

    Args:
        channels: With mean, deviation and correlation where they were measured.
        value_scale: What stored numbers were divided by before they were measured; None where the
            file does not say, which is what 0.1.0 wrote.
    """

    channels: ChannelSet
    value_scale: float | None = None


def write_channels(
    channels: ChannelSet, path: str | Path, value_scale: float | None = None
) -> Path:
    """Write a channel set with its statistics as JSON.

    The correlation of more than 32 channels goes into a safetensors file beside it.

    Args:
        channels: The channels.
        path: Of the JSON file.
        value_scale: What stored numbers were divided by before they were measured.

    Returns:
        The path.
    """
    path = Path(path)
    content = channels.to_dict(value_scale)
    if channels.correlation is not None and len(channels) > MAX_TEXT_CHANNELS:
        import torch
        from safetensors.torch import save_file

        content["correlation"] = path.with_suffix(".safetensors").name
        save_file(
            {"correlation": torch.tensor(channels.correlation)}, path.with_suffix(".safetensors")
        )
    text = json.dumps({**content, "channels": None, "correlation": None}, indent=2)
    rows = ",\n".join("    " + json.dumps(entry) for entry in content["channels"])
    text = text.replace('"channels": null', f'"channels": [\n{rows}\n  ]')
    text = text.replace(
        '"correlation": null', f'"correlation": {json.dumps(content["correlation"])}'
    )
    path.write_text(text + "\n", encoding="utf-8")
    return path


def read_channel_file(path: str | Path) -> ChannelFile:
    """Read what `write_channels` wrote, here or in 0.1.0.

    Raises:
        UserError: No such file, or another content.
    """
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        listed = config.get("channels") if isinstance(config, dict) else config
        if not isinstance(listed, list) or not listed:
            raise UserError(f"it needs a list of channels, not {str(config)[:40]!r}")
        if isinstance(config, list):
            return ChannelFile(ChannelSet.from_config(config))
        scale = config.get("value_scale")
        if scale is not None and not (isinstance(scale, (int, float)) and 0 < scale < math.inf):
            raise UserError(f"value_scale is {scale!r}, not a number above 0")
        correlation = config.get("correlation")
        if isinstance(correlation, str):
            from safetensors.torch import load_file

            table = load_file(Path(path).with_name(correlation))["correlation"].double()
            channels = ChannelSet.from_config({**config, "correlation": None})
            return ChannelFile(ChannelSet(channels.channels, table.tolist()), scale)  # type: ignore[arg-type]
        return ChannelFile(ChannelSet.from_config(config), scale)
    except (OSError, TypeError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} holds no channels ({error}). Make it with: python -m "
            f"timm_varchan.data.measure DATA --output {path}"
        ) from error


def read_channels(spec: ChannelSetLike, *, new_names: bool = False) -> ChannelSet:
    """A channel set as `ChannelSet.parse` takes it, or the path of a JSON file.

    Args:
        spec: Text that ends in `.json` is a file of `write_channels`.
        new_names: Take a name that nobody knows for a channel without a wavelength.

    Returns:
        The channel set.

    Raises:
        UserError: No such file, another content, or what `ChannelSet.parse` refuses.
    """
    if isinstance(spec, str) and spec.endswith(".json"):
        channels, value_scale = read_channel_file(spec)
        return replace(channels, value_scale=value_scale)
    return ChannelSet.parse(spec, new_names=new_names)


ChannelSetLike = Union[ChannelSet, str, Sequence[ChannelLike], dict[str, Any]]

#: Any number of channels about which nothing is known.
ANONYMOUS = ChannelSet()
#: The channels that timm's weights were trained on.
RGB = ChannelSet.parse("RGB")
