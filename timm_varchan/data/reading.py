"""From what is stored of an image to its planes in a model's units: the only path there.

Training, evaluation, prediction and scenes all come through `Reading`: which planes, in which
order, on which scale, and where no data are is decided here and nowhere else.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from timm_varchan.channels import ChannelSet, ChannelSetLike
from timm_varchan.data.decode import Planes, decode, has_data, is_mask, planes_first
from timm_varchan.data.plane_names import NO_NAMES, PlaneNames, as_asked, contradict, find_planes
from timm_varchan.data.transforms import scale_values
from timm_varchan.errors import ImageError, UserError
from timm_varchan.input_spec import InputSpec
from timm_varchan.products import products_with

__all__ = ["FILLED", "Reading", "fit", "read_image"]

#: What is done about pixels without data that lets images come with NaN in them.
FILLED = ("mean", "predict")
#: Written where nothing was measured, by programs whose format cannot say so; of these, signed and
#: floating numbers, an exact match counts.
_USUAL_NO_DATA = (-9999.0, -99999.0, -32768.0, -float(np.finfo(np.float32).max), -1e20, 1e20, -1e34)


@dataclass(frozen=True)
class Reading:
    """How what is stored becomes the images of an input.

    Args:
        spec: Which channels, what their stored numbers are divided by, what is done about pixels
            that hold no data by the file's own word (GDAL's tag, a mask, NaN), by its
            `no_data_value` or by the usual one (-9999 and the like, of signed and floating
            numbers): `refuse` the image; mark them as NaN, for the transforms to put the channel's
            `mean` there or to `predict` them; or `keep` the numbers (NaN is refused).
        stored: What the planes of a file are, in order, that does not name them; by default the
            channels of the spec.
        partial: Whether a file that names its planes may lack some of the channels.
        folder: What relative paths start from.
        files: Of images in several files, which file each channel is.
    """

    spec: InputSpec
    stored: ChannelSet | None = None
    partial: bool = False
    folder: str = ""
    files: tuple[int, ...] = ()

    @property
    def channels(self) -> ChannelSet:
        """The planes of every image, in order; `ANONYMOUS` for any number."""
        return self.spec.channels

    def with_channels(self, channels: ChannelSet) -> Reading:
        """The same with more said of the same channels."""
        return replace(self, spec=replace(self.spec, channels=channels))

    def with_planes(self, planes: Sequence[int], channels: ChannelSet) -> Reading:
        """A reading of these planes alone, called by these channels."""
        chosen, stored = self.with_channels(channels), self.stored or self.channels
        if self.files:
            return replace(chosen, files=tuple(self.files[place] for place in planes))
        is_whole = self.stored is None and list(planes) == list(range(len(stored)))
        return replace(chosen, stored=None if is_whole else stored)

    def decode(self, value: Any) -> Planes:
        """The planes of an image as they are stored.

        Args:
            value: A path, the bytes of a file, `{bytes, path}`, an array, a function that makes
                one, or a file a channel, whose planes come in the order of the channels.

        Raises:
            ImageError: It is empty or cannot be read.
        """
        if isinstance(value, tuple):
            return self._together([value[place] for place in self.files])
        if isinstance(value, dict):
            value = value.get("path") if value["bytes"] is None else value["bytes"]
        if value is None:
            raise ImageError("the row is empty")
        count = len(self.stored or self.channels) or None
        if callable(value):
            return Planes(value())
        if isinstance(value, np.ndarray):
            return Planes(planes_first(value, count))
        path = value if isinstance(value, bytes) else os.path.join(self.folder, value)
        return decode(path, count, self.spec.max_pixels)

    def read(self, value: Any) -> Tensor:
        """The image of what is stored; planes whose files are not there are NaN."""
        if isinstance(value, Tensor):
            return value
        if not isinstance(value, tuple) or None not in value:
            return self.image(self.decode(value))
        present = [k for k, place in enumerate(self.files) if value[place] is not None]
        if len(present) == len(self.files):
            return self.image(self.decode(value))
        read = self.with_planes(present, self.channels.take(present)).read(value)
        image = torch.full((len(self.files), *read.shape[1:]), torch.nan)
        image[present] = scale_values(read)
        return image

    def image(self, planes: Planes) -> Tensor:
        """The image `(C, H, W)`: uint8, uint16 or float32, NaN where there is no data.

        Raises:
            ImageError: Other planes than the channels, pixels without data.
        """
        return self.part(planes)[0]

    def part(self, planes: Planes, may_be_empty: bool = False) -> tuple[Tensor, ChannelSet]:
        """The same and the channels that are there; images without any data only where allowed."""
        planes, channels = fit(planes, self.channels, self.stored, self.partial)
        missing, why = self._missing(planes)
        stored = self._scaled(planes, as_float=missing is not None)
        if missing is not None:
            is_empty = missing.all() and not may_be_empty
            if self.spec.no_data not in FILLED or is_empty:
                cure = "; --no-data mean (no_data='mean') puts the channel's mean there"
                share, cure = missing.mean(), "" if missing.all() else cure + ", predict more"
                raise ImageError(f"{share:.1%} of its values hold no data ({why}){cure}")
            stored[missing] = np.nan
        return torch.from_numpy(np.require(stored, requirements=["C", "W"])), channels

    def _missing(self, planes: Planes) -> tuple[np.ndarray | None, str]:
        """Where there is no data, or None, and how that is known."""
        image, value, keep = planes.image, self.spec.no_data_value, self.spec.no_data == "keep"
        found = _missing_by_value(image, usual=not keep)
        valid = {"the file says so": planes.valid}
        if value is not None:
            valid[f"they are {value:g}, the no-data value"] = has_data(image, value)
        if not keep:
            found = {k: ~v for k, v in valid.items() if v is not None and not v.all()} | found
        if not found:
            return None, ""
        missing = np.logical_or.reduce([np.broadcast_to(m, image.shape) for m in found.values()])
        return missing, next(iter(found))

    def _scaled(self, planes: Planes, as_float: bool) -> np.ndarray:
        image, scale, offset = planes.image, self.channels.value_scale, self.channels.value_offset
        if planes.names.scaling is not None:
            factor, shift = planes.names.scaling
            if scale and not (
                np.allclose(factor, 1 / scale) and np.allclose(shift, offset / scale)
            ):
                raise ImageError(
                    f"the file scales its numbers itself, by {factor.flat[0]:g} and "
                    f"{shift.flat[0]:+g}; leave --value-scale {scale:g} out (value_scale=None)"
                )
            return image.astype(np.float32) * factor + shift
        scale, is_whole = scale or planes.white, image.dtype in (np.uint8, np.uint16)
        if scale is None and not offset and not as_float:
            return image if is_whole else image.astype(np.float32, copy=False)
        scaled = image.astype(np.float32)
        if offset:
            scaled += np.float32(offset)
        scaled /= np.float32(scale or (np.iinfo(image.dtype).max if is_whole else 1))
        return scaled

    def _together(self, paths: Sequence[str | None]) -> Planes:
        """Files of a plane each as one image; lower resolution is brought to the finest.

        Pixels are repeated, so that no new values come up.
        """
        present = [path for path in paths if path is not None]
        if not present:
            raise ImageError("none of its files is there")
        parts = [self._one_plane(path) for path in present]
        height, width = (max(part.image.shape[axis] for part in parts) for axis in (1, 2))
        for part, path in zip(parts, present, strict=True):
            h, w = part.image.shape[1:]
            if abs(h / height - w / width) > 0.02:
                raise ImageError(
                    f"{path} has {h} x {w} pixels, others {height} x {width}: another area"
                )
        if len({(part.image.dtype, part.white, part.names.scaling is None) for part in parts}) > 1:
            types = ", ".join(sorted({str(part.image.dtype) for part in parts}))
            raise ImageError(f"its files are of different types or scales: {types}")
        valid, scaling = None, None
        if any(part.valid is not None for part in parts):
            masks = [
                np.broadcast_to(True if p.valid is None else p.valid, p.image.shape) for p in parts
            ]
            valid = np.concatenate([_enlarged(mask, height, width) for mask in masks])
        if parts[0].names.scaling is not None:
            pairs = [part.names.scaling for part in parts if part.names.scaling is not None]
            scaling = (np.concatenate([p[0] for p in pairs]), np.concatenate([p[1] for p in pairs]))
        image = np.concatenate([_enlarged(part.image, height, width) for part in parts])
        return Planes(image, white=parts[0].white, valid=valid, names=PlaneNames(scaling=scaling))

    def _one_plane(self, path: str) -> Planes:
        try:
            planes = decode(os.path.join(self.folder, path), None, self.spec.max_pixels)
        except ImageError as error:
            raise ImageError(f"{path}: {error}") from error
        if planes.num_planes != 1:
            raise ImageError(f"{path} has {planes.num_planes} planes; one file a channel has 1")
        return planes.without_alpha()


def _enlarged(image: np.ndarray, height: int, width: int) -> np.ndarray:
    if image.shape[1:] == (height, width):
        return image
    rows = np.arange(height) * image.shape[1] // height
    return image[:, rows][:, :, np.arange(width) * image.shape[2] // width]


def _missing_by_value(image: np.ndarray, usual: bool) -> dict[str, np.ndarray]:
    """Where numbers stand for no data, by the reason: not finite, or exactly a usual sign of it."""
    found: dict[str, np.ndarray] = {}
    if image.dtype.kind not in "fi" or image.dtype.itemsize < 2:
        return found
    low, high = image.min(), image.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        found["they are not finite"] = ~np.isfinite(image)
        low, high = np.fmin.reduce(image, axis=None), np.fmax.reduce(image, axis=None)
    for value in _USUAL_NO_DATA if usual and (low <= -9999 or high >= 1e20) else ():
        if low <= value <= high and (here := np.equal(image, image.dtype.type(value))).any():
            found[f"{value:g} is the usual sign of it; if it is meant, --no-data keep"] = here
            break
    return found


def fit(
    planes: Planes, channels: ChannelSet, stored: ChannelSet | None = None, partial: bool = False
) -> tuple[Planes, ChannelSet]:
    """Bring decoded planes to the channels of an input; the arguments are `Reading`'s.

    Planes that the file names are found by name or wavelength, wherever they lie. Others are taken
    in order: then a gray image among R, G and B becomes three equal planes, and an alpha plane that
    the channels do not count is dropped. Nothing else is guessed.

    Returns:
        The planes and their channels, which are fewer where the reading is partial.

    Raises:
        ImageError: Another number of planes, or the file calls them by other names.
    """
    order, labels, satellite = stored or channels, planes.labels, planes.names.satellite
    if not channels.channels:
        return planes.without_alpha(), channels
    is_gray = len(labels) == 1 < len(order) and labels[0].wavelength_nm in (None, 555.0)
    if not labels or is_gray:
        return _in_order(planes, order, channels), channels
    found = find_planes(labels, channels.channels, satellite)
    present = [k for k, place in enumerate(found) if place is not None]
    named = labels[: planes.num_planes] if len(labels) != len(order) else labels
    if len(present) < len(found) and len(named) == len(order):
        if not contradict(named, order.channels, satellite):
            return _in_order(planes, order, channels), channels
    if len(present) == len(found) or (partial and present):
        taken = channels if len(present) == len(found) else channels.take(present)
        return planes.take([p for p in found if p is not None]), taken
    names, absent = (
        "+".join(c.label for c in x)
        for x in (labels, (c for k, c in enumerate(channels) if k not in present))
    )
    lacks = f" and lacks {absent}" if present else ""
    raise ImageError(
        f"the file calls its planes {names}{lacks}, the channels are {channels}; leave --channels "
        f"out, which takes the file's names, or say --channels {as_asked(labels)}"
    )


def _in_order(planes: Planes, order: ChannelSet, channels: ChannelSet) -> Planes:
    """The channels of an image whose planes are these in this order."""
    if len(planes.image) != len(order):
        planes = planes.without_alpha()
    elif planes.has_alpha and order.wavelengths_nm[-1] and is_mask(planes.image[-1]):
        raise ImageError(
            f"its last plane is alpha, {planes.image[-1].max()} wherever it is not 0, and no "
            f"{order.labels[-1]}; say --channels {'+'.join(order.labels[:-1])}"
        )
    if len(planes.image) == 1 and len(order) == 3 and {*order.names} == {"R", "G", "B"}:
        planes = replace(planes, image=np.repeat(planes.image, 3, axis=0), names=NO_NAMES)
    if len(planes.image) != len(order):
        product = products_with(len(planes.image))
        raise ImageError(
            f"it has {len(planes.image)} planes, but the channels are {order} ({len(order)}); see "
            f"--channels" + (f". {product}" if product else "")
        )
    return planes if order is channels else planes.take(order.index(channels))


def read_image(
    source: str | Path | bytes, channels: ChannelSetLike | None = None, **fields: Any
) -> Tensor:
    """Read one image as a data set with these channels reads it.

    Args:
        source: A file or the bytes of one.
        channels: The channels of its planes; any number of planes by default.
        **fields: Of `InputSpec.of`: `value_scale` (10000 for Sentinel-2 reflectance; without it 8
            and 16 bits are scaled by their range, in the transforms), `no_data`, ...

    Returns:
        `(C, H, W)`: uint8, uint16 or float32.

    Raises:
        UserError: It cannot be read, or has another number of planes.
        FileNotFoundError: There is no such file.
    """
    reading = Reading(InputSpec.of(channels=channels, **fields))
    named = "the image" if isinstance(source, bytes) else f"image {source}"
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise FileNotFoundError(f"There is no {named}. Check the path.")
    try:
        return reading.read(source)
    except ImageError as error:
        raise UserError(
            f"Cannot read {named}: {error}. Give a JPEG, PNG, TIFF or .npy file with the planes "
            f"{reading.channels}."
        ) from error
