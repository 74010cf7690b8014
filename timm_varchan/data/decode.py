"""From an image file to its planes, in the file's own numbers.

One decoder a format: tifffile (with imagecodecs) for TIFF, imagecodecs for PNG and for JPEG 2000 of
more than 8 bits, NumPy's format here, Pillow for the rest. What a file says of its numbers is
obeyed or refused (docs/data.md has the list).
"""

from __future__ import annotations

import io
import math
import os
import re
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
import tifffile
from PIL import ExifTags, Image, ImageOps
from tifffile import PHOTOMETRIC

from timm_varchan.channels import Channel
from timm_varchan.data.plane_names import (
    NO_NAMES,
    PlaneNames,
    channels_of,
    gdal_names,
    ome_names,
    satellite_of,
)
from timm_varchan.errors import ImageError
from timm_varchan.input_spec import MAX_PIXELS

__all__ = ["IMAGE_SUFFIXES", "Planes", "decode", "has_data", "is_mask", "planes_first"]

#: Files that a folder is searched for.
IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .bmp .dib .gif .webp .ppm .pgm .pbm .pnm .tga .jp2 .j2k .jpx "
    ".tif .tiff .btf .tf8 .npy".split()
)
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNG, _JPEG2000 = b"\x89PNG\r\n\x1a\n", b"\xff\x4f\xff\x51"


@dataclass(frozen=True)
class Planes:
    """A decoded image."""

    image: np.ndarray  # (C, H, W) in the file's own numbers; floats of any width as float32
    has_alpha: bool = False  # whether the last plane is an alpha plane
    white: float | None = None  # the largest number, where that is not the largest of the type
    valid: np.ndarray | None = None  # where there is data, broadcastable; None for everywhere
    names: PlaneNames = NO_NAMES  # what the file says of its planes

    def __post_init__(self) -> None:
        if self.names.channels and len(self.names.channels) != len(self.image):
            object.__setattr__(self, "names", self.names._replace(channels=()))
        if self.has_alpha and self.names.last_is_a_band:
            object.__setattr__(self, "has_alpha", False)

    @property
    def labels(self) -> tuple[Channel, ...]:
        """What the file calls its planes; empty where it does not."""
        return self.names.channels

    @property
    def num_planes(self) -> int:
        """Planes without the alpha plane."""
        return len(self.image) - int(self.has_alpha)

    def take(self, places: Sequence[int]) -> Planes:
        """These planes in this order, none of them alpha any more."""
        if list(places) == list(range(len(self.image))):
            return self
        index, scaling, valid = list(places), self.names.scaling, self.valid
        if valid is not None and len(valid) > 1:
            valid = valid[index]
        names = self.names._replace(
            channels=tuple(self.labels[i] for i in index) if self.labels else (),
            scaling=scaling and (scaling[0][index], scaling[1][index]),
        )
        return replace(self, image=self.image[index], has_alpha=False, valid=valid, names=names)

    def without_alpha(self) -> Planes:
        """The same without the alpha plane."""
        return self.take(range(self.num_planes))


def decode(source: Any, num_channels: int | None = None, max_pixels: int = MAX_PIXELS) -> Planes:
    """Decode one image file: JPEG, PNG, TIFF, JPEG 2000, `.npy` or whatever else Pillow opens.

    Args:
        source: A path, whose `.msk` and `.aux.xml` (GDAL's) count too, or a buffer of the bytes.
        num_channels: Which axis of an array holds the channels: the one of this length.
        max_pixels: Width times height that is read.

    Raises:
        ImageError: It cannot be read, its end is missing, or what it says of itself is not
            understood.
    """
    if isinstance(source, (str, Path)):
        planes = decode(read_bytes(source), num_channels, max_pixels)
        return _with_sidecars(planes, str(source), max_pixels)
    head = bytes(source[:64])
    if head[:6] == b"\x93NUMPY":
        return Planes(planes_first(_npy(source), num_channels))
    if head[:4] in _TIFF:
        return _tiff(memoryview(source), num_channels, max_pixels)
    if head[:8] == _PNG:
        return _png(bytes(source), max_pixels)
    if head[:4] == _JPEG2000 or head[4:8] == b"jP  ":
        return _jpeg2000(bytes(source), max_pixels)
    netpbm = _netpbm(bytes(source)) if re.match(rb"P[2356]\s", head) else None
    return netpbm or _pillow(source, max_pixels)


@contextmanager
def _decoding() -> Iterator[None]:
    """What a decoder raises becomes an `ImageError`; only decoders' calls stand in it."""
    try:
        yield
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError("there is no such file") from error
    except Exception as error:  # decoders raise anything on bytes that they cannot read
        text = (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__
        if "cannot identify image file" in text:  # Pillow goes on with a memory address
            text = "it is no image"
        more = " (pip install -U imagecodecs)" if "imagecodecs" in text else ""
        raise ImageError(text + more) from error


def _check_size(sides: Sequence[int], max_pixels: int) -> None:
    """Refuse an image before its pixels take all memory."""
    if math.prod(sides) > max_pixels:
        raise ImageError(
            f"it has more pixels than the limit of {max_pixels:,} (width times height); cut it "
            f"into parts, or raise the limit with --max-pixels (max_pixels=)"
        )


def _refuse_cut(is_cut: bool) -> None:
    if is_cut:
        raise ImageError("its end is missing: it was cut off; copy or download it again")


def _has_end(data: bytes, last_part: bytes) -> bool:
    """Whether the mark at the end of a JPEG or JPEG 2000 follows the one of its last part."""
    return data.rfind(b"\xff\xd9") > data.rfind(last_part)


# Arrays -------------------------------------------------------------------------------------------


@_decoding()
def _npy(data: Any) -> np.ndarray:
    """An array of the same memory, which `np.load` would copy in pieces."""
    view = memoryview(data)
    size = 4 if view[6] > 1 else 2  # bytes of the header's length, since version 2 four
    start = 8 + size + int.from_bytes(view[8 : 8 + size], "little")
    shape, fortran, dtype = _npy_header(bytes(view[:start]))
    num_bytes, num_said = len(view) - start, math.prod(shape) * dtype.itemsize
    if num_bytes != num_said:
        raise ImageError(f"it has {num_bytes} bytes of numbers, its header says {num_said}")
    return np.frombuffer(view, dtype, -1, start).reshape(shape, order="F" if fortran else "C")


@lru_cache(maxsize=64)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    file, form = io.BytesIO(header), np.lib.format
    is_first = form.read_magic(file) == (1, 0)
    read = form.read_array_header_1_0 if is_first else form.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ImageError("it holds Python objects, not numbers")
    return shape, fortran, dtype


def planes_first(array: np.ndarray, num_channels: int | None = None) -> np.ndarray:
    """Planes `(C, H, W)` of an array `(H, W)`, `(C, H, W)` or `(H, W, C)`, of the same memory.

    Args:
        array: Numbers of any real type.
        num_channels: How many planes there are, which tells the axis. Without it the axis must
            follow from the shape: fewer channels than pixels a side, and an image nearer to a
            square than the other reading's.

    Raises:
        ImageError: Another rank, numbers that are not real, an axis that does not follow.
    """
    if array.ndim not in (2, 3):
        raise ImageError(f"shape {array.shape} is not that of an image: (H, W), (C, H, W)")
    if array.ndim == 2:
        return _real(array[None])
    first, middle, last = array.shape
    is_last = last < first  # where the caller says another count
    if num_channels is None:
        is_last = _can_be_channels(last, middle, first)
        if is_last == _can_be_channels(first, middle, last):
            raise ImageError(
                f"shape {array.shape} does not tell which axis the channels are; say how many or "
                f"which with --channels (channels=), such as {max(array.shape)} wavelengths"
            )
    elif num_channels in (first, last):
        is_last = last == num_channels
        if first == last:
            raise ImageError(
                f"shape {array.shape} has {first} at both ends, so that the axis of the channels "
                f"cannot be told; write a TIFF, which says it"
            )
    return _real(np.moveaxis(array, -1, 0) if is_last else array)


def _can_be_channels(count: int, side: int, other: int) -> bool:
    """Whether one end of three axes can be the channels, the other end being a side."""
    stretch, other_stretch = (max(s) / max(min(s), 1) for s in ((side, other), (count, side)))
    return count < min(side, other) and (stretch <= other_stretch or (count <= 4 and stretch <= 10))


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

_opening = threading.Lock()
_TO_RGB = {"1": "L"} | dict.fromkeys(("P", "PA", "CMYK", "YCbCr", "LAB", "HSV"), "RGB")


@contextmanager
def _opened(data: Any, max_pixels: int) -> Iterator[Image.Image]:
    """The one picture of a file as Pillow opens it, by our limit of size instead of Pillow's."""
    with _decoding():
        with _opening:
            usual, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                picture = Image.open(io.BytesIO(data))
            finally:
                Image.MAX_IMAGE_PIXELS = usual
        with picture:
            _check_size(picture.size, max_pixels)
            num_frames = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)
            if num_frames > 1:
                raise ImageError(f"it holds {num_frames} pictures, not one; write that one alone")
            yield picture


def _pillow(data: Any, max_pixels: int) -> Planes:
    with _opened(data, max_pixels) as picture:
        if picture.format in ("JPEG", "MPO"):
            _refuse_cut(not _has_end(bytes(data), b"\xff\xda"))
        elif picture.format == "WEBP":
            zeros = len(data) - len(bytes(data).rstrip(b"\0"))
            # A flat lower part comes out as zeros too, in the lossy kind, but in few of them.
            is_lossy = b"VP8 " in bytes(data[:4096])
            _refuse_cut(zeros > (max(64, math.prod(picture.size) // 4000) if is_lossy else 8))
        upright: Image.Image = picture
        if picture.getexif().get(ExifTags.Base.Orientation) is not None:
            upright = ImageOps.exif_transpose(picture)
        if upright.mode in _TO_RGB:
            upright = upright.convert(_TO_RGB[upright.mode])
        array, has_alpha = np.asarray(upright), upright.mode in ("LA", "RGBA", "La", "RGBa")
    return Planes(_real(_last_to_first(array)), has_alpha)


def _last_to_first(array: np.ndarray) -> np.ndarray:
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)


def _netpbm(data: bytes) -> Planes | None:
    """PGM and PPM of another depth than 8 bits, which Pillow stretches or cuts to 8 or 16."""
    found = re.match(rb"P([2356])" + 3 * rb"(?:\s|#[^\n]*\n)+(\d+)" + rb"\s", data)
    if found is None or int(found[4]) == 255:
        return None
    kind, width, height, largest = map(int, found.groups())
    dtype, body = np.dtype(np.uint8 if largest < 256 else ">u2"), data[found.end() :]
    with _decoding():
        if kind < 4:
            numbers = np.array(re.sub(rb"#[^\n]*", b"", body).split(), np.int64)
        else:
            numbers = np.frombuffer(body, dtype)
        planes = _last_to_first(numbers.reshape(height, width, 3 if kind in (3, 6) else 1))
    if planes.size and not 0 <= planes.min() <= planes.max() <= largest < 65536:
        raise ImageError(f"it holds {planes.max()}; its largest value is said to be {largest}")
    white = None if largest == 65535 else float(largest)
    return Planes(_real(planes.astype(dtype)), white=white)


def _png(data: bytes, max_pixels: int) -> Planes:
    """Pillow keeps one byte of two, and does not look at checksums."""
    orientation = 1
    with _decoding():
        _check_size(struct.unpack(">II", data[16:24]), max_pixels)
        planes = _last_to_first(imagecodecs.png_decode(data))
    if b"acTL" in data[:999] or b"eXIf" in data:
        with _opened(data, max_pixels) as picture:
            orientation = int(picture.getexif().get(ExifTags.Base.Orientation) or 1)
    return Planes(_real(_upright(planes, orientation)), has_alpha=len(planes) in (2, 4))


def _jpeg2000(data: bytes, max_pixels: int) -> Planes:
    """Pillow stretches 12 or 15 bits to 16, and colours to 8."""
    with _decoding():
        stream = data[data.find(_JPEG2000) :]
        x1, y1, x0, y0 = struct.unpack(">4I", stream[8:24])
        depth = (stream[42] & 127) + 1
        _check_size((x1 - x0, y1 - y0), max_pixels)
        _refuse_cut(not _has_end(stream, b"\xff\x90"))
        if depth <= 8:
            return _pillow(data, max_pixels)
        planes = _last_to_first(imagecodecs.jpeg2k_decode(data))
    white = float(2**depth - 1) if planes.dtype == np.uint16 and depth < 16 else None
    return Planes(_real(planes), has_alpha=len(planes) in (2, 4) and white is None, white=white)


# TIFF ---------------------------------------------------------------------------------------------

_TAGS_READ = (
    _PHOTOMETRIC, _ABOUT, _ORIENTATION, _INK_SET, _EXTRA_SAMPLES, _GEO_KEYS, _GDAL_METADATA,
    _GDAL_NO_DATA,
) = 262, 270, 274, 332, 338, 34735, 42112, 42113  # fmt: skip
_PAGE_NAME, _ALPHA = 285, (1, 2)  # of ExtraSamples: associated and unassociated alpha
#: Compressions that come back as RGB; whose parts end in a mark; whose decoders go on over zeros.
_JPEG, _MARKED = (6, 7, 33007, 34892), (7, 33003, 33004, 33005, 34712)
_UNCHECKED = (5, 32773, 50001, *_MARKED)
#: Colours of 8 bits that Pillow turns into RGB.
_PILLOWS = (PHOTOMETRIC.PALETTE, PHOTOMETRIC.SEPARATED, PHOTOMETRIC.YCBCR)


class _About(NamedTuple):
    """What a TIFF says of its numbers."""

    axes: str
    tags: dict[int, Any]
    bits: int | tuple[int, ...]
    is_jpeg: bool
    names: PlaneNames


class _Layout(NamedTuple):
    """Where the numbers of an uncompressed TIFF lie: between all the bytes before and after."""

    head: bytes
    tail: bytes
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    about: _About

    def array(self, data: memoryview) -> np.ndarray | None:
        """The numbers of a file that is the same otherwise; None for another file."""
        start, stop = len(self.head), len(data) - len(self.tail)
        if data[:start] != self.head or data[stop:] != self.tail:
            return None
        return np.frombuffer(data[start:stop], self.dtype).reshape(self.shape)


#: By the length of the file; tifffile takes several times as long to find the same.
_layouts: dict[int, _Layout] = {}


def _tiff(data: memoryview, num_channels: int | None, max_pixels: int) -> Planes:
    layout = _layouts.get(len(data))
    array = None if layout is None else layout.array(data)
    if array is not None and layout is not None:
        return _as_tagged(array, layout.about, num_channels, None)
    with _decoding(), tifffile.TiffFile(io.BytesIO(data)) as file:
        series, masks = _the_series(file.series)
        page, start = series.keyframe, series.dataoffset
        size = (page.imagewidth, page.imagelength)
        _check_size(size, max_pixels)
        _refuse_cut(start is None and any(_is_part_cut(data, part) for part in series.pages))
        array, header = series.asarray(), (series.shape, series.dtype)
        valid = masks[0].asarray() if masks else None
        tags = {tag.code: tag.value for tag in page.tags if tag.code in _TAGS_READ}
        names = _tiff_names(file, tags, math.prod(header[0]) // math.prod(size))
        is_jpeg, dtype = page.compression in _JPEG, array.dtype.newbyteorder(file.byteorder)
        about = _About(series.axes, tags, page.bitspersample, is_jpeg, names)
    if (array.shape, array.dtype) != header:
        raise ImageError(
            f"it decodes to {array.shape} {array.dtype}, its header says {header[0]} {header[1]}"
        )
    if tags.get(_PHOTOMETRIC) in _PILLOWS and array.dtype == np.uint8 and not is_jpeg:
        if tags.get(_INK_SET, 1) == 1:
            colours = _pillow(data, max_pixels).image
            return _as_tagged(array, about, num_channels, valid, colours)
    elif valid is None and start is not None:
        _keep_layout(data, start, _Layout(b"", b"", dtype, array.shape, about), array)
    return _as_tagged(array, about, num_channels, valid)


def _tiff_names(file: tifffile.TiffFile, tags: dict[int, Any], count: int) -> PlaneNames:
    """What OME, GDAL, ImageJ, Micro-Manager or the pages' own names call the planes."""
    page, about = file.pages.first, str(tags.get(_ABOUT, ""))
    if page.is_ome and file.ome_metadata:
        return ome_names(file.ome_metadata)
    if _GDAL_METADATA in tags:
        return gdal_names(str(tags[_GDAL_METADATA]), count, about)
    names: Any = (file.imagej_metadata or {}).get("Labels")
    if page.is_micromanager:
        names = ((file.micromanager_metadata or {}).get("Summary") or {}).get("ChNames")
    if names is None and _PAGE_NAME in page.tags and count == len(file.pages):
        names = [p.aspage().tags.valueof(_PAGE_NAME, "") for p in file.pages]
    satellite = satellite_of(about)
    if not isinstance(names, (list, tuple)) or len(names) != count:
        return PlaneNames(satellite=satellite)
    return PlaneNames(channels_of([str(n) for n in names], (), satellite), satellite)


def _is_part_cut(data: memoryview, page: Any) -> bool:
    """Whether a strip or tile ends beyond the file, or in zeros where no decoder would mind."""
    parts = () if page is None else zip(page.dataoffsets, page.databytecounts, strict=False)
    for stop, size in ((start + size, size) for start, size in parts if size):
        tail = bytes(data[max(stop - 32, stop - size) : stop])
        is_blank = page.compression in _UNCHECKED and not tail.strip(b"\0")
        if (
            stop > len(data)
            or is_blank
            or (page.compression in _MARKED and b"\xff\xd9" not in tail)
        ):
            return True
    return False


def _keep_layout(data: memoryview, start: int, layout: _Layout, array: np.ndarray) -> None:
    """Remember where the numbers lie, if they are found there."""
    stop = start + array.nbytes
    if stop > len(data) or len(data) - array.nbytes > 2**16:
        return
    layout = layout._replace(head=bytes(data[:start]), tail=bytes(data[stop:]))
    found = layout.array(data)
    if found is not None and np.array_equal(found, array, equal_nan=array.dtype.kind == "f"):
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
    if "Y" not in axes or "X" not in axes or array.size == 0:
        raise ImageError(f"axes {axes} of {array.shape} are not those of an image")
    array = np.moveaxis(array, (axes.index("Y"), axes.index("X")), (-2, -1))
    outer = [a for a in axes if a not in "YX"]
    several = [f"{a} ({n})" for a, n in zip(outer, array.shape, strict=False) if n > 1]
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
    array: np.ndarray,
    about: _About,
    num_channels: int | None,
    mask: np.ndarray | None,
    colours: np.ndarray | None = None,
) -> Planes:
    """The planes of an array and its mask with what the tags say of them applied.

    The colours of a palette or of inks, upright, come beside the numbers that stand for them.
    """
    tags, planes = about.tags, _one_axis(array, about.axes, num_channels)
    valid = None if mask is None else _fitting(mask[None] != 0, planes)
    if _GDAL_NO_DATA in tags:
        valid = _both(valid, has_data(planes, tags[_GDAL_NO_DATA]))
    orientation, white = int(tags.get(_ORIENTATION, 1)), None
    valid = None if valid is None else _upright(valid, orientation)
    if colours is None:
        planes, white = _colours(_upright(planes, orientation), about)
    else:
        planes, valid = colours, None if valid is None else np.asarray(valid.all(0, keepdims=True))
    extra = np.atleast_1d(tags.get(_EXTRA_SAMPLES, ()))
    has_alpha = len(extra) > 0 and int(extra[-1]) in _ALPHA and len(planes) > 1
    has_alpha = has_alpha and not about.names.last_is_a_band
    if has_alpha and _GEO_KEYS in tags:
        # GDAL calls the fourth of four bands of 8 bits alpha, whatever it is.
        has_alpha = is_mask(planes[-1])
        valid = _both(valid, planes[-1:] != 0) if has_alpha else valid
    return Planes(planes, has_alpha, white, valid, about.names)


def _fitting(mask: np.ndarray, planes: np.ndarray) -> np.ndarray:
    """A mask of an image's size: one plane, or one each."""
    if mask.shape[1:] != planes.shape[1:]:
        raise ImageError(f"its mask is {mask.shape[1:]}, its image {planes.shape[1:]}")
    return mask if len(mask) == len(planes) else np.asarray(mask.all(0, keepdims=True))


def is_mask(plane: np.ndarray) -> bool:
    """Whether a plane holds 0 and one other number, its largest, at most."""
    return bool(np.isin(plane, (0, plane.max())).all())


def _both(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    """Where there is data by two masks, each of which may be missing."""
    if first is None or second is None:
        return first if second is None else second
    return np.logical_and(first, second)


def has_data(planes: np.ndarray, text: object) -> np.ndarray | None:
    """Where the planes hold another value than a no-data value; None where all do."""
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
    if not 1 <= orientation <= 8:
        raise ImageError(f"its orientation is {orientation}, there are 1 to 8")
    planes = planes.swapaxes(-1, -2) if orientation >= 5 else planes
    down, across = (-1 if orientation in x else 1 for x in ((3, 4, 7, 8), (2, 3, 6, 7)))
    return planes[..., ::down, ::across]


def _colours(planes: np.ndarray, about: _About) -> tuple[np.ndarray, float | None]:
    """Gray, RGB or bands, whatever the samples stand for; and what white is, if not the type's."""
    if _PHOTOMETRIC not in about.tags:
        raise ImageError("it does not say what its numbers stand for (PhotometricInterpretation)")
    depths = {about.bits} if isinstance(about.bits, int) else set(about.bits)
    if len(depths) > 1:
        raise ImageError(f"its planes have different depths, {about.bits} bits")
    (depth,), is_whole, white = depths, planes.dtype.kind == "u", None
    if is_whole and depth not in (1, 8 * planes.dtype.itemsize):
        white = float(2**depth - 1)
    photometric = int(about.tags[_PHOTOMETRIC])
    is_plain = photometric in (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.RGB)
    if is_plain or (photometric == PHOTOMETRIC.YCBCR and about.is_jpeg):
        return planes, white
    if photometric == PHOTOMETRIC.MINISWHITE and is_whole:
        return planes.dtype.type(white or np.iinfo(planes.dtype).max) - planes, white
    photometrics = {item.value: item.name for item in PHOTOMETRIC}
    photometrics |= {0: "such that its white is zero", 5: "CMYK or other inks"}
    name = photometrics.get(photometric, photometric)
    raise ImageError(f"its colours are {name}, in {planes.dtype}; write it as RGB or as bands")


def _with_sidecars(planes: Planes, path: str, max_pixels: int) -> Planes:
    """The planes with what GDAL wrote into files beside the image: a mask, names, scales."""
    valid, names = planes.valid, planes.names
    if os.path.isfile(path + ".msk"):
        mask = decode(read_bytes(path + ".msk"), None, max_pixels).image != 0
        valid = _both(valid, _fitting(mask, planes.image))
    if os.path.isfile(path + ".aux.xml"):
        text = bytes(read_bytes(path + ".aux.xml")).decode(errors="replace")
        beside = gdal_names(text, len(planes.image))
        if beside.no_data is not None:
            valid = _both(valid, has_data(planes.image, beside.no_data))
        names = PlaneNames(
            names.channels or beside.channels, names.satellite or beside.satellite,
            names.scaling or beside.scaling,
        )  # fmt: skip
    return replace(planes, valid=valid, names=names)


def read_bytes(path: str | Path) -> Any:
    """A file's bytes, in memory that may be written to."""
    with _decoding():
        data = np.fromfile(path, np.uint8)
    return data.data if data.size else b""
