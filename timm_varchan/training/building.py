"""Data, model and loaders of a configuration."""

from __future__ import annotations

import dataclasses
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.models import model_entrypoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from timm_varchan.channels import ChannelSet
from timm_varchan.data import (
    ImageData,
    ImageSplit,
    TransformedSplit,
    channel_stats,
    eval_transform,
    load_data,
    train_transform,
)
from timm_varchan.evaluation import has_stems
from timm_varchan.training.channel_draws import FIXED_COUNT_AUGS
from timm_varchan.training.configuration import TrainConfig
from timm_varchan.training.loop import EpochSampler

__all__ = ["build_model", "eval_loader", "load_run_data", "train_loader"]

Loader = DataLoader[tuple[Tensor, int]]


def load_run_data(config: TrainConfig, accelerator: Accelerator) -> ImageData:
    """The data of a run, its channels with mean and standard deviation.

    The main process comes first: it downloads and measures, the others read what it left.
    """
    named = {"train": config.train_split, "validation": config.validation_split}
    named["test"] = config.test_split
    with accelerator.main_process_first():
        data = load_data(
            config.dataset,
            channels=config.channels,
            image_column=config.image_column,
            label_column=config.label_column,
            splits={split: name for split, name in named.items() if name is not None},
            validation_fraction=config.validation_fraction,
            limit=config.limit,
            seed=config.data_seed,
            skip_corrupt=config.skip_corrupt,
            value_scale=config.value_scale,
            img_size=config.img_size,
        )
    if data.channels.mean is not None:
        return data
    split = next(s for s in (data.train, data.validation, data.test) if s is not None)
    stats: list[Any] = [channel_stats(split) if accelerator.is_main_process else None]
    broadcast_object_list(stats)
    return dataclasses.replace(data, channels=data.channels.with_stats(*stats[0]))


def build_model(config: TrainConfig, data: ImageData) -> nn.Module:
    """The model of a run, for the data's channels and classes.

    Raises:
        ValueError: An augmentation that changes the number of planes, for a model without a stem.
    """
    if config.eval_only is not None:
        model = timm.create_model(f"local-dir:{config.eval_only}", pretrained=True)
        return _check(model, config, data)
    kwargs: dict[str, Any] = {"num_classes": len(data.class_names), "in_chans": len(data.channels)}
    if ":" in config.model:
        return _check(timm.create_model(config.model, pretrained=True, **kwargs), config, data)
    known = timm.models.get_pretrained_cfg(config.model)
    if known is not None and known.fixed_input_size:
        kwargs["img_size"] = config.img_size
    words = [c.name for c in data.channels if c.name is not None and c.wavelength_nm is None]
    if words and model_entrypoint(config.model).__module__.startswith("timm_varchan"):
        kwargs["channel_names"] = tuple(words)
    kwargs |= config.model_kwargs
    return _check(
        timm.create_model(config.model, pretrained=config.pretrained, **kwargs), config, data
    )


def _check(model: nn.Module, config: TrainConfig, data: ImageData) -> nn.Module:
    if not has_stems(model) and config.channel_aug not in FIXED_COUNT_AUGS:
        raise ValueError(
            f"{config.model} takes a fixed number of channels, --channel-aug {config.channel_aug} "
            f"changes it. Choose dwg_{config.model}, or one of {', '.join(FIXED_COUNT_AUGS)}."
        )
    if model.num_classes != len(data.class_names):
        raise ValueError(
            f"The model has {model.num_classes} classes, the data {len(data.class_names)}. "
            f"Evaluate on the data that it was trained for."
        )
    return model


def stored_channels(model: nn.Module, channels: ChannelSet) -> ChannelSet:
    """The channels with the mean and standard deviation that a saved model was trained with."""
    cfg: Any = model.pretrained_cfg
    if len(cfg["mean"]) != len(channels):
        raise ValueError(
            f"The model was trained on {len(cfg['mean'])} channels, the data has {channels} "
            f"({len(channels)}). Say which with --channels."
        )
    return channels.with_stats(cfg["mean"], cfg["std"])


def train_loader(
    config: TrainConfig, split: ImageSplit, channels: ChannelSet, num_processes: int
) -> Loader:
    """Augmented batches, in an order that depends on seed and epoch.

    Raises:
        ValueError: Fewer images than one step takes.
    """
    if len(split) < config.batch_size * num_processes:
        raise ValueError(
            f"{len(split)} training images are fewer than a step of {num_processes} x "
            f"{config.batch_size}. Lower --batch-size."
        )
    transform = train_transform(config.img_size, channels)
    return DataLoader(
        TransformedSplit(split, transform, config.seed),
        batch_size=config.batch_size,
        sampler=EpochSampler(len(split), config.seed),
        num_workers=config.workers,
        drop_last=True,
        pin_memory=torch.cuda.is_available(),
    )


def eval_loader(config: TrainConfig, split: ImageSplit, channels: ChannelSet) -> Loader:
    """Batches for evaluation, in the order of the data."""
    transform = eval_transform(config.img_size, channels, crop_pct=config.crop_pct)
    return DataLoader(
        TransformedSplit(split, transform, config.seed),
        batch_size=config.eval_batch_size,
        num_workers=config.workers,
        pin_memory=torch.cuda.is_available(),
    )
