"""What a run trains: its model, the part that moves, optimizer and schedule, where it begins."""

from __future__ import annotations

import logging
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.data import Mixup
from timm.models import is_model, model_entrypoint, resolve_model_input_args
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, unwrap_model
from torch import nn

from timm_varchan.channels import RGB, ChannelSet
from timm_varchan.data import ImageData
from timm_varchan.errors import UserError
from timm_varchan.evaluation import plan_sets, spread
from timm_varchan.hub import load
from timm_varchan.models import adapt, choose_virtual_channels, has_stems, stems
from timm_varchan.training.checkpoint import Checkpoints, Progress
from timm_varchan.training.config import TrainConfig
from timm_varchan.training.loaders import StreamLoader, eval_loader, train_loader
from timm_varchan.training.loop import Trainer, tell_all_channels
from timm_varchan.training.report import RunLog
from timm_varchan.views import FIXED_COUNT_AUGS

__all__ = ["architecture", "build_model", "prepare"]

logger = logging.getLogger(__name__)


def architecture(model: nn.Module) -> str:
    """What timm calls a model."""
    cfg: Any = model.pretrained_cfg
    return str(cfg["architecture"])


def build_model(config: TrainConfig, data: ImageData) -> nn.Module:
    """The model to train, for the data's channels and classes.

    Raises:
        UserError: An unknown model, one that cannot be loaded, or an augmentation that changes
            the number of planes for a model without a stem.
    """
    model = _load(config, _arguments(config, data))
    if config.adapt:
        words, stats = _words(data.channels), _stats(data.channels)
        adapt(model, in_chans=len(data.channels), **words, **stats)
    if config.grad_checkpointing:
        model.set_grad_checkpointing()  # type: ignore[operator]  # every timm model has it
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    if not has_stems(model) and config.channel_aug not in FIXED_COUNT_AUGS:
        twin, cure = f"dwg_{architecture(model)}", "--adapt, which puts a stem into it"
        if ":" not in config.model and is_model(twin):
            cure = f"--model {twin}"
        raise UserError(
            f"{config.model} takes a fixed number of channels, --channel-aug {config.channel_aug} "
            f"changes it. Choose {cure}, or --channel-aug {', '.join(FIXED_COUNT_AUGS)}."
        )
    return model.train()


def _arguments(config: TrainConfig, data: ImageData) -> dict[str, Any]:
    """What the model is created with."""
    try:
        resolved = resolve_model_input_args(config.model, config.model_kwargs)
    except (AssertionError, KeyError, RuntimeError) as error:  # timm's words for an unknown name
        raise UserError(f"Cannot load --model {config.model}: {error!r}.") from error
    kwargs: dict[str, Any] = {"num_classes": len(data.class_names)}
    if not config.adapt:  # there the kernels stay those of the saved model
        kwargs["in_chans"] = len(data.channels)
    if resolved["pretrained_cfg"]["fixed_input_size"]:
        kwargs["img_size"] = config.pixels
    if model_entrypoint(resolved["model_name"]).__module__.endswith("models.dwg_twins"):
        known = tuple(resolved.get("channel_names", ()))
        kwargs |= _twin_arguments(config, known, data.channels)
    if config.drop_path:
        kwargs["drop_path_rate"] = config.drop_path
    return kwargs | config.model_kwargs


def _load(config: TrainConfig, kwargs: dict[str, Any]) -> nn.Module:
    pretrained = config.pretrained or ":" in config.model
    try:
        return load(config.model, pretrained=pretrained, **kwargs).model
    except UserError as error:
        if config.drop_path and "drop_path_rate" in str(error.__cause__):
            raise UserError(
                f"{config.model} has no stochastic depth. Add --drop-path 0."
            ) from error
        raise


def _twin_arguments(
    config: TrainConfig, known: tuple[str, ...], channels: ChannelSet
) -> dict[str, Any]:
    """What a twin is told of its channels; a saved one keeps what it predicts them from."""
    arguments = _words(channels, known)
    if ":" in config.model:
        return arguments
    virtual = (
        choose_virtual_channels(channels)
        if config.virtual_channels is None
        else ChannelSet.parse(config.virtual_channels)
    )
    if virtual != RGB:
        arguments["virtual_channels"] = virtual.to_dict()
    return arguments | _stats(channels)


def _words(channels: ChannelSet, known: tuple[str, ...] = ()) -> dict[str, Any]:
    """Names without a wavelength, of which a stem learns a code: those that it has come first."""
    words = [c.name for c in channels if c.name is not None and c.wavelength_nm is None]
    names = known + tuple(word for word in words if word not in known)
    return {"channel_names": names} if names else {}


def _stats(channels: ChannelSet) -> dict[str, Any]:
    """The correlation of the normalised planes, where it is known and belongs to names."""
    if channels.correlation is None or any(c.is_anonymous for c in channels):
        return {}
    return {"channel_stats": channels.standardised().to_dict()}


def prepare(
    config: TrainConfig, accelerator: Accelerator, model: nn.Module, data: ImageData
) -> tuple[Trainer, Progress]:
    """Everything that training needs, at the beginning or where a checkpoint left it.

    Args:
        config: The run.
        accelerator: Its processes.
        model: From `build_model`.
        data: Images and channels, these with mean and standard deviation.

    Returns:
        The trainer, and the progress to begin at.

    Raises:
        UserError: No or too few training images, a part that the model lacks, a full disk, a
            checkpoint of another run.
    """
    tell_all_channels(model, data.channels, config.channel_identity)
    choose_trained(model, config.train_only)
    checkpoints = Checkpoints(config.folder / "checkpoints")
    # Weights, two moments of them, an average.
    copies = 3 if config.ema_decay is None else 4
    checkpoints.check_space(copies * sum(p.numel() * p.element_size() for p in model.parameters()))
    loader: Any = train_loader(config, data, accelerator)
    validation = eval_loader(config, data.validation, data.channels) if data.validation else None
    # accelerate's wrappers must hold the model that they are given: the average comes after them.
    optimizer = _optimizer(config, model)
    if config.compile:
        model.compile()
    model, optimizer = accelerator.prepare(model, optimizer)
    if not isinstance(loader, StreamLoader):
        loader = accelerator.prepare_data_loader(loader)
    if validation is not None:
        validation = accelerator.prepare_data_loader(validation)
    average = None
    if config.ema_decay is not None:
        average = ModelEmaV3(unwrap_model(model), decay=config.ema_decay, use_warmup=True)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched=config.sched, num_epochs=config.epochs, min_lr=config.min_lr,
        warmup_lr=config.lr / 100, warmup_epochs=min(config.warmup_epochs, config.epochs - 1),
        step_on_epochs=False, updates_per_epoch=len(loader) // config.grad_accum_steps,
    )  # fmt: skip
    mixup = Mixup(
        config.mixup, config.cutmix, label_smoothing=config.smoothing,
        num_classes=len(data.class_names),
    )  # fmt: skip
    sets = spread(plan_sets(data.channels, seed=config.seed), max(2, config.val_max_sets))
    # From here on only what differs between processes anyway (dropout) draws from generators.
    set_seed(config.seed, device_specific=True)
    trainer = Trainer(
        config, accelerator, model, optimizer, scheduler, loader,
        validation=validation, validation_sets=sets[: max(1, config.val_max_sets)],
        channels=data.channels, checkpoints=checkpoints, log=RunLog(accelerator, config),
        mixup=mixup if config.mixes else None, average=average,
    )  # fmt: skip
    return trainer, _resume(trainer)


def choose_trained(model: nn.Module, part: str) -> None:
    """Leave only a part of a model trainable.

    Args:
        model: A timm model or twin, not wrapped.
        part: `all`; `head`: the classifier; `stem`: what mixes the channels, its kernels apart.

    Raises:
        UserError: The model has no such part.
    """
    if part == "all":
        return
    if part == "stem":
        found: list[nn.Module] = [*stems(model)] if has_stems(model) else []
    else:
        heads = model.get_classifier()  # type: ignore[operator]  # every timm model has it
        found = [head for head in (heads if isinstance(heads, tuple) else (heads,)) if head]
    if not any(list(module.parameters()) for module in found):
        other = "head" if part == "stem" else "stem"
        raise UserError(
            f"{type(model).__name__} has no {part} to train alone. Choose another model (a dwg_ "
            f"twin has a stem), or --train-only {other}."
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in found:
        module.requires_grad_(True)


def _optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    try:
        return create_optimizer_v2(
            model, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
        )  # fmt: skip
    except ValueError as error:  # timm's word for an unknown name
        raise UserError(f"--opt {config.opt}: {error}") from error


def _resume(trainer: Trainer) -> Progress:
    """The progress of the checkpoint that `--resume` means, once it is loaded; or none yet."""
    config, accelerator = trainer.config, trainer.accelerator
    images = config.batch_size * config.grad_accum_steps * accelerator.num_processes
    checkpoint = trainer.checkpoints.resume_from(config.resume)
    if checkpoint is None:
        return Progress(images_per_update=images, num_processes=accelerator.num_processes)
    progress, own = trainer.checkpoints.load(accelerator, checkpoint)
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
