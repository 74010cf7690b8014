"""Multispectral images made from a seed: materials with smooth reflectance curves in shapes.

Ten classes in five bands. Six of them are pairs that look the same in visible light and differ in
the infrared (leaves and green paint, snow and white paint, dry and moist soil), two differ in
colour, two only in texture. So every further band helps, and a single one still tells something.

The curves are idealised: a chlorophyll bump and red edge at 720 nm, ice that absorbs beyond
1200 nm, liquid water beyond 1300 nm, pigments with one edge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from timm_varchan.channels import ChannelSet
from timm_varchan.data.records import Files
from timm_varchan.errors import UserError
from timm_varchan.input_spec import InputSpec

#: The bands, with mean and deviation measured over the default training split.
SYNTHETIC_CHANNELS = ChannelSet.parse("R+G+B+NIR+SWIR1").with_stats(
    mean=(0.190, 0.184, 0.193, 0.226, 0.198),
    std=(0.156, 0.150, 0.156, 0.160, 0.125),
)
DEFAULT_NUM_IMAGES = {"train": 2000, "validation": 500, "test": 500}
DEFAULT_IMG_SIZE = 64
MIN_IMG_SIZE = 16

SPLIT_CODES = {"train": 0, "validation": 1, "test": 2}
_GRID = 6  # points a side of the smooth random fields
_UINT16_MAX = 65535.0


class _Curve(NamedTuple):
    """Reflectance over wavelength: a base, edges (nm, width, rise), bumps (nm, width, height)."""

    base: float
    edges: tuple[tuple[float, float, float], ...] = ()
    bumps: tuple[tuple[float, float, float], ...] = ()

    def __call__(self, wavelengths_nm: np.ndarray) -> np.ndarray:
        """Reflectance in 0..1 at wavelengths in nm."""
        value = np.full(wavelengths_nm.shape, self.base)
        for nm, width, rise in self.edges:
            value += rise / (1 + np.exp(-np.clip((wavelengths_nm - nm) / width, -50, 50)))
        for nm, width, height in self.bumps:
            value += height * np.exp(-0.5 * ((wavelengths_nm - nm) / width) ** 2)
        return value


_LEAF_BUMP = ((550.0, 35.0, 0.10),)
_SOIL_EDGE = (590.0, 60.0, 0.20)
_CURVES = {
    "vegetation": _Curve(0.05, ((720.0, 10.0, 0.45), (1350.0, 60.0, -0.25)), _LEAF_BUMP),
    "green_paint": _Curve(0.05, ((720.0, 10.0, 0.12),), _LEAF_BUMP),
    "snow": _Curve(0.80, ((1200.0, 60.0, -0.72),)),
    "white_paint": _Curve(0.80, ((1200.0, 60.0, -0.20),)),
    "dry_soil": _Curve(0.10, (_SOIL_EDGE, (900.0, 150.0, 0.14))),
    "moist_soil": _Curve(0.10, (_SOIL_EDGE, (900.0, 150.0, 0.14), (1300.0, 60.0, -0.32))),
    "red_roof": _Curve(0.07, ((600.0, 15.0, 0.30),)),
    "blue_tarp": _Curve(0.07, ((800.0, 20.0, 0.25),), ((465.0, 35.0, 0.30),)),
    "striped_asphalt": _Curve(0.12, ((1000.0, 300.0, 0.08),)),
    "checked_asphalt": _Curve(0.12, ((1000.0, 300.0, 0.08),)),
}
_GROUND = (
    _Curve(0.16, ((700.0, 200.0, 0.10),)),  # gravel
    _Curve(0.10, ((560.0, 50.0, 0.08), (720.0, 30.0, 0.12))),  # dry grass
    _Curve(0.28, ((650.0, 150.0, 0.08),)),  # concrete
    _Curve(0.05, ((700.0, 60.0, -0.03),)),  # water
)
SYNTHETIC_CLASSES = tuple(_CURVES)

_BANDS_NM = np.array([nm for nm in SYNTHETIC_CHANNELS.wavelengths_nm if nm is not None])
_MATERIALS = np.stack([curve(_BANDS_NM) for curve in _CURVES.values()]).astype(np.float32)
_GROUNDS = np.stack([curve(_BANDS_NM) for curve in _GROUND]).astype(np.float32)
_HAZE = ((470.0 / _BANDS_NM) ** 3).astype(np.float32)  # scattering falls off with wavelength


def class_reflectances() -> dict[str, tuple[float, ...]]:
    """Reflectance of every class's material in `SYNTHETIC_CHANNELS`, without marks and grain."""
    return {name: tuple(map(float, row)) for name, row in zip(_CURVES, _MATERIALS, strict=True)}


@dataclass(frozen=True)
class SyntheticImage:
    """One image with all bands; it depends on the arguments alone.

    Args:
        seed: Of the data set.
        split: `train`, `validation` or `test`.
        index: Which image; the class is `index % 10`.
        img_size: Height and width in pixels.
    """

    seed: int
    split: str
    index: int
    img_size: int = DEFAULT_IMG_SIZE

    def __call__(self) -> np.ndarray:
        """`(5, img_size, img_size)` uint16; 65535 is a reflectance of 1 in full light."""
        rng = np.random.default_rng([self.seed, SPLIT_CODES[self.split], self.index])
        label, img_size = self.index % len(SYNTHETIC_CLASSES), self.img_size
        scene = _ground(rng, img_size)
        for _ in range(3):  # small pieces of anything are clutter, not the class
            piece = _MATERIALS[rng.integers(len(_MATERIALS))]
            _paint(scene, _shape(rng, img_size, 0.05, 0.10), piece)
        texture = _texture(rng, SYNTHETIC_CLASSES[label], img_size)
        _paint(scene, _shape(rng, img_size, 0.22, 0.36), _MATERIALS[label], texture)
        return _sense(rng, scene)

    def __str__(self) -> str:
        return f"{self.split} {self.index}"


def _smooth(rng: np.random.Generator, img_size: int) -> np.ndarray:
    """A smooth random field in 0..1: a coarse grid, interpolated along both axes."""
    place = np.linspace(0, _GRID - 1, img_size, dtype=np.float32)
    weight = np.maximum(0, 1 - np.abs(place[:, None] - np.arange(_GRID, dtype=np.float32)))
    return weight @ rng.random((_GRID, _GRID), dtype=np.float32) @ weight.T


def _ground(rng: np.random.Generator, img_size: int) -> np.ndarray:
    first, second = _GROUNDS[rng.choice(len(_GROUNDS), size=2, replace=False)]
    mix = np.clip(4 * _smooth(rng, img_size) - 1.5, 0, 1)
    scene = first[:, None, None] * mix + second[:, None, None] * (1 - mix)
    return scene * (0.8 + 0.4 * rng.random((img_size, img_size), dtype=np.float32))


def _shape(
    rng: np.random.Generator, img_size: int, low: float, high: float
) -> tuple[tuple[slice, slice], np.ndarray]:
    """Box and mask in it of a blob with a wavy outline, of `low` to `high` sides' radius."""
    radius = img_size * rng.uniform(low, high)
    place = rng.uniform(radius, img_size - radius, size=2)
    waves, depth, turn = int(rng.integers(2, 6)), rng.uniform(0, 0.3), rng.uniform(0, 2 * np.pi)
    reach = radius * (1 + depth)
    starts = np.maximum(0, np.floor(place - reach)).astype(int)
    stops = np.minimum(img_size, np.ceil(place + reach) + 1).astype(int)
    down, across = (
        np.arange(start, stop, dtype=np.float32) - np.float32(centre)
        for start, stop, centre in zip(starts, stops, place, strict=True)
    )
    angle = np.arctan2(down[:, None], across[None])
    edge = np.float32(radius) * (1 + np.float32(depth) * np.cos(waves * angle + np.float32(turn)))
    box = (slice(starts[0], stops[0]), slice(starts[1], stops[1]))
    return box, down[:, None] ** 2 + across[None] ** 2 < edge**2


def _texture(rng: np.random.Generator, name: str, img_size: int) -> np.ndarray:
    """Relative brightness inside the object: grain, and the marks of the asphalts."""
    grain = 0.85 + 0.3 * rng.random((img_size, img_size), dtype=np.float32)
    if not name.endswith("asphalt"):
        return grain
    angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi, size=2)
    step = 2 * np.pi / (img_size * rng.uniform(0.10, 0.16))
    axis = step * np.arange(img_size, dtype=np.float32)
    along = np.cos(angle) * axis[:, None] + np.sin(angle) * axis[None] + phase[0]
    marks = np.sin(along)
    if name == "checked_asphalt":
        marks = marks * np.sin(
            np.cos(angle) * axis[None] - np.sin(angle) * axis[:, None] + phase[1]
        )
    return grain * np.where(marks > 0, np.float32(1.5), np.float32(0.5))


def _paint(
    scene: np.ndarray,
    shape: tuple[tuple[slice, slice], np.ndarray],
    curve: np.ndarray,
    texture: np.ndarray | None = None,
) -> None:
    box, mask = shape
    inside = curve[:, None, None] if texture is None else curve[:, None, None] * texture[box]
    view = scene[:, box[0], box[1]]
    np.copyto(view, inside, where=mask)


def _sense(rng: np.random.Generator, scene: np.ndarray) -> np.ndarray:
    """Light, haze and a sensor: what reflectance becomes in a file."""
    num_bands, img_size = scene.shape[:2]
    light = np.float32(rng.uniform(0.45, 1.15)) * (0.8 + 0.4 * _smooth(rng, img_size))
    gain = np.asarray(rng.uniform(0.92, 1.08, size=num_bands), np.float32)
    haze = _HAZE * np.float32(rng.uniform(0, 0.08))
    noise = np.float32(0.02) * rng.standard_normal(scene.shape, dtype=np.float32)
    value = scene * light * gain[:, None, None] + haze[:, None, None] + noise
    return (np.clip(value, 0, 1) * _UINT16_MAX).astype(np.uint16)


def synthetic_splits(
    spec: InputSpec, *, seed: int = 0, num_images: Mapping[str, int] | None = None
) -> tuple[dict[str, Files], InputSpec]:
    """The images of the embedded data set, made when they are called, and what they are.

    Args:
        spec: Which bands, in which order (all five by default), and the size of the images.
        seed: Same seed, same images.
        num_images: Images by split; `DEFAULT_NUM_IMAGES` for splits that are not named.

    Raises:
        UserError: A channel that is none of the bands, a split that is none, images under 16
            pixels, fewer than one image.
    """
    size = DEFAULT_IMG_SIZE if spec.img_size is None else spec.img_size
    counts = DEFAULT_NUM_IMAGES | dict(num_images or {})
    if size < MIN_IMG_SIZE:
        raise UserError(f"img_size is {size}; synthetic images have {MIN_IMG_SIZE} or more.")
    if set(counts) != set(SPLIT_CODES) or min(counts.values()) < 1:
        raise UserError(
            f"num_images is {num_images}; it takes {', '.join(SPLIT_CODES)}, each at least 1."
        )
    bands = SYNTHETIC_CHANNELS.index(spec.channels if len(spec.channels) else SYNTHETIC_CHANNELS)
    made = {
        split: Files(
            [SyntheticImage(seed, split, index, size) for index in range(count)],
            [index % len(SYNTHETIC_CLASSES) for index in range(count)],
        )
        for split, count in counts.items()
    }
    channels = SYNTHETIC_CHANNELS.take(bands)
    return made, replace(spec, channels=channels, class_names=SYNTHETIC_CLASSES)
