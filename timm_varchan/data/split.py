"""What a loaded data set is: splits of images and labels, and the channels of the planes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import datasets
import torch
from torch import Tensor

from timm_varchan.channels import ChannelSet

logger = logging.getLogger(__name__)

#: How the error about a row ends.
ROW_CURE = (
    ". Repair it or take it out, or leave such rows out with --skip-corrupt (skip_corrupt=True)."
)
#: Rows that a warning about skipped ones names.
NUM_NAMED = 5


class Reader(Protocol):
    """Where a split's images come from; it must pickle, for the workers of a `DataLoader`."""

    channels: ChannelSet

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
        taken = ImageSplit(self._reader, (), rows=(), skipped=self.skipped)
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
        readable = self.take([i for i, problem in enumerate(problems) if problem is None])
        readable.skipped = self.skipped + tuple(p for p in problems if p is not None)
        if readable.num_skipped:
            logger.warning(
                "%d images skipped: %s%s",
                readable.num_skipped,
                "; ".join(readable.skipped[:NUM_NAMED]),
                "; ..." if readable.num_skipped > NUM_NAMED else "",
            )
        return readable

    def _problem(self, row: int) -> str | None:
        try:
            self._reader(row)
        except ValueError as error:
            return str(error).removesuffix(ROW_CURE)
        return None


@dataclass(frozen=True)
class ImageData:
    """A loaded data set.

    Args:
        train: Images to learn from, None where the source has none.
        validation: Images to choose by.
        test: Images for the final figures.
        class_names: Name of every label.
        channels: Planes of every image, in order, with mean and standard deviation where known.
        name: What the data is, for results: `synthetic`, a hub name, a folder's name; no path.
        stream: Where training images are streamed, their rows and the names of the image and the
            label column; `train` has only the first of them then.
    """

    train: ImageSplit | None
    validation: ImageSplit | None
    test: ImageSplit | None
    class_names: tuple[str, ...]
    channels: ChannelSet
    name: str
    stream: tuple[datasets.IterableDataset, tuple[str, str]] | None = None
