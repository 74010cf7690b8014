"""A loaded data set: images and labels by split, and how an image becomes a tensor."""

from __future__ import annotations

import copy
import itertools
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import psutil
import torch
from torch import Tensor, nn

from timm_varchan.channels import ChannelSet, seeded_rng
from timm_varchan.data.labels import (
    StoredLabels,
    balanced_indices,
    label_problem,
    resolve_labels,
    stored_labels,
)
from timm_varchan.data.lists import SPLIT_ALIASES, Columns, asked_column, usual_column
from timm_varchan.data.look import settle
from timm_varchan.data.reading import FILLED, Reading
from timm_varchan.data.records import ROW_CURE, Files, Records
from timm_varchan.data.sources import Tables, empty_split, load_tables
from timm_varchan.data.synthetic import SYNTHETIC_CHANNELS, synthetic_splits
from timm_varchan.data.transforms import TrainTransform, scale_values
from timm_varchan.errors import ImageError, UserError
from timm_varchan.input_spec import InputSpec
from timm_varchan.measure import ChannelMoments

logger = logging.getLogger(__name__)

#: Rows that a warning about skipped ones names.
NUM_NAMED = 5
#: Images that are decoded before all are, for the memory that they take.
_NUM_LOOKED_AT = 32
#: Fraction of the memory that is free which a cache may take.
_CACHE_FRACTION = 0.8
_ABSENT_CURE = (
    "--no-data mean or predict fills it, and of training images --channel-aug hcs-sample takes it "
    "for absent"
)
#: Beside a model: which images it was trained on.
FINGERPRINTS = "splits.npz"


# Splits -------------------------------------------------------------------------------------------


class ImageSplit(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Images and labels of one split: `split[i]` is `((C, H, W) uint8|uint16|float32, label)`.

    It pickles, for the workers of a `DataLoader`.

    Args:
        records: What is stored of every image, by row.
        labels: Label of every row.
        reading: How an image is made of it.
        rows: The rows that belong to the split; all by default.
        skipped: Why rows were left out, one text each.
        absent: Rows that have no file for a channel, which nothing fills.
    """

    def __init__(
        self,
        records: Records,
        labels: Sequence[int],
        reading: Reading,
        *,
        rows: Sequence[int] | None = None,
        skipped: Sequence[str] = (),
        absent: Iterable[int] = (),
    ) -> None:
        self.records, self.reading, self._absent = records, reading, frozenset(absent)
        self._rows = list(range(len(labels))) if rows is None else list(rows)
        self._labels = [int(labels[row]) for row in self._rows]
        self.skipped = tuple(skipped)
        self._kept: tuple[Tensor | list[Tensor], dict[int, int]] | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = self._rows[index]
        if self._kept is not None:
            images, places = self._kept
            return images[places[row]], self._labels[index]
        try:
            return self.reading.read(self.records[row]), self._labels[index]
        except ImageError as error:
            problem = self.records.where(row, f"cannot be read: {error}")
            raise UserError(problem + ROW_CURE) from error

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return (self[i] for i in range(len(self)))

    @property
    def channels(self) -> ChannelSet:
        """The planes of every image, in order."""
        return self.reading.channels

    @property
    def num_skipped(self) -> int:
        """How many rows were left out because they could not be read or had no valid label."""
        return len(self.skipped)

    @property
    def absent(self) -> list[bool]:
        """Which images have no file for a channel, which nothing fills."""
        return [row in self._absent for row in self._rows]

    def labels(self) -> list[int]:
        """The label of every image; nothing is decoded."""
        return list(self._labels)

    def name(self, index: int) -> str:
        """What an image is called: its file, or its place."""
        return self.records.name(self._rows[index])

    def take(self, indices: Iterable[int]) -> ImageSplit:
        """The split with only the images at these positions, in this order."""
        taken, chosen = copy.copy(self), list(indices)
        taken._rows = [self._rows[i] for i in chosen]
        taken._labels = [self._labels[i] for i in chosen]
        return taken

    def with_planes(self, planes: Sequence[int], channels: ChannelSet) -> ImageSplit:
        """The split with these planes of its images alone, called by these channels."""
        taken = copy.copy(self)
        taken.reading, taken._kept = self.reading.with_planes(planes, channels), None
        return taken

    def fingerprint(self) -> np.ndarray:
        """A number for the content of every image, `(N,)` uint64: the same wherever it lies."""
        return np.array(self.records.identities(self._rows), np.uint64)

    def places(self) -> list[Any]:
        """Where every image lies, one spelling a file; nothing where they lie in a table."""
        return [self.records.same(row) for row in self._rows] if self.records.paths else []

    def without_unreadable(self) -> ImageSplit:
        """The split without the images that cannot be read: every one is decoded once, in threads.

        Returns:
            A split whose `skipped` tells what was left out; a warning in the log does too.
        """
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
            problems = list(threads.map(self._problem, range(len(self))))
        left = self.take(i for i, problem in enumerate(problems) if problem is None)
        left.skipped += tuple(problem for problem in problems if problem is not None)
        if left.skipped:
            shown = "; ".join(left.skipped[:NUM_NAMED])
            more = "; ..." if left.num_skipped > NUM_NAMED else ""
            logger.warning("%d images skipped: %s%s", left.num_skipped, shown, more)
        return left

    def _problem(self, index: int) -> str | None:
        try:
            self[index]
        except UserError as error:
            return str(error).removesuffix(ROW_CURE)
        return None


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """A loaded data set.

    Args:
        spec: What its images are: channels, with mean and deviation where known, class names, what
            is done about pixels without data.
        name: What the data is, for results: `synthetic`, a hub name, a folder's name; no path.
        train: Images to learn from, None where the source has none.
        validation: Images to choose by.
        test: Images for the final figures.
        stream: Where training images are streamed, their rows and the names of the image and the
            label column; `train` has only the first of them then.
        notes: What was said while it was loaded: what was left out, put together, assumed.
        invalid_share: Fraction of the pixels that hold no data, of the images that were measured.
    """

    spec: InputSpec
    name: str
    train: ImageSplit | None = None
    validation: ImageSplit | None = None
    test: ImageSplit | None = None
    stream: tuple[datasets.IterableDataset, tuple[str, str]] | None = None
    notes: tuple[str, ...] = ()
    invalid_share: float = 0.0

    @property
    def channels(self) -> ChannelSet:
        """Planes of every image, in order."""
        return self.spec.channels

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of every label."""
        return self.spec.class_names

    @property
    def splits(self) -> dict[str, ImageSplit]:
        """The splits that are there, by name."""
        found = {name: getattr(self, name) for name in SPLIT_ALIASES}
        return {name: split for name, split in found.items() if split is not None}

    def each(self, change: Callable[[str, ImageSplit], ImageSplit]) -> ImageData:
        """The data with every split that it has changed by a function of name and images."""
        changes: dict[str, Any] = {name: change(name, s) for name, s in self.splits.items()}
        return replace(self, **changes)

    def with_channels(self, channels: ChannelSet) -> ImageData:
        """The data with more said of the same channels."""
        return replace(self, spec=replace(self.spec, channels=channels))

    def with_planes(self, planes: Sequence[int], channels: ChannelSet) -> ImageData:
        """The data with these planes of its images alone, called by these channels."""
        chosen = self.each(lambda name, split: split.with_planes(planes, channels))
        return chosen.with_channels(channels)


class TransformedSplit(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Transformed images and labels, ready for a `DataLoader`.

    A resumed run, and one with other workers or processes, sees the same samples. The epoch lies
    in shared memory, so that persistent workers follow `set_epoch` too. Torch's own generator is
    as it was after every image.

    Args:
        split: The images.
        transform: From `(C, H, W)` to what the model takes; draws from torch's default generator.
        seed: Of the augmentation.
        keep_absent: Leave planes NaN whose files an image does not have: `draw_channels` takes
            them for absent. Otherwise they become the mean.
    """

    def __init__(
        self, split: ImageSplit, transform: nn.Module, seed: int = 0, keep_absent: bool = False
    ) -> None:
        self.split, self.transform, self._seed = split, transform, seed
        self.keep_absent = keep_absent and any(split.absent)
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
        x = seeded_transform(self.transform, image, key)
        if self.keep_absent and image.is_floating_point() and bool(image[:, 0, 0].isnan().any()):
            x[image.flatten(1).isnan().all(1)] = torch.nan
        return x, label


def seeded_transform(transform: nn.Module, image: Tensor, key: int) -> Tensor:
    """A transformed image whose chance is the key's; torch's generator is as it was afterwards."""
    if isinstance(transform, TrainTransform):
        return transform.seeded(image, key)
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it reseeds the accelerators too, and in workers queues that.
        torch.default_generator.manual_seed(key)
        return transform(image)


# Loading ------------------------------------------------------------------------------------------


def load_data(
    source: str,
    spec: InputSpec | None = None,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    splits: Mapping[str, str | None] | None = None,
    planes: str | None = None,
    validation_fraction: float = 0.0,
    limit: int | None = None,
    seed: int = 0,
    skip_corrupt: bool = False,
    allow_absent: bool = False,
    partial: bool = False,
    cache_dir: str | Path | None = None,
    num_images: Mapping[str, int] | None = None,
    **fields: Any,
) -> ImageData:
    """Load images and labels from anywhere.

    Args:
        source: `"synthetic"`; a folder of class folders, with `train/`, `val/`, `test/` above them
            or without; a folder of lists or tables (`train.txt`, `labels.csv`, `metadata.jsonl`),
            of Parquet files, of `save_to_disk`, or one such file; else a name on the hub. See
            docs/data.md.
        spec: What the images are: channels in the order of the files (by default what the files
            call them, else RGB for three planes and anonymous for other counts), class names where
            a model knows them, what is done about pixels without data. `img_size` is that of
            synthetic images.
        image_column: Column of the images; found by its name or type where it is not given.
        label_column: Column of the labels, whole numbers from 0 or text.
        splits: Names of `train`, `validation` and `test` in the source; None leaves one out, "." is
            a folder of class folders itself.
        planes: Which files are one image, as `"{image}_w{channel}.tif"`; `"none"`: every file.
        validation_fraction: Fraction of `train` to set apart, balanced over the classes, where the
            source has no validation split. A class's only image stays in `train`, as do images
            that lack files; equal images stay together.
        limit: At most so many images a split, balanced over the classes.
        seed: Of the synthetic images, of the limit and of the validation fraction.
        skip_corrupt: Leave out images that cannot be read and labels that are none instead of
            raising; decodes every image once. `ImageSplit.skipped` tells what went.
        allow_absent: Take training images in several files of which some are missing: their planes
            are NaN. With `no_data` `mean` and `predict` images of every split are taken anyway.
        partial: Take files that name their planes and lack some of the channels: the spec of the
            data has those that are there.
        cache_dir: Where `datasets` keeps its copies.
        num_images: Images in each synthetic split, by its name.
        **fields: Fields of the spec in place of its own, as `InputSpec.of` takes them. Channels
            that are said to be `"anonymous"` are never guessed.

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
    if num_images is not None and source != "synthetic":
        raise UserError(f"num_images is for 'synthetic', {source} has what it has; use limit.")
    spec, guess = settle_spec(spec, fields)
    with _noted() as notes:
        if source == "synthetic":
            made, spec = synthetic_splits(spec, seed=seed, num_images=num_images)
            reading = Reading(spec, SYNTHETIC_CHANNELS)
            found: dict[str, Any] = {
                name: ImageSplit(Records(rows, name), rows.labels, reading)
                for name, rows in made.items()
            }
            data = ImageData(spec=spec, name=source, **found)
        else:
            asked = tuple(c.name for c in spec.channels if c.name is not None)
            columns = Columns(image_column, label_column, planes, asked)
            tables = load_tables(source, splits or {}, columns=columns, cache_dir=cache_dir)
            data = data_of(
                tables, spec, columns, skip_corrupt=skip_corrupt, guess=guess, partial=partial,
                allow_absent=allow_absent,
            )  # fmt: skip
            data = _set_apart(data, validation_fraction, seed)
        if limit is not None:
            data = data.each(
                lambda name, split: split.take(balanced_indices(split.labels(), limit, seed, name))
            )
        data = data.each(readable) if skip_corrupt else data
    return replace(data, notes=tuple(notes))


@contextmanager
def _noted() -> Iterator[list[str]]:
    """The warnings of this package while it is entered."""
    notes: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: notes.append(record.getMessage())  # type: ignore[method-assign]
    heard = logging.getLogger("timm_varchan")
    heard.addHandler(handler)
    try:
        yield notes
    finally:
        heard.removeHandler(handler)


def settle_spec(spec: InputSpec | None, fields: Mapping[str, Any]) -> tuple[InputSpec, bool]:
    """A spec with further fields, and whether its channels may be guessed."""
    settled = InputSpec.of(spec, **fields)
    return settled, fields.get("channels") is None and not len(settled.channels)


def data_of(
    tables: Tables,
    spec: InputSpec,
    columns: Columns,
    *,
    skip_corrupt: bool,
    guess: bool,
    allow_absent: bool = False,
    partial: bool = False,
) -> ImageData:
    """The data of tables: columns, labels and channels are settled; see `load_data`.

    Channels that the spec leaves open stay anonymous unless they may be guessed.
    """
    records, stored = _opened(tables, columns)
    classes, indices = resolve_labels(stored, spec.class_names or None)
    reading = settle(
        next(iter(records.values())),
        Reading(replace(spec, class_names=classes), folder=str(tables.folder)),
        tables.planes, guess=guess, partial=partial,
    )  # fmt: skip
    made: dict[str, Any] = {}
    for split, some in records.items():
        problems = {
            row: label_problem(stored[split].values[row], len(classes))
            for row, index in enumerate(indices[split])
            if index < 0
        }
        missing = _missing_files(some, reading)
        is_filled = spec.no_data in FILLED
        if missing and (is_filled or (allow_absent and split == "train")):
            row = min(missing)
            logger.warning(
                "%s: %d of %d images lack files; %s %s", some.split, len(missing), len(some),
                some.name(row), missing[row],
            )  # fmt: skip
        elif missing:
            problems = {r: f"{p}; {_ABSENT_CURE}" for r, p in missing.items()} | problems
        if problems and not skip_corrupt:
            raise _problem_of(some, problems, split)
        made[split] = ImageSplit(
            some, indices[split], reading,
            rows=[row for row in range(len(some)) if row not in problems],
            skipped=[some.where(row, problem) for row, problem in problems.items()],
            absent=() if is_filled else missing,
        )  # fmt: skip
    return ImageData(spec=reading.spec, name=tables.name, **made)


def _opened(tables: Tables, columns: Columns) -> tuple[dict[str, Records], dict[str, StoredLabels]]:
    """Images and labels as they are stored, by split."""
    records: dict[str, Records] = {}
    stored: dict[str, StoredLabels] = {}
    for split, rows in tables.splits.items():
        where = f"{tables.name}/{split}"
        if len(rows) == 0:
            raise empty_split(where, split)
        images = find_column(rows, columns.image, IMAGE_RULE, where)
        names = tables.row_names.get(split)
        records[split] = Records(rows, where, str(tables.folder), images, names)
        stored[split] = stored_labels(rows, find_column(rows, columns.label, LABEL_RULE, where))
    return records, stored


def _missing_files(records: Records, reading: Reading) -> dict[int, str]:
    """The rows of which files are missing, and which."""
    found: dict[int, str] = {}
    for row, files in enumerate(records.paths if reading.files else ()):
        pairs = zip(reading.channels, reading.files, strict=True)
        lacking = [channel.label for channel, place in pairs if files[place] is None]
        if lacking:
            found[row] = f"has no file for {', '.join(lacking)}"
    return found


def _problem_of(records: Records, problems: Mapping[int, str], split: str) -> UserError:
    """One error about rows, which says once what all of them share."""
    row = min(problems)
    if len(problems) == len(records) > 1:
        return UserError(
            f"{records.split}: all {len(records)} rows are of no use; the first "
            f"({records.name(row)}) {problems[row]}. Name another column with --label-column, or "
            f"another split with --{split}-split."
        )
    more = f" (and {len(problems) - 1} rows more)" if len(problems) > 1 else ""
    cure = "" if split == "train" else f" Or name another split with --{split}-split."
    return UserError(records.where(row, problems[row]) + more + ROW_CURE + cure)


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
        return ""
    if asked is not None:
        return asked_column(rows.column_names, asked, rule.what, where, rule.flag)
    typed = [name for name, kind in rows.features.items() if isinstance(kind, rule.feature)]
    found = usual_column(rows.column_names, rule.names) or (typed[0] if len(typed) == 1 else None)
    if found is None:
        raise UserError(
            f"{where} has no column for the {rule.what} that is called one of "
            f"{', '.join(rule.names)}; it has {', '.join(rows.column_names)}. Name it with "
            f"{rule.flag}."
        )
    return found


def readable(name: str, split: ImageSplit) -> ImageSplit:
    """The images of a split that can be read; a `UserError` where none is left."""
    left = split.without_unreadable()
    if len(left) == 0:
        raise UserError(
            f"Nothing of {name} is left: {left.num_skipped} rows cannot be read or have no "
            f"valid label, the first: {left.skipped[0]}"
        )
    return left


# Which images are the same ------------------------------------------------------------------------


def _set_apart(data: ImageData, fraction: float, seed: int) -> ImageData:
    """Validation images from the training split, where they are missing; the same image is said."""
    if data.train is not None and data.validation is None and fraction > 0:
        train, validation = _split_off(data.train, fraction, seed)
        return replace(data, train=train, validation=validation)
    _say_shared(data, {name: split.places() for name, split in data.splits.items()})
    return data


def _say_shared(data: ImageData, keys: Mapping[str, Sequence[Any]]) -> None:
    """Say which splits have an image in common, by anything that tells images apart."""
    for (name, first), (other_name, second) in itertools.combinations(keys.items(), 2):
        keys_of_first = set(first)
        both = [place for place, key in enumerate(second) if key in keys_of_first]
        if both:
            logger.warning(
                "%s: the same image is in %s and in %s: %d of %d of %s, as %s. Figures on them "
                "are no test.", data.name, name, other_name, len(both), len(second), other_name,
                data.splits[other_name].name(both[0]),
            )  # fmt: skip


def _split_off(
    train: ImageSplit, fraction: float, seed: int
) -> tuple[ImageSplit, ImageSplit | None]:
    """The rest, and some images of every class that has several; equal images stay together."""
    labels, places = train.labels(), dict[Any, int]()
    keys = train.places() or train.fingerprint().tolist()
    group = np.array([places.setdefault(key, len(places)) for key in keys])
    if len(places) <= len(set(labels)):  # the images tell less than the labels: no data of use
        group = np.arange(len(labels))
    _, firsts = np.unique(group, return_index=True)
    left, absent = Counter(labels[i] for i in firsts), train.absent
    candidates = [int(i) for i in firsts if left[labels[i]] > 1 and not absent[i]]
    if not candidates:
        logger.warning("No class has a second image, so none is set apart for validation.")
        return train, None
    count = max(1, round(fraction * len(firsts)))
    chosen = balanced_indices([labels[i] for i in candidates], count, seed, "validation")
    taken = []
    for index in (candidates[i] for i in chosen):
        if left[labels[index]] > 1:
            left[labels[index]] -= 1
            taken.append(group[index])
    if len(firsts) < len(group):
        logger.warning(
            "%d rows repeat the same image: repeats stay on one side of the split.",
            len(group) - len(firsts),
        )
    apart = np.isin(group, taken)
    return train.take(np.flatnonzero(~apart)), train.take(np.flatnonzero(apart))


def save_fingerprints(data: ImageData, folder: str | Path) -> None:
    """Keep beside a model which images it was trained, chosen, tested on; says equal ones."""
    prints: dict[str, Any] = {name: split.fingerprint() for name, split in data.splits.items()}
    _say_shared(data, {name: found.tolist() for name, found in prints.items()})
    np.savez_compressed(Path(folder) / FINGERPRINTS, **prints)


def load_fingerprints(folder: str | Path) -> dict[str, np.ndarray]:
    """What `save_fingerprints` kept, by split; nothing where nothing is known."""
    path = Path(folder) / FINGERPRINTS
    if not path.is_file():
        return {}
    with np.load(path) as stored:
        return dict(stored)


def unseen(split: ImageSplit, trained: np.ndarray, name: str = "the data") -> ImageSplit:
    """The images of a split that are none of those that a model was trained on.

    Args:
        split: The images.
        trained: Fingerprints of the training images.
        name: What the split is called in the log, which says what was left out.

    Returns:
        The other images; all of them where none is another one, which the log says loudly.
    """
    is_trained = np.isin(split.fingerprint(), trained)
    if not is_trained.any():
        return split
    if is_trained.all():
        logger.warning(
            "THE MODEL WAS TRAINED ON ALL %d IMAGES of %s: what comes of them is no test. Give "
            "images that were set apart.", len(is_trained), name,
        )  # fmt: skip
        return split
    logger.warning(
        "%d of %d images of %s were trained on and are left out; the other %d were set apart.",
        is_trained.sum(), len(is_trained), name, (~is_trained).sum(),
    )  # fmt: skip
    return split.take(np.flatnonzero(~is_trained))


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
    """What normalisation needs, one mean and deviation a channel; see `measure_split`."""
    measured, _ = measure_split(split, num_images, seed)
    return list(measured.mean or ()), list(measured.std or ())


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
    limit = _CACHE_FRACTION * free / num_copies

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
    made = copy.copy(split)
    made._kept = kept, {row: place for place, row in enumerate(split._rows)}
    return made


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
