"""From the bytes of an image file to planes: the only path, for training, evaluation and predict.

One decoder a format: tifffile (with imagecodecs) for TIFF, imagecodecs for PNG and JPEG 2000 of
more than 8 bits, NumPy's format and Netpbm of unusual depth here, Pillow for the rest. What a file
says of its numbers is obeyed or refused (docs/data.md has the list); where it says that a pixel
holds no data, `Reading` refuses the image or marks the pixel as NaN.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import imagecodecs
import numpy as np
import tifffile
import torch
from PIL import ExifTags, Image, ImageOps
from tifffile import PHOTOMETRIC
from torch import Tensor

from timm_varchan.channels import Channel, ChannelSet, ChannelSetLike, known_channels
from timm_varchan.errors import ImageError, UserError
from timm_varchan.products import products_with

#: Files that a folder is searched for.
IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .bmp .dib .gif .webp .ppm .pgm .pbm .pnm .tga .jp2 .j2k .jpx "
    ".tif .tiff .btf .tf8 .npy".split()
)
#: What is done about pixels without data.
NO_DATA = ("refuse", "mean", "predict", "keep")
#: With these, images come with NaN in such pixels.
FILLED = ("mean", "predict")
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_BIT_DEPTH_AT = 24  # signature 8, chunk length and type 8, width 4, height 4
_JPEG2000 = (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")
_ALPHA = (1, 2)  # TIFF's ExtraSamples: associated and unassociated alpha
#: Written where nothing was measured, by programs whose format cannot say so; of these, signed and
#: floating numbers, an exact match counts.
_USUAL_NO_DATA = (-9999.0, -99999.0, -32768.0, -float(np.finfo(np.float32).max), -1e20, 1e20, -1e34)


@dataclass(frozen=True)
class Planes:
    """A decoded image.

    Args:
        image: `(C, H, W)` in the file's own numbers; floats of any width as float32.
        has_alpha: Whether the last plane is an alpha plane.
        white: The largest number that can be stored, where that is not the largest of the type.
        valid: Where there is data, broadcastable to the image; None for everywhere.
        scaling: Factor and offset of every plane, where the file says that its numbers need them.
        labels: What the file calls its planes; empty where it does not.
    """

    image: np.ndarray
    has_alpha: bool = False
    white: float | None = None
    valid: np.ndarray | None = None
    scaling: tuple[np.ndarray, np.ndarray] | None = None
    labels: tuple[Channel, ...] = ()

    @property
    def num_planes(self) -> int:
        """Planes without the alpha plane."""
        return self.image.shape[0] - int(self.has_alpha)

    def without_alpha(self) -> Planes:
        """The same without the alpha plane."""
        if not self.has_alpha:
            return self
        count = self.num_planes
        valid, scaling = self.valid, self.scaling
        if valid is not None and valid.shape[0] > 1:
            valid = valid[:count]
        if scaling is not None:
            scaling = (scaling[0][:count], scaling[1][:count])
        return replace(
            self, image=self.image[:count], has_alpha=False, valid=valid, scaling=scaling,
            labels=self.labels[:count],
        )  # fmt: skip


def decode(data: Any, num_channels: int | None = None) -> Planes:
    """Decode the bytes of one image file.

    Args:
        data: A buffer with JPEG, PNG, TIFF, `.npy` or whatever else Pillow opens.
        num_channels: Which axis of an array holds the channels: the one of this length.

    Returns:
        The planes.

    Raises:
        ImageError: It cannot be read, or what it says of itself is not understood.
    """
    head = bytes(data[:26])
    if head[:6] == b"\x93NUMPY":
        with _decoding():
            array = _npy(data)
        return Planes(planes_first(array, num_channels))
    if head[:4] in _TIFF:
        return _tiff(data, num_channels)
    if head[:8] == _PNG and head[_PNG_BIT_DEPTH_AT:][:1] == b"\x10":
        return _png16(data)
    if head.startswith(_JPEG2000):
        return _jpeg2000(data)
    if re.match(rb"P[2356]\s", head):
        planes = _netpbm(bytes(data))
        if planes is not None:
            return planes
    return _pillow(data)


@contextmanager
def _decoding() -> Iterator[None]:
    """What a decoder raises becomes an `ImageError`; only decoders' calls stand in it."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:  # decoders raise anything on bytes that they cannot read
        raise ImageError(_reason(error)) from error


def _reason(error: BaseException) -> str:
    """One line that says what a decoder found."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    text = (str(error).splitlines() or [""])[0].rstrip(".")
    if "cannot identify image file" in text:  # Pillow goes on with a memory address
        return "it is no image"
    if "imagecodecs" in text:
        return f"{text} (pip install -U imagecodecs)"
    return text or type(error).__name__


# NumPy --------------------------------------------------------------------------------------------


def _npy(data: Any) -> np.ndarray:
    """An array of the same memory, which `np.load` would copy in pieces."""
    view = memoryview(data)
    size = 4 if view[6] > 1 else 2  # bytes of the header's length, since version 2 four
    start = 8 + size + int.from_bytes(view[8 : 8 + size], "little")
    shape, fortran, dtype = _npy_header(bytes(view[:start]))
    count = math.prod(shape)
    if len(view) - start != count * dtype.itemsize:
        raise ImageError(
            f"it has {len(view) - start} bytes of numbers, its header says {count * dtype.itemsize}"
        )
    array = np.frombuffer(view, dtype, count, start)
    return array.reshape(shape, order="F" if fortran else "C")


@lru_cache(maxsize=64)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    file = io.BytesIO(header)
    is_first = np.lib.format.read_magic(file) == (1, 0)
    form = np.lib.format
    shape, fortran, dtype = (
        form.read_array_header_1_0(file) if is_first else form.read_array_header_2_0(file)
    )
    if dtype.hasobject:
        raise ImageError("it holds Python objects, not numbers")
    return shape, fortran, dtype


def planes_first(array: np.ndarray, num_channels: int | None = None) -> np.ndarray:
    """Planes `(C, H, W)` of an array `(H, W)`, `(C, H, W)` or `(H, W, C)`.

    Args:
        array: Numbers of any real type; the planes may share its memory.
        num_channels: How many planes there are, which tells the axis. Without it the axis must
            follow from the shape: fewer channels than pixels a side, and an image nearer to a
            square than the other reading's.

    Returns:
        The planes.

    Raises:
        ImageError: Another rank, numbers that are not real, an axis that does not follow.
    """
    if array.ndim == 2:
        return _real(array[None])
    if array.ndim != 3:
        raise ImageError(f"shape {array.shape} is not that of an image: (H, W), (C, H, W)")
    first, _, last = array.shape
    if num_channels is not None and num_channels in (first, last):
        if first == last:
            raise ImageError(
                f"shape {array.shape} has {first} at both ends, so that the axis of the channels "
                f"cannot be told; write a TIFF, which says it"
            )
        is_last = last == num_channels
    elif num_channels is not None:  # another count: the caller says so
        is_last = last < first
    else:
        is_last = _is_channels_last(array.shape)
    return _real(np.moveaxis(array, -1, 0) if is_last else array)


def _is_channels_last(shape: tuple[int, ...]) -> bool:
    """Which end of three axes the channels are."""
    first, middle, last = shape

    def follows(count: int, sides: tuple[int, int], other: tuple[int, int]) -> bool:
        stretch, others = (max(s) / max(min(s), 1) for s in (sides, other))
        return count < min(sides) and (stretch <= others or (count <= 4 and stretch <= 10))

    is_first = follows(first, (middle, last), (first, middle))
    is_last = follows(last, (first, middle), (middle, last))
    if is_first == is_last:
        raise ImageError(
            f"shape {shape} does not tell which axis the channels are; say how many or which with "
            f"--channels (channels=), such as {max(shape)} wavelengths"
        )
    return is_last


def _real(planes: np.ndarray) -> np.ndarray:
    """Numbers in the machine's own byte order; truth values as 0 and 255."""
    if planes.size == 0:
        raise ImageError(f"the image has no pixels (shape {planes.shape})")
    if planes.dtype == np.bool_:
        return planes.astype(np.uint8) * np.uint8(255)
    if planes.dtype.kind == "f":
        with np.errstate(over="ignore"):  # infinity, which is no data
            return planes.astype(np.float32, copy=False)
    if planes.dtype.kind not in "iu":
        raise ImageError(f"type {planes.dtype} is not one of real numbers")
    return planes.astype(planes.dtype.newbyteorder("="), copy=False)


# Pictures -----------------------------------------------------------------------------------------


def _pillow(data: Any) -> Planes:
    with _decoding(), Image.open(io.BytesIO(data)) as picture:
        num_frames = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)
        if num_frames > 1:
            raise ImageError(f"it holds {num_frames} pictures, not one; write the one it is about")
        upright: Image.Image = picture
        if picture.getexif().get(ExifTags.Base.Orientation) is not None:
            upright = ImageOps.exif_transpose(picture)
        mode = {"1": "L"} | dict.fromkeys(("P", "PA", "CMYK", "YCbCr", "LAB", "HSV"), "RGB")
        if upright.mode in mode:
            upright = upright.convert(mode[upright.mode])
        array, has_alpha = np.asarray(upright), upright.mode in ("LA", "RGBA", "La", "RGBa")
    return Planes(_real(_last_to_first(array)), has_alpha=has_alpha)


def _last_to_first(array: np.ndarray) -> np.ndarray:
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)


def _png16(data: Any) -> Planes:
    """Pillow keeps one byte of the two."""
    with _decoding():
        planes = _last_to_first(imagecodecs.png_decode(bytes(data)))
    if b"eXIf" in bytes(data):
        with _decoding(), Image.open(io.BytesIO(data)) as picture:
            orientation = int(picture.getexif().get(ExifTags.Base.Orientation) or 1)
        planes = _upright(planes, orientation)
    return Planes(_real(planes), has_alpha=len(planes) in (2, 4))


def _jpeg2000(data: Any) -> Planes:
    """Pillow stretches 12 or 15 bits to 16, and colours to 8."""
    size = bytes(data[:4096]).find(b"\xff\x4f\xff\x51")
    depth = (data[size + 42] & 127) + 1 if size >= 0 and len(data) > size + 42 else 8
    if depth <= 8:
        return _pillow(data)
    with _decoding():
        planes = _last_to_first(imagecodecs.jpeg2k_decode(bytes(data)))
    white = float(2**depth - 1) if planes.dtype == np.uint16 and depth < 16 else None
    return Planes(_real(planes), has_alpha=len(planes) in (2, 4) and white is None, white=white)


def _netpbm(data: bytes) -> Planes | None:
    """PGM and PPM whose largest value is not 255, which Pillow stretches or cuts to 8 bits."""
    found = re.match(rb"P([2356])" + 3 * rb"(?:\s|#[^\n]*\n)+(\d+)" + rb"\s", data)
    if found is None:
        raise ImageError("its header is not that of a PGM or PPM file")
    kind, width, height, largest = map(int, found.groups())
    depth = 3 if kind in (3, 6) else 1
    if largest == 255:
        return None
    if not 0 < largest < 65536:
        raise ImageError(f"its largest value is said to be {largest}; PGM has 1 to 65535")
    body, count = data[found.end() :], width * height * depth
    dtype = np.dtype(np.uint8 if largest < 256 else ">u2")
    with _decoding():
        if kind < 4:
            numbers = np.array(re.sub(rb"#[^\n]*", b"", body).split(), np.int64)
        else:
            if body[count * dtype.itemsize :].strip():
                raise ImageError("it holds more than one picture")
            numbers = np.frombuffer(body, dtype, count)
        planes = _last_to_first(numbers.reshape(height, width, depth))
    if planes.size and not 0 <= planes.min() <= planes.max() <= largest:
        raise ImageError(f"it holds {planes.max()}, above {largest}, its largest value")
    white = None if largest == 65535 else float(largest)
    return Planes(_real(planes.astype(dtype.newbyteorder("="))), white=white)


# TIFF ---------------------------------------------------------------------------------------------

_TAGS_READ = (
    _PHOTOMETRIC, _ORIENTATION, _COLOR_MAP, _INK_SET, _EXTRA_SAMPLES,
    _YCBCR_COEFFICIENTS, _REFERENCE, _GEO_KEYS, _GDAL_METADATA, _GDAL_NO_DATA,
) = 262, 274, 320, 332, 338, 529, 532, 34735, 42112, 42113  # fmt: skip
_JPEG = (6, 7, 33007, 34892)  # compressions that come back as RGB


@dataclass(frozen=True)
class _About:
    """What a TIFF says of its numbers."""

    axes: str
    tags: dict[int, Any]
    bits: int | tuple[int, ...]
    is_jpeg: bool
    labels: tuple[Channel, ...]


class _Layout(NamedTuple):
    """Where the numbers of an uncompressed TIFF lie: between all the bytes before and after."""

    head: bytes
    tail: bytes
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    about: _About

    def array(self, data: Any) -> np.ndarray | None:
        """The numbers of a file that is the same otherwise; None for another file."""
        start, stop = len(self.head), len(data) - len(self.tail)
        if data[:start] != self.head or data[stop:] != self.tail:
            return None
        return np.frombuffer(data[start:stop], self.dtype).reshape(self.shape)


#: By the length of the file; tifffile takes several times as long to find the same.
_layouts: dict[int, _Layout] = {}


def _tiff(data: Any, num_channels: int | None = None) -> Planes:
    data = memoryview(data)
    layout = _layouts.get(len(data))
    array = None if layout is None else layout.array(data)
    if array is not None and layout is not None:
        return _as_tagged(array, layout.about, num_channels, None)
    with _decoding(), tifffile.TiffFile(io.BytesIO(data)) as file:
        series, masks = _the_series(file.series)
        page, start, order = series.keyframe, series.dataoffset, file.byteorder
        array, said = series.asarray(), (series.shape, series.dtype)
        valid = masks[0].asarray() if masks else None
        tags = {tag.code: tag.value for tag in page.tags if tag.code in _TAGS_READ}
        ome = file.ome_metadata if page.is_ome else None
        labels = _ome_labels(ome) if ome else ()
        is_jpeg = page.compression in _JPEG
        about = _About(series.axes, tags, page.bitspersample, is_jpeg, labels)
    if (array.shape, array.dtype) != said:
        raise ImageError(
            f"it decodes to {array.shape} {array.dtype}, its header says {said[0]} {said[1]}"
        )
    if valid is None and start is not None:
        _keep_layout(data, start, array, array.dtype.newbyteorder(order), about)
    return _as_tagged(array, about, num_channels, valid)


def _keep_layout(
    data: memoryview, start: int, array: np.ndarray, dtype: np.dtype[Any], about: _About
) -> None:
    """Remember where the numbers lie, if they are found there."""
    stop = start + array.nbytes
    if stop > len(data) or len(data) - array.nbytes > 2**16:
        return
    layout = _Layout(bytes(data[:start]), bytes(data[stop:]), dtype, array.shape, about)
    there = layout.array(data)
    if there is not None and np.array_equal(there, array, equal_nan=array.dtype.kind == "f"):
        if len(_layouts) >= 16:
            _layouts.clear()
        _layouts[len(data)] = layout


def _the_series(found: Any) -> tuple[Any, list[Any]]:
    """The one image of a file, and its masks; previews and overviews are passed over."""
    whole = [s for s in found if not s.keyframe.is_reduced]
    images = [s for s in whole if not s.keyframe.is_mask]
    if len(images) != 1:
        shapes = ", ".join(f"{s.shape} {s.dtype}" for s in images[:4]) or "nothing but previews"
        raise ImageError(f"it holds {len(images)} images ({shapes}), not one; write one a file")
    if images[0].kind == "ome" and any(page is None for page in images[0].pages):
        raise ImageError("some of its planes lie in other files; write one file with all of them")
    return images[0], [s for s in whole if s.keyframe.is_mask]


def _one_axis(array: np.ndarray, axes: str, num_channels: int | None) -> np.ndarray:
    """Planes `(C, H, W)` of an array whose axes the file names."""
    if "Y" not in axes or "X" not in axes:
        raise ImageError(f"axes {axes} are not those of an image")
    if array.size == 0:
        raise ImageError(f"it has no pixels: {array.shape}")
    array = np.moveaxis(array, (axes.index("Y"), axes.index("X")), (-2, -1))
    others = [a for a in axes if a not in "YX"]
    several = [f"{a} ({n})" for a, n in zip(others, array.shape, strict=False) if n > 1]
    if len(several) > 1:
        raise ImageError(
            f"its planes have several axes, {' and '.join(several)}; write one axis of channels, "
            f"such as a projection or one file a plane"
        )
    planes = array.reshape(-1, *array.shape[-2:])
    # tifffile's own writer takes the first of three axes for pages unless it is told otherwise.
    if axes == "QYX" and num_channels in (None, planes.shape[0], planes.shape[-1]):
        return planes_first(planes, num_channels)
    return _real(planes)


def _as_tagged(
    array: np.ndarray, about: _About, num_channels: int | None, valid: np.ndarray | None
) -> Planes:
    """The planes of an array and its mask with what the tags say of them applied."""
    tags, planes = about.tags, _one_axis(array, about.axes, num_channels)
    if valid is not None:
        if valid.shape != planes.shape[1:]:
            raise ImageError(f"its mask is {valid.shape}, its image {planes.shape[1:]}")
        valid = valid[None] != 0
    if _GDAL_NO_DATA in tags:
        valid = _both(valid, _has_data(planes, tags[_GDAL_NO_DATA]))
    orientation = int(tags.get(_ORIENTATION, 1))
    planes = _upright(planes, orientation)
    valid = None if valid is None else _upright(valid, orientation)
    planes, white = _colours(planes, about)
    if valid is not None and len(valid) not in (1, len(planes)):
        valid = np.asarray(valid.all(0, keepdims=True))  # the colours of a palette, of inks
    labels, scaling = about.labels, None
    if _GDAL_METADATA in tags:
        labels, scaling = _gdal_metadata(str(tags[_GDAL_METADATA]), len(planes))
    extra = np.atleast_1d(tags.get(_EXTRA_SAMPLES, ()))
    has_alpha = len(extra) > 0 and int(extra[-1]) in _ALPHA and len(planes) > 1
    if has_alpha and _GEO_KEYS in tags:
        # GDAL calls the fourth of four bands of 8 bits alpha, whatever it is.
        has_alpha = bool(np.isin(planes[-1], (0, np.iinfo(np.uint8).max, planes[-1].max())).all())
        valid = _both(valid, planes[-1:] != 0) if has_alpha else valid
    return Planes(planes, has_alpha, white, valid, scaling, labels)


def _both(one: np.ndarray | None, other: np.ndarray | None) -> np.ndarray | None:
    """Where there is data by two masks, each of which may be missing."""
    if one is None or other is None:
        return one if other is None else other
    return np.logical_and(one, other)


def _has_data(planes: np.ndarray, text: object) -> np.ndarray | None:
    """Where the planes hold another value than GDAL's tag names; None where all do."""
    try:
        value = float(str(text).strip(" \0\n"))
    except ValueError as error:
        raise ImageError(f"its no-data value is said to be {text!r}, which is no number") from error
    if planes.dtype.kind == "f":
        with np.errstate(over="ignore"):
            return None if math.isnan(value) else np.not_equal(planes, np.float32(value))
    limits = np.iinfo(planes.dtype)
    if not value.is_integer() or not limits.min <= value <= limits.max:
        return None
    return np.not_equal(planes, planes.dtype.type(int(value)))


def _upright(planes: np.ndarray, orientation: int) -> np.ndarray:
    """Turn rows and columns as EXIF and TIFF count orientations, from 1 (upright) to 8."""
    if orientation == 1:
        return planes
    if not 1 < orientation <= 8:
        raise ImageError(f"its orientation is {orientation}, there are 1 to 8")
    if orientation >= 5:
        planes = planes.swapaxes(-1, -2)
    if orientation in (3, 4, 7, 8):
        planes = planes[..., ::-1, :]
    if orientation in (2, 3, 6, 7):
        planes = planes[..., ::-1]
    return planes


def _colours(planes: np.ndarray, about: _About) -> tuple[np.ndarray, float | None]:
    """Gray, RGB or bands, whatever the samples stand for; and what white is."""
    tags = about.tags
    if _PHOTOMETRIC not in tags:
        raise ImageError("it does not say what its numbers stand for (PhotometricInterpretation)")
    photometric, white = int(tags[_PHOTOMETRIC]), _white(planes, about.bits)
    if photometric in (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.RGB):
        return planes, white
    if photometric == PHOTOMETRIC.PALETTE:
        return _palette(planes, tags), None
    if photometric == PHOTOMETRIC.MINISWHITE:
        return planes.dtype.type(_top(planes, white)) - planes, white
    if photometric == PHOTOMETRIC.SEPARATED:
        return _inks(planes, tags, white), white
    if photometric == PHOTOMETRIC.YCBCR:
        return (planes if about.is_jpeg else _ycbcr(planes, tags)), white
    known = {item.value: item.name for item in PHOTOMETRIC}
    name = known.get(photometric, str(photometric))
    raise ImageError(f"its colours are {name}, which is not converted; write it as RGB")


def _white(planes: np.ndarray, bits: int | tuple[int, ...]) -> float | None:
    """The largest number of an unusual depth, None where it is that of the type."""
    depths = {bits} if isinstance(bits, int) else set(bits)
    if len(depths) > 1:
        raise ImageError(f"its planes have different depths, {bits} bits")
    (depth,) = depths
    if planes.dtype.kind != "u" or depth in (1, 8 * planes.dtype.itemsize):
        return None
    return float(2**depth - 1)


def _top(planes: np.ndarray, white: float | None) -> int:
    """The largest number that can be stored."""
    if planes.dtype.kind != "u":
        raise ImageError(f"its white is zero, in {planes.dtype}: what black is nobody knows")
    return int(np.iinfo(planes.dtype).max if white is None else white)


def _palette(planes: np.ndarray, tags: dict[int, Any]) -> np.ndarray:
    colours = np.asarray(tags.get(_COLOR_MAP, ()))
    if colours.size == 0 or colours.size % 3 or len(planes) != 1:
        raise ImageError("its palette is missing or of a wrong length")
    colours = colours.reshape(3, -1)
    if planes.max() >= colours.shape[1]:
        raise ImageError(f"it uses colour {planes.max()} of {colours.shape[1]}")
    # 16 bits by the standard; some programs write 8.
    colours = colours if colours.max() < 256 else colours >> 8
    return colours.astype(np.uint8)[:, planes[0]]


def _inks(planes: np.ndarray, tags: dict[int, Any], white: float | None) -> np.ndarray:
    """CMYK as Pillow turns it to RGB: each ink takes its share of what black leaves."""
    if len(planes) != 4 or int(tags.get(_INK_SET, 1)) != 1 or planes.dtype.kind != "u":
        raise ImageError(f"its {len(planes)} inks are not those of CMYK; write it as RGB")
    top = _top(planes, white)
    left = top - planes[3].astype(np.float64)
    return np.rint(left * (1 - planes[:3] / top)).astype(planes.dtype)


def _ycbcr(planes: np.ndarray, tags: dict[int, Any]) -> np.ndarray:
    """Source: TIFF 6.0, section 21."""
    if len(planes) != 3 or planes.dtype != np.uint8:
        raise ImageError(f"its YCbCr has {len(planes)} planes of {planes.dtype}; write it as RGB")
    red, green, blue = _fractions(tags.get(_YCBCR_COEFFICIENTS), (0.299, 0.587, 0.114))
    low = _fractions(tags.get(_REFERENCE), (0.0, 255.0, 128.0, 255.0, 128.0, 255.0))
    values = planes.astype(np.float64)
    y = (values[0] - low[0]) * 255 / (low[1] - low[0])
    cb, cr = ((values[i] - low[2 * i]) * 127 / (low[2 * i + 1] - low[2 * i]) for i in (1, 2))
    r, b = y + cr * (2 - 2 * red), y + cb * (2 - 2 * blue)
    g = (y - red * r - blue * b) / green
    return np.rint(np.clip(np.stack([r, g, b]), 0, 255)).astype(np.uint8)


def _fractions(value: Any, default: tuple[float, ...]) -> tuple[float, ...]:
    """TIFF's rational numbers, which tifffile gives as numerators and denominators in turn."""
    if value is None:
        return default
    numbers = [float(x) for x in np.ravel(value)]
    if len(numbers) == 2 * len(default):
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        numbers = [n / d if d else math.nan for n, d in pairs]
    if len(numbers) != len(default) or not all(map(math.isfinite, numbers)):
        raise ImageError("its YCbCr coefficients are of a wrong length")
    return tuple(numbers)


# Names of planes ----------------------------------------------------------------------------------

_COLOUR_WORDS = {
    "red": "R", "green": "G", "blue": "B", "nir": "NIR", "near infrared": "NIR", "swir1": "SWIR1",
    "swir2": "SWIR2",
}  # fmt: skip
_WAVELENGTH_TAGS = (
    "wavelength", "wavelength_nm", "central_wavelength", "center_wavelength",
    "central_wavelength_um", "central_wavelength_nm",
)  # fmt: skip
Scaling = tuple[np.ndarray, np.ndarray]


@lru_cache(maxsize=256)
def _gdal_metadata(text: str, count: int) -> tuple[tuple[Channel, ...], Scaling | None]:
    """Descriptions and wavelengths as channels, scales and offsets, of GDAL's XML."""
    try:
        items = list(ElementTree.fromstring(text.strip(" \0\n")).iter("Item"))
    except ElementTree.ParseError as error:
        raise ImageError(f"its GDAL metadata is no XML ({error})") from error
    found: dict[str, dict[int, str]] = {}
    for item in items:
        sample, kind = item.get("sample"), item.get("role") or str(item.get("name")).lower()
        if sample is not None and sample.isdigit() and int(sample) < count:
            found.setdefault(kind, {})[int(sample)] = (item.text or "").strip()
    names = found.get("description", {})
    lengths = next((found[tag] for tag in _WAVELENGTH_TAGS if tag in found), {})
    labels = tuple(label_of(names.get(i), lengths.get(i)) for i in range(count))
    return labels if any(not c.is_anonymous for c in labels) else (), _scaling(found, count)


def _scaling(found: dict[str, dict[int, str]], count: int) -> Scaling | None:
    try:
        scale, offset = (
            np.array([float(found.get(kind, {}).get(i, default)) for i in range(count)])
            for kind, default in (("scale", 1.0), ("offset", 0.0))
        )
    except ValueError as error:
        raise ImageError(f"its scales and offsets are not numbers ({error})") from error
    if not (np.isfinite(scale).all() and np.isfinite(offset).all() and scale.all()):
        raise ImageError("its scales and offsets are not finite, or 0")
    if (scale == 1).all() and (offset == 0).all():
        return None
    return scale.astype(np.float32)[:, None, None], offset.astype(np.float32)[:, None, None]


def label_of(name: str | None, wavelength: str | None = None) -> Channel:
    """The channel that a file's words mean; anonymous where they mean none."""
    known = known_channels()
    text = (name or "").strip()
    short = re.sub(r"^B(\d)$", r"B0\1", text.upper())
    for word in (text, short, _COLOUR_WORDS.get(text.lower(), "")):
        if word in known:
            return known[word]
    try:
        nm = float(wavelength) if wavelength else None
    except ValueError:
        nm = None
    if nm is None or not math.isfinite(nm) or nm <= 0:
        return Channel()
    return Channel(text or None, nm * 1000 if nm < 100 else nm)  # micrometres


@lru_cache(maxsize=256)
def _ome_labels(text: str) -> tuple[Channel, ...]:
    """Names and emission wavelengths of a microscope's channels."""
    labels = []
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ImageError(f"its OME metadata is no XML ({error})") from error
    for element in root.iter():
        if element.tag.rpartition("}")[2] == "Channel":
            name, nm = element.get("Name"), element.get("EmissionWavelength")
            known = label_of(name, nm)
            labels.append(Channel(name) if known.is_anonymous and name else known)
    return tuple(labels)


# From planes to images ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """How the files of a data set become images.

    Args:
        channels: The planes of every image; `ANONYMOUS` for any number.
        value_scale: What stored numbers are divided by; without it 8 and 16 bits are scaled by
            their range, in the transforms, and a file's own factors are applied.
        no_data: What is done about pixels that hold no data by the file's own word (GDAL's tag, a
            mask, NaN) or by the usual one (-9999 and the like, of signed and floating numbers):
            `refuse` the image; mark them as NaN, for the transforms to put the channel's `mean`
            there or to `predict` them from the same pixel's other channels; or `keep` the numbers
            (NaN is refused).

    Raises:
        UserError: An unknown `no_data`, a `value_scale` that is not above 0.
    """

    channels: ChannelSet
    value_scale: float | None = None
    no_data: str = "refuse"

    def __post_init__(self) -> None:
        if self.value_scale is not None and not 0 < self.value_scale < math.inf:
            raise UserError(
                f"value_scale is {self.value_scale}; it must be above 0, such as 10000."
            )
        if self.no_data not in NO_DATA:
            raise UserError(f"no_data is {self.no_data!r}. Choose from: {', '.join(NO_DATA)}.")

    def file(self, path: str | Path) -> Tensor:
        """The image of a file; see `image`."""
        return self.image(decode(read_bytes(path), len(self.channels) or None))

    def encoded(self, data: Any) -> Tensor:
        """The image of the bytes of a file; see `image`."""
        return self.image(decode(data, len(self.channels) or None))

    def image(self, planes: Planes) -> Tensor:
        """The image `(C, H, W)`: uint8, uint16 or float32, NaN where there is no data.

        Raises:
            ImageError: Other planes than the channels, pixels without data.
        """
        planes = fit(planes, self.channels)
        missing, why = self._missing(planes)
        if missing is not None and (self.no_data not in FILLED or missing.all()):
            cure = "; --no-data mean (no_data='mean') puts the channel's mean there, predict more"
            share = missing.mean()
            raise ImageError(
                f"{share:.1%} of its values hold no data ({why}){cure if share < 1 else ''}"
            )
        return self._tensor(planes, missing)

    def marked(self, planes: Planes) -> Tensor:
        """The same with NaN wherever there is no data; nothing is refused for it."""
        planes = fit(planes, self.channels)
        return self._tensor(planes, self._missing(planes)[0])

    def _missing(self, planes: Planes) -> tuple[np.ndarray | None, str]:
        """Where there is no data, or None, and how that is known."""
        keep = self.no_data == "keep"
        found = _missing_by_value(planes.image, usual=not keep)
        if planes.valid is not None and not keep and not planes.valid.all():
            found = {"the file says so": ~planes.valid} | found
        if not found:
            return None, ""
        missing = np.logical_or.reduce(
            [np.broadcast_to(m, planes.image.shape) for m in found.values()]
        )
        return missing, next(iter(found))

    def _tensor(self, planes: Planes, missing: np.ndarray | None) -> Tensor:
        stored = self._stored(planes, as_float=missing is not None)
        if missing is not None:
            stored[missing] = np.nan
        return torch.from_numpy(np.require(stored, requirements=["C", "W"]))

    def _stored(self, planes: Planes, as_float: bool) -> np.ndarray:
        image, scale = planes.image, self.value_scale
        if planes.scaling is not None:
            factor, offset = planes.scaling
            if scale is not None and not (np.allclose(factor, 1 / scale) and not offset.any()):
                raise ImageError(
                    f"the file scales its numbers itself, by {factor.flat[0]:g} and "
                    f"{offset.flat[0]:+g}; leave --value-scale {scale:g} out (value_scale=None)"
                )
            return image.astype(np.float32) * factor + offset
        if scale is not None:
            return image.astype(np.float32) / np.float32(scale)
        if planes.white is not None:
            return image.astype(np.float32) / np.float32(planes.white)
        if image.dtype in (np.uint8, np.uint16):
            top = np.float32(np.iinfo(image.dtype).max)
            return image.astype(np.float32) / top if as_float else image
        return image.astype(np.float32, copy=as_float)


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
        if low <= value <= high:
            here = np.equal(image, image.dtype.type(value))
            if here.any():
                found[f"{value:g} is the usual sign of it; if it is meant, --no-data keep"] = here
                break
    return found


def fit(planes: Planes, channels: ChannelSet) -> Planes:
    """Bring decoded planes to the channels of the data set.

    A gray image among R, G and B becomes three equal planes; an alpha plane that the channels do
    not count is dropped. Nothing else is guessed.

    Args:
        planes: The decoded image.
        channels: The channels of the data set; `ANONYMOUS` takes all planes but alpha.

    Returns:
        The planes of the channels.

    Raises:
        ImageError: Another number of planes, or the file calls them by the same names in another
            order.
    """
    if len(planes.image) != len(channels):
        planes = planes.without_alpha()
    if not channels.channels:
        return planes
    if len(planes.image) == 1 and is_camera_rgb(channels):
        planes = replace(planes, image=np.repeat(planes.image, 3, axis=0), labels=())
    if len(planes.image) != len(channels):
        known = products_with(len(planes.image))
        raise ImageError(
            f"it has {len(planes.image)} planes, but the channels are {channels} "
            f"({len(channels)}); see --channels" + (f". {known}" if known else "")
        )
    named = [c.name for c in planes.labels]
    if None not in named and set(named) == set(channels.names) and tuple(named) != channels.names:
        raise ImageError(
            f"the file calls its planes {'+'.join(map(str, named))}, the channels are {channels}; "
            f"see --channels"
        )
    return planes


def is_camera_rgb(channels: ChannelSet) -> bool:
    """Whether the planes are red, green and blue, in any order."""
    return len(channels) == 3 and set(channels.names) == {"R", "G", "B"}


def read_bytes(path: str | Path) -> Any:
    """A file's bytes, in memory that may be written to."""
    try:
        with open(path, "rb", buffering=0) as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            data = np.empty(size, np.uint8)
            if size and file.readinto(data.data) != size:
                raise ImageError("it was cut off while it was read")
    except OSError as error:
        raise ImageError(_reason(error)) from error
    return data.data if size else b""


def read_image(
    source: str | Path | bytes,
    channels: ChannelSetLike,
    *,
    value_scale: float | None = None,
    no_data: str = "refuse",
) -> Tensor:
    """Read one image as a data set with these channels reads it.

    Args:
        source: A file or the bytes of one.
        channels: The channels of its planes.
        value_scale: What the stored numbers are divided by (10000 for Sentinel-2 reflectance);
            without it 8 and 16 bits are scaled by their range, in the transforms.
        no_data: See `Reading`.

    Returns:
        `(C, H, W)`: uint8, uint16 or float32.

    Raises:
        UserError: It cannot be read, or has another number of planes.
        FileNotFoundError: There is no such file.
    """
    wanted = ChannelSet.parse(channels)
    reading = Reading(wanted, value_scale, no_data)
    named = "the image" if isinstance(source, bytes) else f"image {source}"
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise FileNotFoundError(f"There is no {named}. Check the path.")
    try:
        return reading.encoded(source) if isinstance(source, bytes) else reading.file(source)
    except ImageError as error:
        raise UserError(
            f"Cannot read {named}: {error}. Give a JPEG, PNG, TIFF or .npy file with the planes "
            f"{wanted}."
        ) from error
