r"""Task II: networks of a few layers against a ResNet34, all from scratch.

Trains timm's ResNet34, the RRDB family and variants of it (`ARMS`) on the same data with the same
budget and recipe. ResNet34 and `rrdb_rnn_small` each get their own learning rate from a small
search on training images that are set aside for it; variants take that of `rrdb_rnn_small`.
Each run is written to `--output` as soon as it is finished and is not repeated.

    python bench/task2.py run --data DIR --output runs/task2
    python bench/task2.py report --output runs/task2 --json bench/results/task2.json

Variants are compared with each other by shorter runs; `search-*.json` may be copied:

    python bench/task2.py run --data DIR --output runs/task2_short --epochs 4 \
        --arms rrdb_rnn_small no-recurrence attention graph
    python bench/task2.py report --output runs/task2_short --reference rrdb_rnn_small \
        --json bench/results/task2_short.json

Weights for the package:

    python bench/task2.py weights --data DIR --output runs/task2 --arm rrdb_rnn_small \
        --folder timm_varchan/weights

`--data` is a folder with `train.parquet` and `validation.parquet` (columns `image`, `label`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from finished_runs import Run, read_runs, run_path, write_run
from fronts import FRONTS
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file, save_model
from small_images import BATCH, SMOOTHING, WEIGHT_DECAY, Images, class_names, fit, load
from timing import Clock, ratios, spread
from torch import Tensor, nn

import timm_varchan
from timm_varchan import RGB
from timm_varchan.complexity import count_complexity
from timm_varchan.evaluation import (
    METRICS,
    SetView,
    classification_metrics,
    paired_difference,
    predict_channel_sets,
    wilson_interval,
)
from timm_varchan.training import DrawKey, draw_channels

BAR, OWN, TWIN = "resnet34", "rrdb_rnn_small", "dwg_rrdb_rnn_small"


@dataclass(frozen=True)
class Arm:
    """One network.

    Args:
        architecture: timm's name.
        options: Of the architecture.
        front: Key of `FRONTS`, to stand in the recurrence's place.
        search: Whether it has a learning rate of its own; if not it takes that of `OWN`.
        aug: Key of `CHANNEL_AUGS`: what training does to the channels.
    """

    architecture: str
    options: Mapping[str, Any] = field(default_factory=dict)
    front: str | None = None
    search: bool = False
    aug: str = "none"


ARMS = {
    BAR: Arm(BAR, search=True),
    OWN: Arm(OWN, search=True),
    "rrdb_small": Arm("rrdb_small"),
    "no-recurrence": Arm(OWN, {"steps": 0}),
    TWIN: Arm(TWIN, aug="hcs-sample"),
    "attention": Arm(OWN, {"steps": 0}, front="attention"),
    "graph": Arm(OWN, {"steps": 0}, front="graph"),
    "1-step": Arm(OWN, {"steps": 1}),
    "no-gates": Arm(OWN, {"gating": "none"}),
    "one-gate": Arm(OWN, {"gating": "minimal"}),
    "6-steps": Arm(OWN, {"steps": 6}),
    "rrdb_rnn_base": Arm("rrdb_rnn_base"),
}
#: The search starts in the middle and goes on while an end of what was tried is the best.
LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
#: Of each class, for the search to be judged on; the final runs train on them too.
NUM_ASIDE = 40
#: At most so many test images for the curves; the results are of all.
MAX_CURVE = 1000
#: Costs are counted at these sizes too, in pixels.
OTHER_SIZES = (64, 224)


def build(arm: Arm, num_classes: int) -> nn.Module:
    """The arm's network, from random weights."""
    model = timm.create_model(arm.architecture, num_classes=num_classes, **arm.options)
    if arm.front is not None:
        model.recurrence = FRONTS[arm.front](model.stem.conv.out_channels)
    return model.to(memory_format=torch.channels_last)


def predict(model: nn.Module, data: Images, views: list[SetView]) -> dict[str, np.ndarray]:
    """Predicted classes by channel set."""
    predicted, _ = predict_channel_sets(model, data.batches(500), views)
    return {str(v.channel_set): p for v, p in zip(views, predicted.T, strict=True)}


def test_views(arm: Arm, seed: int) -> list[SetView]:
    """RGB; for a twin every subset of it, with the channels named."""
    if not arm.architecture.startswith("dwg_"):
        return [SetView(RGB, (0, 1, 2), "mask", "in order", seed)]
    subsets = [RGB.index(subset) for subset in RGB.subsets()]
    return [SetView(RGB, indices, "named", "in order", seed) for indices in subsets]


def train(
    arm: Arm, data: Images, held_out: Images, args: argparse.Namespace, *, lr: float, epochs: int,
    seed: int,
) -> tuple[nn.Module, list[dict[str, float]]]:  # fmt: skip
    """Train one arm; the model, and by epoch the loss and the accuracies."""
    torch.manual_seed(seed)
    model = build(arm, args.num_classes)
    view = test_views(arm, seed)[0]
    every = -(-len(held_out.y) // MAX_CURVE)
    few = Images(held_out.x[::every], held_out.y[::every])
    labels = few.y.numpy()

    def prepare(x: Tensor, epoch: int, step: int) -> Tensor:
        key = DrawKey(seed, epoch, step)
        x, told = draw_channels(arm.aug, x, RGB, key, identity="named")
        if arm.architecture.startswith("dwg_"):
            timm_varchan.set_channels(model, told)
        return x

    def evaluate() -> float:
        return 100 * float((predict(model, few, [view])["RGB"] == labels).mean())

    history = fit(
        model, data, lr=lr, epochs=epochs, warmup_epochs=epochs / 10, seed=seed, prepare=prepare,
        evaluate=evaluate, bfloat16=args.bfloat16,
    )  # fmt: skip
    return model, history


def next_rate(tried: Mapping[float, float]) -> float | None:
    """The learning rate to try next: beside the best one, if that is at an end of those tried."""
    if not tried:
        return LEARNING_RATES[len(LEARNING_RATES) // 2]
    best = LEARNING_RATES.index(max(tried, key=lambda lr: tried[lr]))
    beside = [i for i in (best - 1, best + 1) if 0 <= i < len(LEARNING_RATES)]
    return next((LEARNING_RATES[i] for i in beside if LEARNING_RATES[i] not in tried), None)


def search(name: str, images: Images, args: argparse.Namespace) -> dict[float, float]:
    """Accuracy by learning rate after a short training, on training images set aside."""
    file = args.output / f"search-{name}.json"
    tried: dict[float, float] = {}
    if file.exists():
        tried = {float(lr): value for lr, value in json.loads(file.read_text()).items()}
    aside, others = images.split(NUM_ASIDE)
    while (lr := next_rate(tried)) is not None:
        print(f"{name}: trying learning rate {lr:g}", flush=True)
        _, history = train(
            ARMS[name], others, aside, args, lr=lr, epochs=args.search_epochs, seed=0
        )
        tried[lr] = history[-1]["test_accuracy"]
        file.write_text(json.dumps(tried) + "\n")
    return tried


def run(args: argparse.Namespace) -> None:
    """Train and test every arm and seed that has no result yet."""
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    data = None
    for seed in args.seeds:
        for name in args.arms:
            target = run_path(args.output, name, seed)
            if target.exists():
                continue
            arm = ARMS[name]
            data = data or load(args.data, args.num_classes, args.img_size)
            images, held_out = data
            source = args.rate_of or (name if arm.search else OWN)
            tried = search(source, images, args)
            lr = max(tried, key=lambda lr: tried[lr])
            print(f"{name}, seed {seed}, learning rate {lr:g}: {len(images.y)} training images")
            start, busy = time.perf_counter(), time.process_time()
            model, history = train(
                arm, images, held_out, args, lr=lr, epochs=args.epochs, seed=seed
            )
            details = {"lr": lr, "lr_of": source, "tried": tried,
                       "seconds": time.perf_counter() - start,
                       "cpu_seconds": time.process_time() - busy}  # fmt: skip
            results = predict(model, held_out, test_views(arm, seed))
            labels = held_out.y.numpy()
            for key, predicted in results.items():
                print(f"  {key}: {100 * (predicted == labels).mean():.1f}", flush=True)
            keys = ("num_classes", "img_size", "epochs", "search_epochs", "bfloat16")
            meta = {key: getattr(args, key) for key in keys}
            meta |= {"training_images": len(images.y), "test_images": len(labels)}
            save_model(model, str(target.with_suffix(".safetensors")))
            write_run(target, meta=meta, history=history, labels=labels, predictions=results,
                      details=details)  # fmt: skip


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
        | {"batch_size": BATCH, "weight_decay": WEIGHT_DECAY, "smoothing": SMOOTHING,
           "learning_rates": LEARNING_RATES, "aside_for_search": NUM_ASIDE},
        "machine": f"{platform.machine()}, torch {torch.__version__}, {args.machine}",
        "reference": args.reference,
        "arms": arms,
    }  # fmt: skip
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


def weights(args: argparse.Namespace) -> None:
    """Write the weights of an arm in half precision, and the note that describes them."""
    one = read_runs(args.output, ARMS)[args.arm][0]
    settings, arm = json.loads(one.meta), ARMS[args.arm]
    model = build(arm, settings["num_classes"]).eval()
    state = load_file(run_path(args.output, args.arm, 0).with_suffix(".safetensors"))
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    model.load_state_dict(half)
    size = settings["img_size"]
    images = load(args.data, settings["num_classes"], size)[1]
    # behind the training images that were set aside: the validation split
    validation = Images(*(v[settings["num_classes"] * 100 :] for v in (images.x, images.y)))
    labels = validation.y.numpy()
    results = {}
    for key, predicted in predict(model, validation, test_views(arm, 0)).items():
        low, high = wilson_interval(int((predicted == labels).sum()), len(labels))
        value = float((predicted == labels).mean())
        results[key] = {"value": 100 * value, "low": 100 * low, "high": 100 * high}
    reduced = size // model.feature_info[-1]["reduction"]
    note = {
        "tag": f"tin{settings['num_classes']}_{size}",
        "pretrained_cfg": {
            "num_classes": settings["num_classes"], "input_size": [3, size, size],
            "pool_size": [reduced, reduced], "crop_pct": 1.0, "interpolation": "bilinear",
            "mean": RGB.mean, "std": RGB.std, "license": "other",
            "label_names": class_names(args.data)[: settings["num_classes"]],
        },
        "data": f"{settings['training_images']} images of {settings['num_classes']} classes of "
                f"Tiny-ImageNet-200, reduced to {size} px; {settings['epochs']} epochs",
        "licence": "for research, as the images of ImageNet",
        "num_validation_images": len(labels),
        "results": results,
    }  # fmt: skip
    args.folder.mkdir(parents=True, exist_ok=True)
    save_file(half, args.folder / f"{arm.architecture}.safetensors")
    (args.folder / f"{arm.architecture}.json").write_text(json.dumps(note, indent=1) + "\n")
    print(json.dumps(results, indent=1))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run", help="search learning rates, train and test")
    runs.add_argument("--data", type=Path, required=True, help="folder with the Parquet files")
    runs.add_argument("--output", type=Path, required=True, help="folder for the runs' results")
    runs.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    runs.add_argument("--seeds", nargs="+", type=int, default=[0])
    runs.add_argument("--epochs", type=int, default=8)
    runs.add_argument("--search-epochs", type=int, default=2)
    runs.add_argument("--rate-of", choices=[BAR, OWN],
                      help="take its learning rate instead of an own search")  # fmt: skip
    runs.add_argument("--num-classes", type=int, default=25)
    runs.add_argument("--img-size", type=int, default=32)
    runs.add_argument("--bfloat16", action=argparse.BooleanOptionalAction, default=True,
                      help="train with autocast")  # fmt: skip
    runs.add_argument("--threads", type=int, default=1)
    runs.set_defaults(func=run)
    reports = commands.add_parser("report", help="tables of all finished runs")
    reports.add_argument("--output", type=Path, required=True, help="folder of the runs' results")
    reports.add_argument(
        "--json", type=Path, required=True, help="file; tables and curves beside it"
    )
    reports.add_argument("--reference", choices=list(ARMS), default=BAR, help="to compare with")
    reports.add_argument("--rounds", type=int, default=30, help="timed steps of each network")
    reports.add_argument("--machine", default=f"{os.cpu_count()} CPU cores", help="in words")
    reports.set_defaults(func=report)
    ship = commands.add_parser("weights", help="weights of a finished run, for the package")
    ship.add_argument("--data", type=Path, required=True, help="folder with the Parquet files")
    ship.add_argument("--output", type=Path, required=True, help="folder of the runs' results")
    ship.add_argument("--arm", choices=[OWN, TWIN], required=True)
    ship.add_argument("--folder", type=Path, required=True, help="timm_varchan/weights")
    ship.set_defaults(func=weights)
    args = parser.parse_args()
    args.func(args)


if __name__ == "__main__":
    main()
