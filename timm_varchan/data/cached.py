"""Images decoded once and kept in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import torch
from torch import Tensor

from timm_varchan.data.split import ImageSplit

__all__ = ["cached"]

#: Share of the memory that is free which a cache may take.
_SHARE = 0.8


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
        ValueError: They need more memory than is free; an image that cannot be read.
    """
    first = split[0][0]
    needed = first.nbytes * len(split) * num_copies
    free = psutil.virtual_memory().available
    if needed > _SHARE * free:
        raise ValueError(
            f"{len(split)} images of {tuple(first.shape)} need about {needed / 2**30:.1f} GiB of "
            f"memory ({num_copies} processes), {free / 2**30:.1f} GiB are free. Leave --cache out."
        )
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
        images = threads.map(lambda index: split[index][0], range(len(split)))
        kept = _stacked(first, len(split), images)
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
