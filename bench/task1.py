"""Task I: one model for every channel set against experts for one, and what BatchNorm does to it.

Trains the same small BatchNorm network with the same budget in each of several ways (`ARMS`): as an
expert for one channel set, and with every stem of timm_varchan under every augmentation of the
channels. Then tests each on every subset of RGB: with the channels named and anonymous, in order
and shuffled, with BatchNorm's running statistics and with statistics estimated anew for the set.
Each run is written to `--output` as soon as it is finished and is not repeated.

    python bench/task1.py run --data DIR --output runs/task1 --arms expert-RGB dwg-hcs-sample
    python bench/task1.py report --output runs/task1 --json bench/results/task1.json

`--data` is a folder with `train.parquet` and `validation.parquet` (columns `image`, `label`).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
from arms_cli import add_report_arguments, add_run_arguments, machine, unfinished, write_report
from finished_runs import Run, read_runs, write_run
from small_images import BATCH, SMOOTHING, WEIGHT_DECAY, Images, fit, interval
from tables import table
from torch import Tensor, nn

import timm_varchan
from timm_varchan import RGB, ChannelSet
from timm_varchan.evaluation import (
    METRICS,
    ORDERS,
    SetView,
    classification_metrics,
    predict_channel_sets,
)
from timm_varchan.stems import MIXERS
from timm_varchan.training import CHANNEL_AUGS, DrawKey, draw_channels

#: A resnet10t a quarter as wide as timm's: the smallest BatchNorm network that shows the effect.
ARCHITECTURE, WIDTHS = "resnet10t", {"channels": (32, 64, 128, 256), "stem_width": 16}
WARMUP_EPOCHS, LR = 2, 2e-3
TEST_SETS = tuple(map(str, RGB.subsets()))
SINGLES = ("R", "G", "B")


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        stem: Key of `MIXERS`; None for a plain timm model.
        channels: The channels that it is made for.
        aug: Key of `CHANNEL_AUGS`: what training does to the channels.
        identity: Whether training tells the model which channels it sees.
    """

    stem: str | None
    channels: str = "RGB"
    aug: str = "none"
    identity: str = "named"

    @property
    def modes(self) -> tuple[str, ...]:
        """In which modes it is tested."""
        if self.stem is None:
            return ("mask",)
        if not MIXERS[self.stem].supports_anonymous:
            return ("named",)
        told_names = self.identity == "named" and self.aug != "shuffle"
        return ("named", "anonymous") if told_names else ("anonymous",)

    @property
    def test_sets(self) -> list[ChannelSet]:
        """On which subsets of its channels it is tested."""
        channels = ChannelSet.parse(self.channels)
        any_count = self.stem is None or MIXERS[self.stem].any_count
        return channels.subsets() if any_count else [channels]


def stem_augs(stem: str) -> tuple[str, ...]:
    """What training can do to the channels of a model with this stem."""
    if not MIXERS[stem].any_count:
        return ("none",)
    needs_names = not MIXERS[stem].supports_anonymous
    return tuple(aug for aug in CHANNEL_AUGS if not (needs_names and aug == "shuffle"))


ARMS = (
    {f"expert-{name}": Arm(None, name) for name in TEST_SETS}
    | {f"plain-{aug}": Arm(None, aug=aug) for aug in ("shuffle", "hcs-mask")}
    | {f"{stem}-{aug}": Arm(stem, aug=aug) for stem in MIXERS for aug in stem_augs(stem)}
    | {
        f"{stem}-{aug}-anonymous": Arm(stem, aug=aug, identity="anonymous")
        for stem, mixer in MIXERS.items() if mixer.supports_anonymous for aug in stem_augs(stem)
    }
)  # fmt: skip


def build(arm: Arm, num_classes: int) -> nn.Module:
    """The arm's network, from random weights."""
    in_chans = len(ChannelSet.parse(arm.channels))
    model = timm.create_model(ARCHITECTURE, num_classes=num_classes, in_chans=in_chans, **WIDTHS)
    if arm.stem is not None:
        model = timm_varchan.adapt(model, arm.stem)
    return model.to(memory_format=torch.channels_last)


def train(
    arm: Arm, data: Images, held_out: Images, num_classes: int, epochs: int, seed: int
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Train one arm; the model, and by epoch the loss and the accuracies on all its channels."""
    torch.manual_seed(seed)
    model = build(arm, num_classes)
    channels = ChannelSet.parse(arm.channels)
    planes = list(RGB.index(channels))
    view = SetView(channels, tuple(range(len(channels))), arm.modes[0], "in order", seed)

    def prepare(x: Tensor, epoch: int, step: int) -> Tensor:
        x, told = draw_channels(
            arm.aug, x[:, planes], channels, DrawKey(seed, epoch, step), identity=arm.identity
        )
        if arm.stem is not None:
            timm_varchan.set_channels(model, told)
        return x

    def evaluate() -> float:
        predicted, references = predict_channel_sets(
            model, ((x[:, planes], y) for x, y in held_out.batches(500)), [view]
        )
        return 100 * float((predicted[:, 0] == references).mean())

    history = fit(
        model, data, lr=LR, epochs=epochs, warmup_epochs=WARMUP_EPOCHS, seed=seed,
        prepare=prepare, evaluate=evaluate,
    )  # fmt: skip
    return model, history


def test(
    model: nn.Module, arm: Arm, data: Images, calibration: Images, seed: int
) -> dict[str, np.ndarray]:
    """Predicted classes by `set|mode|order|statistics`."""
    channels = ChannelSet.parse(arm.channels)
    planes = list(RGB.index(channels))
    views = [
        SetView(channels, indices, mode, order, seed)
        for indices in map(channels.index, arm.test_sets)
        for mode in arm.modes for order in ORDERS
        if mode != "named" or order == "in order"  # names move with their planes
    ]  # fmt: skip
    kinds: dict[str, dict[tuple[str, str], dict[str, Tensor]]] = {"running": {}}
    if arm.stem is not None:
        kinds["estimated"] = {
            (str(view.channel_set), view.mode): timm_varchan.channel_statistics(
                model, (x[:, planes][:, list(view.indices)] for x, _ in calibration.batches(BATCH)),
                "anonymous" if view.mode == "anonymous" else view.channel_set,
            )
            for view in views if view.order == "in order"
        }  # fmt: skip
    results = {}
    for kind, statistics in kinds.items():
        loader = ((x[:, planes], y) for x, y in data.batches(500))
        predictions, _ = predict_channel_sets(model, loader, views, statistics=statistics)
        for view, predicted in zip(views, predictions.T, strict=True):
            key = "|".join((str(view.channel_set), view.mode, view.order, kind))
            results[key] = predicted
    return results


def run(args: argparse.Namespace) -> None:
    """Train and test every arm and seed that has no result yet."""
    for name, seed, target, images, held_out in unfinished(args):
        print(f"{name}, seed {seed}: {len(images.y)} training, {len(held_out.y)} test images")
        model, history = train(ARMS[name], images, held_out, args.num_classes, args.epochs, seed)
        few = torch.randperm(len(images.y), generator=torch.Generator().manual_seed(seed))
        calibration = Images(images.x[few[:2560]], images.y[few[:2560]])
        results = test(model, ARMS[name], held_out, calibration, seed)
        meta = {k: getattr(args, k) for k in ("num_classes", "img_size", "epochs")}
        meta |= {"training_images": len(images.y), "test_images": len(held_out.y)}
        write_run(
            target, meta=meta, history=history, labels=held_out.y.numpy(), predictions=results
        )


def gap(own: dict[int, Run], runs: dict[str, dict[int, Run]], sets: tuple[str, ...],
        condition: str) -> dict[str, object] | None:  # fmt: skip
    """Mean loss to the experts over some sets, in points, on the same images and seeds."""
    experts = [runs.get(f"expert-{name}", {}) for name in sets]
    seeds = sorted(set(own).intersection(*experts))
    if not seeds:
        return None
    differences = [
        expert[seed].correct(f"{name}|mask|in order|running").astype(float)
        - own[seed].correct(f"{name}|{condition}")
        for name, expert in zip(sets, experts, strict=True) for seed in seeds
    ]  # fmt: skip
    by_seed = np.array(differences).reshape(len(sets), len(seeds), -1).mean((0, 2))
    return interval(np.mean(differences, axis=0)) | {
        "seeds": seeds, "by_seed": (100 * by_seed).tolist()
    }  # fmt: skip


def summarise(
    arm: dict[int, Run], runs: dict[str, dict[int, Run]], num_classes: int
) -> list[dict[str, Any]]:
    """A row for each mode, order and kind of statistics of one arm."""
    conditions = {key.partition("|")[2] for key in next(iter(arm.values())).predictions}
    rows = []
    for condition in sorted(conditions, key=lambda c: [c.split("|")[i] for i in (0, 2, 1)][::-1]):
        mode, order, statistics = condition.split("|")
        sets: dict[str, object] = {}
        for name in TEST_SETS:
            key = f"{name}|{condition}"
            present = [one for one in arm.values() if key in one.predictions]
            if not present:
                continue
            metrics = [
                classification_metrics(one.predictions[key], one.labels, num_classes, seed=0)
                for one in present
            ]
            sets[name] = {
                "accuracy": interval(np.mean([one.correct(key) for one in present], axis=0)),
                "accuracy_by_seed": [100 * m["accuracy"].value for m in metrics],
                **{
                    m: 100 * float(np.mean([one[m].value for one in metrics]))
                    for m in METRICS
                    if m != "accuracy"
                },
            }
        row: dict[str, Any] = {"mode": mode, "order": order, "statistics": statistics, "sets": sets}
        if len(sets) == len(TEST_SETS):
            row["loss_rgb"] = gap(arm, runs, ("RGB",), condition)
            row["loss_singles"] = gap(arm, runs, SINGLES, condition)
        rows.append(row)
    return rows


def report(args: argparse.Namespace) -> None:
    """Write accuracies and paired gaps of all finished runs as JSON and print the table."""
    runs = read_runs(args.output, ARMS)
    settings = json.loads(next(iter(next(iter(runs.values())).values())).meta)
    arms = {
        name: {
            "seeds": sorted(arm),
            "results": summarise(arm, runs, settings["num_classes"]),
            "history": {str(seed): one.history for seed, one in arm.items()},
        }
        for name, arm in runs.items()
    }
    summary = {
        "settings": settings
        | {"architecture": ARCHITECTURE, **WIDTHS, "batch_size": BATCH, "lr": LR,
           "warmup_epochs": WARMUP_EPOCHS, "weight_decay": WEIGHT_DECAY, "smoothing": SMOOTHING},
        "machine": machine(args),
        "arms": arms,
    }  # fmt: skip
    write_report(args.json, summary, markdown(arms))


def markdown(arms: dict[str, dict[str, Any]]) -> str:
    """The table of all arms, in per cent, losses in points with 95 % intervals."""
    header = ("trained as", "seeds", "tested", "statistics", *TEST_SETS, "loss on RGB",
              "mean loss on R, G, B")  # fmt: skip
    rows = []
    for name, arm in arms.items():
        for row in arm["results"]:
            sets = row["sets"]
            cells = [f"{sets[s]['accuracy']['mean']:.1f}" if s in sets else "" for s in TEST_SETS]
            cells += [
                f"{g['mean']:.1f} ({g['low']:.1f} to {g['high']:.1f})" if g else ""
                for g in (row.get("loss_rgb"), row.get("loss_singles"))
            ]
            tested = f"{row['mode']}, {row['order']}"
            rows.append((name, len(arm["seeds"]), tested, row["statistics"], *cells))
    return table(header, rows)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run", help="train and test")
    add_run_arguments(runs, ARMS, epochs=30)
    runs.set_defaults(func=run)
    reports = commands.add_parser("report", help="tables of all finished runs")
    add_report_arguments(reports)
    reports.set_defaults(func=report)
    args = parser.parse_args()
    args.func(args)


if __name__ == "__main__":
    main()
