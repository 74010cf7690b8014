"""Training images that are read as they come, from the hub or from Parquet files.

`datasets` shuffles, and divides files among processes and workers.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from datasets.distributed import split_dataset_by_node
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from timm_varchan.channels import seeded_rng
from timm_varchan.data.dataset import (
    IMAGE_RULE,
    LABEL_RULE,
    NUM_NAMED,
    ImageData,
    data_of,
    find_column,
    readable,
    seeded_transform,
    settle_spec,
)
from timm_varchan.data.labels import label_problem
from timm_varchan.data.lists import Columns
from timm_varchan.data.reading import Reading
from timm_varchan.data.records import ROW_CURE
from timm_varchan.data.sources import Tables, load_tables
from timm_varchan.errors import ImageError, UserError
from timm_varchan.input_spec import InputSpec

logger = logging.getLogger(__name__)

__all__ = ["ImageStream", "check_workers", "stream_data"]

#: After so many skipped images the log has another line.
_LOG_EVERY = 1000
#: Training images that are looked at for means and deviations,
NUM_SAMPLED = 1000
#: files that they come from, and of how many rows of a file one is drawn.
_NUM_FILES_SAMPLED, _SPREAD = 16, 4
_PIECE = 100


class ImageStream(torch.utils.data.IterableDataset[tuple[Tensor, int]]):
    """An epoch of transformed images and labels for one process, in a shuffled order.

    Whoever comes to the end of its share of the rows begins again. Order and augmentation depend on
    seed, epoch and place alone.

    Args:
        data: From `stream_data`.
        transform: From `(C, H, W)` to what the model takes.
        num_batches: Batches of an epoch and process.
        batch_size: Images of a batch.
        process: Index of this process and how many there are.
        seed: Of order and augmentation.
        buffer_size: Images among which the next is drawn.
        skip_corrupt: Take the next row for one that cannot be read or has no valid label; the log
            names the first ones.
    """

    def __init__(
        self,
        data: ImageData,
        transform: nn.Module,
        *,
        num_batches: int,
        batch_size: int,
        process: tuple[int, int] = (0, 1),
        seed: int = 0,
        buffer_size: int = 1000,
        skip_corrupt: bool = False,
    ) -> None:
        assert data.stream is not None
        self._rows, self._columns = data.stream
        self._num_classes, self._reading = len(data.class_names), Reading(data.spec)
        self._transform, self._seed = transform, seed
        self._num_batches, self._batch_size = num_batches, batch_size
        self._process, self._buffer_size = process, buffer_size
        self._skip_corrupt, self._num_skipped = skip_corrupt, 0
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
        # Workers take turns at whole batches.
        batches = len(range(worker, self._num_batches, num_workers))
        rows = itertools.islice(self._passes(epoch), batches * self._batch_size)
        for place, (planes, label) in enumerate(rows):
            key = seeded_rng("stream", self._seed, epoch, rank, worker, place).getrandbits(63)
            yield seeded_transform(self._transform, planes, key), label

    def _passes(self, epoch: int) -> Iterator[tuple[Tensor, int]]:
        """This reader's images and labels, again and again, in another order each time."""
        for number in itertools.count():
            seed = seeded_rng("stream order", self._seed, epoch, number).getrandbits(32)
            rows = self._rows.shuffle(seed=seed, buffer_size=self._buffer_size)
            problem, num_read = "", 0
            for place, row in enumerate(split_dataset_by_node(rows, *self._process)):
                try:
                    example = self._read(row, f"row {place} of pass {number} in epoch {epoch}")
                except UserError as error:
                    if not self._skip_corrupt:
                        raise
                    problem = str(error).removesuffix(ROW_CURE)
                    self._num_skipped += 1
                    if self._num_skipped <= NUM_NAMED or self._num_skipped % _LOG_EVERY == 0:
                        logger.warning("%d streamed images skipped: %s", self._num_skipped, problem)
                    continue
                num_read += 1
                yield example
            if num_read == 0:
                raise UserError(
                    f"No training image can be read; the last: {problem}. Leave --streaming out."
                    if problem
                    else _too_many(self._rows, self._process[1])
                )

    def _read(self, row: Mapping[str, Any], place: str) -> tuple[Tensor, int]:
        """Image and label of a row; a `UserError` names it."""
        image, label = (row[column] for column in self._columns)
        try:
            if label is not None and 0 <= label < self._num_classes:
                return self._reading.read(image), int(label)
            problem = label_problem(label, self._num_classes)
        except ImageError as error:
            problem = f"cannot be read: {error}"
        path = image.get("path") if isinstance(image, dict) else None
        named = f"label {label}" + (f", {path}" if path else "")
        raise UserError(f"train {place} ({named}) {problem}{ROW_CURE}")


def check_workers(rows: datasets.IterableDataset, num_ranks: int, num_workers: int) -> None:
    """Refuse more workers than a process has files.

    Raises:
        UserError: Says how many workers there may be.
    """
    if num_workers > _num_files(rows, num_ranks):
        raise UserError(_too_many(rows, num_ranks))


def _num_files(rows: datasets.IterableDataset, num_ranks: int) -> int:
    """Files of a process: a share of them, or parts of all where they cannot be shared evenly."""
    return rows.num_shards // num_ranks if rows.num_shards % num_ranks == 0 else rows.num_shards


def _too_many(rows: datasets.IterableDataset, num_ranks: int) -> str:
    return (
        f"The stream has {rows.num_shards} files and every worker reads files of its own: set "
        f"--workers to {_num_files(rows, num_ranks)} or less, or divide the data into more files."
    )


def stream_data(
    source: str,
    spec: InputSpec | None = None,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    splits: Mapping[str, str | None] | None = None,
    limit: int | None = None,
    skip_corrupt: bool = False,
    **fields: Any,
) -> ImageData:
    """Open data that is not downloaded as a whole; the arguments are those of `load_data`.

    The source is a name on the hub, a folder of Parquet files or one such file; its images are in
    the rows, its labels are `ClassLabel`. A limit takes the first images of validation and test.

    Returns:
        The data: of the training split a sample and the stream; the other splits are kept encoded
        in memory. The sample is drawn from the beginnings of files all over the data.

    Raises:
        FileNotFoundError: Nothing is there, or the hub cannot be reached.
        UserError: No training split, labels without names or out of range, images that are not in
            the rows or, among those that are kept, cannot be read.
    """
    spec, guess = settle_spec(spec, fields)
    opened = load_tables(source, splits or {}, streaming=True)
    name, streams = opened.name, opened.splits
    if "train" not in streams:
        raise UserError(f"{source} has no training split to stream; it has {', '.join(streams)}.")
    image = find_column(streams["train"], image_column, IMAGE_RULE, name)
    label = find_column(streams["train"], label_column, LABEL_RULE, name)
    features = streams["train"].features
    if not isinstance(features[label], datasets.ClassLabel):
        raise UserError(
            f"The labels of {name} are {features[label]}, whose classes only a look at all of them "
            f"tells. Write them as ClassLabel, or leave --streaming out."
        )
    if isinstance(features[image], (datasets.Array2D, datasets.Array3D)):
        raise UserError(f"The images of {name} are arrays, not files. Leave --streaming out.")
    raw = {split: _raw(rows, image, label) for split, rows in streams.items()}
    sample = list(_sampled_rows(raw["train"]))
    kept = {"train": [row for _, row in sample]}
    kept |= {
        s: list(rows.take(limit) if limit else rows) for s, rows in raw.items() if s != "train"
    }
    tables = Tables(
        {s: _table_of(r, raw[s].features) for s, r in kept.items()}, Path(), name,
        row_names={"train": [place for place, _ in sample]},
    )  # fmt: skip
    spec = replace(spec, class_names=tuple(features[label].names))
    data = data_of(tables, spec, Columns(image, label), skip_corrupt=skip_corrupt, guess=guess)
    data = replace(data, stream=(raw["train"], (image, label)))
    return data.each(readable) if skip_corrupt else data


def _raw(rows: datasets.IterableDataset, image: str, label: str) -> datasets.IterableDataset:
    """Only the two columns, images as bytes."""
    rows = rows.select_columns([image, label])
    if isinstance(rows.features[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    return rows


def _table_of(rows: list[dict[str, Any]], features: datasets.Features) -> datasets.Dataset:
    """Rows as they are, in pieces: an arrow array of bytes ends at 2 GiB."""
    starts = range(0, max(1, len(rows)), _PIECE)
    pieces = [pa.Table.from_pylist(rows[i : i + _PIECE], features.arrow_schema) for i in starts]
    return datasets.Dataset(datasets.table.InMemoryTable(pa.concat_tables(pieces)))


def _sampled_rows(rows: datasets.IterableDataset) -> Iterator[tuple[str, dict[str, Any]]]:
    """Some rows and their places, drawn with a fixed seed from the beginnings of several files."""
    rng, count = seeded_rng("stream sample"), rows.num_shards
    share, missing = -(-NUM_SAMPLED // min(_NUM_FILES_SAMPLED, count)), NUM_SAMPLED
    for file in rng.sample(range(count), count):
        part = rows.shard(count, file) if count > 1 else rows
        some = list(enumerate(part.take(_SPREAD * share)))
        drawn = sorted(rng.sample(range(len(some)), min(share, missing, len(some))))
        yield from ((f"file {file + 1} of {count}, row {some[i][0]}", some[i][1]) for i in drawn)
        missing -= len(drawn)
        if missing <= 0:
            return
