"""One function for every kind of data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from timm_varchan.channels import ChannelSet, ChannelSetLike
from timm_varchan.data.labels import LabelColumn, balanced_indices, resolve_labels
from timm_varchan.data.rows import RowReader, RowSource, guess_channels
from timm_varchan.data.sources import Tables, empty_split, load_tables
from timm_varchan.data.split import ROW_CURE, ImageData, ImageSplit
from timm_varchan.data.synthetic import synthetic_data


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
        channels: What the planes are, in the order of the files; by default RGB for three planes
            and anonymous for other counts. For `"synthetic"`, which of its bands to take.
        image_column: Column of the images; found by its name or type where it is not given.
        label_column: Column of the labels, whole numbers from 0 or text.
        splits: Names of `train`, `validation` and `test` in the source; None leaves one out.
        class_names: The classes in the order of the labels, where the data does not tell or a
            trained model does. Otherwise text is sorted.
        validation_fraction: Share of `train` to set apart, balanced over the classes, where the
            source has no validation split.
        limit: At most so many images a split, balanced over the classes.
        seed: Of the synthetic images, of the limit and of the validation fraction.
        skip_corrupt: Leave out images that cannot be read and labels that are none instead of
            raising; decodes every image once. `ImageSplit.skipped` tells what went.
        value_scale: What stored numbers are divided by (10000 for Sentinel-2 reflectance); images
            are float32 then.
        cache_dir: Where `datasets` keeps its copies.
        img_size: Height and width of the synthetic images; nothing else uses it.
        num_images: Images in each synthetic split, by its name.

    Returns:
        The data; images are decoded when they are asked for.

    Raises:
        FileNotFoundError: Nothing is there, or the hub cannot be reached.
        ValueError: A column or split that is missing or empty, a label out of range, files that
            cannot be read. An image that cannot be read raises when it is asked for.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction is {validation_fraction}; it must be in 0..1.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1 image a split.")
    if value_scale is not None and not value_scale > 0:
        raise ValueError(f"value_scale is {value_scale}; it must be above 0, such as 10000.")
    if channels is not None:
        value_scale = ChannelSet.parse(channels).scale_with(value_scale)
    if source == "synthetic":
        data = synthetic_data(channels, seed=seed, img_size=img_size, num_images=num_images)
        return _limited(data, limit, seed)
    if num_images is not None:
        raise ValueError(f"num_images is for 'synthetic', {source} has what it has; use limit.")
    tables = load_tables(source, splits or {}, cache_dir)
    names, made = make_splits(
        tables,
        ChannelSet.parse(channels) if channels is not None else None,
        Options(image_column, label_column, class_names, skip_corrupt, value_scale),
    )
    if "validation" not in made and validation_fraction > 0 and "train" in made:
        made |= _split_off(made["train"], validation_fraction, seed)
    wanted = next(iter(made.values())).channels
    data = ImageData(
        train=made.get("train"),
        validation=made.get("validation"),
        test=made.get("test"),
        class_names=names,
        channels=wanted,
        name=tables.name,
    )
    data = _limited(data, limit, seed)
    return each_split(data, readable) if skip_corrupt else data


@dataclass(frozen=True)
class Options:
    """How `make_splits` reads tables; see `load_data`."""

    image_column: str | None
    label_column: str | None
    class_names: Sequence[str] | None
    skip_corrupt: bool
    value_scale: float | None


def make_splits(
    tables: Tables, channels: ChannelSet | None, options: Options
) -> tuple[tuple[str, ...], dict[str, ImageSplit]]:
    """Class names and splits of tables; the images' columns, labels and channels are settled."""
    sources: dict[str, RowSource] = {}
    columns: dict[str, tuple[Any, Sequence[Any]]] = {}
    for split, table in tables.splits.items():
        where = f"{tables.name}/{split}"
        if len(table) == 0:
            raise empty_split(where, split)
        image = find_column(table, options.image_column, IMAGE_RULE, where)
        sources[split] = RowSource(table, image, where, tables.folder, tables.row_names.get(split))
        label = find_column(table, options.label_column, LABEL_RULE, where)
        columns[split] = (
            table.features[label],
            table.select_columns([label]).with_format(None)[:][label],
        )
    names, labels = resolve_labels(columns, options.class_names)
    if channels is None or not channels.channels:
        guessed = guess_channels(next(iter(sources.values())))
        channels = guessed if channels is None else guessed.without_identity()
    made = {}
    for split, source in sources.items():
        reader = RowReader(source, channels, options.value_scale)
        made[split] = _labelled_split(reader, labels[split], split, options.skip_corrupt)
    return names, made


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


def find_column(table: Any, asked: str | None, rule: _ColumnRule, where: str) -> str:
    """The asked column, else the first of the usual names, else the only one of the right type."""
    if asked is not None:
        if asked in table.column_names:
            return asked
        problem = f"has no column {asked!r} for the {rule.what}"
    else:
        usual = [name for name in rule.names if name in table.column_names]
        typed = [name for name, kind in table.features.items() if isinstance(kind, rule.feature)]
        if usual:
            return usual[0]
        if len(typed) == 1:
            return typed[0]
        problem = f"has no column for the {rule.what} that is called one of {', '.join(rule.names)}"
    raise ValueError(
        f"{where} {problem}; it has {', '.join(table.column_names)}. Name it with {rule.flag}."
    )


def _labelled_split(
    reader: RowReader, labels: LabelColumn, split: str, skip_corrupt: bool
) -> ImageSplit:
    problems = [reader.source.where(row, text) for row, text in labels.problems.items()]
    if problems and not skip_corrupt:
        more = f" (and {len(problems) - 1} rows more)" if problems[1:] else ""
        other = "" if split == "train" else f" Or name another split with --{split}-split."
        raise ValueError(problems[0] + more + ROW_CURE + other)
    rows = [row for row, index in enumerate(labels.indices) if index >= 0]
    return ImageSplit(reader, labels.indices, rows=rows, skipped=problems)


def _split_off(train: ImageSplit, fraction: float, seed: int) -> dict[str, ImageSplit]:
    count = max(1, round(fraction * len(train)))
    taken = balanced_indices(train.labels(), count, seed, "validation")
    kept = sorted(set(range(len(train))) - set(taken))
    return {"train": train.take(kept), "validation": train.take(taken)}


def each_split(data: ImageData, change: Callable[[str, ImageSplit], ImageSplit]) -> ImageData:
    """The data with every split that it has changed by a function of name and images."""
    made = {
        split: None if images is None else change(split, images)
        for split, images in (
            ("train", data.train),
            ("validation", data.validation),
            ("test", data.test),
        )
    }
    return replace(data, train=made["train"], validation=made["validation"], test=made["test"])


def _limited(data: ImageData, limit: int | None, seed: int) -> ImageData:
    if limit is None:
        return data
    return each_split(
        data, lambda name, split: split.take(balanced_indices(split.labels(), limit, seed, name))
    )


def readable(name: str, split: ImageSplit) -> ImageSplit:
    """The images that can be read; a `ValueError` where none is left."""
    left = split.without_unreadable()
    if len(left) == 0:
        raise ValueError(
            f"Nothing of {name} is left: {left.num_skipped} rows cannot be read or have no "
            f"valid label, the first: {left.skipped[0]}"
        )
    return left
