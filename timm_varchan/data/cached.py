"""Images decoded once and kept in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import torch
from torch import Tensor

from timm_varchan.channels import seeded_rng
from timm_varchan.data.split import ImageSplit

__all__ = ["cached"]

#: Share of the memory that is free which a cache may take.
_SHARE = 0.8
#: Images that are looked at before all of them are decoded.
_NUM_LOOKED_AT = 32


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
    chosen = seeded_rng("cache").sample(range(len(split)), min(_NUM_LOOKED_AT, len(split)))
    looked_at = [split[index][0] for index in sorted(chosen)]
    free = psutil.virtual_memory().available
    limit = _SHARE * free / num_copies

    def check(num_bytes: float, number: str) -> None:
        if num_bytes > limit:
            raise ValueError(
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
