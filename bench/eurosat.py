"""Thirteen real bands, some of them missing: EuroSAT in folds by place, trained by the product.

`python bench/eurosat.py run --data FILE --output DIR` trains every arm on every fold with
`timm_varchan.training.run` and keeps its answers on the held-out places; arms whose answers are
there already are not run again. `python bench/eurosat.py report --output DIR` prints the table.
FILE is a Parquet file with the columns image (13-band TIFF), label, utm_zone, utm_x and utm_y.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import StratifiedGroupKFold
from torch import nn
from torch.utils.data import DataLoader
from transfer import pretrained

import timm_varchan
from timm_varchan import hub
from timm_varchan.channels import ChannelSet, seeded_rng
from timm_varchan.data import TransformedSplit, eval_transform, load_data
from timm_varchan.training import TrainConfig, run

#: In the order of the files: B8A is last.
BANDS = "B01+B02+B03+B04+B05+B06+B07+B08+B09+B10+B11+B12+B8A"
SMALL = {"channels": [32, 64, 128, 256], "stem_width": 16}
K6 = "R+G+B+B06+B08+B11"
COMMON: dict[str, Any] = {
    "channels": BANDS, "value_scale": 10000.0, "img_size": 64, "epochs": 60, "batch_size": 16,
    "workers": 0, "cache": True, "mixed_precision": "no", "vflip": 0.5, "crop_scale": (0.7, 1.0),
    "eval_max_sets": 13, "val_max_sets": 1, "eval_orders": ("in order",),
}  # fmt: skip


def small(model: str, **changes: Any) -> dict[str, Any]:
    """A ResNet-10 half as wide as timm's, from random weights."""
    return {**COMMON, "model": model, "model_kwargs": SMALL, **changes}


def lite(model: str, **changes: Any) -> dict[str, Any]:
    """EfficientNet-Lite0 from its ImageNet weights, twelve epochs."""
    return {
        **COMMON, "model": model, "pretrained": True, "epochs": 12, "lr": 1e-3,
        "model_kwargs": {"pretrained_cfg_overlay": {"file": "lite0.safetensors"}}, **changes,
    }  # fmt: skip


#: Arm -> what `TrainConfig` gets.
ARMS: dict[str, dict[str, Any]] = {
    "plain": small("resnet10t", channel_aug="none"),
    "plain-masked": small("resnet10t", channel_aug="hcs-mask"),
    "k3": small("dwg_resnet10t", virtual_channels="RGB"),
    "k6": small("dwg_resnet10t"),
    "k6-design": small("dwg_resnet10t", virtual_channels=K6),
    "k13": small("dwg_resnet10t", virtual_channels=BANDS),
    "k6-share0": small("dwg_resnet10t", full_share=0.0),
    "k6-share25": small("dwg_resnet10t", full_share=0.25),
    "k6-share75": small("dwg_resnet10t", full_share=0.75),
    "k6-spectral": small("dwg_resnet10t", model_kwargs={**SMALL, "prior": "spectral"}),
    "k6-nearest": small("dwg_resnet10t", model_kwargs={**SMALL, "prior": "nearest"}),
    "k6-matched": small("dwg_resnet10t", model_kwargs={**SMALL, "prior_scale": "matched"}),
    "lite-tiled": lite("tf_efficientnet_lite0", channel_aug="none"),
    "lite-k3": lite("dwg_tf_efficientnet_lite0", virtual_channels="RGB"),
    "lite-k6": lite("dwg_tf_efficientnet_lite0"),
    "lite-k6-design": lite("dwg_tf_efficientnet_lite0", virtual_channels=K6),
    "lite-k13": lite("dwg_tf_efficientnet_lite0", virtual_channels=BANDS),
    "lite-k13-all": lite(
        "dwg_tf_efficientnet_lite0", virtual_channels=BANDS, channel_aug="none"
    ),
}  # fmt: skip
#: What a plain model becomes without further training, by name.
UNTRAINED: dict[str, dict[str, Any]] = {
    "zero": {"stem": "slice"},
    "mean": {"stem": "prior", "prior": "mean"},
    "nearest": {"stem": "prior", "prior": "nearest"},
    "spectral": {"stem": "prior", "prior": "spectral"},
    "measured": {"stem": "prior", "prior": "measured"},
    "measured-matched": {"stem": "prior", "prior": "measured", "prior_scale": "matched"},
}


def test_sets() -> dict[str, list[tuple[int, ...]]]:
    """Positions of the bands that are there, by the name of the question."""
    bands = ChannelSet.parse(BANDS)
    everything = tuple(range(len(bands)))
    rng = seeded_rng("eurosat subsets", 0)
    drawn = []
    for _ in range(20):
        drawn.append(tuple(sorted(rng.sample(everything, rng.randint(1, len(bands))))))
    return {
        "all": [everything],
        "all but one": [everything[:i] + everything[i + 1 :] for i in everything],
        "RGB": [bands.index("B04+B03+B02")],
        "RGB+NIR": [bands.index("B04+B03+B02+B08")],
        "one": [(i,) for i in everything],
        "random": drawn,
    }


def folds(file: Path, num_folds: int, repeat: int) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    """Training and held-out rows; patches within 5 km of each other stay together."""
    table = pd.read_parquet(file)
    place = table[["utm_x", "utm_y"]].to_numpy()
    apart = np.linalg.norm(place[:, None] - place, axis=-1)
    near = (apart < 5000) & (table.utm_zone.to_numpy()[:, None] == table.utm_zone.to_numpy())
    _, group = connected_components(coo_matrix(near), directed=False)
    splitter = StratifiedGroupKFold(num_folds, shuffle=True, random_state=repeat)
    for train, held_out in splitter.split(table, table.label, group):
        yield table.iloc[train], table.iloc[held_out]


def write_fold(train: pd.DataFrame, held_out: pd.DataFrame, source: Path, folder: Path) -> None:
    """A data set in a folder, as users have it, with the features of the source."""
    from datasets import Dataset, Features

    features = Dataset.from_parquet(str(source), keep_in_memory=True).features
    kept = Features({name: features[name] for name in ("image", "label")})
    folder.mkdir(parents=True)
    for name, rows in (("train", train), ("validation", held_out)):
        columns = {key: rows[key].tolist() for key in kept}
        Dataset.from_dict(columns, features=kept).to_parquet(str(folder / f"{name}.parquet"))


def forget_accelerate() -> None:
    """One process runs many runs."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@torch.no_grad()
def answers(model: nn.Module, loader: DataLoader[Any], bands: ChannelSet) -> dict[str, np.ndarray]:
    """The class of each image by channel set, -1 where the model gives no number."""
    model.eval()
    found: dict[str, list[np.ndarray]] = {}
    for x, _ in loader:
        for question, sets in test_sets().items():
            for number, planes in enumerate(sets):
                timm_varchan.set_channels(model, bands.take(planes))
                logits = model(x[:, planes])
                right = torch.where(logits.isfinite().all(1), logits.argmax(1), -1)
                key = f"{question}|{number}"
                found.setdefault(key, []).append(right.numpy())
    return {key: np.concatenate(parts) for key, parts in found.items()}


def run_arm(arm: str, folder: Path, fold: Path, seed: int) -> None:
    """Train one arm on one fold and keep its answers."""
    target = folder / f"{fold.name}-{arm}.npz"
    if target.exists():
        return
    changes = dict(ARMS[arm])
    overlay = changes["model_kwargs"].get("pretrained_cfg_overlay")
    if overlay:
        file = {"file": str(folder / overlay["file"])}
        changes["model_kwargs"] = {"pretrained_cfg_overlay": file}
    config = TrainConfig(dataset=str(fold), output_dir=str(folder / "run"), seed=seed, **changes)
    shutil.rmtree(folder / "run", ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()):
        run(config)
    forget_accelerate()
    saved = hub.load(folder / "run" / "model")
    data = load_data(str(fold), channels=saved.channels, value_scale=10000.0)
    transform = eval_transform(64, saved.channels, crop_pct=1.0)
    held_out = DataLoader(TransformedSplit(data.validation, transform), batch_size=128)
    labels = np.concatenate([y.numpy() for _, y in held_out])
    found: dict[str, np.ndarray] = {"labels": labels}
    for name, model in _models(arm, saved):
        got = answers(model, held_out, saved.channels)
        found |= {f"{name}|{key}": value for key, value in got.items()}
        means = {
            question: 100 * np.mean([v == labels for k, v in got.items() if k.startswith(question)])
            for question in (f"{q}|" for q in test_sets())
        }
        shown = "  ".join(f"{q[:-1]} {value:.1f}" for q, value in means.items())
        print(f"{fold.name} {arm} {name}: {shown}", flush=True)
    np.savez_compressed(target, **found)


def _models(arm: str, saved: hub.SavedModel) -> Iterator[tuple[str, nn.Module]]:
    """The trained model, or, of one for a fixed count, what it becomes without training."""
    if timm_varchan.models.has_stems(saved.model):
        yield "trained", saved.model
        return
    known = saved.channels.standardised()
    for name, arguments in UNTRAINED.items():
        plain = copy.deepcopy(saved.model)
        given = dict(arguments)
        if given.get("prior") == "measured":
            given["statistics"] = known
        yield name, timm_varchan.adapt(plain, given.pop("stem"), virtual_channels=BANDS, **given)


def report(folder: Path) -> pd.DataFrame:
    """Mean accuracy by arm and question over all held-out images, with its spread over folds."""
    rows = []
    for file in sorted(folder.glob("fold-*.npz")):
        found = np.load(file)
        _, repeat, fold, arm = file.stem.split("-", 3)
        for key in found.files:
            if key != "labels":
                way, question, number = key.split("|")
                right = found[key] == found["labels"]
                rows.append((repeat, fold, arm, way, question, number, right.mean(), len(right)))
    names = ["repeat", "fold", "arm", "way", "question", "set", "accuracy", "images"]
    return pd.DataFrame(rows, columns=names)


def main() -> None:
    """Run or report."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("--data", type=Path, required=True)
    running.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    running.add_argument("--folds", type=int, default=5)
    running.add_argument("--repeats", type=int, default=1)
    reporting = commands.add_parser("report")
    for command in (running, reporting):
        command.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    if args.command == "report":
        table = report(args.output)
        means = table.groupby(["arm", "way", "question", "fold", "repeat"]).accuracy.mean()
        by_question = means.groupby(["arm", "way", "question"]).agg(["mean", "sem"]).unstack()
        print((100 * by_question).round(1).to_string())
        return
    args.output.mkdir(parents=True, exist_ok=True)
    lite0 = args.output / "lite0.safetensors"
    if not lite0.exists():
        from safetensors.torch import save_file

        save_file(pretrained().state_dict(), lite0)
    for repeat in range(args.repeats):
        for number, (train, held_out) in enumerate(folds(args.data, args.folds, repeat)):
            fold = args.output / f"fold-{repeat}-{number}"
            if not fold.exists():
                write_fold(train, held_out, args.data, fold)
            for arm in args.arms:
                run_arm(arm, args.output, fold, seed=repeat)
    print(json.dumps({"done": args.arms}))


if __name__ == "__main__":
    main()
