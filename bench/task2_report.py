"""What `bench/task2.py report` writes: comparisons, costs, latency, tables, curves."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from finished_runs import Run, read_runs
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from small_images import BATCH, SMOOTHING, WEIGHT_DECAY
from task2_arms import ARMS, BAR, OWN, build
from timing import Clock, ratios, spread
from torch import nn

from timm_varchan import RGB
from timm_varchan.complexity import count_complexity
from timm_varchan.evaluation import METRICS, classification_metrics, paired_difference

#: Costs are counted at these sizes too, in pixels.
OTHER_SIZES = (64, 224)


def compare(own: Run, reference: Run, seed: int = 0) -> dict[str, Any]:
    """The paired difference to a reference in points, and the ratio of accuracies by bootstrap."""
    a, b = own.correct("RGB"), reference.correct("RGB")
    paired = paired_difference(a, b)
    generator = np.random.default_rng(seed)
    counts = np.array([(a & b).sum(), (a & ~b).sum(), (~a & b).sum(), (~a & ~b).sum()])
    draws = generator.multinomial(counts.sum(), counts / counts.sum(), 10_000)
    ratio = 100 * (draws[:, 0] + draws[:, 1]) / (draws[:, 0] + draws[:, 2])
    low, high = np.quantile(ratio, (0.025, 0.975))
    return {
        "difference": {"value": 100 * paired.difference, "low": 100 * paired.low,
                       "high": 100 * paired.high, "p": paired.p},
        "ratio": {"value": 100 * a.mean() / b.mean(), "low": low, "high": high},
    }  # fmt: skip


@torch.inference_mode()
def latency(
    models: Mapping[str, nn.Module], img_size: int, batch: int, rounds: int
) -> dict[str, Any]:
    """Time of a forward pass of each model, interleaved, and its ratio to the first one's."""
    x = torch.randn(batch, 3, img_size, img_size).contiguous(memory_format=torch.channels_last)
    clock = Clock(x.device)
    steps: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 3):
        for name, model in models.items():
            seconds = clock(lambda model=model: model(x))
            if number >= 3:  # the first ones warm up
                steps[name].append(seconds)
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
            entry["seeds"][str(seed)]["compared"] = compare(one, reference[seed])
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
        "machine": f"{platform.machine()}, torch {torch.__version__}, {args.machine}",
        "reference": args.reference,
        "arms": arms,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(summary, indent=1) + "\n")
    table = markdown(summary)
    args.json.with_suffix(".md").write_text(table)
    draw_curves(runs, args.json.with_suffix(".png"))
    print(table)


def _with_interval(estimate: Mapping[str, float], digits: int = 1) -> str:
    value, low, high = (f"{estimate[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def markdown(summary: Mapping[str, Any]) -> str:
    """The tables, in per cent with 95 % intervals over the choice of test images."""
    size, reference = str(summary["settings"]["img_size"]), summary["reference"]
    header = ("network", "params (M)", f"multi-adds at {size} px (M)", "fwd/bwd size (MB)", "lr",
              *METRICS, f"minus {reference} (points)", f"of {reference} (%)",
              f"time / {reference}, batches of 1, 32")  # fmt: skip
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name, arm in summary["arms"].items():
        cost = arm["complexity"][size]
        for one in arm["seeds"].values():
            cells = [name, f"{cost['params'] / 1e6:.2f}", f"{cost['macs'] / 1e6:.1f}",
                     f"{cost['forward_backward_mb']:.2f}", f"{one['lr']:g}"]  # fmt: skip
            cells += [_with_interval(one["sets"]["RGB"][metric]) for metric in METRICS]
            against = one.get("compared")
            if against:
                difference = against["difference"]
                cells += [
                    f"{_with_interval(difference)}, p = {difference['p']:.2g}",
                    _with_interval(against["ratio"], 0),
                    ", ".join(f"{t['ratio']['median']:.2f}" for t in arm["latency"].values()),
                ]
            cells += [""] * (len(header) - len(cells))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


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
        one.set_ylabel(label)
        one.grid(alpha=0.3)
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=110)
