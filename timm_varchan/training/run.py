"""A whole run: build, train, evaluate every channel set, write what came of it."""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from timm_varchan.cards import write_card
from timm_varchan.channels import ANONYMOUS, ChannelSet, seeded_rng
from timm_varchan.data import ImageData
from timm_varchan.errors import UserError
from timm_varchan.evaluation import (
    DEFAULT_BUDGET,
    Evaluation,
    PlannedSet,
    Predictions,
    evaluate_channel_sets,
    parse_sets,
    plan_sets,
)
from timm_varchan.hub import SavedModel, load, save
from timm_varchan.models import estimate_bn_buffers, expected_error, has_stems
from timm_varchan.results import Evaluated, write_results
from timm_varchan.training.build import architecture, build_model, prepare
from timm_varchan.training.checkpoint import (
    Progress,
    check_folder,
    claim_folder,
    write_json,
)
from timm_varchan.training.config import TrainConfig
from timm_varchan.training.launch import check_sharding, create_accelerator, whole_model
from timm_varchan.training.loaders import eval_loader, evaluation_split, load_run_data
from timm_varchan.training.loop import Trainer, tell_all_channels, trained_mode, warn_not_finite
from timm_varchan.training.report import build_results, check_trackers, opening

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
            check_folder(config, accelerator)
            set_seed(config.seed)
            data = load_run_data(config, accelerator, saved)
            model = build_model(config, data) if saved is None else saved.model
            _check_evaluation(config, model, data)
            baseline = _load_baseline(config, data)
            import_module("timm_varchan.plots")  # slow, so only here: before anything is trained
            if saved is None:
                trainer, progress = prepare(config, accelerator, model, data)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                claim_folder(config)
                logger.info("%s", opening(config, data, model, accelerator))
        if saved is not None:
            model = model.to(accelerator.device)
            return _finish(config, accelerator, model, data, baseline, None, None)
        progress = trainer.fit(progress)
        model, checkpoint = _chosen(trainer, data)
        return _finish(config, accelerator, model, data, baseline, progress, checkpoint)
    finally:
        accelerator.end_training()


@contextmanager
def _setup() -> Iterator[None]:
    """What a user can cure before training begins: wrong data, model, flags, folder.

    Anything else is a fault of the package and keeps its traceback.
    """
    try:
        yield
    except (UserError, OSError) as error:
        raise SetupError(str(error)) from error


def _with_sizes(config: TrainConfig, saved: SavedModel | None) -> TrainConfig:
    """The configuration with what the saved model says of its images where no flag does."""
    scale = config.value_scale or (None if saved is None else saved.value_scale)
    channels = config.channel_set() if saved is None else None
    if channels is not None:
        scale = channels.with_scale(scale).value_scale
    img_size, crop_pct = (config.pixels, 1.0) if saved is None else (saved.img_size, saved.crop_pct)
    return dataclasses.replace(
        config,
        img_size=img_size if config.img_size is None else config.img_size,
        crop_pct=crop_pct if config.crop_pct is None else config.crop_pct,
        value_scale=scale,
    )


def _check_evaluation(config: TrainConfig, model: nn.Module, data: ImageData) -> None:
    """Refuse an evaluation that the model cannot do, before it is trained.

    Raises:
        UserError: No images; channels that the data lacks, fewer sets than sizes; modes or
            statistics that need a stem; no images for statistics.
    """
    evaluation_split(data)
    try:
        _plan(config, model, data.channels)
    except UserError as error:
        name = "--eval-sets" if config.eval_max_sets is None else "--eval-max-sets"
        raise UserError(f"{name}: {error}") from error
    if not has_stems(model) and set(config.eval_modes or ()) - {"mask"}:
        raise UserError(
            f"--eval-modes {' '.join(config.eval_modes or ())} need a model with a stem. Leave it "
            f"out, or choose mask."
        )
    if config.eval_statistics and (not has_stems(model) or data.train is None):
        raise UserError(
            "--eval-statistics needs a model with a stem and training images; leave it out."
        )


def _plan(config: TrainConfig, model: nn.Module, channels: ChannelSet) -> list[PlannedSet]:
    """The sets to evaluate; one less by default where all channels are also shuffled."""
    also = []
    if config.missing is not None:
        gone = {i for one in parse_sets(channels, config.missing) for i in one}
        also = [[i for i in range(len(channels)) if i not in gone]]
        if not also[0]:
            raise UserError(f"--missing {config.missing} leaves no channel of {channels}.")
    budget = DEFAULT_BUDGET - int(not has_stems(model))
    return plan_sets(channels, config.planned_sets, seed=config.seed, budget=budget, also=also)


def _load_baseline(config: TrainConfig, data: ImageData) -> Predictions | None:
    """The answers of `--baseline`.

    Raises:
        UserError: There are none, or of other images or classes than the run's.
    """
    if config.baseline is None:
        return None
    found = Predictions.load(config.baseline)
    found.check(data.class_names, evaluation_split(data)[1].labels())
    return found


def _chosen(trainer: Trainer, data: ImageData) -> tuple[nn.Module, str | None]:
    """The whole model of the chosen checkpoint, on every process, and the checkpoint's name."""
    config, checkpoints, accelerator = trainer.config, trainer.checkpoints, trainer.accelerator
    best = checkpoints.best() if config.eval_checkpoint == "best" else None
    chosen = best or checkpoints.last()
    if best is not None:
        progress, own = checkpoints.load(accelerator, best)
        trainer.load_own_state(own, progress.num_processes)
    model = whole_model(accelerator, trainer.best_model, lambda: build_model(config, data))
    return model, None if chosen is None else chosen.name


def _finish(
    config: TrainConfig,
    accelerator: Accelerator,
    model: nn.Module,
    data: ImageData,
    baseline: Predictions | None,
    progress: Progress | None,
    checkpoint: str | None,
) -> Outcome:
    """Evaluate the channel sets and write tables, pictures and the model."""
    started = time.perf_counter()
    with torch.compiler.set_stance("force_eager"):  # not a graph for every channel set
        evaluated = _evaluate(config, accelerator, model, data, baseline)
    results = build_results(
        config, data, accelerator, evaluated,
        model={
            "name": architecture(model),
            "num_parameters": sum(p.numel() for p in model.parameters()),
            "folder": "model",
        },
        progress=progress, checkpoint=checkpoint, seconds=time.perf_counter() - started,
    )  # fmt: skip
    if accelerator.is_main_process:
        tell_all_channels(model, data.channels, config.channel_identity)
        _write(results, evaluated, model, data, config)
    accelerator.wait_for_everyone()
    return Outcome(config.folder, results, evaluated.sets, accelerator.is_main_process)


def _evaluate(
    config: TrainConfig,
    accelerator: Accelerator,
    model: nn.Module,
    data: ImageData,
    baseline: Predictions | None,
) -> Evaluated:
    """Evaluate a run's model on the images that it is judged by."""
    name, split = evaluation_split(data)
    modes = config.eval_modes or (trained_mode(config, model, data.channels),)
    plan = _plan(config, model, data.channels)
    common: dict[str, Any] = {
        "num_classes": len(data.class_names),
        "accelerator": accelerator,
        "seed": config.seed,
        "progress": accelerator.is_main_process,
    }
    sets = evaluate_channel_sets(
        model,
        accelerator.prepare_data_loader(eval_loader(config, split, data.channels)),
        data.channels,
        modes=modes,
        orders=config.eval_orders,
        sets=plan,
        bn_buffers=_set_buffers(config, model, data, plan, modes),
        **common,
    )
    warn_not_finite({s.name: s.num_not_finite for s in sets if s.num_not_finite}, accelerator)
    errors = tuple(_expected_error(model, data.channels, s.mode, s.indices) for s in sets)
    predictions = Predictions.of(
        sets, data.channels, class_names=data.class_names, model=architecture(model),
        fingerprint=split.fingerprint(),
    )  # fmt: skip
    return Evaluated(name, sets, predictions, errors, baseline)


def _expected_error(
    model: nn.Module, channels: ChannelSet, mode: str, indices: tuple[int, ...]
) -> float | None:
    """The unexplained share of variance, mean over the virtual channels, where it is known."""
    if mode != "named":
        return None
    error = statistics.fmean(expected_error(model, channels.take(indices)).values())
    return error if math.isfinite(error) else None


def _set_buffers(
    config: TrainConfig,
    model: nn.Module,
    data: ImageData,
    plan: list[PlannedSet],
    modes: tuple[str, ...],
) -> dict[tuple[tuple[int, ...], str], dict[str, Tensor]] | None:
    """BatchNorm's statistics of every set and mode on training images, the same on every process.

    Returns:
        What `evaluate_channel_sets(bn_buffers=)` takes; None without `--eval-statistics`.
    """
    if not config.eval_statistics or data.train is None:
        return None
    count = min(config.eval_statistics, len(data.train))
    chosen = seeded_rng("set statistics", config.seed).sample(range(len(data.train)), count)
    images, device = data.train.take(sorted(chosen)), next(model.parameters()).device
    found = {}
    for one in plan:
        for mode in modes:
            told = data.channels.take(one.indices) if mode == "named" else ANONYMOUS
            loader = eval_loader(config, images, data.channels)
            batches = (x[:, one.indices].to(device) for x, _ in loader)
            found[one.indices, mode] = estimate_bn_buffers(model, batches, told)
    return found


def _write(
    results: Mapping[str, Any],
    evaluated: Evaluated,
    model: nn.Module,
    data: ImageData,
    config: TrainConfig,
) -> None:
    """Everything that stays in the output folder."""
    path = config.folder
    write_json(results, path / "results.json")
    _, images = evaluation_split(data)
    files = write_results(results, evaluated, path, data.channels, images)
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
