"""Single channels and the names by which people call them."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from numbers import Real

from timm_varchan.errors import UserError

__all__ = ["MIN_WAVELENGTH_NM", "Channel", "known_channels", "register_channel"]

#: Wavelengths below this, in nm, are refused: they are almost always micrometres.
MIN_WAVELENGTH_NM = 100.0


def _is_name(name: object) -> bool:
    return isinstance(name, str) and bool(name) and not re.search(r"[\s+,]", name)


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
        if self.name is not None and not _is_name(self.name):
            raise UserError(
                f"Channel name {self.name!r} is no text, empty or contains a space, '+' or ',', "
                f"which separate channels. Use letters, digits, '-' and '_'."
            )
        for field in ("wavelength_nm", "mean", "std"):
            value = getattr(self, field)
            if value is not None and not _is_finite(value):
                raise UserError(f"Channel {self.label}: {field} is {value!r}, not a finite number.")
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
        UserError: The name is taken by another channel, or is a row of known letters
            (`"GB"` would no longer be green and blue).
    """
    channel = Channel(name, wavelength_nm, mean, std)
    known = _registry.get(name)
    if known is not None and known != channel and not overwrite:
        raise UserError(f"Channel {name!r} is known already ({known}). Pass overwrite=True.")
    if len(name) > 1 and all(letter in _registry for letter in name):
        raise UserError(
            f"Channel name {name!r} already reads as {'+'.join(name)}; choose another one."
        )
    if name.lower() == "anonymous":
        raise UserError("The name 'anonymous' is reserved for channels without identity.")
    _registry[name] = channel
    return channel
