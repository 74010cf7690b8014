"""What a run evaluates: which sets, told what, with which statistics, beside which baseline."""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from timm_varchan.channels import ANONYMOUS, ChannelSet, seeded_rng
from timm_varchan.data import ImageData, ImageSplit
from timm_varchan.errors import UserError
from timm_varchan.evaluation import (
    DEFAULT_BUDGET,
    Evaluation,
    PlannedSet,
    Validation,
    default_modes,
    evaluate_channel_sets,
    parse_sets,
    plan_sets,
    spread,
    validate_channel_sets,
)
from timm_varchan.hub import SavedModel, load
from timm_varchan.models import channel_statistics, expected_error, has_stems
from timm_varchan.training.building import architecture
from timm_varchan.training.configuration import TrainConfig
from timm_varchan.training.loaders import eval_loader, evaluation_split, load_run_data

__all__ = ["Baseline", "Evaluated", "check_evaluation", "evaluate", "load_baseline", "validator"]

logger = logging.getLogger(__name__)


class Baseline(NamedTuple):
    """A saved model to compare with, and the run's data as it takes them."""

    saved: SavedModel
    data: ImageData


class Evaluated(NamedTuple):
    """What an evaluation came to.

    Args:
        split: Its name.
        sets: The results of the channel sets.
        baseline: The baseline's, None without one.
        baseline_name: Its architecture.
        expected_errors: Of each result what the measured correlation foretells, or None.
    """

    split: str
    sets: Evaluation
    baseline: Evaluation | None
    baseline_name: str | None
    expected_errors: tuple[float | None, ...]


def _trained_mode(config: TrainConfig, model: nn.Module, channels: ChannelSet) -> str:
    """How training told the model its channels."""
    trains = config.eval_only is None
    if trains and has_stems(model) and config.channel_identity == "anonymous":
        return "anonymous"
    if trains and has_stems(model) and not channels.is_anonymous:
        return "named"
    return default_modes(model, channels)[0]


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


def check_evaluation(config: TrainConfig, model: nn.Module, data: ImageData) -> None:
    """Refuse an evaluation that the model cannot do, before it is trained.

    Raises:
        UserError: No images; channels that the data lacks, fewer sets than sizes; modes or
            statistics that need a stem; no images for statistics.
    """
    evaluation_split(data)
    try:
        _plan(config, model, data.channels)
    except ValueError as error:
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


def load_baseline(
    config: TrainConfig, accelerator: Accelerator, data: ImageData
) -> Baseline | None:
    """The model of `--baseline` and the same images, scaled and normalised as it was trained.

    Raises:
        UserError: Other channels or classes than the data's.
    """
    if config.baseline is None:
        return None
    saved = load(config.baseline)
    own = dataclasses.replace(
        config,
        eval_only=config.baseline,
        push_to_hub=None,
        img_size=saved.img_size,
        crop_pct=saved.crop_pct,
        value_scale=saved.value_scale,
    )
    theirs = load_run_data(own, accelerator, saved)
    ours = data.channels
    named = not ours.is_anonymous and not theirs.channels.is_anonymous
    same = [c.identity for c in ours] == [c.identity for c in theirs.channels]
    if len(ours) != len(theirs.channels) or (named and not same):
        raise UserError(
            f"--baseline {config.baseline} takes {theirs.channels}, the data are {ours}. Compare "
            f"models of the same planes in the same order."
        )
    if theirs.class_names != data.class_names:
        raise UserError(f"--baseline {config.baseline} has other classes than the data.")
    return Baseline(saved, theirs)


def validator(
    config: TrainConfig,
    accelerator: Accelerator,
    loader: DataLoader[Any] | None,
    channels: ChannelSet,
) -> Callable[[nn.Module], Validation]:
    """A function that tests a model on the validation images.

    Args:
        config: How many sets, and whether the model is told the channels.
        accelerator: Gathers over the processes.
        loader: Normalised batches with all channels, prepared; None without validation images.
        channels: What the planes are.
    """
    count = max(1, config.val_max_sets)
    sets = spread(plan_sets(channels, seed=config.seed), max(2, count))[:count]

    def validate(model: nn.Module) -> Validation:
        if loader is None:
            return Validation()
        mode = _trained_mode(config, model, channels)
        found = validate_channel_sets(model, loader, channels, sets, mode, accelerator=accelerator)
        if found.num_not_finite:
            logger.warning(_not_finite(found.num_not_finite))
        return found

    return validate


def evaluate(
    config: TrainConfig,
    accelerator: Accelerator,
    model: nn.Module,
    data: ImageData,
    baseline: Baseline | None,
) -> Evaluated:
    """Evaluate a run's model, and its baseline on the same images and sets."""
    name, split = evaluation_split(data)
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
        modes=config.eval_modes or (_trained_mode(config, model, data.channels),),
        orders=config.eval_orders,
        sets=_plan(config, model, data.channels),
        statistics=set_statistics(config, model, data),
        **common,
    )
    bad = {one.name: one.num_not_finite for one in sets if one.num_not_finite}
    if bad and accelerator.is_main_process:
        logger.warning(_not_finite(bad))
    errors = _expected_errors(model, data.channels, sets)
    if baseline is None:
        return Evaluated(name, sets, None, None, errors)
    own = dataclasses.replace(
        config, img_size=baseline.saved.img_size, crop_pct=baseline.saved.crop_pct
    )
    theirs = evaluate_channel_sets(
        baseline.saved.model.to(accelerator.device),
        accelerator.prepare_data_loader(
            eval_loader(own, evaluation_split(baseline.data)[1], baseline.data.channels)
        ),
        baseline.data.channels,
        orders=("in order",),
        sets=[
            PlannedSet(indices, one.kind, one.name)
            for indices, one in {one.indices: one for one in sets}.items()
        ],
        **common,
    )
    if not np.array_equal(theirs[0].references, sets[0].references):
        raise UserError(f"The images of --baseline {config.baseline} have other labels.")
    return Evaluated(name, sets, theirs, architecture(baseline.saved.model), errors)


def _expected_errors(
    model: nn.Module, channels: ChannelSet, sets: Evaluation
) -> tuple[float | None, ...]:
    """The unexplained share of variance, mean over the virtual channels, where it is known."""
    errors: list[float | None] = []
    for result in sets:
        error = math.nan
        if result.mode == "named":
            shares = expected_error(model, channels.take(result.indices))
            error = statistics.fmean(shares.values())
        errors.append(error if math.isfinite(error) else None)
    return tuple(errors)


def _not_finite(counts: Mapping[str, int]) -> str:
    """One line on the logits that are not finite."""
    shown = ", ".join(f"{name} {count}" for name, count in list(counts.items())[:5])
    more = f" and {len(counts) - 5} sets more" if len(counts) > 5 else ""
    return (
        f"Logits that are not finite numbers count as wrong: {shown}{more} images. Look for NaN in "
        f"the images, or lower the learning rate."
    )


def set_statistics(
    config: TrainConfig, model: nn.Module, data: ImageData
) -> dict[tuple[tuple[int, ...], str], dict[str, Tensor]] | None:
    """Statistics for `evaluate_channel_sets(statistics=)`, the same on every process.

    Args:
        config: `eval_statistics` is the number of images; none are estimated if it is 0.
        model: Not wrapped.
        data: The training images are used.

    Returns:
        BatchNorm buffers by the positions of the set's planes and the mode, or None.
    """
    if not config.eval_statistics or data.train is None:
        return None
    count = min(config.eval_statistics, len(data.train))
    chosen = seeded_rng("set statistics", config.seed).sample(range(len(data.train)), count)
    images = data.train.take(sorted(chosen))
    found = {}
    for one in _plan(config, model, data.channels):
        for mode in config.eval_modes or (_trained_mode(config, model, data.channels),):
            told = data.channels.take(one.indices) if mode == "named" else ANONYMOUS
            batches = _planes(config, images, data, model, one.indices)
            found[one.indices, mode] = channel_statistics(model, batches, told)
    return found


def _planes(
    config: TrainConfig,
    images: ImageSplit,
    data: ImageData,
    model: nn.Module,
    indices: tuple[int, ...],
) -> Iterator[Tensor]:
    """The planes of a channel set, in batches on the model's device."""
    device = next(model.parameters()).device
    for x, _ in eval_loader(config, images, data.channels):
        yield x[:, indices].to(device)
