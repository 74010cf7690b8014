"""Mixup and cutmix by timm, drawn from seed, epoch and step."""

from __future__ import annotations

import numpy as np
from timm.data import Mixup
from torch import Tensor

from timm_varchan.channels import seeded_rng
from timm_varchan.training.configuration import TrainConfig
from timm_varchan.views import DrawKey

__all__ = ["SeededMixup"]


class SeededMixup:
    """Mixes the images of a batch and their labels; all planes of an image in the same way.

    Args:
        config: Strengths and label smoothing.
        num_classes: Width of the mixed labels.
    """

    def __init__(self, config: TrainConfig, num_classes: int) -> None:
        self._mixup = Mixup(
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            label_smoothing=config.smoothing,
            num_classes=num_classes,
        )

    def __call__(self, x: Tensor, labels: Tensor, key: DrawKey) -> tuple[Tensor, Tensor]:
        """Mix `(B, C, H, W)` in place; the labels `(B,)` become `(B, num_classes)`."""
        seed = seeded_rng("mixup", key.seed, key.epoch, key.step, key.start).getrandbits(32)
        state = np.random.get_state()  # timm draws from NumPy's global generator
        np.random.seed(seed)
        try:
            return self._mixup(x, labels)
        finally:
            np.random.set_state(state)
