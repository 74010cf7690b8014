"""What a twin costs: operations, latency, training and reading, each beside its plain baseline.

    python bench/cost.py complexity            counted, on the meta device: any size takes seconds
    python bench/cost.py latency               the twin beside timm and beside itself folded
    python bench/cost.py peers_cost            DOFA's and ChannelViT's mechanisms beside ours
    python bench/cost.py throughput            images a second of the training loop, in turns
    python bench/cost.py loading               images a second that are read, in turns

Each writes one tidy CSV into `results/`, whose name says the conditions. Times are of one machine:
the figure is the ratio, taken round by round, with the exact 95 % interval of its median.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import tifffile
import timm
import timm.optim
import torch
import torch.nn.functional as F
from arms import BENCHMARKS, PEERS
from complexity import count_complexity
from scipy import stats
from tidy import write_csv
from torch import Tensor, nn
from torch.utils.data import DataLoader

import timm_varchan
from timm_varchan import RGB, ChannelSet
from timm_varchan.data import TransformedSplit, cached, load_data, train_transform
from timm_varchan.folding import fold
from timm_varchan.training import TrainConfig
from timm_varchan.training import run as train

Key = TypeVar("Key")
Rows = list[dict[str, Any]]
RESULTS = Path(__file__).parent / "results"


class Clock:
    """Times one call, in seconds: by the wall clock, on CUDA by events and synchronised."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, call: Callable[[], object]) -> float:
        """Seconds that the call takes."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000


def interleave(
    calls: Mapping[Key, Callable[[], object]], clock: Clock, *, rounds: int, warmup: int
) -> dict[Key, list[float]]:
    """Time one step of each call in turn: whatever slows the machine down slows all of them.

    Args:
        calls: What to time, by name.
        clock: Times one of them.
        rounds: Timed steps of each.
        warmup: Steps of each before that count for nothing.

    Returns:
        Seconds of each timed step, by name.
    """
    steps: dict[Key, list[float]] = {name: [] for name in calls}
    for number in range(warmup + rounds):
        for name, call in calls.items():
            seconds = clock(call)
            if number >= warmup:
                steps[name].append(seconds)
    return steps


def spread(values: list[float]) -> dict[str, float]:
    """The median, the quartiles, and the exact 95 % interval of the median by order statistics."""
    ordered = np.sort(values)
    below = max(0, int(stats.binom.ppf(0.025, len(ordered), 0.5)) - 1)
    q25, median, q75 = np.quantile(ordered, (0.25, 0.5, 0.75))
    figures = {"median": median, "q25": q25, "q75": q75}
    figures |= {"low": ordered[below], "high": ordered[len(ordered) - 1 - below]}
    return {name: float(value) for name, value in figures.items()}


def ratios(steps: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """The first model's time over that of each other one, round by round: `spread` of the ratios.

    Args:
        steps: Seconds of each round, by model.
    """
    first, *baselines = steps
    return {
        name: spread([a / b for a, b in zip(steps[first], steps[name], strict=True)])
        for name in baselines
    }


def with_interval(name: str, figures: Mapping[str, float]) -> dict[str, float]:
    """The columns of a ratio."""
    return {name: figures["median"], f"{name}_low": figures["low"], f"{name}_high": figures["high"]}


# --- Complexity

#: The reference report counts 50 classes at 224 px.
NUM_CLASSES, IMG_SIZE, COUNTS = 50, 224, (1, 3, 8, 13)
MODELS = ("densenet121", "dwg_densenet121", "resnet34", "dwg_resnet34")
OTHERS = ("resnet34_stride1", "rrdb_small", "rrdb_rnn_small", "dwg_rrdb_rnn_small")


def channel_set(count: int) -> ChannelSet:
    """RGB for three, else so many anonymous channels."""
    return RGB if count == len(RGB) else ChannelSet.anonymous(count)


def counted(name: str, count: int) -> Any:
    """The complexity of a model, built anew for each number where it is plain."""
    with torch.device("meta"):
        kwargs = {} if name.startswith("dwg_") else {"in_chans": count}
        model = timm.create_model(name, num_classes=NUM_CLASSES, **kwargs)
    return count_complexity(model, channel_set(count), img_size=IMG_SIZE)


def complexity(args: argparse.Namespace) -> Rows:
    """A row for each model and number of channels."""
    wanted = [(name, count) for name in MODELS for count in COUNTS]
    wanted += [(name, len(RGB)) for name in OTHERS]
    found = {key: counted(*key) for key in wanted}
    rows = []
    for (name, count), cost in found.items():
        row = {"model": name, "channels": count, **dataclasses.asdict(cost)}
        if cost.macs_per_added_channel is None and name in MODELS:  # built anew for each number
            few, many = found[name, COUNTS[0]], found[name, COUNTS[-1]]
            row["macs_per_added_channel"] = (many.macs - few.macs) / (COUNTS[-1] - COUNTS[0])
        rows.append(row)
    return rows


def peers_cost(args: argparse.Namespace) -> Rows:
    """Published mechanisms beside ours: operations, and the time of a batch in turns."""
    bands, models = BENCHMARKS["scratch"].channel_set(), {}
    for name, config in PEERS.items():
        kwargs = dict(config["model_kwargs"])
        if config["virtual_channels"] is not None:
            kwargs["virtual_channels"] = config["virtual_channels"]
        models[name] = timm.create_model(config["model"], num_classes=10, **kwargs).eval()
    rows: Rows = []
    for count in COUNTS:
        given = bands.take(tuple(range(count)))
        x = torch.randn(args.batch_size, count, args.img_size, args.img_size)
        for model in models.values():
            timm_varchan.set_channels(model, given)
        with torch.inference_mode():
            calls = {name: partial(model, x) for name, model in models.items()}
            steps = interleave(calls, Clock(x.device), rounds=4 * args.rounds, warmup=2)
        for name, model in models.items():
            cost = count_complexity(model, given, img_size=args.img_size)
            row = {"model": name, "channels": count, "params": cost.params, "macs": cost.macs,
                   "ms": 1000 * spread(steps[name])["median"]}  # fmt: skip
            if name != "twin":
                row |= with_interval(
                    "to_twin", ratios({name: steps[name], "t": steps["twin"]})["t"]
                )
            rows.append(row)
    return rows


# --- Latency


def contestants(name: str, count: int, args: argparse.Namespace) -> dict[str, nn.Module]:
    """A twin, plain timm with `in_chans=`, and the twin folded for the set, ready to be timed."""
    twin = timm.create_model(name).eval()
    timm_varchan.set_channels(twin, channel_set(count))
    plain = timm.create_model(name.removeprefix("dwg_"), in_chans=count).eval()
    models = {"twin": twin, "timm": plain, "folded": fold(twin, channel_set(count))}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = {
        key: model.to(device, getattr(torch, args.precision)).to(memory_format=args.layout)
        for key, model in models.items()
    }
    return {k: torch.compile(m) for k, m in models.items()} if args.compiled else dict(models)


def latency(args: argparse.Namespace) -> Rows:
    """A row for each batch and number of channels; memory that runs out gives an empty one."""
    args.layout = torch.channels_last if args.channels_last else torch.contiguous_format
    rows: Rows = []
    for batch, count in itertools.product(args.batches, COUNTS):
        row = {"model": f"dwg_{args.arch}", "batch": batch, "channels": count}
        try:
            steps = timed(row, args)
        except torch.OutOfMemoryError as error:
            rows.append({**row, "reason": f"{type(error).__name__}: {error}".splitlines()[0]})
            continue
        row |= {f"{name}_ms": 1000 * spread(seconds)["median"] for name, seconds in steps.items()}
        for name, figures in ratios(steps).items():
            row |= with_interval(f"to_{name}", figures)
        rows.append({**row, "rounds": args.rounds})
    return rows


def timed(row: Mapping[str, Any], args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each round, by model."""
    models = contestants(row["model"], row["channels"], args)
    like = next(models["twin"].parameters())
    shape = (row["batch"], row["channels"], args.img_size, args.img_size)
    x = torch.randn(shape, device=like.device, dtype=like.dtype).to(memory_format=args.layout)
    with torch.inference_mode():
        calls = {name: partial(model, x) for name, model in models.items()}
        return interleave(calls, Clock(x.device), rounds=args.rounds, warmup=3)


# --- Training


def plain_loop(config: TrainConfig, arch: str) -> list[float]:
    """Images a second of every epoch after the first, of the loop that a tutorial shows."""
    data = load_data(config.dataset, channels=config.channels, limit=config.limit,
                     img_size=config.img_size)  # fmt: skip
    assert data.train is not None
    split = TransformedSplit(
        cached(data.train), train_transform(config.img_size, data.channels), config.seed
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


def package_loop(config: TrainConfig) -> list[float]:
    """The same of the loop of `timm-varchan train`."""
    with tempfile.TemporaryDirectory() as folder:
        outcome = train(dataclasses.replace(config, output_dir=folder))
    return [entry["images_per_second"] for entry in outcome.results["training"]["history"][1:]]


def throughput(args: argparse.Namespace) -> Rows:
    """The loops in turns, the same images and network; the first epoch of a turn warms up."""
    config = TrainConfig(
        channels="RGB", img_size=args.img_size, batch_size=args.batch_size, limit=args.num_images,
        epochs=args.epochs, workers=args.workers, cache=True, model=f"dwg_{args.arch}",
        sched="none", warmup_epochs=0, val_max_sets=1, eval_orders=("in order",), sets="3",
    )  # fmt: skip
    as_is = dataclasses.replace(config, channel_aug="none")
    loops: dict[str, Callable[[], list[float]]] = {
        f"plain loop, {args.arch}": partial(plain_loop, config, args.arch),
        f"timm-varchan train, {args.arch}": partial(
            package_loop, dataclasses.replace(as_is, model=args.arch)
        ),
        f"timm-varchan train, dwg_{args.arch}, channels as they are": partial(package_loop, as_is),
        f"timm-varchan train, dwg_{args.arch}, a set an image": partial(package_loop, config),
    }
    speeds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(args.rounds):
        for name, loop in loops.items():
            speeds[name] += loop()
            print(f"round {number + 1}: {name}: {speeds[name][-1]:.1f} images/s", flush=True)
    first = next(iter(speeds.values()))
    return [
        {"loop": name, "images_per_second": spread(each)["median"],
         **with_interval("of_plain", spread([a / b for a, b in zip(each, first, strict=True)]))}
        for name, each in speeds.items()
    ]  # fmt: skip


# --- Reading

PLANES, PIXELS = 13, 64


def make_folder(
    root: Path, suffix: str, images: np.ndarray, compression: str | None = None
) -> list[Path]:
    """Class folders with one file an image; the files, sorted."""
    files = []
    for number, image in enumerate(images):
        file = root / "train" / f"class{number % 2}" / f"{number:05d}{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        if suffix == ".npy":
            np.save(file, image)
        else:
            tifffile.imwrite(file, image, photometric="minisblack", compression=compression)
        files.append(file)
    return sorted(files)


def make_parquet(root: Path, images: np.ndarray) -> Any:
    """A Parquet file with the bytes of `.npy`, and its rows read by `datasets` alone."""
    import datasets

    root.mkdir()
    features = datasets.Features(
        {"image": datasets.Value("binary"), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    packed = []
    for image in images:
        buffer = io.BytesIO()
        np.save(buffer, image)
        packed.append(buffer.getvalue())
    columns = {"image": packed, "label": [i % 2 for i in range(len(images))]}
    file = root / "train.parquet"
    datasets.Dataset.from_dict(columns, features).to_parquet(str(file))
    return datasets.load_dataset("parquet", data_files=str(file), split="train")


def torchvisions() -> Callable[[np.ndarray], Tensor]:
    """The augmentation of training, put together from torchvision's transforms."""
    from torchvision.transforms import v2

    steps = v2.Compose([
        v2.RandomResizedCrop(PIXELS, scale=(0.35, 1.0), antialias=True),
        v2.RandomHorizontalFlip(),
        v2.Normalize([0.1] * PLANES, [0.1] * PLANES),
        v2.RandomRotation(15, interpolation=v2.InterpolationMode.BILINEAR),
    ])  # fmt: skip
    return lambda image: steps(torch.from_numpy(image).to(torch.float32) / 65535)


def each(read: Callable[[Any], object], items: Iterable[Any]) -> None:
    """Read every image once."""
    for item in items:
        read(item)


def loading(args: argparse.Namespace) -> Rows:
    """A row for each format: an `ImageSplit` against the plainest reader of the same bytes.

    In every round each image is read once by each, in one process on one thread; then also
    augmented, against torchvision's transforms of the plain reader's images.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return read_formats(Path(folder), args.num_images, args.rounds)
    finally:
        torch.set_num_threads(threads)


def read_formats(folder: Path, num_images: int, rounds: int) -> Rows:
    """Write the images in each format, read them in turns."""
    shape = (num_images, PLANES, PIXELS, PIXELS)
    images = np.random.default_rng(0).integers(0, 10_000, shape, np.uint16)
    npy, tif = (make_folder(folder / s[1:], s, images) for s in (".npy", ".tif"))
    packed = make_folder(folder / "deflate", ".tif", images // 64 * 64, "deflate")
    parquet = make_parquet(folder / "parquet", images)
    numbers = range(num_images)
    formats: dict[str, tuple[str, Callable[[Any], np.ndarray], Iterable[Any]]] = {
        ".npy files": ("npy", np.load, npy),
        "TIFF files": ("tif", tifffile.imread, tif),
        "TIFF files, deflate": ("deflate", tifffile.imread, packed),
        "Parquet, bytes of .npy": (
            "parquet", lambda i: np.load(io.BytesIO(parquet[i]["image"])), numbers
        ),
    }  # fmt: skip
    augment, rows = torchvisions(), []
    for name, (source, read, items) in formats.items():
        data = load_data(str(folder / source))
        split = data.train
        assert split is not None
        same = sorted(x.numpy().tobytes() for x, _ in split)
        assert same == sorted(np.ascontiguousarray(read(item)).tobytes() for item in items)
        channels = data.channels.with_stats([0.1] * PLANES, [0.1] * PLANES)
        augmented = TransformedSplit(split, train_transform(PIXELS, channels))
        calls = {
            "ours": partial(each, split.__getitem__, numbers),
            "plain": partial(each, read, items),
            "augmented": partial(each, augmented.__getitem__, numbers),
            "torchvision": partial(each, lambda item, read=read: augment(read(item)), items),
        }
        steps = interleave(calls, Clock(torch.device("cpu")), rounds=rounds, warmup=1)
        pairs = {"of_plain": ("plain", "ours"), "of_torchvision": ("torchvision", "augmented")}
        row: dict[str, Any] = {"format": name}
        row |= {k: spread([num_images / s for s in v])["median"] for k, v in steps.items()}
        for column, (baseline, ours) in pairs.items():  # the plain reader's time over ours
            figures = ratios({baseline: steps[baseline], ours: steps[ours]})[ours]
            row |= with_interval(column, figures)
        rows.append(row)
    return rows


MEASURES: dict[str, Callable[[argparse.Namespace], Rows]] = {
    measure.__name__: measure for measure in (complexity, latency, peers_cost, throughput, loading)
}


def conditions(args: argparse.Namespace) -> str:
    """What the name of the file says."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = f"{torch.get_num_threads()}threads-{device}"
    if args.measure == "complexity":
        return f"{IMG_SIZE}px-{NUM_CLASSES}classes"
    if args.measure == "loading":
        return f"{PLANES}x{PIXELS}x{PIXELS}-uint16-1thread-cpu"
    if args.measure == "latency":
        layout = "-channels_last" if args.channels_last else ""
        kind = "compiled" if args.compiled else "eager"
        return f"dwg_{args.arch}-{args.img_size}px-{args.precision}{layout}-{kind}-{machine}"
    arch = f"{args.arch}-" if args.measure == "throughput" else ""
    return f"{arch}{args.img_size}px-batch{args.batch_size}-{machine}"


def main(args: list[str] | None = None) -> None:
    """Measure and write."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("measure", choices=MEASURES)
    parser.add_argument("--arch", default="densenet121", help="latency, throughput: timm's model")
    parser.add_argument("--img-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32, help="throughput, peers_cost")
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 8), help="latency")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--channels-last", action="store_true", help="latency")
    parser.add_argument("--compiled", action="store_true", help="latency: torch.compile")
    parser.add_argument("--epochs", type=int, default=3, help="throughput: of a turn")
    parser.add_argument("--workers", type=int, default=1, help="throughput")
    parser.add_argument("--num-images", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="CSV; named by the conditions")
    options = parser.parse_args(args)
    rows = MEASURES[options.measure](options)
    table = pd.DataFrame(rows).assign(version=timm_varchan.__version__)
    file = options.output or RESULTS / f"{options.measure}-{conditions(options)}.csv"
    write_csv(table, file)
    print(f"{file}: {len(table)} rows")


if __name__ == "__main__":
    main()
