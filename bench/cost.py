"""What a twin costs: operations, latency, training and reading, each beside its plain baseline.

    python bench/cost.py complexity            counted, on the meta device: any size takes seconds
    python bench/cost.py stems                 what each stem can, and what it costs
    python bench/cost.py peers_cost            DOFA's and ChannelViT's mechanisms beside ours
    python bench/cost.py throughput            images a second of hf_train.py's loop, in turns
    python bench/cost.py channels              choosing channels, beside a training step
    python bench/cost.py loading               images a second that are read, in turns
    python bench/cost.py latency --json FILE   of `pytest bench --benchmark-json=FILE`

Each writes one tidy CSV into `results/`, whose name says the conditions. Times are of one machine:
the figure is the ratio, taken round by round, with the exact 95 % interval of its median.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pytest
import tifffile
import timm
import timm.optim
import torch
import torch.nn.functional as F
from arms import BENCHMARKS
from run import RESULTS, write_csv
from scipy import stats
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

import timm_varchan
from timm_varchan import RGB, ChannelSet, measure_channels
from timm_varchan.complexity import count_complexity
from timm_varchan.data import TransformedSplit, cached, load_data, train_transform
from timm_varchan.stems import MIXERS, Mixer
from timm_varchan.training import TrainConfig
from timm_varchan.training import run as train
from timm_varchan.views import DrawKey, draw_channels

Key = TypeVar("Key")
Rows = list[dict[str, Any]]

#: What PyTorch says when memory runs out.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


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
    own, *baselines = steps
    return {
        name: spread([a / b for a, b in zip(steps[own], steps[name], strict=True)])
        for name in baselines
    }


def peak_mib(model: nn.Module, x: Tensor) -> float:
    """Largest size of the tensors that are alive at once in a forward pass, in MiB.

    Without the weights and the input. On a CPU without what libraries allocate for themselves.
    """
    if x.device.type == "cuda":
        before = torch.cuda.memory_allocated(x.device)
        torch.cuda.reset_peak_memory_stats(x.device)
        model(x)
        return (torch.cuda.max_memory_allocated(x.device) - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(x)
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(0, *np.cumsum([size for _, size in changes]).tolist()) / 2**20


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


def with_interval(name: str, figures: Mapping[str, float]) -> dict[str, float]:
    """The columns of a ratio."""
    return {name: figures["median"], f"{name}_low": figures["low"], f"{name}_high": figures["high"]}


# --- Complexity

#: The reference report counts 50 classes at 224 px.
NUM_CLASSES, IMG_SIZE, COUNTS = 50, 224, (1, 3, 8, 13)
MODELS = ("densenet121", "dwg_densenet121", "resnet34", "dwg_resnet34")
OTHERS = ("resnet34_stride1", "rrdb_small", "rrdb_rnn_small", "dwg_rrdb_rnn_small")


def channel_set(count: int, mixer: type[Mixer]) -> ChannelSet:
    """A set of this size that a stem takes: RGB for three, else anonymous, else wavelengths."""
    if count == len(RGB):
        return RGB
    if mixer.supports_anonymous:
        return ChannelSet.anonymous(count)
    return ChannelSet.parse([400.0 + 50 * i for i in range(count)])


def counted(name: str, count: int, stem: str | None = None) -> Any:
    """The complexity of a model, built anew where it is plain; `stem` puts one into it."""
    plain = not name.startswith("dwg_")
    with torch.device("meta"):
        kwargs = {"in_chans": count} if plain and stem is None else {}
        model = timm.create_model(name, num_classes=NUM_CLASSES, **kwargs)
        if stem is not None:
            timm_varchan.adapt(model, stem)
    return count_complexity(model, channel_set(count, MIXERS[stem or "dwg"]), img_size=IMG_SIZE)


def complexity(args: argparse.Namespace) -> Rows:
    """A row for each model and number of channels."""
    wanted = [(name, count) for name in MODELS for count in COUNTS]
    wanted += [(name, len(RGB)) for name in OTHERS]
    found = {key: counted(*key) for key in wanted}
    rows = []
    for (name, count), cost in found.items():
        growth = cost.macs_per_added_channel
        if growth is None and name in MODELS:  # of a model built anew for each number
            few, many = found[name, COUNTS[0]], found[name, COUNTS[-1]]
            growth = (many.macs - few.macs) / (COUNTS[-1] - COUNTS[0])
        rows.append({"model": name, "channels": count, "params": cost.params, "macs": cost.macs,
                     "macs_per_added_channel": growth, "stem_macs": cost.stem_macs,
                     "forward_backward_mb": cost.forward_backward_mb,
                     "params_mb": cost.params_mb})  # fmt: skip
    return rows


def stems(args: argparse.Namespace) -> Rows:
    """What each stem declares that it can, and its cost in DenseNet-121 on RGB beside timm's."""
    plain = counted("densenet121", len(RGB))
    rows = []
    for stem, mixer in MIXERS.items():
        cost = counted("densenet121", len(RGB), stem)
        can = {"any_count": mixer.any_count, "anonymous": mixer.supports_anonymous,
               "unseen": mixer.supports_unseen, "content": mixer.content_dependent}  # fmt: skip
        shown = {name: "yes" if flag else "no" for name, flag in can.items()}
        rows.append({"stem": stem, **shown, "params": cost.params - plain.params,
                     "macs": cost.macs - plain.macs})  # fmt: skip
    return rows


def peers_cost(args: argparse.Namespace) -> Rows:
    """Published mechanisms beside ours: operations, and the time of a batch in turns."""
    bands, models = BENCHMARKS["peers"].channel_set(), {}
    for name, arm in BENCHMARKS["peers"].arms.items():
        kwargs = dict(arm.config["model_kwargs"])
        if "virtual_channels" in arm.config:
            kwargs["virtual_channels"] = arm.config["virtual_channels"]
        models[name] = timm.create_model(arm.config["model"], num_classes=10, **kwargs).eval()
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
            ratio = ratios({name: steps[name], "own": steps["k13"]})["own"]
            rows.append({**row, **with_interval("to_k13", ratio)})
    return rows


# --- Latency, measured by test_latency.py

#: Rows without a figure: what was to be measured, and the reason.
EMPTY_ROWS: pytest.StashKey[list[dict[str, Any]]] = pytest.StashKey()


def latency(args: argparse.Namespace) -> Rows:
    """The rows of a file of pytest-benchmark; those without a figure have the reason."""
    result = json.loads(args.json.read_text())
    rows = []
    for one in (benchmark["extra_info"] for benchmark in result["benchmarks"]):
        own, ms, peak = one["model"], one["ms"], one["peak_mib"]
        row = {"model": own, "batch": one["batch_size"], "channels": one["num_channels"],
               "twin_ms": ms[own]["median"], "timm_ms": ms["timm"]["median"],
               "twin_mib": peak[own], "timm_mib": peak["timm"], "rounds": one["rounds"],
               "img_size": one["img_size"], "device": one["device"],
               "precision": one["precision"], "compiled": one["compiled"]}  # fmt: skip
        for baseline, figures in one["ratios"].items():
            row |= with_interval(f"to_{baseline}", figures)
        rows.append(row)
    return rows + [{"model": row["model"], "batch": row["batch_size"], "reason": row["reason"],
                    "channels": row["num_channels"]} for row in result["empty_rows"]]  # fmt: skip


# --- Training


def plain_loop(config: TrainConfig, arch: str) -> list[float]:
    """Images a second of every epoch after the first, of the loop that a tutorial shows."""
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


def own_loop(config: TrainConfig) -> list[float]:
    """The same of hf_train.py's loop."""
    with tempfile.TemporaryDirectory() as folder:
        outcome = train(dataclasses.replace(config, output_dir=folder))
    return [entry["images_per_second"] for entry in outcome.results["training"]["history"][1:]]


def throughput(args: argparse.Namespace) -> Rows:
    """The loops in turns, the same images and network; the first epoch of a turn warms up."""
    config = TrainConfig(
        channels="RGB", img_size=args.img_size, batch_size=args.batch_size, limit=args.num_images,
        epochs=args.epochs, workers=args.workers, cache=True, model=f"dwg_{args.arch}",
        sched="none", warmup_epochs=0, val_max_sets=1, eval_orders=("in order",), eval_max_sets=3,
    )  # fmt: skip
    as_is = dataclasses.replace(config, channel_aug="none")
    loops: dict[str, Callable[[], list[float]]] = {
        f"plain loop, {args.arch}": partial(plain_loop, config, args.arch),
        f"hf_train.py, {args.arch}": partial(own_loop, dataclasses.replace(as_is, model=args.arch)),
        f"hf_train.py, dwg_{args.arch}, channels as they are": partial(own_loop, as_is),
        f"hf_train.py, dwg_{args.arch}, a set an image": partial(own_loop, config),
    }
    speeds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(args.rounds):
        for name, loop in loops.items():
            speeds[name] += loop()
            print(f"round {number + 1}: {name}: {speeds[name][-1]:.1f} images/s", flush=True)
    first = next(iter(speeds.values()))
    return [
        {"loop": name, "images_per_second": spread(own)["median"],
         **with_interval("of_plain", spread([a / b for a, b in zip(own, first, strict=True)]))}
        for name, own in speeds.items()
    ]  # fmt: skip


def channels(args: argparse.Namespace) -> Rows:
    """Choosing the channels of every image and telling the model, beside a training step."""
    size, batch = 64, 256
    names = ChannelSet.parse("eurosat")
    torch.manual_seed(0)
    mixed = torch.randn(1000, len(names)) @ torch.randn(len(names), len(names))
    known = measure_channels([mixed[:, :, None, None]], names)  # some correlation or other
    x = torch.randn(batch, len(names), size, size)
    twin = timm.create_model("dwg_resnet18", virtual_channels=names, channel_stats=known)
    plain = timm.create_model("resnet18", in_chans=len(names))
    seconds: dict[str, list[float]] = {"channels": [], "step": []}
    for number in range(args.rounds + 1):  # the first warms up
        started = time.perf_counter()
        key = DrawKey(0, 0, number)
        view = draw_channels("hcs-sample", x, names, key, identity="named", full_share=0.5)
        view.tell(twin)
        told = time.perf_counter()
        plain(x).sum().backward()
        seconds["channels"].append(told - started)
        seconds["step"].append(time.perf_counter() - told)
    shares = [a / b for a, b in zip(seconds["channels"], seconds["step"], strict=True)][1:]
    return [
        {"channels": len(names), "batch": batch, "img_size": size, "model": "resnet18",
         "channels_ms": 1000 * spread(seconds["channels"][1:])["median"],
         "step_ms": 1000 * spread(seconds["step"][1:])["median"],
         **with_interval("of_step", spread(shares))}
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
        for column, (theirs, own) in pairs.items():  # the plain reader's time over ours
            figures = ratios({theirs: steps[theirs], own: steps[own]})[own]
            row |= with_interval(column, figures)
        rows.append(row)
    return rows


MEASURES: dict[str, Callable[[argparse.Namespace], Rows]] = {
    measure.__name__: measure
    for measure in (complexity, stems, peers_cost, latency, throughput, channels, loading)
}


def conditions(args: argparse.Namespace) -> str:
    """What the name of the file says."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.measure in ("complexity", "stems"):
        return f"{IMG_SIZE}px-{NUM_CLASSES}classes"
    if args.measure == "latency":
        info = json.loads(args.json.read_text())
        one = info["benchmarks"][0]["extra_info"]
        kind = "compiled" if one["compiled"] else "eager"
        layout = "-channels_last" if one["channels_last"] else ""
        return (f"{one['model']}-{one['img_size']}px-{one['precision']}{layout}-{kind}-"
                f"{info['machine_info']['threads']}threads-{one['device']}")  # fmt: skip
    if args.measure == "channels":
        return f"resnet18-64px-13bands-batch256-{os.cpu_count()}cores-cpu"
    if args.measure == "peers_cost":
        return f"{args.img_size}px-batch{args.batch_size}-{torch.get_num_threads()}threads-cpu"
    if args.measure == "throughput":
        size = f"{args.arch}-{args.img_size}px-batch{args.batch_size}"
        return f"{size}-{os.cpu_count()}cores-{device}"
    return f"{PLANES}x{PIXELS}x{PIXELS}-uint16-1thread-cpu"


def main(args: list[str] | None = None) -> None:
    """Measure and write."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("measure", choices=MEASURES)
    parser.add_argument("--json", type=Path, help="latency: the file of pytest-benchmark")
    parser.add_argument("--arch", default="densenet121", help="throughput: a model of timm")
    parser.add_argument("--img-size", type=int, default=64, help="throughput")
    parser.add_argument("--batch-size", type=int, default=32, help="throughput")
    parser.add_argument("--epochs", type=int, default=3, help="throughput: of a turn")
    parser.add_argument("--workers", type=int, default=1, help="throughput")
    parser.add_argument("--num-images", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="CSV; named by the conditions")
    options = parser.parse_args(args)
    if options.measure == "latency" and options.json is None:
        parser.error("latency needs --json FILE: pytest bench --benchmark-json=FILE")
    rows = MEASURES[options.measure](options)
    table = pd.DataFrame(rows).assign(version=timm_varchan.__version__)
    file = options.output or RESULTS / f"{options.measure}-{conditions(options)}.csv"
    write_csv(table, file)
    print(f"{file}: {len(table)} rows")


if __name__ == "__main__":
    main()
