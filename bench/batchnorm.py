"""BatchNorm under channel sampling: what a model for every channel set loses to experts for one.

Trains the same small BatchNorm network, with the same budget, as an expert for one channel set, as
a DWG twin under channel sampling, and as a zero-filled model under the same sampling; then tests
each on every subset of RGB, with the running statistics and with statistics estimated anew for the
set. Each run is written to `--output` as soon as it is finished and is not repeated.

    python bench/batchnorm.py run --data DIR --output runs/batchnorm --arms expert-RGB dwg-sample
    python bench/batchnorm.py report --output runs/batchnorm --json bench/results/batchnorm.json

`--data` is a folder with `train.parquet` and `validation.parquet` (columns `image`, `label`).
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import timm
import timm.optim
import torch
import torch.nn.functional as F
from PIL import Image
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

import timm_varchan
from timm_varchan import RGB, ChannelSet
from timm_varchan.channels import seeded_rng

#: A resnet10t a quarter as wide as timm's: the smallest BatchNorm network that shows the effect.
ARCHITECTURE, WIDTHS = "resnet10t", {"channels": (32, 64, 128, 256), "stem_width": 16}
BATCH, WARMUP_EPOCHS, LR, WEIGHT_DECAY, SMOOTHING = 128, 2, 2e-3, 0.05, 0.1
TEST_SETS = RGB.subsets()


@dataclass(frozen=True)
class Arm:
    """One way to train: which stem, which channel sets it sees, drawn for a step or a sample."""

    stem: str | None
    channels: str = "RGB"
    draw: str = "none"
    identity: str = "named"


ARMS = {f"expert-{s}": Arm(None, str(s)) for s in TEST_SETS} | {
    "zero-step": Arm("zero_fill", draw="step"),
    "zero-sample": Arm("zero_fill", draw="sample"),
    "prior-sample": Arm("prior", draw="sample"),
    "dwg-step": Arm("dwg", draw="step"),
    "dwg-sample": Arm("dwg", draw="sample"),
    "dwg-step-anonymous": Arm("dwg", draw="step", identity="anonymous"),
    "dwg-sample-anonymous": Arm("dwg", draw="sample", identity="anonymous"),
    "dwg-none": Arm("dwg"),
    "dwg-none-anonymous": Arm("dwg", identity="anonymous"),
}


@dataclass(frozen=True)
class Images:
    """Decoded images `(N, 3, H, W)` in uint8 and their labels `(N,)`."""

    x: Tensor
    y: Tensor

    def batches(self, size: int, order: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Scaled and normalised batches, in this order."""
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (RGB.mean, RGB.std))
        order = torch.arange(len(self.y)) if order is None else order
        for rows in order.split(size):
            yield (self.x[rows].float() / 255 - mean) / std, self.y[rows]


def load(folder: Path, num_classes: int, img_size: int) -> tuple[Images, Images]:
    """Training images, and test images: 100 training images a class set aside, and validation."""
    files = {
        "train": str(folder / "train.parquet"),
        "validation": str(folder / "validation.parquet"),
    }
    data = datasets.load_dataset("parquet", data_files=files)
    splits = {}
    for name, split in data.items():
        split = split.cast_column("image", datasets.Image(decode=False))
        labels = np.array(split["label"])
        keep = np.flatnonzero(labels < num_classes)
        x = np.empty((len(keep), 3, img_size, img_size), np.uint8)
        for row, record in enumerate(split.select(keep)["image"]):
            image = Image.open(io.BytesIO(record["bytes"])).convert("RGB")
            image = image.resize((img_size, img_size), Image.Resampling.BOX)
            x[row] = np.asarray(image).transpose(2, 0, 1)
        splits[name] = Images(torch.from_numpy(x), torch.from_numpy(labels[keep]))
    train, validation = splits["train"], splits["validation"]
    rank = torch.empty_like(train.y)
    for label in range(num_classes):
        rows = (train.y == label).nonzero()[:, 0]
        rank[rows] = torch.arange(len(rows))
    aside = rank < 100
    test = Images(
        torch.cat([train.x[aside], validation.x]), torch.cat([train.y[aside], validation.y])
    )
    return Images(train.x[~aside], train.y[~aside]), test


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random flip and shift by up to an eighth, one draw an image."""
    B, _, H, W = x.shape
    flip = torch.rand(B, generator=generator) < 0.5
    x = torch.where(flip.view(B, 1, 1, 1), x.flip(-1), x)
    pad = H // 8
    padded = F.pad(x, (pad,) * 4)
    top, left = (torch.randint(2 * pad + 1, (2, B), generator=generator)).unbind()
    rows = (top[:, None] + torch.arange(H)).view(B, 1, H, 1)
    columns = (left[:, None] + torch.arange(W)).view(B, 1, 1, W)
    return padded[
        torch.arange(B).view(B, 1, 1, 1), torch.arange(x.shape[1]).view(1, -1, 1, 1), rows, columns
    ]


def draw_channels(model: nn.Module, x: Tensor, arm: Arm, key: tuple[int, ...]) -> Tensor:
    """Take channels of a training batch by the arm's way of sampling, and tell the model."""
    source = RGB.without_identity() if arm.identity == "anonymous" else RGB
    if arm.draw == "none":
        if arm.stem is not None:
            timm_varchan.set_channels(model, source)
        return x[:, list(RGB.index(arm.channels))]
    if arm.draw == "step":
        indices = RGB.sample_indices(seeded_rng(*key))
        timm_varchan.set_channels(model, source.take(indices))
        return x[:, list(indices)]
    rng = seeded_rng(*key)
    drawn = [RGB.sample_indices(rng) for _ in range(len(x))]
    timm_varchan.set_channels(model, tuple(source.take(indices) for indices in drawn))
    width = max(len(indices) for indices in drawn)
    padded = torch.tensor([(*indices, *(0,) * (width - len(indices))) for indices in drawn])
    return x[torch.arange(len(x))[:, None], padded]


def build(arm: Arm, num_classes: int) -> nn.Module:
    """The arm's network, from random weights."""
    in_chans = len(ChannelSet.parse(arm.channels))
    model = timm.create_model(ARCHITECTURE, num_classes=num_classes, in_chans=in_chans, **WIDTHS)
    if arm.stem is not None:
        model = timm_varchan.adapt(model, arm.stem)
    return model.to(memory_format=torch.channels_last)


def train(arm: Arm, data: Images, num_classes: int, epochs: int, seed: int) -> nn.Module:
    """Train one arm and return the model."""
    torch.manual_seed(seed)
    model = build(arm, num_classes)
    steps = len(data.y) // BATCH
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=LR, weight_decay=WEIGHT_DECAY)
    schedule = CosineLRScheduler(
        optimizer, epochs * steps, warmup_t=WARMUP_EPOCHS * steps, t_in_epochs=False
    )
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(seed * 1000 + epoch)
        order = torch.randperm(len(data.y), generator=generator)[: steps * BATCH]
        total, start = 0.0, time.perf_counter()
        for step, (x, y) in enumerate(data.batches(BATCH, order)):
            x = draw_channels(model, augment(x, generator), arm, (seed, epoch, step))
            loss = F.cross_entropy(
                model(x.contiguous(memory_format=torch.channels_last)), y, label_smoothing=SMOOTHING
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step_update(epoch * steps + step + 1)
            total += loss.item()
        rate = steps * BATCH / (time.perf_counter() - start)
        print(
            f"  epoch {epoch + 1}/{epochs}: loss {total / steps:.3f}, {rate:.0f} images/s",
            flush=True,
        )
    return model


@torch.no_grad()
def test(model: nn.Module, arm: Arm, data: Images, calibration: Images) -> dict[str, np.ndarray]:
    """Whether each test image is classified correctly, by channel set and kind of statistics."""
    model.eval()
    results: dict[str, np.ndarray] = {}
    for channel_set in [RGB.take(RGB.index(arm.channels))] if arm.stem is None else TEST_SETS:
        indices = list(RGB.index(channel_set))
        told = channel_set.without_identity() if arm.identity == "anonymous" else channel_set
        models = {"running": model if arm.stem is None else timm_varchan.share(model, told)}
        if arm.stem is not None:
            batches = (x[:, indices] for x, _ in calibration.batches(BATCH))
            statistics = timm_varchan.channel_statistics(model, batches, told)
            models["estimated"] = timm_varchan.share(model, told, statistics=statistics)
        for kind, twin in models.items():
            correct = [twin(x[:, indices]).argmax(1) == y for x, y in data.batches(500)]
            results[f"{channel_set}|{kind}"] = torch.cat(correct).numpy()
    return results


def run(args: argparse.Namespace) -> None:
    """Train and test every arm and seed that has no result yet."""
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    data = None
    for seed in args.seeds:
        for name in args.arms:
            target = args.output / f"{name}-seed{seed}.npz"
            if target.exists():
                continue
            data = data or load(args.data, args.num_classes, args.img_size)
            images, held_out = data
            print(f"{name}, seed {seed}: {len(images.y)} training, {len(held_out.y)} test images")
            model = train(ARMS[name], images, args.num_classes, args.epochs, seed)
            few = torch.randperm(len(images.y), generator=torch.Generator().manual_seed(seed))
            calibration = Images(images.x[few[:2560]], images.y[few[:2560]])
            results = test(model, ARMS[name], held_out, calibration)
            for key, correct in results.items():
                print(f"  {key}: {100 * correct.mean():.1f}", flush=True)
            meta = {k: getattr(args, k) for k in ("num_classes", "img_size", "epochs")}
            np.savez_compressed(target, meta=json.dumps(meta), **results)


def read_runs(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """Correctness by arm and by `set|statistics`, `(seeds, images)`; checks one setting for all."""
    found: dict[str, dict[str, list[np.ndarray]]] = {}
    settings = set()
    for path in sorted(folder.glob("*-seed*.npz")):
        arm = path.stem.rpartition("-seed")[0]
        with np.load(path) as run_file:
            settings.add(str(run_file["meta"]))
            for key in run_file.files:
                if key != "meta":
                    found.setdefault(arm, {}).setdefault(key, []).append(run_file[key])
    if len(settings) != 1:
        raise SystemExit(f"{folder} holds runs of {len(settings)} settings; one is needed.")
    stacked = {arm: {k: np.stack(v) for k, v in sets.items()} for arm, sets in found.items()}
    return {"": {"settings": np.array(settings.pop())}, **stacked}


def interval(per_image: np.ndarray) -> dict[str, float]:
    """Mean of a per-image figure with its 95 % interval over the choice of images, in per cent."""
    mean, error = 100 * per_image.mean(), 100 * per_image.std(ddof=1) / len(per_image) ** 0.5
    return {"mean": mean, "low": mean - 1.96 * error, "high": mean + 1.96 * error}


def gap(arm: dict[str, np.ndarray], runs: dict[str, dict[str, np.ndarray]], sets: list[str],
        kind: str) -> dict[str, float] | None:  # fmt: skip
    """Mean loss to the experts over some sets, in points, on the same images and seeds."""
    differences = []
    for name in sets:
        expert, own = runs.get(f"expert-{name}", {}).get(f"{name}|running"), arm[f"{name}|{kind}"]
        if expert is None:
            return None
        seeds = min(len(expert), len(own))
        differences.append(expert[:seeds].mean(0) - own[:seeds].mean(0))
    return interval(np.mean(differences, axis=0)) | {"seeds": seeds}


def report(args: argparse.Namespace) -> None:
    """Write accuracies and paired gaps of all finished runs as JSON and print the table."""
    runs = read_runs(args.output)
    summary: dict[str, object] = {
        "settings": json.loads(str(runs.pop("")["settings"])),
        "command": "python bench/batchnorm.py run, then report",
        "machine": f"{platform.machine()}, torch {torch.__version__}, one thread a run",
        "test_images": next(iter(next(iter(runs.values())).values())).shape[1],
    }
    arms: dict[str, object] = {}
    header = ["trained as", "statistics", "seeds", *map(str, TEST_SETS), "loss on RGB",
              "mean loss on R, G, B"]  # fmt: skip
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name in (n for n in ARMS if n in runs):
        arm, rows = runs[name], {}
        for kind in sorted({key.partition("|")[2] for key in arm}, reverse=True):
            row: dict[str, object] = {
                str(s): interval(arm[f"{s}|{kind}"].mean(0))
                | {"by_seed": (100 * arm[f"{s}|{kind}"].mean(1)).tolist()}
                for s in TEST_SETS if f"{s}|{kind}" in arm
            }  # fmt: skip
            cells = [f"{row[str(s)]['mean']:.1f}" if str(s) in row else "" for s in TEST_SETS]  # type: ignore[index]
            losses = [None, None]
            if ARMS[name].stem is not None:
                losses = [gap(arm, runs, ["RGB"], kind), gap(arm, runs, ["R", "G", "B"], kind)]
                row |= {"loss_rgb": losses[0], "loss_singles": losses[1]}
            cells += [
                "" if g is None else f"{g['mean']:.1f} ({g['low']:.1f} to {g['high']:.1f})"
                for g in losses
            ]
            seeds = len(next(iter(arm.values())))
            lines.append(f"| {name} | {kind} | {seeds} | " + " | ".join(cells) + " |")
            rows[kind] = row
        arms[name] = rows
    summary["arms"] = arms
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(summary, indent=1) + "\n")
    args.json.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run", help="train and test")
    runs.add_argument("--data", type=Path, required=True, help="folder with the Parquet files")
    runs.add_argument("--output", type=Path, required=True, help="folder for the runs' results")
    runs.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    runs.add_argument("--seeds", nargs="+", type=int, default=[0])
    runs.add_argument("--epochs", type=int, default=30)
    runs.add_argument("--num-classes", type=int, default=25)
    runs.add_argument("--img-size", type=int, default=32)
    runs.add_argument("--threads", type=int, default=1)
    runs.set_defaults(func=run)
    reports = commands.add_parser("report", help="tables of all finished runs")
    reports.add_argument("--output", type=Path, required=True, help="folder of the runs' results")
    reports.add_argument(
        "--json", type=Path, required=True, help="file; the table beside it as .md"
    )
    reports.set_defaults(func=report)
    args = parser.parse_args()
    args.func(args)


if __name__ == "__main__":
    main()
