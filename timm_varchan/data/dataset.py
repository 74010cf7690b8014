"""A loaded data set: images and labels by split, the channels of the planes, what is measured."""

from __future__ import annotations

import copy
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import datasets
import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from timm_varchan.channels import RGB, ChannelSet, ChannelSetLike, known_channels, seeded_rng
from timm_varchan.data.decode import Planes, Reading, planes_first
from timm_varchan.data.labels import (
    StoredLabels,
    balanced_indices,
    label_problem,
    resolve_labels,
    stored_labels,
)
from timm_varchan.data.sources import SPLIT_ALIASES, Files, Rows, Tables, empty_split, load_tables
from timm_varchan.data.synthetic import (
    DEFAULT_IMG_SIZE,
    DEFAULT_NUM_IMAGES,
    MIN_IMG_SIZE,
    SPLIT_CODES,
    SYNTHETIC_CHANNELS,
    SYNTHETIC_CLASSES,
    SyntheticReader,
)
from timm_varchan.data.transforms import TrainTransform, scale_values
from timm_varchan.errors import ImageError, UserError
from timm_varchan.input_spec import InputSpec
from timm_varchan.measure import ChannelMoments

logger = logging.getLogger(__name__)

#: How the error about a row ends.
ROW_CURE = (
    ". Repair it or take it out, or leave such rows out with --skip-corrupt (skip_corrupt=True)."
)
#: Rows that a warning about skipped ones names.
NUM_NAMED = 5
#: About so many images are looked at for what nobody said: channels and scale;
_NUM_GUESSED_BY = 16
#: and before all are decoded, for the memory that they take.
_NUM_LOOKED_AT = 32
#: Share of the memory that is free which a cache may take.
_CACHE_SHARE = 0.8


# Splits -------------------------------------------------------------------------------------------


class Reader(Protocol):
    """Where a split's images come from; it must pickle, for the workers of a `DataLoader`."""

    @property
    def channels(self) -> ChannelSet:
        """The planes of every image, in order."""
        ...

    def __call__(self, row: int) -> Tensor:
        """The image `(C, H, W)` of a row; a `ValueError` names the row, the file and the cure."""
        ...


class ImageSplit(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Images and labels of one split: `split[i]` is `((C, H, W) uint8|uint16|float32, label)`.

    Args:
        reader: Reads the image of a row.
        labels: Label of every row of the reader.
        rows: The rows of the reader that belong to the split; all by default.
        skipped: Why rows were left out, one text each.
    """

    def __init__(
        self,
        reader: Reader,
        labels: Sequence[int],
        *,
        rows: Sequence[int] | None = None,
        skipped: Sequence[str] = (),
    ) -> None:
        self._reader = reader
        self._rows = list(range(len(labels))) if rows is None else list(rows)
        self._labels = [int(labels[row]) for row in self._rows]
        self.skipped = tuple(skipped)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._reader(self._rows[index]), self._labels[index]

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return (self[i] for i in range(len(self)))

    @property
    def channels(self) -> ChannelSet:
        """The planes of every image, in order."""
        return self._reader.channels

    @property
    def num_skipped(self) -> int:
        """How many rows were left out because they could not be read or had no valid label."""
        return len(self.skipped)

    def labels(self) -> list[int]:
        """The label of every image; nothing is decoded."""
        return list(self._labels)

    def take(self, indices: Sequence[int]) -> ImageSplit:
        """The split with only the images at these positions, in this order."""
        taken = copy.copy(self)
        taken._rows = [self._rows[i] for i in indices]
        taken._labels = [self._labels[i] for i in indices]
        return taken

    def without_unreadable(self) -> ImageSplit:
        """The split without the images that cannot be read: every one is decoded once, in threads.

        Returns:
            A split whose `skipped` tells what was left out; a warning in the log does too.
        """
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
            problems = list(threads.map(self._problem, self._rows))
        left = self.take([i for i, problem in enumerate(problems) if problem is None])
        left.skipped += tuple(problem for problem in problems if problem is not None)
        if left.skipped:
            shown = "; ".join(left.skipped[:NUM_NAMED])
            more = "; ..." if left.num_skipped > NUM_NAMED else ""
            logger.warning("%d images skipped: %s%s", left.num_skipped, shown, more)
        return left

    def _problem(self, row: int) -> str | None:
        try:
            self._reader(row)
        except UserError as error:
            return str(error).removesuffix(ROW_CURE)
        return None


@dataclass(frozen=True)
class ImageData:
    """A loaded data set.

    Args:
        class_names: Name of every label.
        channels: Planes of every image, in order, with mean and standard deviation where known.
        name: What the data is, for results: `synthetic`, a hub name, a folder's name; no path.
        train: Images to learn from, None where the source has none.
        validation: Images to choose by.
        test: Images for the final figures.
        stream: Where training images are streamed, their rows and the names of the image and the
            label column; `train` has only the first of them then.
        reading: How files became images.
        invalid_share: Share of the pixels that hold no data, of the images that were measured.
    """

    class_names: tuple[str, ...]
    channels: ChannelSet
    name: str
    train: ImageSplit | None = None
    validation: ImageSplit | None = None
    test: ImageSplit | None = None
    stream: tuple[datasets.IterableDataset, tuple[str, str]] | None = None
    reading: Reading | None = None
    invalid_share: float = 0.0

    def each(self, change: Callable[[str, ImageSplit], ImageSplit]) -> ImageData:
        """The data with every split that it has changed by a function of name and images."""
        changes: dict[str, Any] = {
            name: change(name, split)
            for name in SPLIT_ALIASES
            if (split := getattr(self, name)) is not None
        }
        return replace(self, **changes)


class TransformedSplit(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Transformed images and labels, ready for a `DataLoader`.

    A resumed run, and one with other workers or processes, sees the same samples. The epoch lies
    in shared memory, so that persistent workers follow `set_epoch` too. Torch's own generator is
    as it was after every image.

    Args:
        split: The images.
        transform: From `(C, H, W)` to what the model takes; draws from torch's default generator.
        seed: Of the augmentation.
    """

    def __init__(self, split: ImageSplit, transform: nn.Module, seed: int = 0) -> None:
        self.split, self.transform, self._seed = split, transform, seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.split)

    def set_epoch(self, epoch: int) -> None:
        """Choose the augmentations of this epoch, before the `DataLoader` is iterated."""
        self._epoch.fill_(epoch)

    def labels(self) -> list[int]:
        """The label of every image; nothing is decoded."""
        return self.split.labels()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.split[index]
        key = seeded_rng("augment", self._seed, int(self._epoch), index).getrandbits(63)
        return seeded_transform(self.transform, image, key), label


def seeded_transform(transform: nn.Module, image: Tensor, key: int) -> Tensor:
    """A transformed image whose chance is the key's; torch's generator is as it was afterwards."""
    if isinstance(transform, TrainTransform):
        return transform.seeded(image, key)
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it reseeds the accelerators too, and in workers queues that.
        torch.default_generator.manual_seed(key)
        return transform(image)


# Rows ---------------------------------------------------------------------------------------------


class RowReader:
    """Reads the images of one split by row: files, or rows of a `datasets.Dataset`.

    Args:
        rows: Files, or a table whose column holds `Image`, bytes, text (a path) or arrays.
        column: The column of the images.
        split: Name of the split, for errors.
        folder: What relative paths start from.
        reading: What becomes of decoded planes; another one once the channels are settled.
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
        reading: Reading,
        row_names: Sequence[str] | None = None,
    ) -> None:
        self.split, self.reading = split, reading
        self._column, self._folder, self._row_names = column, str(folder), row_names
        self._array_type: str | None = None
        self._rows = rows if isinstance(rows, Files) else self._images_of(rows)

    def _images_of(self, table: datasets.Dataset) -> datasets.Dataset:
        """The column of images with its values as they are stored."""
        column, feature = self._column, table.features[self._column]
        table = table.select_columns([column])
        if isinstance(feature, datasets.Image):
            return table.cast_column(column, datasets.Image(decode=False)).with_format("arrow")
        if isinstance(feature, (datasets.Array2D, datasets.Array3D)):
            self._array_type = feature.dtype
            return table.with_format("numpy")
        if getattr(feature, "dtype", None) not in ("binary", "large_binary", "string"):
            raise UserError(
                f"Column {column!r} of {self.split} holds {feature}, not images. Name the column "
                f"with --image-column: Image, binary, paths, Array2D or Array3D."
            )
        return table.with_format("arrow")

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def channels(self) -> ChannelSet:
        """The planes of every image, in order."""
        return self.reading.channels

    def __call__(self, row: int) -> Tensor:
        """The image `(C, H, W)` of a row; a `UserError` names the row, the file, the cure."""
        try:
            return self.reading.image(self._decoded(row))
        except ImageError as error:
            raise self._unreadable(row, error) from error

    def planes(self, row: int) -> Planes:
        """The decoded planes of a row; the same `UserError`."""
        try:
            return self._decoded(row)
        except ImageError as error:
            raise self._unreadable(row, error) from error

    def _decoded(self, row: int) -> Planes:
        value = self._value(row)
        if isinstance(value, np.ndarray):
            return Planes(planes_first(value, self.reading.num_planes))
        return self.reading.decode(stored_image(value, self._folder))

    def _value(self, row: int) -> Any:
        if isinstance(self._rows, Files):
            return self._rows.paths[row]
        if self._array_type is not None:
            return np.asarray(self._rows[row][self._column]).astype(self._array_type)
        return self._rows[row].column(0)[0].as_py()

    def _unreadable(self, row: int, error: ImageError) -> UserError:
        return UserError(self.where(row, f"cannot be read: {error}") + ROW_CURE)

    def where(self, row: int, problem: str) -> str:
        """A problem with the split, the row and the file in front of it."""
        file = self._value(row) if self._array_type is None else None
        if isinstance(file, dict):
            file = file.get("path")
        named = f" ({file})" if isinstance(file, str) else ""
        name = f"row {row}" if self._row_names is None else self._row_names[row]
        return f"{self.split} {name}{named} {problem}"


def stored_image(value: Any, folder: str = "") -> bytes | str:
    """The bytes of an image that a row holds, or its path.

    Raises:
        ImageError: The row is empty.
    """
    if isinstance(value, dict):
        value = value["path"] if value["bytes"] is None else value["bytes"]
    if value is None:
        raise ImageError("the row is empty")
    return value if isinstance(value, bytes) else os.path.join(folder, value)


# Loading ------------------------------------------------------------------------------------------


def load_data(
    source: str,
    *,
    channels: ChannelSetLike | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    splits: Mapping[str, str | None] | None = None,
    class_names: Sequence[str] | None = None,
    validation_fraction: float = 0.0,
    limit: int | None = None,
    seed: int = 0,
    skip_corrupt: bool = False,
    value_scale: float | None = None,
    no_data: str = "refuse",
    cache_dir: str | Path | None = None,
    img_size: int | None = None,
    num_images: Mapping[str, int] | None = None,
) -> ImageData:
    """Load images and labels from anywhere.

    Args:
        source: One of

            - `"synthetic"`: made from the seed, nothing is downloaded;
            - a folder of class folders, with `train/`, `val/` or `validation/`, `test/` above them
              or without (then all of it is `train`), images as PNG, JPEG, TIFF, `.npy`, ...;
            - a folder of Parquet files, or one such file; a folder of `save_to_disk`;
            - a folder with `train.txt`, `val.txt`, `test.txt`, or one such file, of `path label`
              lines with paths from the file's folder;
            - else a name on the hub (`"mini-imagenet"` is `"timm/mini-imagenet"`).
        channels: What the planes are, in the order of the files; by default what the files call
            them, else RGB for three planes and anonymous for other counts. For `"synthetic"`, which
            of its bands to take.
        image_column: Column of the images; found by its name or type where it is not given.
        label_column: Column of the labels, whole numbers from 0 or text.
        splits: Names of `train`, `validation` and `test` in the source; None leaves one out, "." is
            a folder of class folders itself.
        class_names: The classes in the order of the labels, where the data does not tell or a
            trained model does. Otherwise text is sorted.
        validation_fraction: Share of `train` to set apart, balanced over the classes, where the
            source has no validation split; a class's only image stays in `train`.
        limit: At most so many images a split, balanced over the classes.
        seed: Of the synthetic images, of the limit and of the validation fraction.
        skip_corrupt: Leave out images that cannot be read and labels that are none instead of
            raising; decodes every image once. `ImageSplit.skipped` tells what went.
        value_scale: What stored numbers are divided by (10000 for Sentinel-2 reflectance); images
            are float32 then.
        no_data: What is done about pixels without data: `refuse` the image when it is asked for,
            mark them as NaN for the transforms (`mean`, `predict`), or `keep` the stored numbers.
            See `timm_varchan.data.Reading`.
        cache_dir: Where `datasets` keeps its copies.
        img_size: Height and width of the synthetic images; nothing else uses it.
        num_images: Images in each synthetic split, by its name.

    Returns:
        The data; images are decoded when they are asked for. Where a look at some of them shows
        that the channels' usual mean and deviation cannot be theirs (counts of 12 bits, floats of
        0..255), the channels come without and the log says so.

    Raises:
        FileNotFoundError: Nothing is there, or the hub cannot be reached.
        UserError: A column or split that is missing or empty, a label out of range, files that
            cannot be read. An image that cannot be read raises when it is asked for.
    """
    if not 0 <= validation_fraction < 1:
        raise UserError(f"validation_fraction is {validation_fraction}; it must be in 0..1.")
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}; it must be at least 1 image a split.")
    reading = reading_for(channels, value_scale, no_data)
    if source == "synthetic":
        data = synthetic_data(channels, seed=seed, img_size=img_size, num_images=num_images)
    elif num_images is not None:
        raise UserError(f"num_images is for 'synthetic', {source} has what it has; use limit.")
    else:
        tables = load_tables(source, splits or {}, cache_dir)
        data = data_of(
            tables, reading, image_column, label_column, class_names,
            skip_corrupt=skip_corrupt, guess=channels is None,
        )  # fmt: skip
        if data.train is not None and data.validation is None and validation_fraction > 0:
            train, validation = _split_off(data.train, validation_fraction, seed)
            data = replace(data, train=train, validation=validation)
    if limit is not None:
        data = data.each(
            lambda name, split: split.take(balanced_indices(split.labels(), limit, seed, name))
        )
    return data.each(readable) if skip_corrupt else data


def reading_for(
    channels: ChannelSetLike | None, value_scale: float | None, no_data: str
) -> Reading:
    """The reading that somebody asks for; without channels, of whatever planes there are."""
    return Reading(InputSpec.of(channels=channels, value_scale=value_scale, no_data=no_data))


def synthetic_data(
    channels: ChannelSetLike | None = None,
    *,
    seed: int = 0,
    img_size: int | None = None,
    num_images: Mapping[str, int] | None = None,
) -> ImageData:
    """The embedded data set; images are made when they are asked for.

    Args:
        channels: Which bands, in which order; all five by default.
        seed: Same seed, same images.
        img_size: Height and width in pixels, 64 by default.
        num_images: Images by split; `DEFAULT_NUM_IMAGES` for splits that are not named.

    Returns:
        The data, classes in equal numbers.

    Raises:
        UserError: A channel that is none of the bands, a split that is none, images under 16
            pixels, fewer than one image.
    """
    img_size = DEFAULT_IMG_SIZE if img_size is None else img_size
    counts = DEFAULT_NUM_IMAGES | dict(num_images or {})
    if img_size < MIN_IMG_SIZE:
        raise UserError(f"img_size is {img_size}; synthetic images have {MIN_IMG_SIZE} or more.")
    if set(counts) != set(SPLIT_CODES) or min(counts.values()) < 1:
        raise UserError(
            f"num_images is {num_images}; it takes {', '.join(SPLIT_CODES)}, each at least 1."
        )
    wanted = ChannelSet.parse(SYNTHETIC_CHANNELS if channels is None else channels)
    bands = SYNTHETIC_CHANNELS.index(wanted)
    taken = SYNTHETIC_CHANNELS.take(bands)
    made: dict[str, Any] = {
        split: ImageSplit(
            SyntheticReader(split, taken, bands, seed, img_size),
            [row % len(SYNTHETIC_CLASSES) for row in range(count)],
        )
        for split, count in counts.items()
    }
    return ImageData(SYNTHETIC_CLASSES, taken, "synthetic", **made)


def data_of(
    tables: Tables,
    reading: Reading,
    image_column: str | None,
    label_column: str | None,
    class_names: Sequence[str] | None,
    *,
    skip_corrupt: bool,
    guess: bool,
) -> ImageData:
    """The data of tables: columns, labels and channels are settled; see `load_data`.

    Channels that the reading leaves open stay anonymous unless they may be guessed.
    """
    readers: dict[str, RowReader] = {}
    stored: dict[str, StoredLabels] = {}
    for split, rows in tables.splits.items():
        where = f"{tables.name}/{split}"
        if len(rows) == 0:
            raise empty_split(where, split)
        images = find_column(rows, image_column, IMAGE_RULE, where)
        names = tables.row_names.get(split)
        readers[split] = RowReader(rows, images, where, tables.folder, reading, names)
        stored[split] = stored_labels(rows, find_column(rows, label_column, LABEL_RULE, where))
    classes, indices = resolve_labels(stored, class_names)
    reading = _with_channels(next(iter(readers.values())), guess)
    made: dict[str, Any] = {}
    for split, reader in readers.items():
        reader.reading = reading
        problems = [
            reader.where(row, label_problem(stored[split].values[row], len(classes)))
            for row, index in enumerate(indices[split])
            if index < 0
        ]
        if problems and not skip_corrupt:
            more = f" (and {len(problems) - 1} rows more)" if problems[1:] else ""
            other = "" if split == "train" else f" Or name another split with --{split}-split."
            raise UserError(problems[0] + more + ROW_CURE + other)
        good = [row for row, index in enumerate(indices[split]) if index >= 0]
        made[split] = ImageSplit(reader, indices[split], rows=good, skipped=problems)
    return ImageData(classes, reading.channels, tables.name, reading=reading, **made)


class _ColumnRule(NamedTuple):
    """How a column is found that nobody named."""

    what: str
    names: tuple[str, ...]
    feature: type
    flag: str


IMAGE_RULE = _ColumnRule(
    "images", ("image", "img", "images", "file", "path"), datasets.Image, "--image-column"
)
LABEL_RULE = _ColumnRule(
    "labels", ("label", "labels", "class", "target"), datasets.ClassLabel, "--label-column"
)


def find_column(rows: Any, asked: str | None, rule: _ColumnRule, where: str) -> str:
    """The asked column, else the first of the usual names, else the only one of the right type."""
    if isinstance(rows, Files):
        return rule.names[0]
    if asked is not None:
        if asked in rows.column_names:
            return asked
        problem = f"has no column {asked!r} for the {rule.what}"
    else:
        usual = [name for name in rule.names if name in rows.column_names]
        typed = [name for name, kind in rows.features.items() if isinstance(kind, rule.feature)]
        if usual:
            return usual[0]
        if len(typed) == 1:
            return typed[0]
        problem = f"has no column for the {rule.what} that is called one of {', '.join(rule.names)}"
    raise UserError(
        f"{where} {problem}; it has {', '.join(rows.column_names)}. Name it with {rule.flag}."
    )


def _split_off(
    train: ImageSplit, fraction: float, seed: int
) -> tuple[ImageSplit, ImageSplit | None]:
    """The rest, and some images of every class that has several."""
    labels = train.labels()
    several = {label for label, count in Counter(labels).items() if count > 1}
    candidates = [i for i, label in enumerate(labels) if label in several]
    if not candidates:
        logger.warning("No class has a second image, so none is set apart for validation.")
        return train, None
    count = max(1, round(fraction * len(train)))
    chosen = balanced_indices([labels[i] for i in candidates], count, seed, "validation")
    left, taken = Counter(labels), []
    for index in (candidates[i] for i in chosen):
        if left[labels[index]] > 1:
            left[labels[index]] -= 1
            taken.append(index)
    kept = sorted(set(range(len(train))) - set(taken))
    return train.take(kept), train.take(taken)


def readable(name: str, split: ImageSplit) -> ImageSplit:
    """The images of a split that can be read; a `UserError` where none is left."""
    left = split.without_unreadable()
    if len(left) == 0:
        raise UserError(
            f"Nothing of {name} is left: {left.num_skipped} rows cannot be read or have no "
            f"valid label, the first: {left.skipped[0]}"
        )
    return left


def _with_channels(reader: RowReader, guess: bool) -> Reading:
    """The reading with its channels settled, after a look at some rows spread over a split."""
    reading, num_rows = reader.reading, len(reader)
    scale = reading.channels.value_scale
    seen: dict[int, Planes] = {}
    failure: UserError | None = None
    for row in range(0, num_rows, max(1, num_rows // _NUM_GUESSED_BY)):
        try:
            seen[row] = _thinned(reader.planes(row))
        except UserError as error:
            failure = failure or error
    if not len(reading.channels):
        if not seen and failure is not None:
            raise failure
        found = guess_channels(seen)
        found = found if guess else found.without_identity()
        reading = reading.with_channels(found.with_scale(scale, reading.channels.value_offset))
    problem, is_factor = _scale_problem(reading, seen.values())
    if problem is None:
        return reading
    problem = f"{reader.split}: {problem}."
    if _has_usual_statistics(reading.channels):
        logger.warning(
            "%s Mean and deviation have to be measured (hf_train.py does); --value-scale says "
            "what stored numbers are divided by.", problem,
        )  # fmt: skip
        bare = tuple(replace(channel, mean=None, std=None) for channel in reading.channels)
        return reading.with_channels(replace(reading.channels, channels=bare))
    if is_factor and scale is None:
        raise UserError(
            f"{problem} Say --value-scale (value_scale=): what stored numbers were divided by "
            f"when these were measured, 65535 for the range of 16 bits."
        )
    logger.warning("%s Is --value-scale right?", problem)
    return reading


def guess_channels(seen: Mapping[int, Planes]) -> ChannelSet:
    """The channels of images about which nothing was said.

    What the files call them, if all call them the same; else RGB for three planes, also with gray
    images among them; else anonymous.

    Args:
        seen: Some images by their rows.

    Raises:
        UserError: They differ in their number of planes.
    """
    labels = {planes.labels for planes in seen.values()}
    if len(labels) == 1:
        (named,) = labels
        names = [c.name for c in named if c.name is not None]
        if named and not any(c.is_anonymous for c in named) and len(set(names)) == len(names):
            logger.info("The files call their planes %s.", "+".join(c.label for c in named))
            return ChannelSet(named)
    counts: dict[int, int] = {}
    for row, planes in seen.items():
        counts.setdefault(planes.num_planes, row)
    if 3 in counts and set(counts) <= {1, 3}:
        return RGB
    if len(counts) > 1:
        found = ", ".join(f"{count} in row {row}" for count, row in counts.items())
        raise UserError(f"The images differ in their number of planes ({found}). Say --channels.")
    return ChannelSet.anonymous(next(iter(counts)))


def _has_usual_statistics(channels: ChannelSet) -> bool:
    """Whether mean and deviation are those that come with the names, not measured ones."""
    known = known_channels()
    return all(c.name in known and known[c.name] == c for c in channels)


def _thinned(planes: Planes) -> Planes:
    """Some of the pixels, so that many large images can be looked at together."""
    step = max(1, max(planes.image.shape[1:]) // 128)
    valid = planes.valid
    if valid is not None:
        valid = valid[:, ::step, ::step]
    return replace(planes, image=planes.image[:, ::step, ::step].copy(), valid=valid)


def _scale_problem(reading: Reading, seen: Iterable[Planes]) -> tuple[str | None, bool]:
    """Why the channels' mean and deviation cannot be those of images; if one factor explains it.

    Bounds are wide, since darker or flatter images than usual are no fault: two deviations for the
    mean (four if it was measured), a fifth to five times for the deviation; under usual statistics
    other types than 8 bits also need values that reach from about 0 to about 1.
    """
    channels = reading.channels
    if channels.mean is None or channels.std is None:
        return None, False
    images, are_bytes = [], True
    for planes in seen:
        try:
            image = reading.image(planes)
        except ImageError:  # raised again when the image is asked for
            continue
        are_bytes = are_bytes and image.dtype == torch.uint8
        images.append(scale_values(image).flatten(1).to(torch.float64))
    values = torch.cat(images, 1) if images else torch.zeros(len(channels), 0)
    values = values[:, values.isfinite().all(0)]
    if values.shape[1] == 0:
        return None, False
    mean, std = values.mean(1), values.std(1, correction=0)
    usual_mean, usual_std = torch.tensor(channels.mean), torch.tensor(channels.std)
    away = ((mean - usual_mean).abs() / usual_std).max().item()
    ratio = (std / usual_std).clamp_min(1e-12)
    low, high = values.min().item(), values.max().item()
    is_usual = _has_usual_statistics(channels)
    is_off = away > (2 if is_usual else 4) or not 0.2 <= ratio.min() <= ratio.max() <= 5
    if is_usual and not are_bytes:
        is_off = is_off or low < -0.05 or not 0.5 <= high <= 1.5
    if not is_off:
        return None, False
    both = ratio / (mean / usual_mean).clamp_min(1e-12)  # 1 where only the scale differs
    one_side = bool((ratio < 0.2).all() or (ratio > 5).all())
    text = (
        f"its values, {low:.4g} to {high:.4g} after scaling, have mean {mean.mean():.4g} and "
        f"deviation {std.mean():.4g}; the channels {channels} stand for mean "
        f"{usual_mean.mean():.3g} and deviation {usual_std.mean():.3g}"
    )
    return text, one_side and bool(((both > 0.25) & (both < 4)).all())


# What is measured, kept and put together ----------------------------------------------------------


def measure_split(
    split: ImageSplit, num_images: int = 1000, seed: int = 0
) -> tuple[ChannelSet, tuple[float, ...]]:
    """Measure the scaled values of a split, over all pixels with data.

    Args:
        split: The images.
        num_images: How many of them to look at, drawn at random; all where there are fewer.
        seed: Which ones.

    Returns:
        The channels with mean, deviation and correlation; the fraction of each one's pixels that
        hold no data.

    Raises:
        UserError: No images, an image that cannot be read.
        ValueError: A channel without any data, values that are not finite.
    """
    if len(split) == 0 or num_images < 1:
        raise UserError(f"Cannot measure {min(len(split), num_images)} images; give at least 1.")
    chosen = seeded_rng("stats", seed).sample(range(len(split)), min(num_images, len(split)))
    moments = ChannelMoments()
    for index in sorted(chosen):
        values = scale_values(split[index][0])
        missing = values.isnan()
        moments.update(values, ~missing if bool(missing.any()) else None)
    return moments.result(split.channels), moments.invalid_fraction


def channel_stats(
    split: ImageSplit, num_images: int = 1000, seed: int = 0
) -> tuple[list[float], list[float]]:
    """What normalisation needs: `channels.with_stats(*channel_stats(data.train))`.

    Args:
        split: The images.
        num_images: How many of them to look at; see `measure_split`.
        seed: Which ones.

    Returns:
        Mean and standard deviation, one each a channel.
    """
    measured, _ = measure_split(split, num_images, seed)
    return list(measured.mean or ()), list(measured.std or ())


class _Kept:
    """A reader of images that are there already, one row each."""

    def __init__(self, split: ImageSplit, images: Tensor | list[Tensor]) -> None:
        self.channels, self._images = split.channels, images

    def __call__(self, row: int) -> Tensor:
        return self._images[row]


def cached(split: ImageSplit, *, num_copies: int = 1) -> ImageSplit:
    """The split with every image decoded, as its stored type; forked workers share the memory.

    Args:
        split: The images.
        num_copies: How many processes of this machine do the same.

    Returns:
        A split of the same images and labels.

    Raises:
        UserError: They need more memory than is free; an image that cannot be read.
    """
    chosen = seeded_rng("cache").sample(range(len(split)), min(_NUM_LOOKED_AT, len(split)))
    looked_at = [split[index][0] for index in sorted(chosen)]
    free = psutil.virtual_memory().available
    limit = _CACHE_SHARE * free / num_copies

    def check(num_bytes: float, number: str) -> None:
        if num_bytes > limit:
            raise UserError(
                f"{number} images need about {num_bytes * num_copies / 2**30:.1f} GiB of memory "
                f"({num_copies} processes), {free / 2**30:.1f} GiB are free. Leave --cache out."
            )

    def counted(images: Iterator[Tensor]) -> Iterator[Tensor]:
        num_bytes = 0
        for number, image in enumerate(images, start=1):
            num_bytes += image.nbytes
            check(num_bytes, f"The first {number} of {len(split)}")
            yield image

    check(sum(x.nbytes for x in looked_at) / len(looked_at) * len(split), f"{len(split)}")
    threads = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
    try:
        images = threads.map(lambda index: split[index][0], range(len(split)))
        kept = _stacked(looked_at[0], len(split), counted(images))
    finally:
        threads.shutdown(cancel_futures=True)
    return ImageSplit(_Kept(split, kept), split.labels(), skipped=split.skipped)


def _stacked(first: Tensor, count: int, images: Iterator[Tensor]) -> Tensor | list[Tensor]:
    """One tensor where all images have a size, else one each."""
    stacked = torch.empty((count, *first.shape), dtype=first.dtype)
    several: list[Tensor] = []
    for row, image in enumerate(images):
        if several or image.shape != first.shape or image.dtype != first.dtype:
            several = several or list(stacked[:row])
            several.append(image)
        else:
            stacked[row] = image
    return several or stacked


def collate_padded(
    batch: Sequence[tuple[Tensor, ChannelSet, int]],
) -> tuple[Tensor, list[ChannelSet], Tensor]:
    """Put images with different channels into one batch; absent planes are zero and come last.

    Args:
        batch: Images `(C_i, H, W)`, the channels of each, labels.

    Returns:
        The images `(B, max C_i, H, W)`, their channel sets, the labels `(B,)` int64.

    Raises:
        UserError: No images, different sizes or types, channels that do not fit an image.
    """
    if not batch:
        raise UserError("A batch needs at least one image.")
    first = batch[0][0]
    for place, (image, channels, _) in enumerate(batch):
        if image.shape[1:] != first.shape[1:] or image.dtype != first.dtype:
            raise UserError(
                f"Image {place} of the batch is {tuple(image.shape)} {image.dtype}, the first "
                f"{tuple(first.shape)} {first.dtype}. Bring all to one size and type first "
                f"(train_transform, eval_transform)."
            )
        if image.shape[0] != len(channels):
            raise UserError(
                f"Image {place} of the batch has {image.shape[0]} planes, its channels are "
                f"{channels} ({len(channels)}). Say one channel a plane."
            )
    images = pad_sequence([image for image, _, _ in batch], batch_first=True)
    labels = torch.tensor([label for _, _, label in batch], dtype=torch.int64)
    return images, [channels for _, channels, _ in batch], labels
