"""One record an image: what is stored of it, its name, and a number for its content."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Union

import datasets
import numpy as np

from timm_varchan.errors import UserError

__all__ = ["ROW_CURE", "Files", "Records", "Rows"]

#: How the error about a row ends.
ROW_CURE = (
    ". Repair it or take it out, or leave such rows out with --skip-corrupt (skip_corrupt=True)."
)
#: Bytes at the beginning, in the middle and at the end by which an image is known again.
_HASHED = 4096
#: Files that a thread takes at once: a thread for each costs more than the reading.
_PART = 256


@dataclass(frozen=True)
class Files:
    """Images that lie in files, with their labels.

    Args:
        paths: One an image, from the folder of the data; a tuple where an image is several files,
            None in it for a file that is not there; or a function that makes an array.
        labels: Text, whole numbers, or None.
        are_names: Whether the labels are certainly names, as those of folders.
        planes: What the files of an image are called, where columns of a table say it.
    """

    paths: list[Any]
    labels: list[Any]
    are_names: bool = False
    planes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)


Rows = Union[Files, datasets.Dataset]


class Records:
    """What is stored of the images of one split, by row; `Reading` makes images of it.

    Args:
        rows: Files, or a table whose column holds `Image`, bytes, text (a path) or arrays.
        split: Name of the split, for errors.
        folder: What relative paths start from.
        column: The column of the images.
        row_names: What errors call the rows; their numbers by default.

    Raises:
        UserError: The column holds no images.
    """

    def __init__(
        self,
        rows: Rows,
        split: str,
        folder: str = "",
        column: str = "",
        row_names: Sequence[str] | None = None,
    ) -> None:
        self.split, self._folder, self._row_names = split, folder, row_names
        self._column, self._array_type = column, ""
        self._rows = rows if isinstance(rows, Files) else self._images_of(rows)
        self._known: dict[int, int] = {}

    def _images_of(self, table: datasets.Dataset) -> datasets.Dataset:
        """The column of images with its values as they are stored."""
        column, feature = self._column, table.features[self._column]
        table = table.select_columns([column])
        if isinstance(feature, datasets.Image):
            return table.cast_column(column, datasets.Image(decode=False)).with_format("arrow")
        if isinstance(feature, (datasets.Array2D, datasets.Array3D)):
            self._array_type = feature.dtype
            return table.with_format("numpy")
        dtype, texts = getattr(feature, "dtype", None), ("string", "large_string")
        if dtype in ("binary", "large_binary", *texts) or "bytes" in (
            feature if isinstance(feature, dict) else ()
        ):
            return table.with_format("arrow")
        raise UserError(
            f"Column {column!r} of {self.split} holds {feature}, not images. Name the column with "
            f"--image-column: Image, binary, paths, {{bytes, path}}, Array2D or Array3D."
        )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Any:
        if isinstance(self._rows, Files):
            return self._rows.paths[row]
        if self._array_type:
            return np.asarray(self._rows[row][self._column]).astype(self._array_type)
        return self._rows[row].column(0)[0].as_py()

    @property
    def paths(self) -> list[Any]:
        """Where the images lie, a tuple for several files; nothing where they lie in a table."""
        return self._rows.paths if isinstance(self._rows, Files) else []

    def name(self, row: int) -> str:
        """The file of a row, else its number."""
        return self._file(row) or f"row {row}"

    def where(self, row: int, problem: str) -> str:
        """A problem with the split, the row and the file in front of it."""
        name = f"row {row}" if self._row_names is None else self._row_names[row]
        file = self._file(row)
        return f"{self.split} {name}{f' ({file})' if file else ''} {problem}"

    def _file(self, row: int) -> str | None:
        value = None if self._array_type else self[row]
        if isinstance(value, tuple):
            value = next((file for file in value if file), None)
        value = value.get("path") if isinstance(value, dict) else value
        return None if value is None or isinstance(value, bytes) else str(value)

    def same(self, row: int) -> Any:
        """Where the image of a row lies, one spelling a file."""
        path = self.paths[row]
        start = os.path.join(self._folder, "")
        return os.path.normpath(start + path) if isinstance(path, str) else path

    def identities(self, rows: Sequence[int]) -> list[int]:
        """A number for the content of every row's image, by what is stored; remembered."""
        new = [row for row in rows if row not in self._known]
        if new and not isinstance(self._rows, Files):
            stored = self._rows.select(new) if len(new) < len(self._rows) else self._rows
            batches = (table for table in stored.with_format("arrow").iter(1000))
            values = (value for table in batches for value in table.column(0).to_pylist())
            self._known.update(zip(new, (_identity(v, self._folder) for v in values), strict=True))
        elif new:
            parts = [new[start : start + _PART] for start in range(0, len(new), _PART)]
            with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
                for part, found in zip(parts, threads.map(self._of_files, parts), strict=True):
                    self._known.update(zip(part, found, strict=True))
        return [self._known[row] for row in rows]

    def _of_files(self, rows: Sequence[int]) -> list[int]:
        return [_identity(self.paths[row], self._folder) for row in rows]


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
