"""Cost of models on channel sets: parameters, operations, sizes, growth with the channels.

    python bench/complexity.py --output complexity.json

Everything is counted on the meta device: any size takes seconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
from schema import write

import timm_varchan
from timm_varchan import RGB, ChannelSet
from timm_varchan.complexity import count_complexity
from timm_varchan.stems import MIXERS, Mixer

#: The report's table counts 50 classes at 224 px.
NUM_CLASSES = 50
MODELS = ("densenet121", "dwg_densenet121", "resnet34", "dwg_resnet34")
COUNTS = (1, 3, 8, 13)


def channel_set(count: int, mixer: type[Mixer]) -> ChannelSet | None:
    """A set of this size that a stem takes: RGB for three, else anonymous, else wavelengths."""
    if count == len(RGB):
        return RGB
    if mixer.supports_anonymous:
        return ChannelSet.anonymous(count)
    if not mixer.supports_unseen:
        return None
    return ChannelSet.parse([400.0 + 50 * i for i in range(count)])


def count_model(name: str, counts: list[int], img_size: int) -> list[dict[str, Any]]:
    """A row for each number of channels; a plain model is built anew for each."""
    rows = []
    for count in counts:
        kwargs = {} if name.startswith("dwg_") else {"in_chans": count}
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=NUM_CLASSES, **kwargs)
        cost = count_complexity(model, channel_set(count, MIXERS["dwg"]), img_size=img_size)
        rows.append({"model": name, **cost.to_json()})
    return rows


def count_stems(name: str, counts: list[int], img_size: int) -> list[dict[str, Any]]:
    """A row for each stem in a plain model and each number of channels that it takes."""
    rows = []
    for stem, mixer in MIXERS.items():
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=NUM_CLASSES)
            timm_varchan.adapt(model, stem)
        taken = [channels for n in counts if (channels := channel_set(n, mixer)) is not None]
        for channels in taken:
            cost = count_complexity(model, channels, img_size=img_size)
            rows.append({"model": f"{name}, stem {stem}", **cost.to_json()})
    return rows


def main() -> None:
    """Parse the command line, count, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="names of timm")
    parser.add_argument("--stems-of", default="densenet121", help="model to put every stem into")
    parser.add_argument("--counts", nargs="+", type=int, default=list(COUNTS))
    parser.add_argument("--img-size", type=int, default=224, help="pixels")
    parser.add_argument("--output", type=Path, required=True, help="result file")
    args = parser.parse_args()
    unknown = [name for name in [*args.models, args.stems_of] if not timm.is_model(name)]
    if unknown:
        parser.error(f"no model of timm: {', '.join(unknown)}. See timm.list_models().")
    rows = [row for name in args.models for row in count_model(name, args.counts, args.img_size)]
    rows += count_stems(args.stems_of, args.counts, args.img_size)
    settings = {"num_classes": NUM_CLASSES, "img_size": args.img_size, "batch_size": 1}
    write(args.output, "complexity", settings, rows=rows)


if __name__ == "__main__":
    main()
