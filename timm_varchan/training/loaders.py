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

from timm_varchan.channels import ChannelSet, seeded_rng
from timm_varchan.data import (
    ImageData,
    ImageSplit,
    ImageStream,
    TransformedSplit,
    cached,
    check_workers,
    eval_transform,
    load_data,
    load_fingerprints,
    measure_split,
    stream_data,
    train_transform,
    unseen,
)
from timm_varchan.errors import UserError
from timm_varchan.hub import SavedModel
from timm_varchan.input_spec import InputSpec
from timm_varchan.models import has_stems
from timm_varchan.products import products_with
from timm_varchan.training.config import EvaluateConfig, TrainConfig

logger = logging.getLogger(__name__)

Loader = DataLoader[tuple[Tensor, int]]


class EpochSampler(Sampler[int]):
    """So many images, all by default, in an order that depends on seed and epoch alone."""

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
    """Batches of an `ImageStream` on this process's device; each process reads its own share."""

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
            yield (
                x.to(self._device, non_blocking=True),
                labels.to(self._device, non_blocking=True),
            )


def epoch_batches(loader: Any, epoch: int, done: int) -> Iterable[tuple[Tensor, Tensor]]:
    """The batches of an epoch after so many that are done.

    What the accelerator prepared is told the epoch itself, since it tells its sampler whenever it
    is iterated: left to itself it counts from 0.
    """
    loader.set_epoch(epoch)
    if isinstance(loader, StreamLoader):
        return loader.skip(done)
    dataset: Any = loader.dataset
    dataset.set_epoch(epoch)  # accelerate tells the sampler or the dataset, not both
    # The loader itself wherever it will do: a new one begins with new workers.
    return skip_first_batches(loader, done) if done else loader


def load_run_data(
    config: TrainConfig | EvaluateConfig,
    spec: InputSpec,
    accelerator: Accelerator,
    *,
    guess: bool = True,
) -> ImageData:
    """The data of a run, its channels with mean and standard deviation.

    The main process comes first: it downloads and measures, the others read what it left.

    Args:
        config: The flags; what they say of the input goes before what `spec` says.
        spec: What is known of the input: nothing but a size, or what a saved model says.
        accelerator: The run's processes.
        guess: Whether planes that nobody named may get names by their place.

    Raises:
        UserError: What `load_data` refuses.
    """
    spec = wanted_spec(config, spec)
    common: dict[str, Any] = {
        "splits": config.splits,
        **{
            k: getattr(config, k) for k in ("image_column", "label_column", "limit", "skip_corrupt")
        },
    }
    streaming = isinstance(config, TrainConfig) and config.streaming
    if accelerator.is_main_process:
        logger.info("Reading %s.", config.dataset)
    with accelerator.main_process_first():
        if streaming:
            data = stream_data(config.dataset, spec, **common)
        else:
            trains, fraction = isinstance(config, TrainConfig), config.validation_fraction
            data = load_data(
                config.dataset, spec, seed=config.data_seed, planes=config.planes,
                validation_fraction=(0.1 if trains else 0.0) if fraction is None else fraction,
                allow_absent=getattr(config, "channel_aug", None) == "hcs-sample", **common,
                partial=not guess and config.channels is None,
            )  # fmt: skip
    if guess and not len(spec.channels):
        data = _with_names(data, accelerator)
    if config.use is not None:
        planes = data.channels.index(config.use)
        data = data.with_planes(planes, data.channels.take(planes))
    return _with_stats(data, accelerator)


def wanted_spec(config: TrainConfig | EvaluateConfig, spec: InputSpec) -> InputSpec:
    """What the flags say of the input, and where they say nothing what is known of it."""
    channels: ChannelSet | None = None
    if config.channels is not None:
        channels = ChannelSet.parse(config.channels, own=spec.channels, new_names=config.new_names)
    return InputSpec.of(
        spec,
        channels=channels,
        img_size=config.img_size,
        crop_pct=config.crop_pct,
        **config.flags,
    )


def load_judged(config: EvaluateConfig, saved: SavedModel, accelerator: Accelerator) -> ImageData:
    """The data to judge a saved model by, without the images that it was trained on.

    Raises:
        UserError: What `load_data` refuses, or data that the model was not made for.
    """
    data = load_run_data(config, saved.spec, accelerator, guess=False)
    _check_saved(saved, data)
    trained = load_fingerprints(config.model.removeprefix("local-dir:")).get("train")
    name, split = evaluation_split(data)
    if trained is None:
        return data
    left: dict[str, Any] = {"validation" if name == "train" else name: unseen(split, trained, name)}
    return dataclasses.replace(data, **left)


def _check_saved(saved: SavedModel, data: ImageData) -> None:
    """Refuse data that a model was not made for: other planes, another scale, other classes."""
    channels = saved.spec.channels
    same = [c.identity for c in channels] == [c.identity for c in data.channels]
    if not (has_stems(saved.model) or channels.is_anonymous or same):
        raise UserError(
            f"The model has no stem and takes {channels} in this order, but the data are "
            f"{data.channels}. Compare models of the same planes in the same order, or use a dwg_ "
            f"twin."
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


def _with_stats(data: ImageData, accelerator: Accelerator) -> ImageData:
    """The data with mean and deviation of its channels, measured where nobody gave them.

    Images are also measured where pixels without data are let in, for their share.
    """
    channels, lets_in = data.channels, data.spec.no_data in ("mean", "predict")
    if channels.mean is not None and not lets_in:
        return data
    split = next(s for s in (data.train, data.validation, data.test) if s is not None)
    found: list[Any] = [None]
    if accelerator.is_main_process:
        logger.info("Measuring mean and deviation of %s.", channels)
        found = [measure_split(split)]
    broadcast_object_list(found)
    measured, invalid = found[0]
    data = data if channels.mean is not None else data.with_channels(measured)
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
) -> tuple[Loader | StreamLoader, int]:
    """Augmented batches, in an order that depends on seed and epoch; whole updates only.

    Returns:
        A loader to prepare, or one that is ready, of streamed images; and its batch size, smaller
        than the flag's where the training images do not fill one.

    Raises:
        UserError: No training images, fewer than two for each process, or more than memory holds
            with --cache.
    """
    split, spec = data.train, data.spec
    if split is None:
        raise UserError(f"{data.name} has no training images. Name its split with --train-split.")
    count = config.epoch_images if config.streaming and config.epoch_images else len(split)
    batch_size = _batch_that_fills(config, count, accelerator)
    images = batch_size * config.grad_accum_steps * accelerator.num_processes
    assert spec.img_size is not None
    transform = train_transform(
        spec.img_size, spec.channels, scale=config.crop_scale, ratio=config.crop_ratio,
        hflip=config.hflip, vflip=config.vflip, rotation_degrees=config.rotation_degrees,
        auto_augment=config.auto_augment, erase_prob=config.erase_prob, no_data=spec.no_data,
    )  # fmt: skip
    if data.stream is not None:
        check_workers(data.stream[0], accelerator.num_processes, config.workers)
        stream = ImageStream(
            data, transform, num_batches=count // images * config.grad_accum_steps,
            batch_size=batch_size, seed=config.seed, skip_corrupt=config.skip_corrupt,
            process=(accelerator.process_index, accelerator.num_processes),
        )  # fmt: skip
        loader: Any = DataLoader(stream, batch_size=batch_size, **_workers(config))
        return StreamLoader(loader, accelerator.device), batch_size
    if config.cache:
        split = cached(split, num_copies=accelerator.num_processes)
    loader = DataLoader(
        TransformedSplit(
            split, transform, config.seed, keep_absent=config.channel_aug == "hcs-sample"
        ),
        batch_size=batch_size,
        sampler=EpochSampler(len(split), config.seed, count // images * images),
        drop_last=True,
        **_workers(config),
    )
    return loader, batch_size


def _batch_that_fills(config: TrainConfig, count: int, accelerator: Accelerator) -> int:
    """The batch size of the flags, or the largest that so many images fill; says what is left out.

    Raises:
        UserError: Fewer than two images for each forward pass of an update.
    """
    passes = config.grad_accum_steps * accelerator.num_processes
    size = min(config.batch_size, count // passes)
    size -= size % 2 if config.mixes else 0
    if size < min(2, config.batch_size):
        raise UserError(
            f"{count} training images are too few: an update takes 2 or more in each of its "
            f"{passes} forward passes. Give more images, or lower --grad-accum-steps."
        )
    left = count % (size * passes)
    if accelerator.is_main_process and size < config.batch_size:
        logger.warning(
            "%d training images do not fill a batch of %d: --batch-size is lowered to %d.",
            count, config.batch_size, size,
        )  # fmt: skip
    if accelerator.is_main_process and left:
        logger.info(
            "An epoch takes whole batches only: %d of %d training images, others in every epoch.",
            count - left, count,
        )  # fmt: skip
    return size


def eval_loader(config: TrainConfig | EvaluateConfig, split: ImageSplit, spec: InputSpec) -> Loader:
    """Batches for evaluation, in the order of the data."""
    assert spec.img_size is not None
    transform = eval_transform(
        spec.img_size, spec.channels, crop_pct=spec.crop_pct, no_data=spec.no_data
    )
    return DataLoader(
        TransformedSplit(split, transform, config.seed),
        batch_size=config.eval_batch_size,
        **_workers(config),
    )


def _workers(config: TrainConfig | EvaluateConfig) -> dict[str, Any]:
    """How the images are fetched. Workers live on through the epochs."""
    return {
        "num_workers": config.workers,
        "persistent_workers": config.workers > 0,
        "pin_memory": torch.cuda.is_available(),
    }
