"""A whole run: build, train, evaluate every channel set, write what came of it."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from timm_varchan.cards import write_card
from timm_varchan.data import ImageData
from timm_varchan.errors import UserError
from timm_varchan.evaluation import Evaluation
from timm_varchan.hub import SavedModel, load, save
from timm_varchan.plots import plot_bands, plot_channel_sets, plot_confusion, plot_curves
from timm_varchan.training.building import architecture, build_model
from timm_varchan.training.checkpoint import Progress
from timm_varchan.training.configuration import TrainConfig
from timm_varchan.training.environment import write_json
from timm_varchan.training.evaluating import (
    Baseline,
    Evaluated,
    check_evaluation,
    evaluate,
    load_baseline,
)
from timm_varchan.training.folder import RunFolder, check_folder
from timm_varchan.training.launch import create_accelerator
from timm_varchan.training.loaders import load_run_data
from timm_varchan.training.loop import Trainer, tell_all_channels
from timm_varchan.training.preparation import prepare
from timm_varchan.training.report import opening
from timm_varchan.training.results import build_results, markdown_report, write_sets
from timm_varchan.training.sharding import check_sharding, whole_model
from timm_varchan.training.tracking import check_trackers

__all__ = ["Outcome", "SetupError", "run"]

logger = logging.getLogger(__name__)


class SetupError(UserError):
    """A run that cannot begin: data, model, flags or folder are not right."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Args:
        folder: Where everything was written.
        results: The content of `results.json`.
        sets: The results of the channel sets.
        is_main: Whether this process is the one to speak.
    """

    folder: Path
    results: dict[str, Any]
    sets: Evaluation
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
        CheckpointError: A checkpoint cannot be written; the disk is full.
    """
    with _setup():
        check_trackers(config)
        accelerator = create_accelerator(config)
    try:
        with _setup():
            check_sharding(config, accelerator)
            saved = load(config.eval_only) if config.eval_only is not None else None
            config = _with_sizes(config, saved)
            folder = check_folder(config, accelerator)
            set_seed(config.seed)
            data = load_run_data(config, accelerator, saved)
            model = build_model(config, data) if saved is None else saved.model
            check_evaluation(config, model, data)
            baseline = load_baseline(config, accelerator, data)
            if saved is None:
                trainer, progress = prepare(config, accelerator, model, data, folder)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                folder.claim(config)
                logger.info("%s", opening(config, data, model, accelerator))
        if saved is not None:
            model = model.to(accelerator.device)
            return _finish(config, accelerator, model, data, folder, None, baseline)
        progress = trainer.fit(progress)
        model = _trained(trainer, data)
        return _finish(config, accelerator, model, data, folder, progress, baseline)
    finally:
        accelerator.end_training()


def _with_sizes(config: TrainConfig, saved: SavedModel | None) -> TrainConfig:
    """The configuration with what the saved model says of its images where no flag does."""
    scale = config.value_scale or (None if saved is None else saved.value_scale)
    channels = config.channel_set()
    if saved is None and channels is not None:
        scale = channels.scale_with(scale)
    img_size, crop_pct = (config.pixels, 1.0) if saved is None else (saved.img_size, saved.crop_pct)
    return dataclasses.replace(
        config,
        img_size=img_size if config.img_size is None else config.img_size,
        crop_pct=crop_pct if config.crop_pct is None else config.crop_pct,
        value_scale=scale,
    )


@contextmanager
def _setup() -> Iterator[None]:
    """What a user can cure before training begins: wrong data, model, flags, folder.

    Anything else is a fault of the package and keeps its traceback.
    """
    try:
        yield
    except (UserError, OSError) as error:
        raise SetupError(str(error)) from error


def _trained(trainer: Trainer, data: ImageData) -> nn.Module:
    """The whole model of the chosen checkpoint, on every process."""
    config, checkpoints = trainer.config, trainer.folder.checkpoints
    best = checkpoints.best() if config.eval_checkpoint == "best" else None
    if best is not None:
        progress, own = checkpoints.load(trainer.accelerator, best)
        trainer.load_own_state(own, progress.num_processes)
    return whole_model(trainer.accelerator, trainer.best_model, lambda: build_model(config, data))


def _finish(
    config: TrainConfig,
    accelerator: Accelerator,
    model: nn.Module,
    data: ImageData,
    folder: RunFolder,
    progress: Progress | None,
    baseline: Baseline | None,
) -> Outcome:
    """Evaluate the channel sets and write tables, pictures and the model."""
    checkpoints, checkpoint = folder.checkpoints, None
    if progress is not None:
        best = config.eval_checkpoint == "best"
        checkpoint = checkpoints.best() if best else checkpoints.last()
    started = time.perf_counter()
    with torch.compiler.set_stance("force_eager"):  # not a graph for every channel set
        evaluated = evaluate(config, accelerator, model, data, baseline)
    about = {
        "name": architecture(model),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "folder": "model",
    }
    results = build_results(
        config, data, accelerator, evaluated,
        model=about, progress=progress,
        checkpoint=checkpoint.name if checkpoint else None,
        seconds=time.perf_counter() - started,
    )  # fmt: skip
    if accelerator.is_main_process:
        tell_all_channels(model, data.channels, config.channel_identity)
        _write(folder.path, results, evaluated, model, data, config)
    accelerator.wait_for_everyone()
    return Outcome(folder.path, results, evaluated.sets, accelerator.is_main_process)


def _write(
    path: Path,
    results: dict[str, Any],
    evaluated: Evaluated,
    model: nn.Module,
    data: ImageData,
    config: TrainConfig,
) -> None:
    """Everything that stays in the output folder."""
    write_json(results, path / "results.json")
    (path / "results.md").write_text(markdown_report(results), encoding="utf-8")
    write_sets(results, path / "sets.csv")
    title = f"{results['model']['name']} on {Path(data.name).name}"
    files = [path / "results.md", path / "sets.csv"]
    files.append(
        plot_channel_sets(
            evaluated.sets, path / "channel_sets.png", title, baseline=evaluated.baseline
        )
    )
    files.append(plot_confusion(evaluated.sets[0], data.class_names, path / "confusion.png", title))
    if results["evaluation"]["bands"]:
        files.append(plot_bands(evaluated.sets, path / "bands.png", title))
    if results["training"] is not None:
        files.append(plot_curves(results["training"]["history"], path / "curves.png"))
    if config.eval_only is None:
        model.to(memory_format=torch.contiguous_format)  # safetensors knows no other layout
        save(
            model, path / "model", class_names=data.class_names, channels=data.channels,
            img_size=config.pixels, crop_pct=config.crop_pct, value_scale=config.value_scale,
            files=files,
        )  # fmt: skip
        # What may be pushed says nothing of this machine's folders.
        public = {**results, "config": {k: _name(v) for k, v in results["config"].items()}}
        write_json(public, path / "model" / "results.json")
        write_card(path / "model", name=path.resolve().name)


def _name(value: Any) -> Any:
    """A path without its folders; anything else as it is."""
    if not isinstance(value, str):
        return value
    prefix, colon, rest = value.rpartition(":")
    path = Path(rest)
    return f"{prefix}{colon}{path.name}" if path.is_absolute() or path.exists() else value
