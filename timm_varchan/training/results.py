"""What a run leaves behind in figures: `results.json` and tables in Markdown.

`results.json`, version 1 of the schema (every key is always there; None where it does not apply):

    schema_version  1
    created         time, ISO 8601, UTC
    config          the fields of `TrainConfig`
    seeds           list of the seeds that took part
    model           name, num_parameters, folder (in the output folder)
    data            name, class_names, channels (as `ChannelSet.to_config`),
                    num_images {train (None if streamed), validation, test, evaluated},
                    num_skipped, value_scale (what stored numbers were divided by, or None: by the
                    range of their type), no_data (as the flag), invalid_share (of the pixels of the
                    measured images, without data)
    training        None if nothing was trained, else epochs, updates, seconds, images_per_second
                    (median over epochs), history: one entry an epoch with epoch (from 0),
                    train_loss, train_accuracy, eval_loss, eval_accuracy, lr, seconds,
                    loader_share (of the seconds, 0..1), images_per_second, eval_sets (accuracy by
                    channel set)
    evaluation      split, checkpoint, seconds,
                    sets: one entry a channel set, mode and order, largest sets first, with
                    channels, indices, size, mode, order, num_images, and for each of accuracy,
                    precision_macro, recall_macro, f1_macro {value, low, high} in 0..1 (95 %;
                    Wilson for accuracy, bootstrap for the macro means);
                    sizes: one entry a size, mode and order with size, mode, order, num_sets, mean,
                    std (between sets, not seeds), worst, worst_set (accuracy)
    machine         platform, processor, device, num_processes, distributed_type
    versions        python, timm_varchan, timm, torch, accelerate, datasets, evaluate, numpy
    git_commit      of the working folder, or None
"""

from __future__ import annotations

import dataclasses
import platform
import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import torch
from accelerate import Accelerator

from timm_varchan.data import ImageData
from timm_varchan.evaluation import METRICS, Estimate, SetResult, summarise_sizes
from timm_varchan.training.checkpoint import Progress
from timm_varchan.training.configuration import TrainConfig
from timm_varchan.training.environment import environment, processor

__all__ = [
    "SCHEMA_VERSION",
    "accuracy_table",
    "build_results",
    "markdown_report",
    "size_table",
]

SCHEMA_VERSION = 1


def build_results(
    config: TrainConfig,
    data: ImageData,
    accelerator: Accelerator,
    results: Sequence[SetResult],
    *,
    model: Mapping[str, Any],
    progress: Progress | None,
    evaluation: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of `results.json`; see the module for the schema.

    Args:
        config: The run.
        data: What it was trained and evaluated on.
        accelerator: Where it ran.
        results: From `evaluate_channel_sets`.
        model: The entry `model`.
        progress: How training went; None if nothing was trained.
        evaluation: The entry `evaluation`, without the results.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "config": config.to_json(),
        "seeds": [config.seed],
        "model": dict(model),
        "data": _data_entry(data, results[0].num_images),
        "training": None if progress is None else _training_entry(progress),
        "evaluation": {
            **evaluation,
            "sets": [result.to_json() for result in results],
            "sizes": [dataclasses.asdict(summary) for summary in summarise_sizes(results)],
        },
        "machine": {
            "platform": platform.platform(),
            "processor": processor(),
            "device": _device_name(accelerator.device),
            "num_processes": accelerator.num_processes,
            "distributed_type": str(accelerator.distributed_type.value),
        },
        **environment(),
    }


def _data_entry(data: ImageData, num_evaluated: int) -> dict[str, Any]:
    splits = {name: getattr(data, name) for name in ("train", "validation", "test")}
    num_images: dict[str, int | None] = {
        name: len(split) if split else 0 for name, split in splits.items()
    }
    reading = data.reading
    if data.stream is not None:
        num_images["train"] = None  # nobody counted
    return {
        "name": data.name,
        "class_names": list(data.class_names),
        "channels": data.channels.to_config(),
        "num_images": {**num_images, "evaluated": num_evaluated},
        "value_scale": reading.value_scale if reading else None,
        "no_data": reading.no_data if reading else None,
        "invalid_share": data.invalid_share,
        "num_skipped": sum(split.num_skipped for split in splits.values() if split),
    }


def _training_entry(progress: Progress) -> dict[str, Any]:
    return {
        "epochs": progress.epoch,
        "updates": progress.updates,
        "seconds": sum(entry["seconds"] for entry in progress.history),
        "images_per_second": statistics.median(e["images_per_second"] for e in progress.history),
        "history": progress.history,
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that reads well as text too: numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *others]) + " |"

    rule = [("-" * w) if number == 0 else "-" * (w - 1) + ":" for number, w in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def _percent(estimate: Estimate) -> str:
    value, low, high = (100 * number for number in estimate)
    return f"{value:.1f} ({low:.1f}-{high:.1f})"


def accuracy_table(results: Sequence[SetResult]) -> str:
    """Accuracy in per cent with its interval: a row for each set, a column for mode and order."""
    series = list(dict.fromkeys((r.mode, r.order) for r in results))
    cells = {(r.indices, r.mode, r.order): _percent(r.metrics["accuracy"]) for r in results}
    rows = [
        [label, *(cells[indices, mode, order] for mode, order in series)]
        for indices, label in dict.fromkeys((r.indices, r.channels) for r in results)
    ]
    return _markdown(["channels", *(f"{mode}, {order}" for mode, order in series)], rows)


def metrics_table(results: Sequence[SetResult]) -> str:
    """All metrics in per cent with their intervals, a row for each result."""
    rows = [
        [r.channels, r.mode, r.order, *(_percent(r.metrics[name]) for name in METRICS)]
        for r in results
    ]
    return _markdown(["channels", "mode", "order", "accuracy", "precision", "recall", "f1"], rows)


def size_table(results: Sequence[SetResult]) -> str:
    """Accuracy in per cent by number of channels: mean, deviation between sets, worst set."""
    rows = [
        [str(s.size), s.mode, s.order, str(s.num_sets), f"{100 * s.mean:.1f}",
         f"{100 * s.std:.1f}", f"{100 * s.worst:.1f} ({s.worst_set})"]
        for s in summarise_sizes(results)
    ]  # fmt: skip
    header = ["number of channels", "mode", "order", "sets", "mean", "std over sets", "worst"]
    return _markdown(header, rows)


def markdown_report(results: Mapping[str, Any], sets: Sequence[SetResult]) -> str:
    """`results.md`: the tables with what they were measured on."""
    data, evaluation, machine = results["data"], results["evaluation"], results["machine"]
    train, seen = data["num_images"]["train"], data["num_images"]["evaluated"]
    return f"""# {results["model"]["name"]} on {data["name"]}

Accuracy and macro averages in per cent with 95 % intervals on {seen} images \
({evaluation["split"]}), {train} training images, seed {results["config"]["seed"]}, \
{results["training"]["epochs"] if results["training"] else 0} epochs, channels trained with \
`{results["config"]["channel_aug"]}` ({results["config"]["channel_identity"]}), on \
{machine["num_processes"]} x {machine["device"]}. Intervals cover the choice of images, not of \
seeds.

## By channel set
{accuracy_table(sets)}

## By number of channels
{size_table(sets)}

## All metrics
{metrics_table(sets)}
"""
