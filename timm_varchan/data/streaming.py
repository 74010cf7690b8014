"""Training images that are read as they come, from the hub or from Parquet files."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets.distributed import split_dataset_by_node
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from timm_varchan.channels import RGB, ChannelSet, ChannelSetLike, seeded_rng
from timm_varchan.data.images import decode_planes, fit_planes, to_stored_values
from timm_varchan.data.loading import IMAGE_RULE, LABEL_RULE, find_column
from timm_varchan.data.sources import open_streams
from timm_varchan.data.split import ImageData, ImageSplit

__all__ = ["ImageStream", "check_workers", "stream_data"]

#: Training images that are looked at for means and deviations.
NUM_SAMPLED = 1000


class ImageStream(torch.utils.data.IterableDataset[tuple[Tensor, int]]):
    """An epoch of transformed images and labels for one process, in a shuffled order.

    Every process reads its own share, and of that every worker its own files; whoever comes to the
    end of its share begins again. Order and augmentation hang on seed, epoch and place alone.

    Args:
        rows: The training rows, their images not decoded.
        columns: Names of the image and the label column.
        channels: The planes of every image.
        transform: From `(C, H, W)` to what the model takes.
        num_batches: Batches of an epoch and process.
        batch_size: Images of a batch.
        process: Index of this process and how many there are.
        seed: Of order and augmentation.
        value_scale: What stored numbers are divided by, or None.
        buffer_size: Images among which the next is drawn.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        columns: tuple[str, str],
        channels: ChannelSet,
        transform: nn.Module,
        *,
        num_batches: int,
        batch_size: int,
        process: tuple[int, int] = (0, 1),
        seed: int = 0,
        value_scale: float | None = None,
        buffer_size: int = 1000,
    ) -> None:
        self._rows, self._columns, self._channels = rows, columns, channels
        self._transform, self._seed, self._value_scale = transform, seed, value_scale
        self._num_batches, self._batch_size = num_batches, batch_size
        self._process, self._buffer_size = process, buffer_size
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return self._num_batches * self._batch_size

    def set_epoch(self, epoch: int) -> None:
        """Choose order and augmentation, before the `DataLoader` is iterated."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        epoch, rank = int(self._epoch), self._process[0]
        image, label = self._columns
        # Workers take turns at whole batches.
        batches = len(range(worker, self._num_batches, num_workers))
        rows = itertools.islice(self._passes(epoch), batches * self._batch_size)
        for place, row in enumerate(rows):
            planes = _decode(row[image], self._channels, self._value_scale)
            key = seeded_rng("stream", self._seed, epoch, rank, worker, place).getrandbits(63)
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(key)
                yield self._transform(planes), int(row[label])

    def _passes(self, epoch: int) -> Iterator[Mapping[str, Any]]:
        """This reader's rows, again and again, in another order each time."""
        rank, num_ranks = self._process
        for number in itertools.count():
            seed = seeded_rng("stream order", self._seed, epoch, number).getrandbits(32)
            rows = self._rows.shuffle(seed=seed, buffer_size=self._buffer_size)
            empty = True
            # `datasets` divides what a process has among its workers.
            for row in split_dataset_by_node(rows, rank, num_ranks):
                empty = False
                yield row
            if empty:
                raise ValueError(_too_many(self._rows, num_ranks))


def check_workers(rows: datasets.IterableDataset, num_ranks: int, num_workers: int) -> None:
    """Refuse more workers than a process has files.

    Raises:
        ValueError: Says how many workers there may be.
    """
    if num_workers > _num_files(rows, num_ranks):
        raise ValueError(_too_many(rows, num_ranks))


def _num_files(rows: datasets.IterableDataset, num_ranks: int) -> int:
    """Files of a process: a share of them, or parts of all where they cannot be shared evenly."""
    return rows.num_shards // num_ranks if rows.num_shards % num_ranks == 0 else rows.num_shards


def _too_many(rows: datasets.IterableDataset, num_ranks: int) -> str:
    return (
        f"The stream has {rows.num_shards} files and every worker reads files of its own: set "
        f"--workers to {_num_files(rows, num_ranks)} or less, or divide the data into more files."
    )


class _Encoded:
    """A reader of images that are kept encoded, decoded when they are asked for."""

    def __init__(self, images: list[Any], channels: ChannelSet, value_scale: float | None) -> None:
        self._images, self.channels, self._value_scale = images, channels, value_scale

    def __call__(self, row: int) -> Tensor:
        return _decode(self._images[row], self.channels, self._value_scale)


def stream_data(
    source: str,
    *,
    channels: ChannelSetLike | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    splits: Mapping[str, str | None] | None = None,
    limit: int | None = None,
    value_scale: float | None = None,
) -> ImageData:
    """Open data that is not downloaded as a whole.

    Args:
        source: A name on the hub, a folder of Parquet files or one such file; its images are in the
            rows, its labels are `ClassLabel`.
        channels: See `load_data`.
        image_column: Likewise.
        label_column: Likewise.
        splits: Likewise.
        limit: At most so many images of validation and test, the first ones.
        value_scale: See `load_data`.

    Returns:
        The data: of the training split the first images and the stream; the other splits are
        kept encoded in memory.

    Raises:
        FileNotFoundError: Nothing is there, or the hub cannot be reached.
        ValueError: No training split, labels without names, images that are not in the rows.
    """
    name, streams = open_streams(source, splits or {})
    if "train" not in streams:
        raise ValueError(f"{source} has no training split to stream; it has {', '.join(streams)}.")
    columns = (
        find_column(streams["train"], image_column, IMAGE_RULE, name),
        find_column(streams["train"], label_column, LABEL_RULE, name),
    )
    feature = streams["train"].features[columns[1]]
    if not isinstance(feature, datasets.ClassLabel):
        raise ValueError(
            f"The labels of {name} are {feature}, whose classes only a look at all of them tells. "
            f"Write them as ClassLabel, or leave --streaming out."
        )
    raw = {split: _raw(rows, columns) for split, rows in streams.items()}
    first = next(iter(raw["train"]))
    wanted = _channels(first[columns[0]], channels)
    kept = {
        split: _keep(rows.take(count) if count else rows, columns, wanted, value_scale)
        for split, rows in raw.items()
        for count in (NUM_SAMPLED if split == "train" else limit,)
    }
    return ImageData(
        train=kept["train"],
        validation=kept.get("validation"),
        test=kept.get("test"),
        class_names=tuple(feature.names),
        channels=wanted,
        name=name,
        stream=(raw["train"], columns),
    )


def _raw(rows: datasets.IterableDataset, columns: tuple[str, str]) -> datasets.IterableDataset:
    """Only the two columns, images as bytes."""
    rows = rows.select_columns(list(columns))
    if isinstance(rows.features[columns[0]], datasets.Image):
        rows = rows.cast_column(columns[0], datasets.Image(decode=False))
    return rows


def _keep(
    rows: datasets.IterableDataset,
    columns: tuple[str, str],
    channels: ChannelSet,
    value_scale: float | None,
) -> ImageSplit:
    images, labels = [], []
    for row in rows:
        images.append(row[columns[0]])
        labels.append(row[columns[1]])
    return ImageSplit(_Encoded(images, channels, value_scale), labels)


def _channels(image: Any, channels: ChannelSetLike | None) -> ChannelSet:
    """The given channels, else those that the first image has."""
    if channels is not None and len(ChannelSet.parse(channels)):
        return ChannelSet.parse(channels)
    count = decode_planes(_bytes(image)).num_planes
    return RGB if channels is None and count in (1, 3) else ChannelSet.anonymous(count)


def _bytes(image: Any) -> bytes:
    if isinstance(image, dict):
        image = image["bytes"] if image["bytes"] is not None else image["path"]
    if isinstance(image, bytes):
        return image
    if isinstance(image, str) and Path(image).is_file():
        return Path(image).read_bytes()
    raise ValueError(
        f"The images are not in the rows (found {type(image).__name__}). Leave --streaming out."
    )


def _decode(image: Any, channels: ChannelSet, value_scale: float | None) -> Tensor:
    planes = decode_planes(_bytes(image), len(channels))
    return to_stored_values(fit_planes(planes, channels), value_scale)
