"""Planes of the products that people have, in the order of their files, and natural sets of bands.

A product's name is a channel set: `ChannelSet.parse("eurosat")`, `--channels planetscope-8b`. The
order is that of the files, which is where silent mistakes come from: EuroSAT keeps B8A last, the
stacks of other Sentinel-2 tools behind B08.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# Middle of the ranges that the makers give, in nm (SuperDove; WorldView-2 and -3).
PRODUCT_BANDS_NM = {
    "PS_CoastalBlue": 441.5, "PS_Blue": 490.0, "PS_Green1": 531.0, "PS_Green": 565.0,
    "PS_Yellow": 610.0, "PS_Red": 665.0, "PS_RedEdge": 705.0, "PS_NIR": 865.0,
    "WV_Coastal": 425.0, "WV_Blue": 480.0, "WV_Green": 545.0, "WV_Yellow": 605.0,
    "WV_Red": 660.0, "WV_RedEdge": 725.0, "WV_NIR1": 832.5, "WV_NIR2": 950.0,
    "WV_SWIR1": 1210.0, "WV_SWIR2": 1570.0, "WV_SWIR3": 1660.0, "WV_SWIR4": 1730.0,
    "WV_SWIR5": 2165.0, "WV_SWIR6": 2205.0, "WV_SWIR7": 2260.0, "WV_SWIR8": 2330.0,
}  # fmt: skip


class Product(NamedTuple):
    """The planes of one kind of file.

    Args:
        bands: Names of the channels, in the order of the planes.
        about: What it is.
        source: Where order and wavelengths are from.
    """

    bands: tuple[str, ...]
    about: str
    source: str


_TO_B08 = "B01 B02 B03 B04 B05 B06 B07 B08"
_WV8 = "WV_Coastal WV_Blue WV_Green WV_Yellow WV_Red WV_RedEdge WV_NIR1 WV_NIR2"
_SWIR8 = " ".join(f"WV_SWIR{number}" for number in range(1, 9))
_ESA = "ESA, Sentinel-2 User Handbook and the instrument's spectral responses (S2A)"
_LANDSAT = "USGS, Landsat 8-9 OLI/TIRS data users handbooks"
_LANDSAT_L2 = "USGS, Landsat 8-9 Collection 2 Level 2 science product guide (SR_B1 to SR_B7)"
_PLANET = "Planet, band order and wavelengths of the PlanetScope assets (SuperDove)"
_MAXAR = "Maxar, WorldView-2 and -3 data sheets; middle of the ranges"

_ROWS = [
    ("eurosat", f"{_TO_B08} B09 B10 B11 B12 B8A", "EuroSAT, 13 bands: B8A is the last plane",
     "Helber et al., arXiv:1709.00029; order: in the files the last plane correlates 0.997 with "
     "B07"),
    ("sentinel2-l1c", f"{_TO_B08} B8A B09 B10 B11 B12",
     "Sentinel-2 top of atmosphere, by wavelength: B8A behind B08", _ESA),
    ("sentinel2-l2a", f"{_TO_B08} B8A B09 B11 B12",
     "Sentinel-2 surface reflectance (no B10); BigEarthNet", _ESA),
    ("sentinel2-10m-20m", "B02 B03 B04 B05 B06 B07 B08 B8A B11 B12",
     "Sentinel-2 without its 60 m bands; So2Sat LCZ42", _ESA),
    ("sentinel2-20m", "B05 B06 B07 B8A B11 B12", "Sentinel-2's 20 m bands", _ESA),
    ("sentinel2-10m", "B02 B03 B04 B08", "Sentinel-2's 10 m bands", _ESA),
    *((f"landsat{n}", " ".join(f"L{n}_B{band}" for band in range(1, 12)),
       f"Landsat {n} Level 1, 11 bands", _LANDSAT) for n in (8, 9)),
    *((f"landsat{n}-sr", " ".join(f"L{n}_B{band}" for band in range(1, 8)),
       f"Landsat {n} surface reflectance", _LANDSAT_L2) for n in (8, 9)),
    ("naip", "R G B NIR",
     "NAIP aerial images, 4 bands; cameras and their wavelengths differ by year",
     "USDA, NAIP Digital Georectified Image metadata (bands 1 to 4)"),
    ("planetscope-4b", "PS_Blue PS_Green PS_Red PS_NIR", "PlanetScope, 4 bands: blue first",
     _PLANET),
    ("planetscope-8b",
     "PS_CoastalBlue PS_Blue PS_Green1 PS_Green PS_Yellow PS_Red PS_RedEdge PS_NIR",
     "PlanetScope, 8 bands", _PLANET),
    ("worldview-4b", "WV_Blue WV_Green WV_Red WV_NIR1", "WorldView-2, -3, 4 bands: blue first",
     _MAXAR),
    ("worldview-8b", _WV8, "WorldView-2, -3, 8 bands", _MAXAR),
    ("worldview3-16b", f"{_WV8} {_SWIR8}", "WorldView-3, 8 bands and 8 in the short-wave infrared",
     _MAXAR),
]  # fmt: skip
#: By the name that `--channels` takes.
PRODUCTS = {name: Product(tuple(bands.split()), *said) for name, bands, *said in _ROWS}


def products_with(num_planes: int) -> str:
    """A sentence that names the products with so many planes; empty where there is none."""
    names = ", ".join(name for name, one in PRODUCTS.items() if len(one.bands) == num_planes)
    return names and f"Products with {num_planes} planes: {names}"


# Lowest, highest and aimed-at centre wavelength in nm of what people call by these names.
_ROLES = {
    "coastal": (430.0, 455.0, 443.0), "blue": (455.0, 520.0, 490.0),
    "green": (520.0, 600.0, 560.0), "red": (620.0, 690.0, 660.0), "nir": (760.0, 900.0, 835.0),
    "narrow nir": (845.0, 885.0, 865.0), "swir1": (1550.0, 1750.0, 1610.0),
    "swir2": (2080.0, 2350.0, 2200.0),
}  # fmt: skip
_NATURAL = {
    "RGB": ("red", "green", "blue"),
    "RGB+NIR": ("red", "green", "blue", "nir"),
    "Landsat-bands": ("coastal", "blue", "green", "red", "narrow nir", "swir1", "swir2"),
}


def natural_sets(wavelengths_nm: Sequence[float | None]) -> dict[str, tuple[int, ...]]:
    """Sets that sensors have and people ask for, among channels of these centre wavelengths in nm.

    Returns:
        Positions by the set's name, ascending; only proper subsets whose every band is there. On
        Sentinel-2, RGB+NIR are its 10 m bands.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, roles in _NATURAL.items():
        places = [plane_near(wavelengths_nm, role) for role in roles]
        chosen = tuple(sorted({place for place in places if place is not None}))
        if None not in places and len(chosen) == len(roles) < len(wavelengths_nm):
            found[name] = chosen
    return found


def plane_near(wavelengths_nm: Sequence[float | None], role: str) -> int | None:
    """Position of the channel that people would call `red`, `green`, `blue`, ...; None: no one."""
    low, high, aim = _ROLES[role]
    inside = {
        place: abs(nm - aim)
        for place, nm in enumerate(wavelengths_nm)
        if nm is not None and low <= nm <= high
    }
    return min(inside, key=inside.__getitem__, default=None)
