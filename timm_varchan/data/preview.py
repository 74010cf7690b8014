"""What training would see of a source: images, channels, counts, and what speaks against it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from timm_varchan.channels import ChannelSet, seeded_rng
from timm_varchan.data.dataset import ImageData, ImageSplit, measure_split
from timm_varchan.data.transforms import scale_values
from timm_varchan.errors import UserError
from timm_varchan.products import PRODUCTS

__all__ = ["Example", "Preview", "order_problem", "preview_data"]

#: Images of the training split that are measured, and shown of every split.
_NUM_MEASURED, NUM_SHOWN = 100, 4
#: A plane that fits another wavelength by so much of correlation is said to be at the wrong place;
#: bands of Sentinel-2 in their own order reach 0.1, with B8A at the wrong end 0.7.
_GAIN = 0.3


class Example(NamedTuple):
    """An image as training reads it.

    Args:
        image: `(C, H, W)`, scaled, NaN where there is no data.
        name: Its file.
        class_name: Its class.
    """

    image: Tensor
    name: str
    class_name: str


@dataclass(frozen=True)
class Preview:
    """What a look at a data set found.

    Args:
        name: The data.
        channels: With mean, deviation and correlation of some images.
        examples: Some images of every split.
        counts: Images of every class by split.
        lines: What is to be said: scale, what was left out, assumed, contradicted.
    """

    name: str
    channels: ChannelSet
    examples: dict[str, list[Example]]
    counts: dict[str, Counter[str]]
    lines: tuple[str, ...]

    @property
    def title(self) -> str:
        """Splits and classes in one line."""
        sizes = ", ".join(f"{split} {counts.total():,}" for split, counts in self.counts.items())
        num_classes = len(set().union(*self.counts.values()))
        return f"{self.name}: {sizes} images of {num_classes} classes"


def preview_data(data: ImageData) -> Preview:
    """Look at some images of every split, the way training reads them.

    Raises:
        UserError: What training would refuse too.
    """
    lines = list(data.notes)
    examples = {name: _examples(data, split, lines) for name, split in data.splits.items()}
    first = next(iter(data.splits.values()))
    try:
        channels, invalid = measure_split(first, _NUM_MEASURED)
    except UserError as error:
        lines.append(f"Training would refuse this: {error}")
        channels, invalid = data.channels, ()
    lines.insert(0, _scaling(data, first))
    if any(invalid):
        lines.append(f"{np.mean(invalid):.1%} of the pixels hold no data: {data.spec.no_data}.")
    lines += filter(None, [order_problem(channels)])
    counts = {
        name: Counter(data.class_names[label] for label in split.labels())
        for name, split in data.splits.items()
    }
    few = [f"{n} ({c})" for n, c in counts[next(iter(counts))].items() if c < 5]
    if few:
        lines.append(f"Classes with fewer than 5 images: {', '.join(sorted(few)[:10])}.")
    return Preview(data.name, channels, examples, counts, tuple(dict.fromkeys(lines)))


def _examples(data: ImageData, split: ImageSplit, lines: list[str]) -> list[Example]:
    """Images of different classes, as far as they can be read."""
    labels, found, seen = split.labels(), list[Example](), set[int]()
    num_new = min(NUM_SHOWN, len(set(labels)))
    for index in seeded_rng("preview").sample(range(len(split)), len(split)):
        if labels[index] in seen and len(seen) < num_new:
            continue
        try:
            image = scale_values(split[index][0])
        except UserError as error:
            lines.append(f"Training would refuse this: {error}")
            break
        found.append(Example(image, split.name(index), data.class_names[labels[index]]))
        seen.add(labels[index])
        if len(found) == NUM_SHOWN:
            break
    return found


def _scaling(data: ImageData, split: ImageSplit) -> str:
    """What the stored numbers are divided by, and why."""
    scale, offset = data.channels.value_scale, data.channels.value_offset
    try:
        kind = split[0][0].dtype
    except UserError:
        kind = None
    if scale is not None or offset:
        plus = f"plus {offset:g}, " if offset else ""
        how = f"{plus}divided by {scale or 1:g}, as --value-scale says"
    elif kind in (torch.uint8, torch.uint16):
        bits = 8 if kind == torch.uint8 else 16
        how = f"divided by {2**bits - 1}, the range of {bits} bits"
    else:
        how = "as they are, or by what the files say of their scale"
    return f"Channels in this order: {data.channels}. Stored numbers are taken {how}."


def order_problem(channels: ChannelSet) -> str | None:
    """Why the order of the planes is hardly the right one: neighbours in wavelength are alike.

    Args:
        channels: With the correlation of the images.

    Returns:
        A sentence that names the plane that fits another place better, and the product whose order
        would; None where nothing speaks against the order.
    """
    if channels.correlation is None or len(channels) < 4 or None in channels.wavelengths_nm:
        return None
    alike, count = np.array(channels.correlation), len(channels)
    by_length = np.argsort(np.array(channels.wavelengths_nm, float))

    def score(order: list[int]) -> float:
        planes = np.array(order)[by_length]
        return float(alike[planes[:-1], planes[1:]].sum())

    def moved(start: int, stop: int) -> list[int]:
        order = list(range(count))
        order.insert(stop, order.pop(start))
        return order

    as_is = score(list(range(count)))
    moves = ((score(moved(i, j)) - as_is, i, j) for i in range(count) for j in range(count))
    gain, start, stop = max(moves)
    if gain < _GAIN:
        return None
    names = list(channels.names)
    better = [
        name
        for name, product in PRODUCTS.items()
        if sorted(product.bands) == sorted(map(str, names))
        and score([product.bands.index(str(n)) for n in names]) > as_is + _GAIN
    ]
    cure = f" --channels {better[0]} has an order that fits." if better else ""
    return (
        f"The order of the channels is doubtful: plane {start + 1}, called "
        f"{channels.labels[start]}, resembles its neighbours in wavelength better as "
        f"{channels.labels[stop]} (their correlations sum to {gain:.2f} more).{cure}"
    )
