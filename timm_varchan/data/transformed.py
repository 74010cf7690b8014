"""A split with a transform whose chance depends on seed, epoch and index alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from timm_varchan.channels import seeded_rng
from timm_varchan.data.split import ImageSplit


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
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: it reseeds the accelerators too, and in workers queues that.
            torch.default_generator.manual_seed(key)
            return self.transform(image), label
