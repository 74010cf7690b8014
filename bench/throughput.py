"""Images a second of hf_train.py's loop with a twin, against the plainest loop with timm's model.

Both train the same architecture on the same images with the same augmentation, batch, optimizer
and schedule-free learning rate, in turns in one process; of every turn the epochs after the first
count. The plain loop is what a tutorial shows: no channel sets, checks, log or checkpoints.

    python bench/throughput.py --output bench/results/0.1.0/throughput.json

The ratio is taken epoch by epoch, with the exact 95 % interval of its median.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
import time
from pathlib import Path

import timm
import timm.optim
import torch
import torch.nn.functional as F
from arms_cli import machine, write_report
from tables import throughput_table
from timing import spread
from torch.utils.data import DataLoader

from timm_varchan.data import TransformedSplit, cached, load_data, train_transform
from timm_varchan.training import TrainConfig, run


def plain(config: TrainConfig, arch: str) -> list[float]:
    """Images a second of every epoch after the first, of the plainest loop."""
    data = load_data(config.dataset, channels=config.channels, limit=config.limit,
                     img_size=config.img_size)  # fmt: skip
    assert data.train is not None
    split = TransformedSplit(
        cached(data.train), train_transform(config.pixels, data.channels), config.seed
    )
    loader = DataLoader(
        split, config.batch_size, shuffle=True, drop_last=True, num_workers=config.workers,
        persistent_workers=config.workers > 0, pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = timm.create_model(arch, num_classes=len(data.class_names)).to(device)
    optimizer = timm.optim.create_optimizer_v2(model, config.opt, config.lr, config.weight_decay)
    speeds = []
    for epoch in range(config.epochs):
        split.set_epoch(epoch)
        model.train()
        started, images = time.perf_counter(), 0
        for x, labels in loader:
            x, labels = x.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            loss = F.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            images += len(labels)
        loss.item()
        speeds.append(images / (time.perf_counter() - started))
    return speeds[1:]


def ours(config: TrainConfig) -> list[float]:
    """The same of hf_train.py's loop."""
    with tempfile.TemporaryDirectory() as folder:
        outcome = run(dataclasses.replace(config, output_dir=folder))
    return [entry["images_per_second"] for entry in outcome.results["training"]["history"][1:]]


def main() -> None:
    """Measure in turns and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="densenet121")
    parser.add_argument("--img-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--limit", type=int, default=320, help="training images")
    parser.add_argument("--epochs", type=int, default=3, help="of a turn; the first warms up")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--machine", default=f"{os.cpu_count()} CPU cores", help="in words")
    parser.add_argument("--output", type=Path, required=True, help="file; the table beside it")
    args = parser.parse_args()
    config = TrainConfig(
        channels="RGB", img_size=args.img_size, batch_size=args.batch_size, limit=args.limit,
        epochs=args.epochs, workers=args.workers, cache=True, model=f"dwg_{args.arch}",
        sched="none", warmup_epochs=0, val_max_sets=1, eval_orders=("in order",), eval_max_sets=3,
    )  # fmt: skip
    loops = {
        f"plain loop, {args.arch}": lambda: plain(config, args.arch),
        f"hf_train.py, {args.arch}": lambda: ours(
            dataclasses.replace(config, model=args.arch, channel_aug="none")
        ),
        f"hf_train.py, dwg_{args.arch}, channels as they are": lambda: ours(
            dataclasses.replace(config, channel_aug="none")
        ),
        f"hf_train.py, dwg_{args.arch}, a set an image": lambda: ours(config),
    }
    speeds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(args.rounds):
        for name, loop in loops.items():
            speeds[name] += loop()
            print(f"round {number + 1}: {name}: {speeds[name][-1]:.1f} images/s", flush=True)
    plain_speeds = next(iter(speeds.values()))
    loops_found = {
        name: {"epochs": own, "images_per_second": spread(own),
               "of_plain": spread([a / b for a, b in zip(own, plain_speeds, strict=True)])}
        for name, own in speeds.items()
    }  # fmt: skip
    summary = {
        "settings": {k: v for k, v in vars(args).items() if k not in ("output", "machine")},
        "machine": machine(args),
        "loops": loops_found,
    }
    write_report(args.output, summary, throughput_table(summary))


if __name__ == "__main__":
    main()
