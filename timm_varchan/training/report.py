"""What a run says and leaves behind: first words, epochs, the content of `results.json`, files."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import platform
import shlex
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import nn

from timm_varchan.cards import write_card
from timm_varchan.channels import ChannelSet, known_channels
from timm_varchan.data import ImageData, save_fingerprints
from timm_varchan.errors import UserError
from timm_varchan.hub import save
from timm_varchan.results import (
    Evaluated,
    evaluation_entry,
    headline,
    markdown_page,
    write_results,
    write_rows,
)
from timm_varchan.training.config import EvaluateConfig, TrainConfig
from timm_varchan.version import __version__

if TYPE_CHECKING:
    from timm_varchan.training.checkpoint import Progress

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
#: The picture is drawn at most so often, in seconds.
_DRAW_EVERY = 30.0
#: Packages that decide about results.
_PACKAGES = ("timm", "torch", "accelerate", "datasets", "evaluate", "numpy")


def opening(
    config: TrainConfig | EvaluateConfig,
    data: ImageData,
    model: nn.Module,
    accelerator: Accelerator,
) -> str:
    """What is about to be done with what, a line for each, before it takes time."""
    counts = [f"{len(split):,} {name}" for name, split in data.splits.items()]
    if data.stream is not None:
        counts.insert(0, "streamed training")
    spec, precision = data.spec, accelerator.mixed_precision
    scale = spec.channels.value_scale
    lines = {
        "data": f"{data.name}, {' + '.join(counts)} images, {len(data.class_names)} classes",
        "channels": _channels(config, data.channels),
        "images": f"{spec.img_size} x {spec.img_size} px, numbers "
        + (f"divided by {scale:g}" if scale else "of their type's range"),
        "model": f"{config.model}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M "
        f"parameters",
    }
    if isinstance(config, TrainConfig):
        start = "pretrained" if config.pretrained else "random"
        lines["model"] += f", {'its own' if ':' in config.model else start} weights"
        lines["training"] = (
            f"{config.epochs} epochs, batches of {config.batch_size}, channels "
            f"{config.channel_aug} and {config.channel_identity}, seed {config.seed}"
        )
    lines["device"] = (
        f"{accelerator.num_processes} x {accelerator.device.type}, precision "
        f"{'float32' if precision == 'no' else precision}"
    )
    if isinstance(config, TrainConfig):
        lines["folder"] = config.output_dir
    return "\n".join(f"{label:9} {text}" for label, text in lines.items())


def _channels(config: TrainConfig | EvaluateConfig, channels: ChannelSet) -> str:
    """The channels, who says so, and where their mean and deviation are from."""
    evaluated = isinstance(config, EvaluateConfig)
    if config.channels is not None:
        source = f"as --channels {config.channels} says"
    elif evaluated:
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
    registry = known_channels()
    usual = all(c.name in registry and c == registry[c.name] for c in channels)
    given = evaluated or str(config.channels).endswith(".json")
    moments = "given" if given else "of ImageNet" if usual else "measured"
    return f"{len(channels)}: {channels}, {source}; mean and deviation {moments}"


def closing(results: Mapping[str, Any], folder: Path | None) -> str:
    """The page, what was achieved in one sentence, where to look, whether an epoch was better."""
    text = f"{results['model']['name']}: {headline(results)}."
    if folder is not None:
        model = "" if results["training"] is None else f", {folder}/model (the model and its card)"
        text += f" Everything is in {folder}/: results.html (open it), results.md{model}."
    return f"{markdown_page(results)}\n{text}{_other_epoch(results, folder)}"


def _other_epoch(results: Mapping[str, Any], folder: Path | None) -> str:
    """Which epoch was best on the validation images, where another one was taken."""
    training = results["training"]
    if training is None or training["best_epoch"] in (None, training["epoch_taken"]):
        return ""
    best, taken = training["best_epoch"], training["epoch_taken"]
    first, second = (100 * training["history"][e - 1]["eval_accuracy"] for e in (best, taken))
    again = f"timm-varchan train --resume auto --output-dir {shlex.quote(str(folder))}"
    return (
        f"\nEpoch {best} was the best on the validation images ({first:.1f} %), epoch {taken} "
        f"({second:.1f} %) was taken. To take the best: {again} --eval-checkpoint best"
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
        groups = {key: key.split("_")[0] for key in newest if key != "epoch"}
        self._accelerator.log(
            {f"{g if g in ('train', 'eval') else 'run'}/{k}": newest[k] for k, g in groups.items()},
            step=newest["epoch"],
        )
        if not self._accelerator.is_main_process:
            return
        write_rows(rows, self._config.folder / "summary.csv")
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
    sets = {f"eval_accuracy_{name}": value for name, value in entry["eval_sets"].items()}
    return {**columns, "epoch": entry["epoch"] + 1, **sets}


def build_results(
    config: TrainConfig | EvaluateConfig,
    data: ImageData,
    accelerator: Accelerator,
    evaluated: Evaluated,
    *,
    model: nn.Module,
    progress: Progress | None = None,
    taken: Progress | None = None,
) -> dict[str, Any]:
    """The content of `results.json`; the schema stands in `docs/evaluation.md`.

    Args:
        config: The run.
        data: What it was trained and evaluated on.
        accelerator: Where it ran.
        evaluated: The answers on the channel sets.
        model: That was evaluated.
        progress: How training went; None if nothing was trained.
        taken: How far it was at the checkpoint that was evaluated.
    """
    device, cfg = accelerator.device, model.pretrained_cfg
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": {
            "name": cfg["architecture"],  # type: ignore[index]
            "num_parameters": sum(p.numel() for p in model.parameters()),
        },
        "evaluation": {**evaluation_entry(evaluated), "planned": config.sets},
        "config": config.to_json(),
        "seeds": [config.seed],
        "data": _data_entry(data, evaluated.sets[0].num_images),
        "training": None if progress is None else _training_entry(progress, taken or progress),
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
    splits = data.splits
    num_images: dict[str, Any] = {
        name: len(splits.get(name, ())) for name in ("train", "validation", "test")
    }
    if data.stream is not None:
        num_images["train"] = None  # nobody counted
    return {
        "name": data.name,
        **data.spec.to_dict(),
        "num_images": {**num_images, "evaluated": num_evaluated},
        "invalid_share": data.invalid_share,
        "num_skipped": sum(split.num_skipped for split in splits.values()),
    }


def _training_entry(progress: Progress, taken: Progress) -> dict[str, Any]:
    history = progress.history
    ranks = {e["epoch"] + 1: e["eval_accuracy"] for e in history if e["eval_accuracy"] is not None}
    ranks = {epoch: accuracy for epoch, accuracy in ranks.items() if not math.isnan(accuracy)}
    return {
        "epochs": progress.epoch,
        "updates": progress.updates,
        "epoch_taken": taken.epoch,
        "best_epoch": max(ranks, key=lambda epoch: ranks[epoch], default=None),
        "seconds": sum(entry["seconds"] for entry in history),
        "images_per_second": statistics.median(e["images_per_second"] for e in history),
        "history": history,
    }


def write_run(
    results: Mapping[str, Any],
    evaluated: Evaluated,
    data: ImageData,
    folder: Path,
    model: nn.Module | None = None,
) -> None:
    """Everything that stays in the output folder; with a model, that one with its card too."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(results, folder / "results.json")
    images = getattr(data, evaluated.split)
    files = write_results(results, evaluated, folder, data.channels, images)
    if model is not None:
        save(model, folder / "model", data.spec, files=files)
        # What may be pushed says nothing of this machine's folders.
        public = {**results, "config": {k: _name(v) for k, v in results["config"].items()}}
        write_json(public, folder / "model" / "results.json")
        save_fingerprints(data, folder / "model")
        write_card(folder / "model", name=folder.resolve().name)


def _name(value: Any) -> Any:
    """A path without its folders; anything else as it is."""
    if not isinstance(value, str):
        return value
    prefix, colon, rest = value.rpartition(":")
    is_path = os.path.isabs(rest) or os.path.exists(rest)  # pathlib refuses long names
    return f"{prefix}{colon}{os.path.basename(rest)}" if is_path else value


def write_json(values: Mapping[str, Any], path: Path) -> None:
    """Write strict JSON: what is no number becomes null. Infinity and NaN are not JSON."""
    text = json.dumps(_without_nan(values), indent=2, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def environment() -> dict[str, Any]:
    """Versions of the packages that decide about results, and the commit of the code."""
    return {
        "versions": {
            "python": platform.python_version(),
            "timm_varchan": __version__,
            **{name: metadata.version(name) for name in _PACKAGES},
        },
        "git_commit": _git_commit(),
    }


def processor() -> str:
    """The processor's name; Linux keeps it in a file."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """The commit of the code that ran, if it runs from a checkout."""
    command = ["git", "rev-parse", "HEAD"]
    here = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
