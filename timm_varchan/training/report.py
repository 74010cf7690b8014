"""What a run says for people at its beginning and at its end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from timm_varchan.channels import ChannelSet, known_channels
from timm_varchan.data import ImageData
from timm_varchan.training.configuration import TrainConfig

__all__ = ["closing", "opening"]


def opening(
    config: TrainConfig, data: ImageData, model: nn.Module, accelerator: Accelerator
) -> str:
    """What is about to be done with what, a line for each, before it takes time.

    Args:
        config: The run.
        data: Its images; channels with mean and standard deviation.
        model: The model, wrapped or not.
        accelerator: Its processes.

    Returns:
        Lines of a label and a text.
    """
    counts = [
        f"{len(split):,} {name}"
        for name, split in (
            ("training", data.train), ("validation", data.validation), ("test", data.test),
        )
        if split is not None
    ]  # fmt: skip
    if data.stream is not None:
        counts.insert(0, "streamed training")
    divided = (
        f"divided by {config.value_scale:g}" if config.value_scale else "of their type's range"
    )
    parameters = sum(p.numel() for p in model.parameters())
    start = "pretrained" if config.pretrained else "random"
    start = "its own" if config.eval_only or ":" in config.model else start
    lines = {
        "data": f"{data.name}, {' + '.join(counts)} images, {len(data.class_names)} classes",
        "channels": _channels(config, data.channels),
        "images": f"{config.pixels} x {config.pixels} px, numbers {divided}",
        "model": f"{config.eval_only or config.model}, {parameters / 1e6:.2f} M parameters, "
        f"{start} weights",
        "training": f"{config.epochs} epochs, batches of {config.batch_size}, channels "
        f"{config.channel_aug} and {config.channel_identity}, seed {config.seed}",
        "device": f"{accelerator.num_processes} x {accelerator.device.type}, precision "
        f"{'float32' if accelerator.mixed_precision == 'no' else accelerator.mixed_precision}",
        "folder": str(config.output_dir),
    }
    if config.eval_only:
        del lines["training"]
    return "\n".join(f"{label:9} {text}" for label, text in lines.items())


def _channels(config: TrainConfig, channels: ChannelSet) -> str:
    """The channels, who says so, and where their mean and deviation are from."""
    if config.channels is not None:
        source = f"as --channels {config.channels} says"
    elif config.eval_only is not None:
        source = "as the model says"
    elif config.dataset == "synthetic":
        source = "as they are made"
    elif channels.labels == ("R", "G", "B"):
        source = "as three planes are taken for"
    elif channels.labels == tuple(f"c{i}" for i in range(len(channels))):
        source = "named by their place"
    else:
        source = "as the files say"
    if config.use is not None:
        source += f", of which --use takes {config.use}"
    known = known_channels()
    usual = all(c.name in known and c == known[c.name] for c in channels)
    given = config.eval_only is not None or str(config.channels).endswith(".json")
    statistics = "given" if given else "of ImageNet" if usual else "measured"
    return f"{len(channels)}: {channels}, {source}; mean and deviation {statistics}"


def closing(results: Mapping[str, Any], folder: Path) -> str:
    """One sentence of what was achieved, and where to look.

    Args:
        results: The content of `results.json`.
        folder: Of the run.
    """
    whole, data = results["evaluation"]["sets"][0], results["data"]
    value, low, high = (100 * whole["accuracy"][key] for key in ("value", "low", "high"))
    classes = len(data["class_names"])
    model = "" if results["training"] is None else f", {folder}/model (the model, with its card)"
    return (
        f"{results['model']['name']} is right on {value:.1f} % (95 % interval {low:.1f} to "
        f"{high:.1f}) of {data['num_images']['evaluated']} {results['evaluation']['split']} images "
        f"with all {whole['size']} channels ({whole['mode']}); chance is {100 / classes:.1f} %. "
        f"Everything is in {folder}/: results.md (tables), channel_sets.png{model}."
    )
