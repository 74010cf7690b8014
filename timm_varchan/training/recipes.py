"""Named configurations: `--recipe NAME` takes their values where no flag says otherwise."""

from __future__ import annotations

from collections.abc import Callable

from timm_varchan.training.configuration import TrainConfig

__all__ = ["RECIPES"]


def report() -> TrainConfig:
    """The reference report's: Adam, 200 epochs, crops, flips, rotations, shuffled channels.

    The model is not told the channels. The report does not print its crops and rotations: those
    are the package's defaults.
    Source: Chia-Ming Lee, Deep Learning Assignment II, github.com/ming0531/DL-Assignment-2.
    """
    return TrainConfig(
        recipe="report",
        epochs=200,
        batch_size=16,
        opt="adam",
        lr=1e-3,
        sched="constant",
        warmup_epochs=0,
        weight_decay=0.0,
        crop_scale=(0.35, 1.0),
        hflip=0.5,
        rotation_degrees=15.0,
        channel_aug="shuffle",
        channel_identity="anonymous",
    )


def modern() -> TrainConfig:
    """What networks are trained with today, for any number of channels.

    AdamW, cosine with warm-up, TrivialAugment, mixup and cutmix, label smoothing, erasing,
    stochastic depth, averaged weights.
    Source: the ingredients of ResNet strikes back, arXiv:2110.00476 (there LAMB and binary cross
    entropy), and of ConvNeXt, arXiv:2201.03545.
    """
    return TrainConfig(
        recipe="modern",
        epochs=100,
        batch_size=128,
        opt="adamw",
        lr=2e-3,
        min_lr=1e-5,
        warmup_epochs=5,
        weight_decay=0.05,
        smoothing=0.1,
        clip_grad=1.0,
        ema_decay=0.9998,
        drop_path=0.05,
        crop_scale=(0.25, 1.0),
        rotation_degrees=0.0,
        auto_augment="trivial",
        erase_prob=0.25,
        mixup=0.1,
        cutmix=1.0,
        channel_aug="hcs-sample",
    )


#: By the name that `--recipe` takes.
RECIPES: dict[str, Callable[[], TrainConfig]] = {"report": report, "modern": modern}
