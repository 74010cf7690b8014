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

import numpy as np
import torch
from arms_cli import add_report_arguments, add_run_arguments, unfinished
from finished_runs import write_run
from small_images import BATCH, Images, fit
from task1_arms import ARMS, LR, WARMUP_EPOCHS, Arm, build
from task1_report import report
from torch import Tensor, nn

import timm_varchan
from timm_varchan import RGB, ChannelSet
from timm_varchan.evaluation import ORDERS, SetView, predict_channel_sets
from timm_varchan.training import DrawKey, draw_channels


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
        view = draw_channels(
            arm.aug, x[:, planes], channels, DrawKey(seed, epoch, step), identity=arm.identity
        )
        view.tell(model)
        return view.planes

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
    kinds: dict[str, dict[tuple[tuple[int, ...], str], dict[str, Tensor]]] = {"running": {}}
    if arm.stem is not None:
        kinds["estimated"] = {
            (view.indices, view.mode): timm_varchan.channel_statistics(
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
