"""What a run says and leaves behind: first and last words, epochs, results, tables for people."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import itertools
import logging
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from timm_varchan.channels import ChannelSet, known_channels
from timm_varchan.data import ImageData
from timm_varchan.errors import UserError
from timm_varchan.evaluation import (
    METRICS,
    Evaluation,
    confusion_counts,
    foretold,
    paired_difference,
    rank_bands,
    robustness,
    spread,
    summarise_sizes,
)
from timm_varchan.training.checkpoint import Progress
from timm_varchan.training.config import TrainConfig
from timm_varchan.training.launch import environment, processor

__all__ = [
    "Evaluated",
    "RunLog",
    "build_results",
    "check_trackers",
    "closing",
    "markdown_report",
    "opening",
    "write_sets",
]

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
#: Rows of a table for people; everything is in `results.json` and `sets.csv`.
MAX_ROWS = 13
#: Sets of which all four metrics are shown, at most; a few channels have no more subsets.
MAX_SETS_SHOWN = 15
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
    whole, data = results["evaluation"]["sets"][0], results["data"]
    value, low, high = (100 * whole["accuracy"][key] for key in ("value", "low", "high"))
    classes = len(data["class_names"])
    model = "" if results["training"] is None else f", {folder}/model (the model, with its card)"
    return (
        f"{results['model']['name']} is right on {value:.1f} % (95 % interval {low:.1f} to "
        f"{high:.1f}) of {data['num_images']['evaluated']} {results['evaluation']['split']} images "
        f"with all {whole['size']} channels ({whole['mode']}); chance is {100 / classes:.1f} %. "
        f"Everything is in {folder}/: results.md (tables), channel_sets.png{model}."
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
    sets, device, check = evaluated.sets, accelerator.device, evaluated.sets.order_check
    own, baseline = _summary(sets), evaluated.baseline
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "config": config.to_json(),
        "seeds": [config.seed],
        "model": dict(model),
        "data": _data_entry(data, evaluated.sets[0].num_images),
        "training": None if progress is None else _training_entry(progress),
        "evaluation": {
            "split": evaluated.split,
            "checkpoint": checkpoint,
            "seconds": seconds,
            "planned": config.planned_sets,
            "num_passes": sets.num_passes,
            "sets": _set_entries(evaluated),
            "sizes": own["sizes"],
            "bands": [band.to_json() for band in rank_bands(sets)],
            "robustness": own["robustness"],
            "foretold": foretold(sets, evaluated.expected_errors),
            "order_check": None if check is None else {**check._asdict(), "equal": check.equal},
            "confusion": confusion_counts(
                sets[0].predictions, sets[0].references, len(data.class_names)
            ).tolist(),
            "baseline": baseline and {"name": evaluated.baseline_name, **_summary(baseline)},
        },
        "machine": {
            "platform": platform.platform(),
            "processor": processor(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "num_processes": accelerator.num_processes,
            "distributed_type": str(accelerator.distributed_type.value),
        },
        **environment(),
    }


def _summary(sets: Evaluation) -> dict[str, Any]:
    """What the results of a model's sets come to: by size, and in one number."""
    score = robustness(sets)
    return {
        "sizes": [dataclasses.asdict(summary) for summary in summarise_sizes(sets)],
        "robustness": None if score is None else score.to_json(),
    }


def _set_entries(evaluated: Evaluated) -> list[dict[str, Any]]:
    """Every result with its paired differences: to all channels, and to the baseline's answer."""
    sets, errors = evaluated.sets, evaluated.expected_errors
    whole = {r.mode: r for r in reversed(sets) if r.kind == "all" and r.order == "in order"}
    theirs = {result.indices: result for result in evaluated.baseline or ()}
    entries = []
    for result, error in zip(sets, errors, strict=True):
        entry = {**result.to_json(), "loss": None, "expected_error": error, "baseline": None}
        full, other = whole.get(result.mode), theirs.get(result.indices)
        if full is not None and full is not result:
            entry["loss"] = paired_difference(full.correct, result.correct)._asdict()
        if other is not None:
            entry["baseline"] = {
                "accuracy": other.metrics["accuracy"]._asdict(),
                "difference": paired_difference(result.correct, other.correct)._asdict(),
            }
        entries.append(entry)
    return entries


def _data_entry(data: ImageData, num_evaluated: int) -> dict[str, Any]:
    splits = {name: getattr(data, name) for name in ("train", "validation", "test")}
    num_images: dict[str, Any] = {n: len(split) if split else 0 for n, split in splits.items()}
    reading = data.reading
    if data.stream is not None:
        num_images["train"] = None  # nobody counted
    return {
        "name": data.name,
        "class_names": list(data.class_names),
        "channels": data.channels.to_dict(),
        "num_images": {**num_images, "evaluated": num_evaluated},
        "no_data": reading.spec.no_data if reading else None,
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


def _percent(estimate: Mapping[str, float]) -> str:
    value, low, high = (100 * estimate[key] for key in ("value", "low", "high"))
    return f"{value:.1f} ({low:.1f}-{high:.1f})"


def _points(difference: Mapping[str, float] | None) -> str:
    """A paired difference in points with its interval; empty where there is none."""
    if difference is None:
        return ""
    value, low, high = (100 * difference[key] for key in ("difference", "low", "high"))
    return f"{value + 0.0:+.1f} ({low:+.1f} to {high:+.1f})"


def metrics_table(evaluation: Mapping[str, Any]) -> str:
    """The four metrics in per cent with their intervals, and what is lost against all channels."""
    sets, baseline = evaluation["sets"], evaluation["baseline"]
    shown = sets
    if len(sets) > MAX_SETS_SHOWN:
        shown = [s for s in sets if s["kind"] in ("all", "natural", "asked")][:MAX_SETS_SHOWN]
    foretell = any(s["expected_error"] is not None for s in sets)
    extra = ["expected error"] if foretell else []
    extra += ["minus baseline"] if baseline else []
    rows = [
        [
            _row_name(s, sets),
            *(_percent(s[name]) for name in METRICS),
            _points(s["loss"]),
            *(["" if (e := s["expected_error"]) is None else f"{e:.2f}"] if foretell else []),
            *([_points((s["baseline"] or {}).get("difference"))] if baseline else []),
        ]
        for s in shown
    ]
    head = ["channels", "accuracy", "precision", "recall", "f1", "lost against all", *extra]
    return _markdown(head, rows)


def _row_name(one: Mapping[str, Any], sets: Sequence[Mapping[str, Any]]) -> str:
    """The set, with what tells it from other rows of the same set."""
    parts = [one["name"]]
    parts += [one["mode"]] if len({s["mode"] for s in sets}) > 1 else []
    parts += [one["order"]] if one["order"] != sets[0]["order"] else []
    return ", ".join(parts)


def bands_table(bands: Sequence[Mapping[str, Any]]) -> str:
    """Two rankings beside each other: what is lost without a channel, what it does alone."""
    left = [band for band in bands if band["loss_without"]][:MAX_ROWS]
    right = [band for band in bands if band["alone"]]
    right = sorted(right, key=lambda band: -band["alone"]["value"])[:MAX_ROWS]
    empty = ("", "")
    rows = [
        [
            *((a["name"], _points(a["loss_without"])) if a else empty),
            *((b["name"], f"{100 * b['alone']['value']:.1f}", _points(b["loss_alone"]))
              if b else (*empty, "")),
        ]
        for a, b in itertools.zip_longest(left, right)
    ]  # fmt: skip
    return _markdown(["left out", "lost without it", "alone", "accuracy", "lost"], rows)


def size_table(evaluation: Mapping[str, Any]) -> str:
    """Accuracy in per cent by number of channels: mean, worst and best set, and which."""
    first = evaluation["sets"][0]
    series = first["mode"], first["order"]
    own = [s for s in evaluation["sizes"] if (s["mode"], s["order"]) == series]
    baseline = {s["size"]: s["mean"] for s in (evaluation["baseline"] or {}).get("sizes", ())}
    rows = [
        [
            str(s["size"]), f"{s['num_sets']} of {s['num_possible']:,}", f"{100 * s['mean']:.1f}",
            f"{100 * s['worst']:.1f} to {100 * s['best']:.1f}" if s["num_sets"] > 1 else "",
            _short(s["worst_set"]) if s["num_sets"] > 1 else "",
            *([f"{100 * baseline[s['size']]:.1f}"] if baseline else []),
        ]
        for s in spread(own, MAX_ROWS)
    ]  # fmt: skip
    extra = ["baseline"] if baseline else []
    return _markdown(["number", "sets", "mean", "worst to best", "worst set", *extra], rows)


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:22]}..."


def markdown_report(results: Mapping[str, Any]) -> str:
    """`results.md` from the content of `results.json`: at most 60 lines for 13 channels."""
    data, evaluation, machine = results["data"], results["evaluation"], results["machine"]
    seen, training = data["num_images"]["evaluated"], results["training"]
    trained = ""
    if training is not None:
        trained = (
            f"; {data['num_images']['train']} training images, {training['epochs']} epochs, "
            f"channels trained with `{results['config']['channel_aug']}`, seed "
            f"{results['config']['seed']}"
        )
    parts = [
        f"# {results['model']['name']} on {Path(data['name']).name}",
        f"Per cent with 95 % intervals on {seen} images ({evaluation['split']}){trained}; "
        f"{machine['num_processes']} x {machine['device']}.\nIntervals cover the choice of images, "
        f"not of seeds; differences are paired, on the same images.",
        metrics_table(evaluation),
        "\n".join(_notes(evaluation)),
    ]
    if evaluation["bands"]:
        parts += ["## Which channels matter", bands_table(evaluation["bands"])]
    parts += ["## By number of channels", size_table(evaluation)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _notes(evaluation: Mapping[str, Any]) -> list[str]:
    """What is to be said of the figures, a line each."""
    notes = []
    bad = [s for s in evaluation["sets"] if s["num_not_finite"]]
    if bad:
        named = ", ".join(f"{s['name']} {s['num_not_finite']}" for s in bad[:5])
        notes.append(
            f"- **Logits that are not finite** (counted as wrong) in {len(bad)} sets, images: "
            f"{named}."
        )
    if evaluation["baseline"]:
        other = evaluation["baseline"]["robustness"]
        said = f", robustness {100 * other['uniform_mean']:.1f}" if other else ""
        notes.append(f"- Baseline: {evaluation['baseline']['name']}{said}.")
    score = evaluation["robustness"]
    if score is not None:
        worst = score["worst_loss"]
        notes.append(
            f"- Robustness: {100 * score['uniform_mean']:.1f} if first the number of channels is "
            f"drawn, then which (all channels: {100 * score['full']:.1f})"
            + (f"; worst single loss {_points(worst)}, {score['worst_channel']}." if worst else ".")
        )
    check = evaluation["order_check"]
    if check is not None:
        said = "the same answer" if check["equal"] else "**ANOTHER answer**"
        notes.append(
            f"- Order: {said} with the planes in another order on {check['num_images']} images "
            f"(logits of up to {check['scale']:.3g} differ by {check['difference']:.1g})."
        )
    if evaluation["foretold"] is not None:
        notes.append(
            f"- Expected error (variance of the virtual channels that a set does not explain) and "
            f"loss of accuracy over all sets: rank correlation {evaluation['foretold']:.2f}."
        )
    return notes


def write_sets(results: Mapping[str, Any], path: Path) -> None:
    """Write `sets.csv`: a line for every set, mode and order."""
    rows = []
    for one in results["evaluation"]["sets"]:
        row = {k: v for k, v in one.items() if not isinstance(v, (dict, list)) and v is not None}
        row["indices"] = "+".join(map(str, one["indices"]))
        for name in METRICS:
            row |= _columns(name, one[name])
        row |= _columns("loss", one["loss"] or {})
        if one["baseline"]:
            row |= _columns("baseline", one["baseline"]["accuracy"])
            row |= _columns("minus_baseline", one["baseline"]["difference"])
        rows.append(row)
    _write_csv(rows, path)


def _columns(name: str, values: Mapping[str, float]) -> dict[str, float]:
    """A column for each part of an estimate or a difference, the first under the name alone."""
    return {
        name if key in ("value", "difference") else f"{name}_{key}": value
        for key, value in values.items()
    }
