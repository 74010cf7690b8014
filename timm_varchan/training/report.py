"""What a run says and leaves behind: first and last words, epochs, results, tables for people."""

from __future__ import annotations

import csv
import importlib.util
import logging
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from timm_varchan.channels import ChannelSet, known_channels
from timm_varchan.data import ImageData
from timm_varchan.errors import UserError
from timm_varchan.results import Evaluated, evaluation_entry, headline
from timm_varchan.training.checkpoint import Progress
from timm_varchan.training.config import TrainConfig
from timm_varchan.training.launch import environment, processor

__all__ = [
    "RunLog",
    "build_results",
    "check_trackers",
    "closing",
    "opening",
]

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
#: The picture is drawn at most so often, in seconds.
_DRAW_EVERY = 30.0


def opening(
    config: TrainConfig, data: ImageData, model: nn.Module, accelerator: Accelerator
) -> str:
    """What is about to be done with what, a line for each, before it takes time."""
    splits = {"training": data.train, "validation": data.validation, "test": data.test}
    counts = [f"{len(split):,} {name}" for name, split in splits.items() if split is not None]
    if data.stream is not None:
        counts.insert(0, "streamed training")
    scale, precision = config.value_scale, accelerator.mixed_precision
    parameters = sum(p.numel() for p in model.parameters())
    start = "pretrained" if config.pretrained else "random"
    start = "its own" if config.eval_only or ":" in config.model else start
    lines = {
        "data": f"{data.name}, {' + '.join(counts)} images, {len(data.class_names)} classes",
        "channels": _channels(config, data.channels),
        "images": f"{config.pixels} x {config.pixels} px, numbers "
        + (f"divided by {scale:g}" if scale else "of their type's range"),
        "model": f"{config.eval_only or config.model}, {parameters / 1e6:.2f} M parameters, "
        f"{start} weights",
        "training": f"{config.epochs} epochs, batches of {config.batch_size}, channels "
        f"{config.channel_aug} and {config.channel_identity}, seed {config.seed}",
        "device": f"{accelerator.num_processes} x {accelerator.device.type}, precision "
        f"{'float32' if precision == 'no' else precision}",
        "folder": config.output_dir,
    }
    if config.eval_only:
        del lines["training"]
    return "\n".join(f"{label:9} {text}" for label, text in lines.items())


def _channels(config: TrainConfig, channels: ChannelSet) -> str:
    """The channels, who says so, and where their mean and deviation are from."""
    if config.channels is not None:
        source = f"as --channels {config.channels} says"
    elif config.eval_only is not None:
        source = "as the model says"
    elif config.dataset == "synthetic":
        source = "as they are made"
    elif channels.labels == ("R", "G", "B"):
        source = "as three planes are taken for"
    elif channels.labels == tuple(f"c{i}" for i in range(len(channels))):
        source = "named by their place"
    else:
        source = "as the files say"
    if config.use is not None:
        source += f", of which --use takes {config.use}"
    known = known_channels()
    usual = all(c.name in known and c == known[c.name] for c in channels)
    given = config.eval_only is not None or str(config.channels).endswith(".json")
    statistics = "given" if given else "of ImageNet" if usual else "measured"
    return f"{len(channels)}: {channels}, {source}; mean and deviation {statistics}"


def closing(results: Mapping[str, Any], folder: Path) -> str:
    """One sentence of what was achieved, and where to look."""
    model = "" if results["training"] is None else f", {folder}/model (the model, with its card)"
    return (
        f"{results['model']['name']}: {headline(results)}. "
        f"Everything is in {folder}/: results.html (open it), results.md{model}."
    )


def check_trackers(config: TrainConfig) -> None:
    """Refuse trackers whose package is not there.

    Raises:
        UserError: Names the package to install.
    """
    for name in config.trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--trackers {name} needs a package: pip install {name}.")


class RunLog:
    """Writes every epoch to `summary.csv`, `curves.png`, the trackers and the log.

    Args:
        accelerator: Holds the trackers; only the main process writes.
        config: Goes to the trackers.
    """

    def __init__(self, accelerator: Accelerator, config: TrainConfig) -> None:
        self._accelerator, self._config, self._drawn = accelerator, config, -_DRAW_EVERY

    def start(self) -> None:
        """Begin the trackers; the folder is the run's own by now."""
        if self._config.trackers:
            plain = (int, float, str, bool)
            values = self._config.to_json().items()
            self._accelerator.init_trackers(
                "timm_varchan",
                config={k: v if isinstance(v, plain) else str(v) for k, v in values},
                init_kwargs={"wandb": {"dir": str(self._config.folder)}},
            )

    def epoch(self, history: Sequence[Mapping[str, Any]], num_epochs: int) -> None:
        """Write the epochs so far, counted from 1; the last of them is new."""
        rows = [_row(entry) for entry in history]
        newest, number = rows[-1], len(history)
        self._accelerator.log(
            {f"{_group(k)}/{k}": v for k, v in newest.items() if k != "epoch"}, step=newest["epoch"]
        )
        if not self._accelerator.is_main_process:
            return
        _write_csv(rows, self._config.folder / "summary.csv")
        if number == num_epochs or time.monotonic() - self._drawn > _DRAW_EVERY:
            from timm_varchan.plots import plot_curves  # matplotlib is slow to import

            plot_curves(history, self._config.folder / "curves.png")
            self._drawn = time.monotonic()
        logger.info(
            "epoch %d/%d: loss %.4f, validation %.1f %%, %.0f images/s, loader %.0f %% of the time",
            number, num_epochs, newest["train_loss"], 100 * newest["eval_accuracy"],
            newest["images_per_second"], 100 * newest["loader_share"],
        )  # fmt: skip


def _row(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of the history with a column for every channel set, its epoch counted from 1."""
    columns = {key: value for key, value in entry.items() if key != "eval_sets"}
    sets = entry.get("eval_sets", {})
    columns["epoch"] += 1
    return columns | {f"eval_accuracy_{name}": value for name, value in sets.items()}


def _group(name: str) -> str:
    head = name.split("_")[0]
    return head if head in ("train", "eval") else "run"


def _write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    names = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)


def build_results(
    config: TrainConfig,
    data: ImageData,
    accelerator: Accelerator,
    evaluated: Evaluated,
    *,
    model: Mapping[str, Any],
    progress: Progress | None,
    checkpoint: str | None,
    seconds: float,
) -> dict[str, Any]:
    """The content of `results.json`; the schema stands in `docs/evaluation.md`.

    Args:
        config: The run.
        data: What it was trained and evaluated on.
        accelerator: Where it ran.
        evaluated: The results of the channel sets, and the baseline's.
        model: The entry `model`.
        progress: How training went; None if nothing was trained.
        checkpoint: Name of the one that was evaluated.
        seconds: That the evaluation took.
    """
    device = accelerator.device
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": dict(model),
        "evaluation": {
            **evaluation_entry(evaluated),
            "checkpoint": checkpoint,
            "seconds": seconds,
            "planned": config.planned_sets,
        },
        "config": config.to_json(),
        "seeds": [config.seed],
        "data": _data_entry(data, evaluated.sets[0].num_images),
        "training": None if progress is None else _training_entry(progress),
        "machine": {
            "platform": platform.platform(),
            "processor": processor(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "num_processes": accelerator.num_processes,
            "distributed_type": str(accelerator.distributed_type.value),
        },
        **environment(),
    }


def _data_entry(data: ImageData, num_evaluated: int) -> dict[str, Any]:
    splits = {name: getattr(data, name) for name in ("train", "validation", "test")}
    num_images: dict[str, Any] = {n: len(split) if split else 0 for n, split in splits.items()}
    if data.stream is not None:
        num_images["train"] = None  # nobody counted
    return {
        "name": data.name,
        "class_names": list(data.class_names),
        "channels": data.channels.to_dict(),
        "num_images": {**num_images, "evaluated": num_evaluated},
        "no_data": data.spec.no_data,
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
