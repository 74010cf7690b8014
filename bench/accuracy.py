r"""What classifiers keep on every channel set, beside each other and beside experts.

    python bench/accuracy.py --data DIR --model dwg=runs/dwg/model --model zero=runs/zero/model \
        --expert RG=runs/rg/model --output accuracy.json

Models are names of timm, folders or `hf-hub:`; each is told, masked or given slices as it can. All
comparisons are on the same images. `bench/report.py` makes tables and pictures of the result.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paired import Results, by_view, expert_gaps, flips, leave_one_out, pairs, series_rows
from schema import FIELDS, write
from timing import Clock, interleave, spread
from torch import Tensor, nn
from torch.utils.data import DataLoader

from timm_varchan import ANONYMOUS, ChannelSet, adapt, hub, set_channels
from timm_varchan.data import ImageData, ImageSplit, TransformedSplit, eval_transform, load_data
from timm_varchan.evaluation import (
    MAX_SETS,
    MODES,
    ORDERS,
    SetView,
    evaluate_channel_sets,
    predict_channel_sets,
    summarise_sizes,
)
from timm_varchan.models import has_stems, stems
from timm_varchan.stems import MIXERS


def zero(model: nn.Module, x: Tensor, view: SetView, positions: range) -> Tensor:
    """Absent channels are zeros, the rest as it is: `mask` without the scaling by C/m."""
    masked = torch.zeros_like(x)
    masked[:, view.indices] = view.planes(x, positions)
    return model(masked)


def twice(model: nn.Module, x: Tensor, view: SetView, positions: range) -> Tensor:
    """Every channel comes twice, and the model is told nothing."""
    planes = view.planes(x, positions)
    set_channels(model, ANONYMOUS)
    return model(torch.cat([planes, planes], 1))


#: Steps before the timed ones.
WARMUP = 2

MODES |= {"zero": zero, "anonymous, twice": twice}


@dataclass(frozen=True)
class Entrant:
    """A model in the comparison.

    Args:
        name: In the tables.
        source: Where it came from: no path, the last part of it.
        saved: The loaded model.
        channels: The planes of the data that it meets, with its own means and deviations.
        planes: Their positions in the data.
    """

    name: str
    source: str
    saved: hub.SavedModel
    channels: ChannelSet
    planes: tuple[int, ...]

    @property
    def modes(self) -> tuple[str, ...]:
        """How it can meet a channel set."""
        if not has_stems(self.saved.model):
            return ("mask", "zero")
        named = () if self.channels.is_anonymous else ("named",)
        anonymous = all(mixer.supports_anonymous for mixer in stems(self.saved.model))
        return named + (("anonymous", "anonymous, twice") if anonymous else ())


def load_model(source: str) -> hub.SavedModel:
    """A model, or with the prefix `STEM:` a plain one with that stem put into it.

    Raises:
        ValueError: No such model, or a stem that takes one number of channels only.
    """
    stem, _, rest = source.partition(":")
    if stem not in MIXERS:
        return hub.load(source)
    if not MIXERS[stem].any_count:
        raise ValueError(f"The stem {stem} takes one channel set only. Give {rest} as it is.")
    saved = hub.load(rest)
    return replace(saved, model=adapt(saved.model, stem, virtual_channels=saved.channels))


def enter(name: str, source: str, data: ImageData, wanted: str | None = None) -> Entrant:
    """Load a model and fit it to the data.

    Args:
        name: In the tables.
        source: What `load_model` takes.
        data: What it will be evaluated on.
        wanted: The channel set of an expert, None for a model of all channels.

    Raises:
        ValueError: No such model, other classes, channels that the data does not have.
    """
    saved = load_model(source)
    ours, theirs = data.class_names, saved.class_names or data.class_names
    if saved.model.num_classes != len(ours) or tuple(theirs) != tuple(ours):
        raise ValueError(
            f"{name} has {saved.model.num_classes} classes, which are not the {len(ours)} of the "
            f"data. Compare models that were trained on them."
        )
    own = saved.channels if wanted is None else ChannelSet.parse(wanted)
    if len(own) != len(saved.channels):
        raise ValueError(
            f"{name} was trained on {saved.channels}, not on {own}. Give the model of that set."
        )
    if saved.channels.mean is None or saved.channels.std is None:
        raise ValueError(
            f"{name} says no means and deviations. Save it with timm_varchan.hub.save."
        )
    planes = range(len(own)) if data.channels.is_anonymous else data.channels.index(own)
    told = data.channels.take(planes).with_stats(saved.channels.mean, saved.channels.std)
    return Entrant(name, Path(source).name, saved, told, tuple(planes))


@dataclass(frozen=True)
class Batches:
    """Normalised batches of an entrant's planes; can be iterated again."""

    split: ImageSplit
    entrant: Entrant
    img_size: int
    batch_size: int
    workers: int

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches `(B, C, H, W)` and labels `(B,)`."""
        num = len(self.split.channels)
        mean, std = np.zeros(num), np.ones(num)
        mean[list(self.entrant.planes)] = self.entrant.channels.mean
        std[list(self.entrant.planes)] = self.entrant.channels.std
        channels = self.split.channels.with_stats(mean.tolist(), std.tolist())
        crop_pct = self.entrant.saved.crop_pct
        transform = eval_transform(self.img_size, channels, crop_pct=crop_pct)
        loader = DataLoader(
            TransformedSplit(self.split, transform), self.batch_size, num_workers=self.workers
        )
        for x, y in loader:
            yield x[:, self.entrant.planes], y


def whole_correct(batches: Batches) -> np.ndarray:
    """Whether an expert is right, on the set of all its channels, one value an image."""
    entrant = batches.entrant
    everything = tuple(range(len(entrant.channels)))
    view = SetView(entrant.channels, everything, entrant.modes[0], "in order")
    predicted, references = predict_channel_sets(entrant.saved.model, batches, [view])
    return predicted[:, 0] == references


def as_defined(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the fields that a result file has, and no others."""
    (fields,) = FIELDS["accuracy"]["models"][0][name]
    return [{field: row[field] for field in fields} for row in rows]


def compare(
    entrants: list[Entrant], experts: list[Entrant], split: ImageSplit, args: argparse.Namespace
) -> dict[str, Any]:
    """Evaluate everything; `models` and `pairs` of the result file."""

    def batches(entrant: Entrant) -> Batches:
        img_size = args.img_size or entrant.saved.img_size
        return Batches(split, entrant, img_size, args.batch_size, args.workers)

    right = {str(expert.channels): whole_correct(batches(expert)) for expert in experts}
    results: dict[str, Results] = {}
    models = []
    for entrant in entrants:
        evaluated = evaluate_channel_sets(
            entrant.saved.model, batches(entrant), entrant.channels,
            num_classes=entrant.saved.model.num_classes, modes=entrant.modes, orders=ORDERS,
            sets=args.max_sets, seed=args.seed,
        )  # fmt: skip
        own = results[entrant.name] = by_view(evaluated)
        models.append({
            "name": entrant.name, "source": entrant.source, "channels": str(entrant.channels),
            "sets": as_defined("sets", [r.to_json() for r in evaluated]),
            "sizes": as_defined("sizes", [asdict(s) for s in summarise_sizes(evaluated)]),
            "series": series_rows(own),
            "leave_one_out": leave_one_out(own, entrant.channels),
            "flips": flips(own),
            "experts": expert_gaps(own, right),
        })  # fmt: skip
    for model, times in zip(models, time_sizes(entrants, args), strict=True):
        model["latency"] = times
    modes = {entrant.name: entrant.modes for entrant in entrants}
    return {"models": models, "pairs": pairs(results, modes)}


@torch.inference_mode()
def time_sizes(entrants: list[Entrant], args: argparse.Namespace) -> list[list[dict[str, Any]]]:
    """Latency of each entrant for each number of channels, their steps interleaved.

    A model of a fixed number of channels gets all of them, as it does when some are masked.
    """
    times: list[list[dict[str, Any]]] = [[] for _ in entrants]
    clock = Clock(torch.device("cpu"))
    for size in range(1, max(len(entrant.channels) for entrant in entrants) + 1):
        calls = {}
        for number, entrant in enumerate(entrants):
            model, total = entrant.saved.model, len(entrant.channels)
            if size > total:
                continue
            flexible = has_stems(model)
            if flexible:
                set_channels(model, entrant.channels.take(range(size)))
            img_size = args.img_size or entrant.saved.img_size
            x = torch.zeros(args.batch_size, size if flexible else total, img_size, img_size)
            calls[number] = partial(model, x)
        steps = interleave(calls, clock, rounds=args.latency_rounds, warmup=WARMUP)
        for number, seconds in steps.items():
            if seconds:
                ms = spread([1000 * s for s in seconds])
                times[number].append({"num_channels": size, "batch_size": args.batch_size,
                                      "rounds": args.latency_rounds, "ms": ms})  # fmt: skip
    return times


def named(text: str) -> tuple[str, str]:
    """Read `NAME=SOURCE`."""
    name, equals, source = text.partition("=")
    if not (name and equals and source):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=SOURCE")
    return name, source


def main() -> None:
    """Parse the command line, check everything, evaluate, write."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", required=True, help="what timm_varchan.data.load_data takes")
    add("--channels", help="what the planes are; RGB for three, else anonymous")
    add("--split", default="validation", choices=("train", "validation", "test"))
    add("--limit", type=int, help="at most so many images")
    add("--model", type=named, action="append", required=True, metavar="NAME=SOURCE",
        help="a name of timm, a folder, hf-hub:...; STEM:SOURCE puts a stem into it")  # fmt: skip
    add("--expert", type=named, action="append", default=[], metavar="SET=SOURCE")
    add("--img-size", type=int, help="pixels; by default each model's own")
    add("--batch-size", type=int, default=64)
    add("--workers", type=int, default=0)
    add("--max-sets", type=int, default=MAX_SETS, help="sets at most; of more a sample")
    add("--latency-rounds", type=int, default=10, help="timed steps a number of channels; 0: none")
    add("--seed", type=int, default=0, help="of permutations, samples and intervals")
    add("--output", type=Path, required=True, help="result file")
    args = parser.parse_args()
    try:
        data = load_data(args.data, channels=args.channels, limit=args.limit)
        split = getattr(data, args.split)
        if split is None:
            raise ValueError(f"{args.data} has no {args.split} split.")
        if len({name for name, _ in args.model}) < len(args.model):
            raise ValueError("Two models have the same name. Give each its own.")
        entrants = [enter(name, source, data) for name, source in args.model]
        experts = [enter(f"expert {s}", source, data, s) for s, source in args.expert]
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error))
    settings = {
        "data": data.name, "split": args.split, "num_images": len(split),
        "num_classes": len(data.class_names), "img_size": args.img_size,
        "channels": str(data.channels), "max_sets": args.max_sets, "seed": args.seed,
    }  # fmt: skip
    write(args.output, "accuracy", settings, **compare(entrants, experts, split, args))


if __name__ == "__main__":
    main()
