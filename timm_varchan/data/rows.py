"""Images in the rows of a `datasets.Dataset`: encoded, as paths, as `np.save` bytes, as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch import Tensor

from timm_varchan.channels import RGB, ChannelSet
from timm_varchan.data.images import (
    DECODE_ERRORS,
    Planes,
    decode_planes,
    decode_reason,
    fit_planes,
    planes_from_array,
    to_stored_values,
)
from timm_varchan.data.split import ROW_CURE

_NUM_LOOKED_AT = 16


class RowSource:
    """Raw images of one split, by row.

    Args:
        table: The rows.
        column: The column of the images: `Image`, binary, text (a path) or `Array2D`/`Array3D`.
        split: Name of the split, for errors.
        folder: What relative paths start from.
        row_names: What errors call the rows; their numbers by default.

    Raises:
        ValueError: The column holds no images.
    """

    def __init__(
        self,
        table: datasets.Dataset,
        column: str,
        split: str,
        folder: Path,
        row_names: Sequence[str] | None = None,
    ) -> None:
        feature = table.features[column]
        self._column, self._split, self._folder = column, split, folder
        self._row_names = row_names
        self._array_type: str | None = None
        table = table.select_columns([column])
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
        elif isinstance(feature, (datasets.Array2D, datasets.Array3D)):
            self._array_type = feature.dtype
            table = table.with_format("numpy")
        elif getattr(feature, "dtype", None) not in ("binary", "large_binary", "string"):
            raise ValueError(
                f"Column {column!r} of {split} holds {feature}, not images. Name the column with "
                f"--image-column: Image, binary, paths, Array2D or Array3D."
            )
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def planes(self, row: int, num_channels: int | None = None) -> Planes:
        """Decode a row.

        Raises:
            ValueError: It cannot be read; names the split, the row, the file and the cure.
        """
        try:
            value = self._table[row][self._column]
            if self._array_type is not None:
                array = np.asarray(value).astype(self._array_type)
                return Planes(planes_from_array(array, num_channels))
            return decode_planes(self._bytes(value), num_channels)
        except DECODE_ERRORS as error:
            raise self.error(row, f"cannot be read: {decode_reason(error)}") from error

    def _bytes(self, value: Any) -> bytes:
        if value is None:
            raise ValueError("the row is empty")
        if isinstance(value, bytes):
            return value
        if isinstance(value, dict):
            if value["bytes"] is not None:
                return value["bytes"]
            value = value["path"]
        return (self._folder / value).read_bytes()

    def where(self, row: int, problem: str) -> str:
        """A problem with the split, the row and the file in front of it."""
        file = self._table[row][self._column] if self._array_type is None else None
        if isinstance(file, dict):
            file = file.get("path")
        named = f" ({file})" if isinstance(file, str) else ""
        name = f"row {row}" if self._row_names is None else self._row_names[row]
        return f"{self._split} {name}{named} {problem}"

    def error(self, row: int, problem: str) -> ValueError:
        """An error that names the split, the row, the file and the cure."""
        return ValueError(self.where(row, problem) + ROW_CURE)


class RowReader:
    """Reads the image of a row with the channels of the data set.

    Args:
        source: The raw images.
        channels: The planes of every image.
        value_scale: What stored numbers are divided by, or None.
    """

    def __init__(
        self, source: RowSource, channels: ChannelSet, value_scale: float | None = None
    ) -> None:
        self.source, self.channels, self._value_scale = source, channels, value_scale

    def __call__(self, row: int) -> Tensor:
        """The image `(C, H, W)` of a row; a `ValueError` names the row, the file, the cure."""
        planes = self.source.planes(row, len(self.channels))
        try:
            image = fit_planes(planes, self.channels)
        except ValueError as error:
            raise self.source.error(row, f"does not fit: {error}; see --channels") from error
        return to_stored_values(image, self._value_scale)


def guess_channels(source: RowSource) -> ChannelSet:
    """The channels of images about which nothing was said: RGB for three planes, else anonymous.

    A look at some rows spread over the split: gray images among coloured ones count as RGB.

    Raises:
        ValueError: None of them can be read, or they differ in their number of planes.
    """
    num_rows = len(source)
    counts: dict[int, int] = {}
    failure: ValueError | None = None
    for row in range(0, num_rows, max(1, num_rows // _NUM_LOOKED_AT)):
        try:
            counts.setdefault(source.planes(row).num_planes, row)
        except ValueError as error:
            failure = failure or error
    if not counts and failure is not None:
        raise failure
    if 3 in counts and set(counts) <= {1, 3}:
        return RGB
    if len(counts) > 1:
        found = ", ".join(f"{count} in row {row}" for count, row in counts.items())
        raise ValueError(f"The images differ in their number of planes ({found}). Say --channels.")
    return ChannelSet.anonymous(next(iter(counts)))
