"""What `bench/task2.py report` writes: comparisons, costs, latency, tables, curves."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms_cli import machine, write_report
from finished_runs import Run, read_runs
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy import stats
from small_images import BATCH, SMOOTHING, WEIGHT_DECAY, interval
from tables import REPORT_TASK2, beside, table
from task2_arms import ARMS, BAR, OWN, build
from timing import Clock, interleave, ratios, spread
from torch import nn

from timm_varchan import RGB
from timm_varchan.complexity import count_complexity
from timm_varchan.evaluation import METRICS, classification_metrics, paired_difference

#: Costs are counted at these sizes too, in pixels.
OTHER_SIZES = (64, 224)
#: The reference report's.
REPORT_SIZE = 224


def compare(own: Sequence[Run], reference: Sequence[Run], seed: int = 0) -> dict[str, Any]:
    """The paired difference to a reference in points, and the ratio of accuracies by bootstrap.

    Args:
        own: Runs of an arm.
        reference: Runs of the reference with the same seeds.
        seed: Of the bootstrap.

    Returns:
        Of one seed the exact McNemar test; of several each image counts with its mean over the
        seeds, and the interval and p-value are those of a mean over images.
    """
    a, b = (np.mean([run.correct("RGB") for run in runs], axis=0) for runs in (own, reference))
    if len(own) == 1:
        paired = paired_difference(own[0].correct("RGB"), reference[0].correct("RGB"))
        difference = {"value": 100 * paired.difference, "low": 100 * paired.low,
                      "high": 100 * paired.high, "p": paired.p}  # fmt: skip
    else:
        difference = _estimate(a - b) | {"p": float(stats.ttest_1samp(a - b, 0).pvalue)}
    cells, counts = np.unique(np.stack([a, b]), axis=1, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), 10_000)
    of_own, of_reference = (draws @ cells.T).T
    low, high = np.quantile(100 * of_own / of_reference, (0.025, 0.975))
    ratio = {"value": 100 * a.mean() / b.mean(), "low": low, "high": high}
    return {"difference": difference, "ratio": ratio}


def _estimate(per_image: np.ndarray) -> dict[str, float]:
    """A mean over images with its 95 % interval, in per cent."""
    found = interval(per_image)
    return {"value": found["mean"], "low": found["low"], "high": found["high"]}


@torch.inference_mode()
def latency(
    models: Mapping[str, nn.Module], img_size: int, batch: int, rounds: int
) -> dict[str, Any]:
    """Time of a forward pass of each model, interleaved, and its ratio to the first one's."""
    x = torch.randn(batch, 3, img_size, img_size).contiguous(memory_format=torch.channels_last)
    calls = {name: partial(model, x) for name, model in models.items()}
    steps = interleave(calls, Clock(x.device), rounds=rounds, warmup=3)
    first = next(iter(steps.values()))
    return {
        name: {"time_ms": spread([1000 * s for s in seconds]),
               "ratio": ratios({name: seconds, "first": first})["first"]}
        for name, seconds in steps.items()
    }  # fmt: skip


def describe(
    name: str, arm_runs: Mapping[int, Run], reference: Mapping[int, Run],
    settings: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Everything about one arm but its latency."""
    num_classes = settings["num_classes"]
    model = build(ARMS[name], num_classes)
    entry: dict[str, Any] = {"architecture": ARMS[name].architecture,
                             "options": dict(ARMS[name].options), "front": ARMS[name].front,
                             "aug": ARMS[name].aug}  # fmt: skip
    count = getattr(model, "count_convs", None)
    entry["num_convs"] = 34 - 1 if name == BAR else count() if count else None
    entry["complexity"] = {
        str(size): count_complexity(model, RGB, img_size=size).to_json()
        for size in sorted({settings["img_size"], *OTHER_SIZES})
    }
    entry["seeds"] = {}
    for seed, one in arm_runs.items():
        sets = {
            key: {m: {"value": 100 * e.value, "low": 100 * e.low, "high": 100 * e.high}
                  for m, e in classification_metrics(p, one.labels, num_classes).items()}
            for key, p in one.predictions.items()
        }  # fmt: skip
        entry["seeds"][str(seed)] = {**one.details, "sets": sets, "history": one.history}
        if seed in reference and one is not reference[seed]:
            entry["seeds"][str(seed)]["compared"] = compare([one], [reference[seed]])
    if len(arm_runs) > 1:
        entry["mean"] = {
            "RGB": _estimate(np.mean([one.correct("RGB") for one in arm_runs.values()], axis=0))
        }
        shared = sorted(set(arm_runs) & set(reference))
        if arm_runs is not reference and len(shared) > 1:
            entry["mean"]["compared_seeds"] = shared
            entry["mean"]["compared"] = compare(
                [arm_runs[seed] for seed in shared], [reference[seed] for seed in shared]
            )
    return entry


def report(args: argparse.Namespace) -> None:
    """Write all finished runs as JSON, tables and a picture of the curves."""
    torch.set_num_threads(1)
    runs = read_runs(args.output, ARMS)
    settings = json.loads(next(iter(next(iter(runs.values())).values())).meta)
    classes, size = settings["num_classes"], settings["img_size"]
    if args.reference not in runs:
        raise SystemExit(f"{args.output} has no finished run of the reference {args.reference}.")
    reference = runs[args.reference]
    arms = {name: describe(name, one, reference, settings) for name, one in runs.items()}
    models = {name: build(ARMS[name], classes).eval() for name in {args.reference: 0, **runs}}
    for batch in (1, 32):
        timed = latency(models, size, batch, args.rounds)
        for name in runs:
            arms[name].setdefault("latency", {})[str(batch)] = timed[name]
    summary = {
        "settings": settings
        | {"batch_size": BATCH, "weight_decay": WEIGHT_DECAY, "smoothing": SMOOTHING},
        "machine": machine(args),
        "reference": args.reference,
        "arms": arms,
    }
    write_report(args.json, summary, markdown(summary))
    draw_curves(runs, args.json.with_suffix(".png"))


def _with_interval(estimate: Mapping[str, float], digits: int = 1) -> str:
    value, low, high = (f"{estimate[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def markdown(summary: Mapping[str, Any]) -> str:
    """The tables, in per cent with 95 % intervals over the choice of test images."""
    size, reference = str(summary["settings"]["img_size"]), summary["reference"]
    header = ("network", "params (M)", f"multi-adds at {size} px (M)", "fwd/bwd size (MB)", "lr",
              "seed", *METRICS, f"minus {reference} (points)", f"of {reference} (%)",
              f"time / {reference}, batches of 1, 32")  # fmt: skip
    rows = []
    for name, arm in summary["arms"].items():
        cost, seeds = arm["complexity"][size], arm["seeds"]
        first = [name, f"{cost['params'] / 1e6:.2f}", f"{cost['macs'] / 1e6:.1f}",
                 f"{cost['forward_backward_mb']:.2f}"]  # fmt: skip
        times = ", ".join(f"{t['ratio']['median']:.2f}" for t in arm["latency"].values())
        for seed, one in seeds.items():
            cells = [*first, f"{one['lr']:g}", seed]
            cells += [_with_interval(one["sets"]["RGB"][metric]) for metric in METRICS]
            rows.append([*cells, *_against(one.get("compared"), times)])
        if "mean" in arm:
            cells = [*first, "", f"mean of {len(seeds)}", _with_interval(arm["mean"]["RGB"])]
            cells += [""] * (len(METRICS) - 1)
            rows.append([*cells, *_against(arm["mean"].get("compared"), times)])
    return table(header, rows)


def _against(compared: Mapping[str, Any] | None, times: str) -> list[str]:
    """The cells of a comparison with the reference; empty for the reference itself."""
    if compared is None:
        return ["", "", ""]
    difference = compared["difference"]
    return [f"{_with_interval(difference)}, p = {difference['p']:.2g}",
            _with_interval(compared["ratio"], 0), times]  # fmt: skip


def sets_markdown(summary: Mapping[str, Any]) -> str:
    """Accuracy on every channel set of the networks that take several; first seeds."""
    columns = {}
    for name, arm in summary["arms"].items():
        sets = next(iter(arm["seeds"].values()))["sets"]
        if len(sets) > 1:
            columns[f"{name} ({arm['aug']})"] = sets
    names = dict.fromkeys(key for sets in columns.values() for key in sets)
    return table(
        ("channels", *columns),
        [(key, *(_with_interval(sets[key]["accuracy"]) for sets in columns.values()))
         for key in names],
    )  # fmt: skip


def beside_report_markdown(summary: Mapping[str, Any]) -> str:
    """The report's columns for our networks at its size, first seeds, and its own figures."""
    columns = {}
    for name, arm in summary["arms"].items():
        cost, sets = arm["complexity"][str(REPORT_SIZE)], next(iter(arm["seeds"].values()))["sets"]
        columns[name] = [
            f"{cost['params'] / 1e6:.2f}", f"{cost['macs'] / 1e9:.2f}",
            f"{cost['forward_backward_mb']:.2f}", f"{cost['flops'] / 1e9:.2f}",
            *(_with_interval(sets["RGB"][metric]) for metric in METRICS),
        ]  # fmt: skip
    return beside(columns, REPORT_TASK2)


def draw_curves(runs: Mapping[str, Mapping[int, Run]], path: Path) -> None:
    """Loss on the training images and accuracy on the test images over the epochs."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    for name, seeds in runs.items():
        history = next(iter(seeds.values())).history
        epochs = [entry["epoch"] for entry in history]
        style = {"linewidth": 2.2} if name in (BAR, OWN) else {"linewidth": 1, "alpha": 0.7}
        for one, key in zip(axes, ("train_loss", "test_accuracy"), strict=True):
            one.plot(epochs, [entry[key] for entry in history], label=name, **style)
    labels = ("cross entropy, smoothed, training", "accuracy (%), test")
    for one, label in zip(axes, labels, strict=True):
        one.set_xlabel("epoch")
        one.xaxis.set_major_locator(MaxNLocator(integer=True))
        one.set_ylabel(label)
        one.grid(alpha=0.3)
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=110)
