"""A whole run: build, train, evaluate every channel set, write what came of it."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import unwrap_model
from torch import nn

from timm_varchan.data import ImageData
from timm_varchan.evaluation import SetResult, evaluate_channel_sets
from timm_varchan.hub import SavedModel, load, save
from timm_varchan.plots import plot_channel_sets, plot_curves
from timm_varchan.training.building import architecture, build_model
from timm_varchan.training.checkpoint import Progress, RunFolder, check_folder
from timm_varchan.training.configuration import TrainConfig
from timm_varchan.training.launch import create_accelerator
from timm_varchan.training.loaders import (
    eval_loader,
    evaluation_split,
    load_run_data,
    train_loader,
)
from timm_varchan.training.loop import Trainer, tell_all_channels
from timm_varchan.training.results import build_results, markdown_report, write_json

__all__ = ["Outcome", "SetupError", "run"]

logger = logging.getLogger(__name__)


class SetupError(ValueError):
    """A run that cannot begin: data, model, flags or folder are not right."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Args:
        folder: Where everything was written.
        results: The content of `results.json`.
        sets: The result of every channel set.
        is_main: Whether this process is the one to speak.
    """

    folder: Path
    results: dict[str, Any]
    sets: list[SetResult]
    is_main: bool


def run(config: TrainConfig) -> Outcome:
    """Train and evaluate as configured, in the processes that the launcher started.

    Args:
        config: What to do.

    Returns:
        What came of it, on every process; the files are written by the main process.

    Raises:
        SystemExit: The launcher did not do what it was asked.
        SetupError: Data, model or folder are not right; nothing was trained.
        Interrupted: A signal came and a checkpoint is saved.
        NonFiniteLossError: The loss became infinite or NaN.
    """
    accelerator = create_accelerator(config.expect_processes)
    try:
        with _setup():
            saved = load(config.eval_only) if config.eval_only is not None else None
            config = _with_sizes(config, saved)
            folder = check_folder(config, accelerator)
            set_seed(config.seed)
            data = load_run_data(config, accelerator, saved)
            evaluation_split(data)
            model = build_model(config, data) if saved is None else saved.model
            prepared = None
            if saved is None:
                prepared = _prepare(config, accelerator, model, data, folder)
            if accelerator.is_main_process:
                folder.claim(config)
        progress = None
        if prepared is not None:
            trainer, progress = prepared
            model = trainer.model
            progress = trainer.fit(progress)
        return _finish(config, accelerator, model, data, folder, progress)
    finally:
        accelerator.end_training()


def _with_sizes(config: TrainConfig, saved: SavedModel | None) -> TrainConfig:
    """The configuration with image size and crop filled in where they were not given."""
    img_size, crop_pct = (config.pixels, 1.0) if saved is None else (saved.img_size, saved.crop_pct)
    return dataclasses.replace(
        config,
        img_size=img_size if config.img_size is None else config.img_size,
        crop_pct=crop_pct if config.crop_pct is None else config.crop_pct,
    )


@contextmanager
def _setup() -> Iterator[None]:
    """What goes wrong before training is the configuration's fault, and told without a trace."""
    try:
        yield
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        raise SetupError(str(error)) from error


def _prepare(
    config: TrainConfig,
    accelerator: Accelerator,
    model: nn.Module,
    data: ImageData,
    folder: RunFolder,
) -> tuple[Trainer, Progress]:
    """The trainer, at the beginning or where a checkpoint left it."""
    if data.train is None:
        raise ValueError(f"{data.name} has no training images. Name its split with --train-split.")
    tell_all_channels(model, data.channels, config.channel_identity)
    optimizer = create_optimizer_v2(
        model, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay
    )
    loader = train_loader(config, data.train, data.channels, accelerator.num_processes)
    validation = eval_loader(config, data.validation, data.channels) if data.validation else None
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.sched,
        num_epochs=config.epochs,
        min_lr=config.min_lr,
        warmup_lr=config.lr / 100,
        warmup_epochs=min(config.warmup_epochs, config.epochs - 1),
        step_on_epochs=False,
        updates_per_epoch=len(loader),
    )
    trainer = Trainer(
        config=config,
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        train_loader=loader,
        eval_loader=accelerator.prepare(validation) if validation else None,
        channels=data.channels,
        folder=folder,
    )
    # From here on only what differs between processes anyway (dropout) draws from generators.
    set_seed(config.seed, device_specific=True)
    return trainer, _resume(config, accelerator, folder)


def _resume(config: TrainConfig, accelerator: Accelerator, folder: RunFolder) -> Progress:
    checkpoint = folder.resume_from(config.resume)
    if checkpoint is None:
        return Progress()
    progress = folder.load(accelerator, checkpoint)
    images_per_step = config.batch_size * accelerator.num_processes
    if progress.images_per_step != images_per_step:
        raise ValueError(
            f"{checkpoint} was trained with {progress.images_per_step} images a step, this run has "
            f"{images_per_step} ({accelerator.num_processes} x {config.batch_size}). Use as many "
            f"processes as before, or change --batch-size."
        )
    logger.info("Resuming from %s: epoch %d, step %d", checkpoint, progress.epoch, progress.step)
    return progress


def _finish(
    config: TrainConfig,
    accelerator: Accelerator,
    model: nn.Module,
    data: ImageData,
    folder: RunFolder,
    progress: Progress | None,
) -> Outcome:
    """Evaluate every channel set and write tables, pictures and the model."""
    checkpoint = _chosen_checkpoint(config, folder) if progress is not None else None
    bare = unwrap_model(model)
    if checkpoint is not None and config.eval_checkpoint == "best":
        folder.load(accelerator, checkpoint)
    if progress is None:
        model = bare.to(accelerator.device)
    started = time.perf_counter()
    name, sets = _evaluate(config, accelerator, model, data)
    evaluation = {
        "split": name,
        "checkpoint": checkpoint.name if checkpoint else None,
        "seconds": time.perf_counter() - started,
    }
    num_parameters = sum(p.numel() for p in bare.parameters())
    about = {"name": architecture(bare), "num_parameters": num_parameters, "folder": "model"}
    results = build_results(
        config, data, accelerator, sets, model=about, progress=progress, evaluation=evaluation
    )
    if accelerator.is_main_process:
        tell_all_channels(bare, data.channels, config.channel_identity)
        _write(folder.path, results, sets, bare, data, config)
    accelerator.wait_for_everyone()
    return Outcome(folder.path, results, sets, accelerator.is_main_process)


def _evaluate(
    config: TrainConfig, accelerator: Accelerator, model: nn.Module, data: ImageData
) -> tuple[str, list[SetResult]]:
    """The split that was evaluated on, and the result of every channel set."""
    name, split = evaluation_split(data)
    sets = evaluate_channel_sets(
        model,
        accelerator.prepare(eval_loader(config, split, data.channels)),
        data.channels,
        num_classes=len(data.class_names),
        accelerator=accelerator,
        modes=config.eval_modes,
        orders=config.eval_orders,
        max_sets=config.eval_max_sets,
        seed=config.seed,
    )
    return name, sets


def _chosen_checkpoint(config: TrainConfig, folder: RunFolder) -> Path | None:
    return folder.best() if config.eval_checkpoint == "best" else folder.last()


def _write(
    path: Path,
    results: dict[str, Any],
    sets: list[SetResult],
    model: nn.Module,
    data: ImageData,
    config: TrainConfig,
) -> None:
    """Everything that stays in the output folder."""
    write_json(results, path / "results.json")
    (path / "results.md").write_text(markdown_report(results, sets), encoding="utf-8")
    title = f"{results['model']['name']} on {data.name}"
    plot_channel_sets(sets, path / "channel_sets.png", title)
    if results["training"] is not None:
        plot_curves(results["training"]["history"], path / "curves.png")
    if config.eval_only is None:
        save(
            model, path / "model", class_names=data.class_names, channels=data.channels,
            img_size=config.pixels, crop_pct=config.crop_pct,
            files=[path / "results.json", path / "results.md", path / "channel_sets.png",
                   path / "curves.png"],
        )  # fmt: skip
