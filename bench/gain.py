"""How fast the residual of the DWG stem leaves zero: accuracy on many bands against its gain.

Trains a small network on the package's synthetic data (5 bands) with channel sampling for every
image, for each gain, and on all bands at every step as the upper bar, once for each seed.

    python bench/gain.py --output bench/results/gain.json
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import timm
import timm.optim
import torch
import torch.nn.functional as F
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

import timm_varchan
from timm_varchan.data import ImageSplit, load_data, scale_values
from timm_varchan.evaluation import wilson_interval
from timm_varchan.training import DrawKey, draw_channels

MODEL, BATCH, LR, WEIGHT_DECAY, IMG_SIZE = "dwg_test_resnet", 32, 2e-3, 0.05, 32
TEST_SETS = ("R+G+B+NIR+SWIR1", "RGB", "R+NIR+SWIR1", "R")


def tensors(split: ImageSplit, channels: timm_varchan.ChannelSet) -> tuple[Tensor, Tensor]:
    """All images of a split, normalised `(N, C, H, W)`, and their labels `(N,)`."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (channels.mean, channels.std))
    images = [F.adaptive_avg_pool2d((scale_values(x) - mean) / std, IMG_SIZE) for x, _ in split]
    return torch.stack(images), torch.tensor(split.labels())


def train(x: Tensor, y: Tensor, channels: timm_varchan.ChannelSet, aug: str, gain: float | None,
          epochs: int, seed: int) -> nn.Module:  # fmt: skip
    """Train one network."""
    torch.manual_seed(seed)
    model = timm.create_model(MODEL, num_classes=int(y.max()) + 1)
    for mixer in timm_varchan.models.stems(model):
        mixer.gain = mixer.gain if gain is None else gain
    steps = len(y) // BATCH
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=LR, weight_decay=WEIGHT_DECAY)
    schedule = CosineLRScheduler(optimizer, epochs * steps, warmup_t=steps, t_in_epochs=False)
    for epoch in range(epochs):
        for step, rows in enumerate(torch.randperm(len(y))[: steps * BATCH].split(BATCH)):
            batch = x[rows]
            for axis in (-1, -2):
                flip = torch.rand(len(rows), 1, 1, 1) < 0.5
                batch = torch.where(flip, batch.flip(axis), batch)
            key = DrawKey(seed, epoch, step)
            view = draw_channels(aug, batch, channels, key, identity="named")
            view.tell(model)
            batch = view.planes
            schedule.step_update(epoch * steps + step)
            optimizer.zero_grad()
            F.cross_entropy(model(batch), y[rows]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracies(model: nn.Module, x: Tensor, y: Tensor,
               channels: timm_varchan.ChannelSet) -> dict[str, dict[str, float]]:  # fmt: skip
    """Accuracy in per cent with its 95 % interval on each of `TEST_SETS`."""
    results = {}
    for name in TEST_SETS:
        indices = channels.index(name)
        correct = timm_varchan.share(model, name)(x[:, list(indices)]).argmax(1) == y
        low, high = wilson_interval(int(correct.sum()), len(y))
        results[name] = {"value": 100 * correct.float().mean().item(), "low": 100 * low,
                         "high": 100 * high}  # fmt: skip
    return results


def main() -> None:
    """Train every arm and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--gains", type=float, nargs="+", default=[1, 8, 32])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    data = load_data("synthetic", img_size=2 * IMG_SIZE)
    assert data.train is not None
    assert data.test is not None
    x, y = tensors(data.train, data.channels)
    test_x, test_y = tensors(data.test, data.channels)
    results = {
        "settings": {"model": MODEL, "data": "synthetic", "epochs": args.epochs,
                     "seeds": args.seeds, "train_images": len(y), "test_images": len(test_y)},
        "machine": f"{platform.machine()}, torch {torch.__version__}",
        "arms": {},
    }  # fmt: skip
    arms = [(f"gain {gain:g}, hcs-sample", "hcs-sample", gain) for gain in args.gains]
    for name, aug, gain in [*arms, ("default gain, all bands at every step", "none", None)]:
        seeds = results["arms"][name] = {}
        for seed in args.seeds:
            model = train(x, y, data.channels, aug, gain, args.epochs, seed)
            seeds[str(seed)] = accuracies(model, test_x, test_y, data.channels)
            print(name, seed, {k: f"{v['value']:.1f}" for k, v in seeds[str(seed)].items()},
                  flush=True)  # fmt: skip
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
