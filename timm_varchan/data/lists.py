"""Lists and tables of images: CSV, TSV, JSON Lines, `path label` lines; header or none.

A table says which files are images, their labels and perhaps their split. Where its files lie is
found once a table: from its folder, from a folder of its own name or `images/`, and without the
folders in front that only another computer has.
"""

from __future__ import annotations

import bisect
import csv
import functools
import io
import json
import logging
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from timm_varchan.data.decode import IMAGE_SUFFIXES
from timm_varchan.data.labels import several_labels
from timm_varchan.data.records import Files
from timm_varchan.errors import UserError

logger = logging.getLogger(__name__)

#: What a split is called in sources, by what it is called here, in any case; the first counts.
SPLIT_ALIASES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
# Usual names of columns, in lower case; the first that is there counts.
_PATHS = (
    "file_name", "filename", "image_path", "image_file", "filepath", "file_path", "path", "file",
    "image", "img", "image_name", "image_id", "id_code", "name", "id",
)  # fmt: skip
_LABELS = (
    "class_name", "classname", "label_name", "label", "labels", "class", "category", "target", "y",
)  # fmt: skip
_SPLITS = ("split", "subset", "partition", "set")
_NOT_SPLITS = {"label", "labels", "list", "split", "metadata", "images", "data", "set", "files"}
#: Words around the channel in the name of a column of paths, as CellProfiler writes them.
_COLUMN_WORDS = r"^(filename|file|path|image)_(orig)?|_(path|file)$"
_FOLDERS = ("images", "image", "img", "imgs", "data")
_SAMPLE = 16
_ENDING = "(?:" + "|".join(re.escape(end) for end in sorted(IMAGE_SUFFIXES)) + ")"


class Columns(NamedTuple):
    """What somebody says of columns and files.

    Args:
        image: The column of the images.
        label: The column of the labels.
        planes: Which files are one image, as `"{image}_w{channel}.tif"`; `"none"`: each is one.
            Found by the names without it.
        channels: Names of the channels that are asked for, which names of files may say.
    """

    image: str | None = None
    label: str | None = None
    planes: str | None = None
    channels: tuple[str, ...] = ()


NO_COLUMNS = Columns()


def natural(text: str) -> list[Any]:
    """A sorting key that has `w2` before `w10`."""
    return [int(part) if part.isdigit() else part.lower() for part in re.split(r"(\d+)", text)]


def split_of(name: str, names: Iterable[str]) -> str | None:
    """The split that a table is of by its name (`train`, `val_labels`), None for others."""
    if name in names:
        return _alias(name) or name
    words = [w for w in re.split(r"[_\-. ]", name.lower()) if w and w not in _NOT_SPLITS]
    return _alias(words[0]) if len(words) == 1 else None


def _alias(name: str) -> str | None:
    return next((s for s, usual in SPLIT_ALIASES.items() if name.lower() in usual), None)


def read_table(
    path: Path, folder: Path, columns: Columns, is_asked: bool
) -> dict[str | None, Files] | None:
    """The rows of a table by what it calls their split, None where it says nothing of that.

    Args:
        path: The table.
        folder: What the paths of the result start from.
        columns: Names of its columns, where somebody says them.
        is_asked: Refuse a table that lists no images that are here; without it the result is None.

    Raises:
        UserError: Lines that are not understood, columns that are not there, labels that are none.
    """
    table = _cells(path)
    if not table or not len(next(iter(table.values()))):
        return {None: Files([], [])} if is_asked else None
    images = _image_columns(table, columns.image, path, is_asked)
    place = _place([x for c in images for x in _sample(table[c])], path)
    for column in table if place is None and columns.image is None else ():
        if place is None:
            images, place = [column], _place(_sample(table[column]), path)
    if not images or place is None:
        if is_asked:
            shown = _sample(table[images[0]])[:1] if images else list(table)
            raise UserError(
                f"{path} names no image that is here (its first: {', '.join(map(str, shown))}). "
                f"Paths start at the table's folder; --image-column says which column they are in."
            )
        logger.warning("left out %s, which lists no images that are here", path)
        return None
    label = _label_column(table, images, columns.label, path)
    if label is None:
        logger.warning("left out %s, which has no labels", path)
        return None
    columns_of = [place.files(table[column], folder) for column in images]
    paths: list[Any] = list(zip(*columns_of, strict=True)) if len(images) > 1 else columns_of[0]
    names = [re.sub(_COLUMN_WORDS, "", c, flags=re.I) for c in images] if len(images) > 1 else []
    labels = [_label(value, path) for value in table[label]]
    split = usual_column(table, _SPLITS)
    parts: dict[str | None, Files] = {}
    for row, name in enumerate(table[split] if split else [None] * len(labels)):
        part = parts.setdefault(name and str(name).strip(), Files([], [], planes=tuple(names)))
        part.paths.append(paths[row])
        part.labels.append(labels[row])
    return parts


# Cells --------------------------------------------------------------------------------------------


def _cells(path: Path) -> dict[str, list[Any]]:
    """The columns of a table; those of one without a header are called by their place."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}. Save it as UTF-8.") from error
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return {}
    if path.suffix.lower() == ".jsonl":
        return _json_cells(lines, path)
    rows = _rows(lines, path)
    if not rows:
        return {}
    width = max(map(len, rows))
    short = next((i for i, row in enumerate(rows) if len(row) < min(width, 2)), None)
    if short is not None:
        raise UserError(f"{path} line {short + 1} is {lines[short]!r}; it needs 'path label'.")
    names = [str(i) for i in range(width)]
    if path.suffix != ".txt" and _is_header(rows):
        names = [name.strip() or str(i) for i, name in enumerate(rows.pop(0))]
        names += [str(i) for i in range(len(names), width)]
    return {name: [r[i] if i < len(r) else "" for r in rows] for i, name in enumerate(names)}


def _json_cells(lines: Sequence[str], path: Path) -> dict[str, list[Any]]:
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path} line {number} is no JSON: {error}.") from error
        if not isinstance(record, dict):
            raise UserError(f"{path} line {number} is no JSON object, as {{...}}.")
        records.append(record)
    return {n: [r.get(n) for r in records] for n in dict.fromkeys(n for r in records for n in r)}


def _rows(lines: Sequence[str], path: Path) -> list[list[str]]:
    """The cells of every line, by what separates them in all."""
    order = "\t;," if path.suffix == ".tsv" or path.suffix == ".txt" else ",;\t"
    separates = [
        mark
        for mark in order
        if all(mark in line for line in lines)
        and (
            path.suffix != ".txt" or mark == "\t" or re.search(_ENDING + rf'"?\s*{mark}', lines[0])
        )
    ]
    if not separates and path.suffix == ".txt":
        return [_words(line) for line in lines]
    mark = max(separates or order, key=lambda m: min(line.count(m) for line in lines))
    return [
        [c.strip() for c in row]
        for row in csv.reader(io.StringIO("\n".join(lines)), delimiter=mark)
    ]


def _words(line: str) -> list[str]:
    """Path and label of a line; the path may hold spaces, after an image's ending the label too."""
    found = re.fullmatch(rf"(.*{_ENDING})\s+(\S.*?)\s*", line, flags=re.I)
    return list(found.groups()) if found else [part.strip() for part in line.rsplit(maxsplit=1)]


def _is_header(rows: Sequence[Sequence[str]]) -> bool:
    first = [cell.strip().lower() for cell in rows[0]]
    if any(_is_image(cell) for cell in first):
        return False
    usual = {*_PATHS, *_LABELS, *_SPLITS}
    cells = {cell.lower() for row in rows[1:] for cell in row}
    return bool(usual & set(first)) or any(_is_image(c) for c in cells) or not set(first) & cells


def _is_image(value: Any) -> bool:
    return isinstance(value, str) and os.path.splitext(value)[1].lower() in IMAGE_SUFFIXES


def _sample(values: Sequence[Any]) -> list[Any]:
    some = values[:: max(1, len(values) // _SAMPLE)][:_SAMPLE]
    return [value for value in some if value not in (None, "")]


# Columns ------------------------------------------------------------------------------------------


def usual_column(table: Iterable[str], names: Sequence[str]) -> str | None:
    """The column that has the first of the usual names which is there, in any case."""
    lower = {column.lower(): column for column in table}
    return next((lower[name] for name in names if name in lower), None)


def _image_columns(
    table: dict[str, list[Any]], asked: str | None, path: Path, is_asked: bool
) -> list[str]:
    """The column of the paths, or one a channel."""
    if asked is not None and (asked in table or is_asked):
        return [asked_column(table, asked, "images", path, "--image-column")]
    like = [c for c in table if (some := _sample(table[c])) and all(map(_is_image, some))]
    usual = usual_column(like, _PATHS)
    if usual is not None or len(like) == 1:
        return [usual or like[0]]
    if like:
        return [c for c in like if "mask" not in c.lower()] or like[:1]
    usual = usual_column(table, _PATHS)
    if usual is None and "0" in table:  # without a header
        usual = "0"
    return [usual] if usual is not None else []


def asked_column(table: Iterable[str], asked: str, what: str, where: object, flag: str) -> str:
    """The column that somebody names, refused where there is no such one."""
    if asked not in table:
        raise UserError(
            f"{where} has no column {asked!r} for the {what}; it has {', '.join(table)}. Name it "
            f"with {flag}."
        )
    return asked


def _label_column(
    table: dict[str, list[Any]], images: Sequence[str], asked: str | None, path: Path
) -> str | None:
    """The column of the labels; None where a table has none, as a test set's may."""
    if asked is not None:
        return asked_column(table, asked, "labels", path, "--label-column")
    rest = [
        c for c in table if c not in images and c.lower() not in (*_SPLITS, "index", "unnamed: 0")
    ]
    usual = usual_column(rest, _LABELS)
    if usual is not None or len(rest) < 2:
        return usual or (rest[0] if rest else None)
    flags = [
        c for c in rest if {str(x) for x in table[c]} <= {"0", "1", "0.0", "1.0", "True", "False"}
    ]
    if len(flags) > 1:
        raise several_labels(f"{path} has a column a class ({', '.join(flags[:4])}, ...)")
    raise UserError(
        f"{path} has no column for the labels that is called one of {', '.join(_LABELS)}; it has "
        f"{', '.join(table)}. Name it with --label-column."
    )


def _label(value: Any, path: Path) -> Any:
    if isinstance(value, (list, dict)):
        raise several_labels(f"{path} has the label {json.dumps(value)[:60]}")
    if isinstance(value, str):
        value = value.strip()
    return None if value in ("", "nan", "NaN") else value if value is None else str(value)


# Where the files are ------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def listing(folder: str) -> tuple[str, ...]:
    """The visible names in a folder, sorted; none where there is no such folder."""
    try:
        return tuple(sorted(name for name in os.listdir(folder) if not name.startswith(".")))
    except (FileNotFoundError, NotADirectoryError):
        return ()


class _Place(NamedTuple):
    """Where a table's paths start, and how many folders in front of them are another computer's."""

    base: str
    num_cut: int

    def path(self, value: Any) -> str:
        parts = str(value).strip().replace("\\", "/").split("/")
        return os.path.normpath(os.path.join(self.base, "/".join(parts[self.num_cut :])))

    def found(self, value: Any) -> list[str]:
        """The files of an image: the file itself, those in a folder, or that begin like it."""
        path = self.path(value)
        if _is_image(path) and os.path.exists(path):
            return [path]
        if os.path.isdir(path):
            return [os.path.join(path, name) for name in listing(path) if _is_image(name)]
        folder, name = os.path.split(path)
        names, found = listing(folder), []
        for file in names[bisect.bisect_left(names, name) :]:
            if not file.startswith(name):
                break
            if _is_image(file) and not file[len(name)].isalnum():
                found.append(file)
        exact = [file for file in found if os.path.splitext(file)[0] == name]
        return [os.path.join(folder, file) for file in exact or found]

    def files(self, values: Sequence[Any], folder: Path) -> list[Any]:
        """A path from the folder for every value, a tuple where it means several files."""
        start = os.path.join(str(folder), "")
        result: list[Any] = []
        for value in values:
            if value in (None, ""):
                result.append(None)
                continue
            found = [self.path(value)] if _is_image(value) else self.found(value)
            short = [p[len(start) :] if p.startswith(start) else os.path.abspath(p) for p in found]
            result.append(tuple(short) if len(short) > 1 else short[0] if short else str(value))
        return result


def _last(place: _Place) -> str:
    return os.path.basename(place.base)


def _place(values: Sequence[Any], table: Path) -> _Place | None:
    """Where most of these files are found; None where none is."""
    listing.cache_clear()
    parent = str(table.parent)
    inside = [name for name in listing(parent) if os.path.isdir(os.path.join(parent, name))]
    first = [name for name in (table.stem, *_FOLDERS) if name in inside]
    depth = max((str(v).replace("\\", "/").count("/") for v in values), default=0)
    for num_cut in range(depth + 1):
        for names in ([""], first, [name for name in inside if name not in first]):
            places = [_Place(os.path.join(parent, name), num_cut) for name in names]
            good = [place for place in places if any(place.found(value) for value in values)]
            if len(good) > 1 and names is not first:
                raise UserError(
                    f"{table} names {values[0]!r}, which is in {_last(good[0])}/ and in "
                    f"{_last(good[1])}/. Write paths from the table's folder, or put a table into "
                    f"each folder."
                )
            if good:
                return good[0]
    return None
