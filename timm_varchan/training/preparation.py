"""From model and data to a trainer, at the beginning or where a checkpoint left it."""

from __future__ import annotations

import logging

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import unwrap_model
from torch import nn

from timm_varchan.data import ImageData
from timm_varchan.errors import UserError
from timm_varchan.training.averaging import WeightAverage
from timm_varchan.training.checkpoint import Progress
from timm_varchan.training.configuration import TrainConfig
from timm_varchan.training.evaluating import validator
from timm_varchan.training.fine_tuning import choose_trained
from timm_varchan.training.folder import RunFolder
from timm_varchan.training.loaders import StreamLoader, eval_loader, train_loader
from timm_varchan.training.loop import Trainer, tell_all_channels
from timm_varchan.training.mixing import SeededMixup
from timm_varchan.training.tracking import RunLog

__all__ = ["prepare"]

logger = logging.getLogger(__name__)


def prepare(
    config: TrainConfig,
    accelerator: Accelerator,
    model: nn.Module,
    data: ImageData,
    folder: RunFolder,
) -> tuple[Trainer, Progress]:
    """Everything that training needs.

    Args:
        config: The run.
        accelerator: Its processes.
        model: From `build_model`.
        data: Images and channels, these with mean and standard deviation.
        folder: Of the run.

    Returns:
        The trainer, and the progress to begin at.

    Raises:
        UserError: No or too few training images, a part that the model lacks, a full disk, a
            checkpoint of another run.
    """
    tell_all_channels(model, data.channels, config.channel_identity)
    choose_trained(model, config.train_only)
    folder.check_space(_checkpoint_bytes(model, config))
    loader = train_loader(config, data, accelerator)
    validation = eval_loader(config, data.validation, data.channels) if data.validation else None
    # accelerate's wrappers must hold the model that they are given: the average comes after them.
    optimizer = _optimizer(config, model)
    if config.compile:
        model.compile()
    if isinstance(loader, StreamLoader):
        model, optimizer = accelerator.prepare(model, optimizer)
    else:
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if validation is not None:
        validation = accelerator.prepare(validation)
    average = None
    if config.ema_decay is not None:
        average = WeightAverage(unwrap_model(model), config.ema_decay)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.sched,
        num_epochs=config.epochs,
        min_lr=config.min_lr,
        warmup_lr=config.lr / 100,
        warmup_epochs=min(config.warmup_epochs, config.epochs - 1),
        step_on_epochs=False,
        updates_per_epoch=len(loader) // config.grad_accum_steps,
    )
    # From here on only what differs between processes anyway (dropout) draws from generators.
    set_seed(config.seed, device_specific=True)
    trainer = Trainer(
        config=config,
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        loader=loader,
        channels=data.channels,
        folder=folder,
        validate=validator(config, accelerator, validation, data.channels),
        log=RunLog(accelerator, folder.path, config),
        mixup=SeededMixup(config, len(data.class_names)) if config.mixes else None,
        average=average,
    )
    return trainer, _resume(trainer)


def _optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    try:
        return create_optimizer_v2(
            model,
            opt=config.opt,
            lr=config.lr,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
        )
    except ValueError as error:  # timm's word for an unknown name
        raise UserError(f"--opt {config.opt}: {error}") from error


def _checkpoint_bytes(model: nn.Module, config: TrainConfig) -> int:
    """About how large a checkpoint will be: weights, two moments of them, an average."""
    copies = 3 if config.ema_decay is None else 4
    return copies * sum(p.numel() * p.element_size() for p in model.parameters())


def _resume(trainer: Trainer) -> Progress:
    config, accelerator = trainer.config, trainer.accelerator
    images = config.batch_size * config.grad_accum_steps * accelerator.num_processes
    fresh = Progress(images_per_update=images, num_processes=accelerator.num_processes)
    checkpoints = trainer.folder.checkpoints
    checkpoint = checkpoints.resume_from(config.resume)
    if checkpoint is None:
        return fresh
    progress, own = checkpoints.load(accelerator, checkpoint)
    if progress.images_per_update != images:
        raise UserError(
            f"{checkpoint} was trained with {progress.images_per_update} images an update, this "
            f"run has {images} ({accelerator.num_processes} processes x {config.batch_size} x "
            f"{config.grad_accum_steps}). Use as many processes as before, or change --batch-size."
        )
    trainer.load_own_state(own, progress.num_processes)
    progress.num_processes = accelerator.num_processes
    logger.info("Resuming from %s: epoch %d, step %d", checkpoint, progress.epoch, progress.step)
    return progress
