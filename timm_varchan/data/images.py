"""Image files and arrays to tensors: any bit depth, any number of planes, plain errors.

Pillow reads pictures (16-bit colours in two passes, as it keeps one byte of each), tifffile every
TIFF, NumPy `.npy`.
"""

from __future__ import annotations

import io
import struct
import tokenize
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from timm_varchan.channels import ChannelSet, ChannelSetLike
from timm_varchan.products import products_with

#: Files that a class folder is searched for.
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".npy"}
)

#: What the decoders raise on bytes that they cannot read, and on files that are not there.
DECODE_ERRORS = (
    OSError, ValueError, RuntimeError, SyntaxError, EOFError, LookupError, TypeError,
    ArithmeticError, AttributeError, AssertionError, MemoryError, struct.error, zlib.error,
    tokenize.TokenError,  # NumPy, of a damaged header
    Image.DecompressionBombError, tifffile.TiffFileError,
)  # fmt: skip

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_BIT_DEPTH_AT = 24  # signature 8, chunk length and type 8, width 4, height 4
_SIXTEEN_BITS = 16
_ALPHA = (1, 2)  # TIFF's ExtraSamples: associated and unassociated alpha


class Planes(NamedTuple):
    """Decoded planes `(C, H, W)` and whether the last one is an alpha plane."""

    image: Tensor
    has_alpha: bool = False

    @property
    def num_planes(self) -> int:
        """Planes without the alpha plane."""
        return self.image.shape[0] - int(self.has_alpha)


def decode_planes(data: bytes, num_channels: int | None = None) -> Planes:
    """Decode the bytes of one image file.

    Args:
        data: JPEG, PNG, TIFF, `.npy` or whatever else Pillow opens.
        num_channels: Which axis of an array holds the channels: the one of this length, the first
            where both ends have it. Without it the shorter end is the channels.

    Returns:
        Planes `(C, H, W)` of the file's own type; floats of any width as float32.

    Raises:
        Exception: One of `DECODE_ERRORS`.
    """
    if data[:6] == b"\x93NUMPY":
        array = np.load(io.BytesIO(data), allow_pickle=False)
        return Planes(planes_from_array(array, num_channels))
    if data[:4] in _TIFF:
        return _decode_tiff(data)
    with Image.open(io.BytesIO(data)) as picture:
        is_png16 = data[:8] == _PNG and data[_PNG_BIT_DEPTH_AT] == _SIXTEEN_BITS
        if is_png16 and picture.mode in ("RGB", "RGBA"):
            return _png16(data, picture.mode)
        return _from_pillow(picture)


def _png16(data: bytes, mode: str) -> Planes:
    """Colours of 16 bits: Pillow takes the high byte of each, or the low one if asked to swap."""
    passes = []
    for raw_mode in (f"{mode};16B", f"{mode};16L"):
        with Image.open(io.BytesIO(data)) as picture:
            picture.tile = [(*tile[:3], raw_mode) for tile in picture.tile]  # type: ignore[misc]
            passes.append(np.asarray(picture).astype(np.uint16))
    high, low = passes
    return Planes(_to_tensor(np.moveaxis(high * 256 + low, -1, 0)), has_alpha=mode == "RGBA")


def decode_reason(error: BaseException) -> str:
    """One line that says what a decoder found."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if "cannot identify image file" in str(error):  # Pillow goes on with a memory address
        return "it is no image"
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _from_pillow(picture: Image.Image) -> Planes:
    if picture.getexif().get(ExifTags.Base.Orientation) is not None:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode == "1":
        picture = picture.convert("L")
    elif picture.mode in ("P", "PA", "CMYK", "YCbCr", "LAB", "HSV"):
        picture = picture.convert("RGB")
    array = np.asarray(picture)
    planes = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
    return Planes(_to_tensor(planes), has_alpha=picture.mode in ("LA", "RGBA"))


def _decode_tiff(data: bytes) -> Planes:
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series = file.series[0]
        photometric = getattr(series.keyframe, "photometric", None)
        if photometric == tifffile.PHOTOMETRIC.PALETTE:
            return _pillow_tiff(data)
        try:
            array = series.asarray()
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            return _pillow_tiff(data, error)
        axes = series.axes
        extra = tuple(getattr(series.keyframe, "extrasamples", ()))
    is_rgba = photometric == tifffile.PHOTOMETRIC.RGB and extra[-1:] in [(a,) for a in _ALPHA]
    return Planes(_to_tensor(_planes_first(array, axes)), has_alpha=is_rgba)


def _pillow_tiff(data: bytes, cause: ValueError | None = None) -> Planes:
    """A palette, or a compression that tifffile reads with `imagecodecs` only, through libtiff."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return _from_pillow(picture)
    except OSError as error:
        raise ValueError(f"{cause or error}; pip install imagecodecs") from error


def _planes_first(array: np.ndarray, axes: str) -> np.ndarray:
    """Move rows and columns last and make one axis of all others, in both TIFF layouts."""
    if "Y" not in axes or "X" not in axes:
        raise ValueError(f"axes {axes} are not those of an image")
    array = np.moveaxis(array, (axes.index("Y"), axes.index("X")), (-2, -1))
    return array.reshape(-1, *array.shape[-2:])


def planes_from_array(array: np.ndarray, num_channels: int | None = None) -> Tensor:
    """Planes `(C, H, W)` from an array `(H, W)`, `(C, H, W)` or `(H, W, C)`.

    Args:
        array: Numbers of any real type; the planes may share its memory.
        num_channels: Which end holds the channels; see `decode_planes`.

    Returns:
        The planes.

    Raises:
        ValueError: Another rank, or numbers that are not real.
    """
    if array.ndim == 2:
        return _to_tensor(array[None])
    if array.ndim != 3:
        raise ValueError(f"shape {array.shape} is not that of an image: (H, W), (C, H, W)")
    first, last = array.shape[0], array.shape[-1]
    if num_channels in (first, last):
        is_last = first != num_channels
    else:
        is_last = last < first
    return _to_tensor(np.moveaxis(array, -1, 0) if is_last else array)


def _to_tensor(planes: np.ndarray) -> Tensor:
    """A tensor of the same memory where that will do: nobody else holds what was decoded."""
    if planes.size == 0:
        raise ValueError(f"the image has no pixels (shape {planes.shape})")
    if planes.dtype == np.bool_:
        planes = planes.astype(np.uint8) * np.uint8(255)
    elif planes.dtype.kind == "f":
        planes = planes.astype(np.float32)
    elif planes.dtype.kind not in "iu":
        raise ValueError(f"type {planes.dtype} is not one of real numbers")
    native = planes.dtype.newbyteorder("=")
    return torch.from_numpy(np.require(planes, native, ["C", "W"]))


def is_camera_rgb(channels: ChannelSet) -> bool:
    """Whether the planes are red, green and blue, in any order."""
    return len(channels) == 3 and set(channels.names) == {"R", "G", "B"}


def fit_planes(planes: Planes, channels: ChannelSet) -> Tensor:
    """Bring decoded planes to the channels of the data set.

    A gray image among R, G and B becomes three equal planes; an alpha plane that the channels do
    not count is dropped. Nothing else is guessed.

    Args:
        planes: The decoded image.
        channels: The channels of the data set.

    Returns:
        The image `(len(channels), H, W)`.

    Raises:
        ValueError: Another number of planes.
    """
    image = planes.image
    if image.shape[0] != len(channels) and planes.has_alpha:
        image = image[:-1]
    if image.shape[0] == 1 and is_camera_rgb(channels):
        image = image.expand(3, -1, -1).contiguous()
    if image.shape[0] != len(channels):
        known = products_with(image.shape[0])
        raise ValueError(
            f"it has {image.shape[0]} planes, but the channels are {channels} ({len(channels)})"
            + (f". {known}" if known else "")
        )
    return image


def to_stored_values(image: Tensor, value_scale: float | None = None) -> Tensor:
    """Leave 8 and 16 bits and float32 as they are, else float32; or divide by `value_scale`."""
    if value_scale is not None:
        return image.to(torch.float32) / value_scale
    if image.dtype in (torch.uint8, torch.uint16, torch.float32):
        return image
    return image.to(torch.float32)


def read_image(
    source: str | Path | bytes, channels: ChannelSetLike, *, value_scale: float | None = None
) -> Tensor:
    """Read one image as a data set with these channels reads it.

    Args:
        source: A file or the bytes of one.
        channels: The channels of its planes.
        value_scale: What the stored numbers are divided by (10000 for Sentinel-2 reflectance);
            without it 8 and 16 bits are scaled by their range, in the transforms.

    Returns:
        `(C, H, W)`: uint8, uint16 or float32.

    Raises:
        ValueError: It cannot be read, or has another number of planes.
        FileNotFoundError: There is no such file.
    """
    wanted = ChannelSet.parse(channels)
    named = "the image" if isinstance(source, bytes) else f"image {source}"
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise FileNotFoundError(f"There is no {named}. Check the path.")
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        image = fit_planes(decode_planes(data, len(wanted)), wanted)
    except DECODE_ERRORS as error:
        raise ValueError(
            f"Cannot read {named}: {decode_reason(error)}. Give a JPEG, PNG, TIFF or .npy file "
            f"with the planes {wanted}."
        ) from error
    return to_stored_values(image, value_scale)
