"""Training on small images that are decoded once: data, augmentation, loop, intervals."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import timm.optim
import torch
import torch.nn.functional as F
from PIL import Image
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from timm_varchan import RGB

BATCH, WEIGHT_DECAY, SMOOTHING = 128, 0.05, 0.1


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

    def split(self, num_aside: int) -> tuple[Images, Images]:
        """The first so many images of each class, and the others."""
        rank = torch.empty_like(self.y)
        for label in self.y.unique():
            rows = (self.y == label).nonzero()[:, 0]
            rank[rows] = torch.arange(len(rows))
        aside = rank < num_aside
        return Images(self.x[aside], self.y[aside]), Images(self.x[~aside], self.y[~aside])


def _tables(folder: Path) -> datasets.DatasetDict:
    """The splits as they are stored."""
    files = {name: str(folder / f"{name}.parquet") for name in ("train", "validation")}
    return datasets.load_dataset("parquet", data_files=files)


def class_names(folder: Path) -> list[str]:
    """The names of all classes."""
    return list(_tables(folder)["train"].features["label"].names)


def load(folder: Path, num_classes: int, img_size: int) -> tuple[Images, Images]:
    """Training images, and test images: 100 training images a class set aside, and validation."""
    splits = {}
    for name, split in _tables(folder).items():
        split = split.cast_column("image", datasets.Image(decode=False))
        labels = np.array(split["label"])
        keep = np.flatnonzero(labels < num_classes)
        x = np.empty((len(keep), 3, img_size, img_size), np.uint8)
        for row, record in enumerate(split.select(keep)["image"]):
            image = Image.open(io.BytesIO(record["bytes"])).convert("RGB")
            image = image.resize((img_size, img_size), Image.Resampling.BOX)
            x[row] = np.asarray(image).transpose(2, 0, 1)
        splits[name] = Images(torch.from_numpy(x), torch.from_numpy(labels[keep]))
    aside, train = splits["train"].split(100)
    validation = splits["validation"]
    return train, Images(torch.cat([aside.x, validation.x]), torch.cat([aside.y, validation.y]))


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


def fit(
    model: nn.Module,
    data: Images,
    *,
    lr: float,
    epochs: int,
    warmup_epochs: float,
    seed: int,
    prepare: Callable[[Tensor, int, int], Tensor],
    evaluate: Callable[[], float],
    bfloat16: bool = False,
) -> list[dict[str, float]]:
    """Train by AdamW with a cosine schedule and cross entropy with label smoothing.

    Args:
        model: In channels-last format.
        data: Training images.
        lr: Highest learning rate.
        epochs: How many; each drops the last, smaller batch.
        warmup_epochs: Over which the learning rate rises from zero.
        seed: Of order and augmentation.
        prepare: Input of the model from an augmented batch, epoch and step.
        evaluate: Accuracy on held-out images, in per cent; called after each epoch.
        bfloat16: Whether convolutions and products are computed in it (autocast).

    Returns:
        By epoch the loss, the accuracies in per cent and images per second.
    """
    steps = len(data.y) // BATCH
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=lr, weight_decay=WEIGHT_DECAY)
    schedule = CosineLRScheduler(
        optimizer, epochs * steps, warmup_t=int(warmup_epochs * steps), t_in_epochs=False
    )
    history = []
    for epoch in range(epochs):
        model.train()
        generator = torch.Generator().manual_seed(seed * 1000 + epoch)
        order = torch.randperm(len(data.y), generator=generator)[: steps * BATCH]
        total, right, start = 0.0, 0, time.perf_counter()
        for step, (x, y) in enumerate(data.batches(BATCH, order)):
            x = prepare(augment(x, generator), epoch, step)
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                logits = model(x.contiguous(memory_format=torch.channels_last)).float()
            loss = F.cross_entropy(logits, y, label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step_update(epoch * steps + step + 1)
            total += loss.item()
            right += int((logits.argmax(1) == y).sum())
        rate = steps * BATCH / (time.perf_counter() - start)
        history.append({
            "epoch": epoch + 1,
            "train_loss": total / steps,
            "train_accuracy": 100 * right / (steps * BATCH),
            "test_accuracy": evaluate(),
        })  # fmt: skip
        print({k: round(v, 3) for k, v in history[-1].items()}, f"{rate:.0f} images/s", flush=True)
    return history


def interval(per_image: np.ndarray) -> dict[str, float]:
    """Mean of a per-image figure with its 95 % interval over the choice of images, in per cent."""
    mean, error = 100 * per_image.mean(), 100 * per_image.std(ddof=1) / len(per_image) ** 0.5
    return {"mean": mean, "low": mean - 1.96 * error, "high": mean + 1.96 * error}
