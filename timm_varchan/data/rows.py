"""From a row of a source to its image: a file, a file a channel, or a row of a table."""

from __future__ import annotations

import copy
import logging
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from timm_varchan.channels import ChannelSet
from timm_varchan.data.decode import Planes, Reading, planes_first
from timm_varchan.data.lists import Files
from timm_varchan.data.planes import read_planes
from timm_varchan.data.sources import Rows
from timm_varchan.data.transforms import scale_values
from timm_varchan.errors import ImageError, UserError
from timm_varchan.input_spec import InputSpec

logger = logging.getLogger(__name__)

#: How the error about a row ends.
ROW_CURE = (
    ". Repair it or take it out, or leave such rows out with --skip-corrupt (skip_corrupt=True)."
)
#: Bytes at the beginning, in the middle and at the end by which an image is known again.
_HASHED = 4096


class RowReader:
    """Reads the images of one split by row: files, or rows of a `datasets.Dataset`.

    Args:
        rows: Files, or a table whose column holds `Image`, bytes, text (a path) or arrays.
        column: The column of the images.
        split: Name of the split, for errors.
        folder: What relative paths start from.
        spec: What becomes of decoded planes; another one once the channels are settled.
        row_names: What errors call the rows; their numbers by default.

    Raises:
        UserError: The column holds no images.
    """

    def __init__(
        self,
        rows: Rows,
        column: str,
        split: str,
        folder: Path,
        spec: InputSpec,
        row_names: Sequence[str] | None = None,
    ) -> None:
        self.split, self._folder, self._row_names = split, str(folder), row_names
        self._column, self._array_type = column, ""
        self._rows = rows if isinstance(rows, Files) else self._images_of(rows)
        self._known: dict[int, int] = {}
        self.use(spec)

    def use(
        self, spec: InputSpec, order: Sequence[int] = (), stored: ChannelSet | None = None
    ) -> None:
        """Read as this says from now on; of images in several files, these files in this order.

        Files that name no planes hold the stored channels, by default those of the spec.
        """
        self._reading, self._order, self.spec = Reading(spec, stored), tuple(order), spec

    def with_planes(self, planes: Sequence[int], channels: ChannelSet) -> RowReader:
        """A reader of these planes alone, called by these channels."""
        chosen, spec, files = copy.copy(self), replace(self.spec, channels=channels), self._order
        stored = None if list(planes) == list(range(len(self.channels))) else self.channels
        if isinstance(self._rows, Files) and isinstance(self._rows.paths[0], tuple):
            files = tuple((files or range(len(self.channels)))[place] for place in planes)
            stored = None
        chosen.use(spec, files, stored)
        return chosen

    def _images_of(self, table: datasets.Dataset) -> datasets.Dataset:
        """The column of images with its values as they are stored."""
        column, feature = self._column, table.features[self._column]
        table = table.select_columns([column])
        if isinstance(feature, datasets.Image):
            return table.cast_column(column, datasets.Image(decode=False)).with_format("arrow")
        if isinstance(feature, (datasets.Array2D, datasets.Array3D)):
            self._array_type = feature.dtype
            return table.with_format("numpy")
        if is_encoded(feature):
            return table.with_format("arrow")
        raise UserError(
            f"Column {column!r} of {self.split} holds {feature}, not images. Name the column with "
            f"--image-column: Image, binary, paths, {{bytes, path}}, Array2D or Array3D."
        )

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def channels(self) -> ChannelSet:
        """The planes of every image, in order."""
        return self.spec.channels

    def __call__(self, row: int) -> Tensor:
        """The image `(C, H, W)` of a row; a `UserError` names the row, the file, the cure."""
        try:
            value = self._value(row)
            if isinstance(value, tuple) and None in value:
                return self._incomplete(value)
            return self._reading.image(self._decoded(value))
        except ImageError as error:
            raise UserError(self.where(row, f"cannot be read: {error}") + ROW_CURE) from error

    def planes(self, row: int) -> Planes:
        """The decoded planes of a row; an `ImageError` says why there are none."""
        value = self._value(row)
        return self._decoded(tuple(v for v in value if v) if isinstance(value, tuple) else value)

    def image_of(self, planes: Planes) -> Tensor:
        """The image that the planes of a row become."""
        return self._reading.image(planes)

    def _incomplete(self, files: tuple[str | None, ...]) -> Tensor:
        """An image of which files are missing: their planes are NaN."""
        there = [place for place, file in enumerate(files) if file is not None]
        part = replace(self.spec, channels=self.channels.take(there))
        read = Reading(part).image(self._decoded(tuple(files[place] for place in there)))
        image = torch.full((len(files), *read.shape[1:]), torch.nan)
        image[there] = scale_values(read)
        return image

    def _decoded(self, value: Any) -> Planes:
        if isinstance(value, tuple):
            return read_planes(value, self._folder, self._reading)
        if isinstance(value, np.ndarray):
            return Planes(planes_first(value, self._reading.num_planes))
        return self._reading.decode(stored_image(value, self._folder))

    def _value(self, row: int) -> Any:
        if isinstance(self._rows, Files):
            files = self._rows.paths[row]
            return tuple(files[i] for i in self._order) if self._order else files
        if self._array_type:
            return np.asarray(self._rows[row][self._column]).astype(self._array_type)
        return self._rows[row].column(0)[0].as_py()

    def where(self, row: int, problem: str) -> str:
        """A problem with the split, the row and the file in front of it."""
        name = f"row {row}" if self._row_names is None else self._row_names[row]
        file = self._file(row)
        return f"{self.split} {name}{f' ({file})' if file else ''} {problem}"

    def paths(self, rows: Sequence[int]) -> list[Any] | None:
        """Where the images of these rows lie, a tuple for several files; None in a table."""
        if not isinstance(self._rows, Files):
            return None
        start, found = os.path.join(self._folder, ""), (self._rows.paths[row] for row in rows)
        return [os.path.normpath(start + p) if isinstance(p, str) else p for p in found]

    def say_sizes(self) -> None:
        """A line on files of lower resolution, by those of the first whole image."""
        rows = self._rows.paths if isinstance(self._rows, Files) else []
        files = next((self._value(row) for row, paths in enumerate(rows) if None not in paths), ())
        try:
            shapes = [self._reading.decode(f"{self._folder}/{f}").image.shape[1:] for f in files]
        except ImageError:  # raised again when the image is asked for
            return
        pairs = zip(self.channels, shapes, strict=True)
        low = [f"{c.label} ({s[0]} x {s[1]})" for c, s in pairs if s != max(shapes)]
        if low:
            logger.warning(
                "%s: planes of lower resolution are brought to the finest, %d x %d, by repeated "
                "pixels: %s", self.split, *max(shapes), ", ".join(low),
            )  # fmt: skip

    def missing_files(self) -> dict[int, str]:
        """The rows of which files are missing, and which."""
        found: dict[int, str] = {}
        for row, files in enumerate(self._rows.paths if isinstance(self._rows, Files) else ()):
            if not isinstance(files, tuple) or None not in self._value(row):
                continue
            pairs = zip(self.channels, self._value(row), strict=True)
            lacking = ", ".join(channel.label for channel, file in pairs if file is None)
            found[row] = f"has no file for {lacking}"
        return found

    def name(self, row: int) -> str:
        """The file of a row, else its number."""
        return self._file(row) or f"row {row}"

    def _file(self, row: int) -> str | None:
        value = None if self._array_type else self._value(row)
        if isinstance(value, tuple):
            value = next((file for file in value if file), None)
        value = value.get("path") if isinstance(value, dict) else value
        return value if isinstance(value, str) else None

    def identities(self, rows: Sequence[int]) -> list[int]:
        """A number for the content of every row's image, by what is stored; remembered."""
        new = [row for row in rows if row not in self._known]
        if new and not isinstance(self._rows, Files):
            stored = self._rows.select(new) if len(new) < len(self._rows) else self._rows
            batches = (table for table in stored.with_format("arrow").iter(1000))
            values = (value for table in batches for value in table.column(0).to_pylist())
            self._known.update(zip(new, (_identity(v, self._folder) for v in values), strict=True))
        elif new:
            with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
                paths = (self._rows.paths[row] for row in new)
                found = threads.map(lambda p: _identity(p, self._folder), paths, chunksize=256)
                self._known.update(zip(new, found, strict=True))
        return [self._known[row] for row in rows]


def is_encoded(feature: Any) -> bool:
    """Whether a column holds bytes, paths, or `{bytes, path}` without a note that says images."""
    if isinstance(feature, dict):
        return "bytes" in feature
    return getattr(feature, "dtype", None) in ("binary", "large_binary", "string", "large_string")


def stored_image(value: Any, folder: str = "") -> bytes | str:
    """The bytes of an image that a row holds, or its path.

    Raises:
        ImageError: The row is empty.
    """
    if isinstance(value, dict):
        value = value.get("path") if value["bytes"] is None else value["bytes"]
    if value is None:
        raise ImageError("the row is empty")
    return value if isinstance(value, bytes) else os.path.join(folder, value)


def _identity(value: Any, folder: str) -> int:
    """A number for the content: size, beginning, middle, end; for the path of what is not there."""
    found = 0
    for part in value if isinstance(value, tuple) else (value,):
        part = part.get("bytes") or part.get("path") if isinstance(part, dict) else part
        if isinstance(part, str):
            part = _pieces_of(os.path.join(folder, part))
        elif isinstance(part, bytes):
            size = len(part)
            part = b"".join([part[s : s + _HASHED] for s in _places(size)]) + b"%d" % size
        else:
            part = repr(part).encode()
        found = zlib.crc32(part, found >> 32) << 32 | zlib.adler32(part, found & 0xFFFFFFFF)
    return found


def _pieces_of(path: str) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            pieces = []
            for start in _places(size):
                file.seek(start)
                pieces.append(file.read(_HASHED))
            return b"".join(pieces) + b"%d" % size
    except OSError:
        return path.encode()


def _places(size: int) -> tuple[int, ...]:
    return (0,) if size <= _HASHED else (0, size // 2, max(_HASHED, size - _HASHED))
