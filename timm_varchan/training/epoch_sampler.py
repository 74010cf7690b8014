"""The order of the training images."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import Sampler

from timm_varchan.channels import seeded_rng

__all__ = ["EpochSampler"]


class EpochSampler(Sampler[int]):
    """Images in an order that depends on seed and epoch alone.

    Args:
        num_images: Size of the data.
        seed: Of the order.
        num_drawn: How many of them an epoch has, others in every epoch; all by default.
    """

    def __init__(self, num_images: int, seed: int, num_drawn: int | None = None) -> None:
        self.num_images, self.seed, self.epoch = num_images, seed, 0
        self.num_drawn = num_images if num_drawn is None else num_drawn

    def set_epoch(self, epoch: int) -> None:
        """Choose the order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_drawn

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.num_images))
        seeded_rng("order", self.seed, self.epoch).shuffle(order)
        return iter(order[: self.num_drawn])
