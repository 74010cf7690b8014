"""Data and loaders of a configuration."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from timm_varchan.channels import ANONYMOUS, ChannelSet, seeded_rng
from timm_varchan.data import (
    ImageData,
    ImageSplit,
    ImageStream,
    TransformedSplit,
    cached,
    check_workers,
    eval_transform,
    load_data,
    measure_split,
    stream_data,
    train_transform,
)
from timm_varchan.errors import UserError
from timm_varchan.hub import SavedModel
from timm_varchan.models import has_stems
from timm_varchan.products import products_with
from timm_varchan.training.config import TrainConfig

__all__ = [
    "EpochSampler",
    "Loader",
    "StreamLoader",
    "epoch_batches",
    "eval_loader",
    "evaluation_split",
    "load_run_data",
    "train_loader",
]

logger = logging.getLogger(__name__)

Loader = DataLoader[tuple[Tensor, int]]


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


class StreamLoader:
    """Batches of a stream on this process's device; every process reads a share of its own.

    Args:
        loader: Of an `ImageStream`.
        device: Where batches go.
    """

    def __init__(self, loader: DataLoader[Any], device: torch.device) -> None:
        self._loader, self._device = loader, device

    def __len__(self) -> int:
        return len(self._loader)

    def set_epoch(self, epoch: int) -> None:
        """Choose order and augmentation."""
        dataset: Any = self._loader.dataset
        dataset.set_epoch(epoch)

    def skip(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the epoch after so many."""
        for x, labels in itertools.islice(self._loader, count, None):
            yield x.to(self._device, non_blocking=True), labels.to(self._device)


def epoch_batches(loader: Any, epoch: int, done: int) -> Iterable[tuple[Tensor, Tensor]]:
    """The batches of an epoch after so many.

    Args:
        loader: A `StreamLoader`, or what the accelerator prepared. It is told the epoch itself,
            since it tells its sampler whenever it is iterated: left to itself it counts from 0.
        epoch: Order and augmentation hang on it.
        done: Batches of this process to leave out.
    """
    loader.set_epoch(epoch)
    if isinstance(loader, StreamLoader):
        return loader.skip(done)
    dataset: Any = loader.dataset
    dataset.set_epoch(epoch)  # accelerate tells the sampler or the dataset, not both
    # The loader itself wherever it will do: a new one begins with new workers.
    return skip_first_batches(loader, done) if done else loader


def load_run_data(
    config: TrainConfig, accelerator: Accelerator, saved: SavedModel | None = None
) -> ImageData:
    """The data of a run, its channels with mean and standard deviation.

    The main process comes first: it downloads and measures, the others read what it left.

    Args:
        config: The run.
        accelerator: Its processes.
        saved: The model that is only evaluated; its classes, channels and their statistics hold.

    Raises:
        UserError: What `load_data` refuses, or other classes than the saved model's.
    """
    if saved is None:
        channels = config.channel_set()
    else:
        channels = saved.select(config.channels) if config.channels else saved.channels
    splits = {name: getattr(config, f"{name}_split") for name in ("train", "validation", "test")}
    common: dict[str, Any] = {
        "channels": channels,
        "splits": {split: name for split, name in splits.items() if name is not None},
        **{
            name: getattr(config, name)
            for name in (
                "image_column", "label_column", "limit", "value_scale", "no_data", "skip_corrupt",
            )
        },
    }  # fmt: skip
    with accelerator.main_process_first():
        if config.streaming and saved is None:
            data = stream_data(config.dataset, **common)
        else:
            data = load_data(
                config.dataset,
                class_names=(saved.class_names or None) if saved else None,
                validation_fraction=config.validation_fraction,
                seed=config.data_seed,
                img_size=config.img_size,
                **common,
            )
    if config.channels is None and saved is None:
        data = _with_names(data, accelerator)
    if config.use is not None:
        planes = data.channels.index(config.use)
        data = data.with_planes(planes, data.channels.take(planes))
        channels = channels.take(planes) if channels is not None and len(channels) else None
    if saved is not None:
        _check_saved(saved, data, channels or ANONYMOUS)
    return _with_statistics(data, channels, accelerator)


def _check_saved(saved: SavedModel, data: ImageData, channels: ChannelSet) -> None:
    """Refuse data that a model was not made for: other planes, another scale, other classes."""
    same = [c.identity for c in saved.channels] == [c.identity for c in channels]
    if not (has_stems(saved.model) or saved.channels.is_anonymous or same):
        raise UserError(
            f"The model has no stem and takes {saved.channels} in this order, but the data are "
            f"{channels}. Compare models of the same planes in the same order, or use a dwg_ twin."
        )
    if data.channels.mean is None and saved.channels.mean is not None:
        raise UserError(
            f"The images of {data.name} are on another scale than the model's, as the log says. "
            f"Say --value-scale."
        )
    if saved.model.num_classes != len(data.class_names):
        raise UserError(
            f"The model has {saved.model.num_classes} classes, the data {len(data.class_names)}. "
            f"Evaluate on the data that it was trained for."
        )


def _with_names(data: ImageData, accelerator: Accelerator) -> ImageData:
    """The data with names for planes of which nobody said anything: c0, c1, ... by their place."""
    count = len(data.channels)
    if not count or not data.channels.is_anonymous or data.stream is not None:
        return data
    names = tuple(dataclasses.replace(c, name=f"c{i}") for i, c in enumerate(data.channels))
    named = dataclasses.replace(data.channels, channels=names)
    if accelerator.is_main_process:
        logger.warning(
            "The %d planes of the images have no names: they are called %s, and learned by their "
            "place. Say what they are with --channels. %s",
            count, named, products_with(count) or "",
        )  # fmt: skip
    return data.with_planes(range(count), named)


def _with_statistics(
    data: ImageData, wanted: ChannelSet | None, accelerator: Accelerator
) -> ImageData:
    """The data with statistics of its channels: those that were wanted, or the images'.

    Images are also measured where pixels without data are let in, for their share.
    """
    channels = data.channels
    if data.name == "synthetic" and wanted is not None and wanted.mean and wanted.std:
        channels = channels.with_stats(wanted.mean, wanted.std, wanted.correlation)
    lets_in = data.spec.no_data in ("mean", "predict")
    if channels.mean is not None and not lets_in:
        return data.with_channels(channels)
    split = next(s for s in (data.train, data.validation, data.test) if s is not None)
    found: list[Any] = [measure_split(split) if accelerator.is_main_process else None]
    broadcast_object_list(found)
    measured, invalid = found[0]
    data = data.with_channels(measured if channels.mean is None else channels)
    return dataclasses.replace(data, invalid_share=sum(invalid) / len(invalid))


def evaluation_split(data: ImageData) -> tuple[str, ImageSplit]:
    """The images for the final figures: test, else validation, else training."""
    for name in ("test", "validation", "train"):
        split = getattr(data, name)
        if split is not None:
            return name, split
    raise UserError(f"{data.name} has no images. Name a split with --test-split.")


def train_loader(
    config: TrainConfig, data: ImageData, accelerator: Accelerator
) -> Loader | StreamLoader:
    """Augmented batches, in an order that depends on seed and epoch; whole updates only.

    Returns:
        A loader to prepare, or one that is ready, of streamed images.

    Raises:
        UserError: No training images, fewer than one update takes, or more than memory holds with
            --cache.
    """
    split, channels = data.train, data.channels
    if split is None:
        raise UserError(f"{data.name} has no training images. Name its split with --train-split.")
    images = config.batch_size * config.grad_accum_steps * accelerator.num_processes
    count = config.epoch_images if config.streaming and config.epoch_images else len(split)
    if count < images:
        raise UserError(
            f"{count} training images are fewer than an update of {accelerator.num_processes} "
            f"x {config.batch_size} x {config.grad_accum_steps}. Lower --batch-size."
        )
    transform = train_transform(
        config.pixels, channels, scale=config.crop_scale, ratio=config.crop_ratio,
        hflip=config.hflip, vflip=config.vflip, rotation_degrees=config.rotation_degrees,
        auto_augment=config.auto_augment, erase_prob=config.erase_prob, no_data=config.no_data,
    )  # fmt: skip
    if data.stream is not None:
        check_workers(data.stream[0], accelerator.num_processes, config.workers)
        stream = ImageStream(
            data, transform,
            num_batches=count // images * config.grad_accum_steps, batch_size=config.batch_size,
            process=(accelerator.process_index, accelerator.num_processes), seed=config.seed,
            skip_corrupt=config.skip_corrupt,
        )  # fmt: skip
        loader = DataLoader(stream, batch_size=config.batch_size, **_workers(config))
        return StreamLoader(loader, accelerator.device)
    if config.cache:
        split = cached(split, num_copies=accelerator.num_processes)
    return DataLoader(
        TransformedSplit(split, transform, config.seed),
        batch_size=config.batch_size,
        sampler=EpochSampler(len(split), config.seed, len(split) // images * images),
        drop_last=True,
        **_workers(config),
    )


def eval_loader(config: TrainConfig, split: ImageSplit, channels: ChannelSet) -> Loader:
    """Batches for evaluation, in the order of the data."""
    transform = eval_transform(
        config.pixels, channels, crop_pct=config.crop_pct or 1.0, no_data=config.no_data
    )
    return DataLoader(
        TransformedSplit(split, transform, config.seed),
        batch_size=config.eval_batch_size,
        **_workers(config),
    )


def _workers(config: TrainConfig) -> dict[str, Any]:
    """How the images are fetched. Workers live on through the epochs."""
    return {
        "num_workers": config.workers,
        "prefetch_factor": config.prefetch if config.workers else None,
        "persistent_workers": config.workers > 0,
        "pin_memory": torch.cuda.is_available(),
    }
