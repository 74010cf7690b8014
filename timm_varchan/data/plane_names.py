"""What a file calls its planes: words, band numbers and wavelengths become channels.

A satellite that the file names decides what `B5` means. Words that mean no channel of ours become
names once blanks, `+` and the like are replaced; mere counting ("Band 1", "Band 2") names nothing.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from timm_varchan.channels import Channel, known_channels
from timm_varchan.errors import ImageError

Scaling = tuple[np.ndarray, np.ndarray]

#: Thematic Mapper and its successor, centre wavelengths in nm. Source: USGS, Landsat 4 to 7.
_TM_NM = {1: 485.0, 2: 560.0, 3: 660.0, 4: 830.0, 5: 1650.0, 7: 2215.0}
_COLOURS = {
    "red": "R", "green": "G", "blue": "B", "nir": "NIR", "nearinfrared": "NIR", "infrared": "NIR",
    "nir1": "NIR", "gray": "gray", "grey": "gray", "swir1": "SWIR1", "swir16": "SWIR1",
    "swir2": "SWIR2", "swir22": "SWIR2",
}  # fmt: skip
#: Other words of sensors, as STAC's common names, with centre wavelengths in nm.
_WORDS_NM = {
    "coastal": 443.0, "coastalaerosol": 443.0, "coastalblue": 443.0, "yellow": 605.0,
    "rededge": 715.0, "rededge1": 704.0, "rededge2": 740.0, "rededge3": 783.0, "nir08": 865.0,
    "narrownir": 865.0, "nirnarrow": 865.0, "nir2": 950.0, "nir09": 945.0, "watervapour": 945.0,
    "watervapor": 945.0, "cirrus": 1373.5,
}  # fmt: skip
#: Where satellites have what words for colours say; cameras' own wavelengths lie elsewhere.
_AIM_NM = {"R": 660.0, "G": 560.0, "B": 490.0, "NIR": 835.0}
_FILLERS = r"band|channel|colou?r|layer|reflectance|surface|sr|toa|boa"
_NUMBER = re.compile(r"(?<![a-z0-9])b(and)?[ _-]?0*(\d{1,2})(a?)(?![a-z0-9])", re.I)
_UNIT_NM = {"n": 1.0, "u": 1e3, "µ": 1e3, "μ": 1e3, "m": 1e3}
_LENGTH = re.compile(
    r"(?<![\d.])(\d+(?:\.\d+)?)\s*(nm|nanomet\w*|[uµμ]m|micromet\w*|microns?)(?![a-z])", re.I
)
_LENGTH_TAGS = (
    "wavelength", "wavelength_nm", "central_wavelength", "center_wavelength",
    "central_wavelength_nm", "central_wavelength_um", "wavelengths",
)  # fmt: skip


class PlaneNames(NamedTuple):
    """What a file says of its planes."""

    channels: tuple[Channel, ...] = ()  # one a plane; empty where nothing is said
    satellite: str | None = None  # whose band numbers these are: S2, L8, ...
    scaling: Scaling | None = None  # factor and offset of every plane, (C, 1, 1)
    no_data: str | None = None  # the number that stands for no data, as a .aux.xml has it

    @property
    def last_is_a_band(self) -> bool:
        """Whether the last plane has a name that is not alpha's."""
        last = self.channels[-1] if self.channels else Channel()
        return not last.is_anonymous and not re.search(r"alpha|^a$", last.name or "", re.I)


NO_NAMES = PlaneNames()


def satellite_of(*texts: str) -> str | None:
    """The satellite that words name: `S2`, or `L4` to `L9`."""
    text = " ".join(texts)
    if re.search(r"sentinel[ _-]?2|(?<![a-z0-9])s2[abc]?(?![a-z0-9])|s2msi", text, re.I):
        return "S2"
    found = re.search(
        r"landsat[ _-]?([4-9])|(?<![a-z0-9])l(?:[cotem]0)?([4-9])(?=[_ ]|\d{6})", text, re.I
    )
    if found:
        return f"L{found[1] or found[2]}"
    return "L8" if re.search(r"landsat|(?<![a-z0-9])[st]r_b\d", text, re.I) else None


def _numbered(text: str, satellite: str | None) -> Channel | None:
    """The channel of a band's number."""
    found = _NUMBER.search(text)
    if found is None:
        return None
    number, satellite = int(found[2]), satellite_of(text) or satellite or "S2"
    if satellite == "S2":
        return known_channels().get(f"B{number}A" if found[3] else f"B{number:02d}")
    name = f"{satellite}_B{number}"
    nm = _TM_NM.get(number) if satellite in ("L4", "L5", "L7") else None
    return known_channels().get(name) or (Channel(name, nm) if nm else None)


def _worded(text: str, name: str | None) -> Channel | None:
    """The channel of a word for a colour; part of a longer word is none."""
    plain = re.sub(rf"\d+(\.\d+)?\s*[nuµμ]m\b|\b({_FILLERS})\b", " ", text, flags=re.I)
    word = re.sub(r"[\W_]+", "", _NUMBER.sub(" ", plain)).lower()
    if word in _COLOURS:
        return known_channels().get(_COLOURS[word])
    return Channel(name, _WORDS_NM[word]) if word in _WORDS_NM else None


def _nanometres(text: str, unit: str = "") -> float | None:
    """A wavelength in nm; numbers below 100 without a unit are micrometres."""
    found = _LENGTH.search(text) or _LENGTH.search(f"{text} {unit}")
    try:
        nm = float(found[1]) * _UNIT_NM[found[2][0].lower()] if found else float(text)
    except ValueError:
        return None
    nm = nm * 1000 if 0 < nm < 100 and not found else nm
    return round(nm, 3) if 100 <= nm < math.inf else None


def is_near(one_nm: float | None, other_nm: float | None) -> bool:
    """Whether wavelengths are close enough for one band: 30 nm, in the infrared 2 %."""
    if one_nm is None or other_nm is None:
        return True
    return abs(one_nm - other_nm) <= max(30.0, 0.02 * other_nm)


def _name_of(text: str) -> str | None:
    """Any word as the name of a channel: what separates or declares channels becomes a dash."""
    name = re.sub(r"[\s\0+,@=]+", "-", text).strip("-")
    is_taken = name in known_channels() or name.lower() == "anonymous" or name.endswith(".json")
    return None if is_taken or not name.isprintable() else name or None


def label_of(
    name: str | None, wavelength: str | None = None, satellite: str | None = None
) -> Channel:
    """The channel that a file's words mean; anonymous where they mean none.

    Args:
        name: What the file calls the plane.
        wavelength: In nm or micrometres, with its unit or without.
        satellite: Whose bands these are; see `satellite_of`.
    """
    text = (name or "").strip(" \0\n\t")
    given = _nanometres(wavelength or "")
    stated = _LENGTH.search(text) or re.fullmatch(r"\d{3,4}\.\d+", text)
    nm = given or (_nanometres(stated[0]) if stated else None)
    new_name = None if stated and stated[0] == text else _name_of(text)
    word, number = _worded(text, new_name), _numbered(text, satellite)
    is_told = (satellite or satellite_of(text)) is not None
    if number and word and not is_told and not is_near(number.wavelength_nm, word.wavelength_nm):
        number = None  # "Band 1 (red)" counts
    of_landsat = [_numbered(text, s) for s in ("L8", "L7")] if nm and not is_told else []
    exact = None if is_told and number else known_channels().get(text)
    for channel in (exact, number, *of_landsat, word):
        if channel is not None and is_near(nm, channel.wavelength_nm):
            return channel
    return Channel(new_name, nm)


def channels_of(
    names: Sequence[str], wavelengths: Sequence[str] = (), satellite: str | None = None
) -> tuple[Channel, ...]:
    """A channel a plane; empty where no plane is told from the others."""
    lengths = wavelengths or [""] * len(names)
    if satellite is None and _counts(names):
        names = [""] * len(names)
    if {"R", "G", "B", "N"} <= set(names):
        names = ["NIR" if name == "N" else name for name in names]
    found = [label_of(n, w, satellite) for n, w in zip(names, lengths, strict=True)]
    often = Counter(c.name for c in found)
    distinct = [Channel(None, c.wavelength_nm) if often[c.name] > 1 else c for c in found]
    return tuple(distinct) if any(not c.is_anonymous for c in distinct) else ()


def _counts(names: Sequence[str]) -> bool:
    """Whether names only number the planes, from 0 or from 1."""
    pattern = r"(?:band|layer|channel|plane|page|image|slice|ch|c)?[ _:#-]*0*(\d+)"
    found = [re.fullmatch(pattern, name.strip(), re.I) for name in names]
    numbers = [int(match[1]) for match in found if match]
    return len(numbers) == len(names) and numbers in (
        list(range(len(names))), list(range(1, len(names) + 1)),
    )  # fmt: skip


# Where files say it -------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def gdal_names(text: str, count: int, about: str = "") -> PlaneNames:
    """What GDAL's metadata says: tag 42112 of a TIFF, or a `.aux.xml`.

    Args:
        text: The XML.
        count: How many planes there are.
        about: Further words that may name the satellite.

    Raises:
        ImageError: No XML; scales that are no numbers.
    """
    found: dict[str, dict[int, str]] = {}
    try:
        root = ElementTree.fromstring(text.strip(" \0\n"))
    except ElementTree.ParseError as error:
        raise ImageError(f"its GDAL metadata is no XML ({error})") from error
    for kind, place, item in _items(root):
        if place.lstrip("-").isdigit():
            found.setdefault(kind.lower(), {})[int(place)] = (item.text or "").strip()
    return names_of(found, count, about)


def _items(root: ElementTree.Element) -> Iterator[tuple[str, str, ElementTree.Element]]:
    """Kind, plane (-1: the file) and element of what is said."""
    for item in root.iter("Item"):
        yield item.get("role") or item.get("name") or "", item.get("sample", "-1"), item
    for item in root.findall("Metadata/MDI"):
        yield item.get("key") or "", "-1", item
    for number, band in enumerate(root.findall("PAMRasterBand"), start=1):
        for item in (*band, *band.findall("Metadata/MDI")):
            yield item.get("key") or item.tag, str(int(band.get("band", number)) - 1), item


def names_of(found: Mapping[str, Mapping[int, str]], count: int, about: str = "") -> PlaneNames:
    """Names, scales and offsets of texts by kind and plane (-1: of the file)."""
    whole = [f"{kind} {texts[-1]}" for kind, texts in found.items() if -1 in texts]
    descriptions = found.get("description", {})
    lengths = next((found[tag] for tag in _LENGTH_TAGS if set(found.get(tag, ())) - {-1}), {})
    units = next(
        (found[tag] for tag in ("wavelength_units", "wavelength_unit") if tag in found), {}
    )
    satellite = satellite_of(about, *whole)
    channels = channels_of(
        [descriptions.get(i, "") for i in range(count)],
        [f"{lengths.get(i, '')} {units.get(i, units.get(-1, ''))}".strip() for i in range(count)],
        satellite,
    )
    no_data = found.get("nodatavalue", {}).get(0)
    return PlaneNames(channels, satellite, _scaling(found, count), no_data)


def _scaling(found: Mapping[str, Mapping[int, str]], count: int) -> Scaling | None:
    try:
        scale, offset = (
            np.array([float(found.get(kind, {}).get(i, default)) for i in range(count)], np.float32)
            for kind, default in (("scale", 1.0), ("offset", 0.0))
        )
    except ValueError as error:
        raise ImageError(f"its scales and offsets are not numbers ({error})") from error
    if not (np.isfinite(scale).all() and np.isfinite(offset).all() and scale.all()):
        raise ImageError("its scales and offsets are not finite, or 0")
    if (scale == 1).all() and (offset == 0).all():
        return None
    return scale[:, None, None], offset[:, None, None]


@lru_cache(maxsize=256)
def ome_names(text: str) -> PlaneNames:
    """Names and emission wavelengths of a microscope's channels; a colour image has none."""
    names: list[str] = []
    lengths: list[str] = []
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return PlaneNames()
    for element in root.iter():
        if element.tag.rpartition("}")[2] == "Channel":
            samples = int(element.get("SamplesPerPixel") or 1)
            name = element.get("Name") or element.get("Fluor") or ""
            length = element.get("EmissionWavelength") or ""
            unit = element.get("EmissionWavelengthUnit") or "nm"
            names += [name] if samples == 1 else [""] * samples
            lengths += [f"{length} {unit}" if length and samples == 1 else ""] * samples
    return PlaneNames(channels_of(names, lengths))


# Which plane is which channel ---------------------------------------------------------------------


def _key(name: str | None) -> str | None:
    return name and re.sub(r"[\W_]+", "", name).lower()


def _apart(one: Channel, other: Channel) -> float | None:
    """How far two channels are from being one, None where nothing says that they are."""
    if one.name is not None and _key(one.name) == _key(other.name):
        return 0.0 if one.name == other.name else 1e-6
    nm, wanted = (_AIM_NM.get(c.name or "", c.wavelength_nm) for c in (one, other))
    if nm is None or wanted is None or not is_near(nm, wanted):
        return None
    return 1e-3 + abs(nm - wanted) / wanted


@lru_cache(maxsize=256)
def find_planes(
    labels: tuple[Channel, ...], wanted: tuple[Channel, ...], satellite: str | None = None
) -> tuple[int | None, ...]:
    """The plane of each wanted channel, by name, else by the nearest wavelength.

    Args:
        labels: What a file calls its planes.
        wanted: The channels.
        satellite: Whose band numbers the labels are, if the file says so.

    Returns:
        A position a channel, None where the file has no such plane.
    """
    labels = _as_wanted(labels, wanted) if satellite is None else labels
    pairs = sorted(
        (apart, place, at)
        for place, channel in enumerate(wanted)
        for at, label in enumerate(labels)
        if (apart := _apart(label, channel)) is not None
    )
    found: dict[int, int] = {}
    for _, place, at in pairs:
        if place not in found and at not in found.values():
            found[place] = at
    return tuple(found.get(place) for place in range(len(wanted)))


def _as_wanted(labels: tuple[Channel, ...], wanted: tuple[Channel, ...]) -> tuple[Channel, ...]:
    """Band numbers of no satellite as those of the satellite whose bands are wanted."""
    asked = {match[1] for c in wanted if (match := re.match(r"(L\d)_B\d", c.name or ""))}
    if len(asked) != 1 or any(_NUMBER.fullmatch(c.name or "") for c in wanted):
        return labels
    return tuple(
        label_of(c.name, None, *asked) if _NUMBER.fullmatch(c.name or "") else c for c in labels
    )


def contradict(
    labels: tuple[Channel, ...], order: tuple[Channel, ...], satellite: str | None = None
) -> bool:
    """Whether a file's names speak against its planes being these channels in this order."""
    labels = _as_wanted(labels, order) if satellite is None else labels
    found = find_planes(labels, order, satellite)
    for at, (label, channel) in enumerate(zip(labels, order, strict=True)):
        if found[at] == at:
            continue
        is_same = label.name is not None and label.name == channel.name
        if at in found or found[at] is not None:
            return True
        if not is_same and not is_near(label.wavelength_nm, channel.wavelength_nm):
            return True
    return False


def as_asked(labels: Sequence[Channel]) -> str:
    """Channels as `--channels` takes them, whether their names are known or not."""
    names = known_channels()
    return "+".join(
        c.label if c.name is None or c.name in names
        else f"{c.name}=" if c.wavelength_nm is None else f"{c.name}@{c.wavelength_nm:g}nm"
        for c in labels
    )  # fmt: skip
