"""Which channel sets are evaluated, why each of them, and what people call them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from timm_varchan.channels import ChannelSet, seeded_rng
from timm_varchan.errors import UserError
from timm_varchan.products import natural_sets

ItemT = TypeVar("ItemT")

#: Sets of the default plan at most; up to this many subsets, all of them (5 channels).
DEFAULT_BUDGET = 40
#: With `all`, at most so many channels: every further one doubles the sets.
_MAX_ALL = 16
#: Sets of more channels than this are called by what they lack, or by how many they are.
_FEW = 4


@dataclass(frozen=True)
class PlannedSet:
    """A channel set of an evaluation.

    Args:
        indices: Positions of its planes in the data, ascending.
        kind: `all`, `single`, `without` (all but one), `natural` (RGB, ...), `subset` (one of all
            of its size), `sample` (drawn) or `asked`.
        name: What people call it.
    """

    indices: tuple[int, ...]
    kind: str
    name: str


def set_label(channels: ChannelSet, indices: Sequence[int]) -> str:
    """The channels of the data at these positions as text that no other set of the data has.

    Channels that share their label with another one (doubled wavelengths) or have none are told
    apart by their number in the data, from 1: `#1+#3`, `850nm#2`.
    """
    labels = channels.labels
    shown = [
        f"#{i + 1}" if labels[i] == "?"
        else labels[i] if labels.count(labels[i]) == 1
        else f"{labels[i]}#{i + 1}"
        for i in indices
    ]  # fmt: skip
    return ("" if all(len(text) == 1 for text in shown) else "+").join(shown)


def plan_sets(
    channels: ChannelSet,
    wanted: str | int = "default",
    *,
    seed: int = 0,
    budget: int = DEFAULT_BUDGET,
    also: Iterable[Sequence[int]] = (),
) -> list[PlannedSet]:
    """The sets to evaluate, largest first; all channels are always among them.

    Args:
        channels: All channels of the data.
        wanted: `default`: every subset where there are at most `budget`, else all channels, each
            alone, all but each one, natural sets (RGB, ...) and a sample of the sizes between;
            `all`: every subset; a number: the default plan with so many sets instead; or a text as
            `parse_sets` takes it.
        seed: Of the samples.
        budget: Sets of the default plan at most.
        also: Positions of further sets.

    Returns:
        The sets, each once.

    Raises:
        UserError: Too many sets, or channels that the data does not have.
    """
    text = str(wanted).strip()
    count = len(channels)
    extra = [tuple(sorted(indices)) for indices in also]
    if text == "default":
        chosen = _default(channels, seed, budget - len(extra))
    elif text == "all":
        if count > _MAX_ALL:
            raise UserError(
                f"{count} channels have {2**count - 1:,} subsets. Give a number of sets instead, "
                f"such as 200."
            )
        chosen = channels.subset_indices()
    elif text.isdigit():
        chosen = _default(channels, seed, int(text) - len(extra))
    else:
        extra += parse_sets(channels, text)
        chosen = []
    whole = tuple(range(count))
    natural = {indices: name for name, indices in natural_sets(channels.wavelengths_nm).items()}
    full = len(chosen) == 2**count - 1
    every = sorted({whole, *chosen, *extra}, key=lambda s: (-len(s), s))
    return [
        PlannedSet(s, _kind(s, count, natural, full, s in extra), _name(channels, s, natural))
        for s in every
    ]


def _kind(
    indices: tuple[int, ...],
    count: int,
    natural: dict[tuple[int, ...], str],
    full: bool,
    is_asked: bool,
) -> str:
    """Why a set is evaluated, the first that holds."""
    if len(indices) == count:
        return "all"
    if is_asked:
        return "asked"
    if full:
        return "subset"
    if len(indices) in (1, count - 1):
        return "single" if len(indices) == 1 else "without"
    return "natural" if indices in natural else "sample"


def _name(
    channels: ChannelSet, indices: tuple[int, ...], natural: dict[tuple[int, ...], str]
) -> str:
    count = len(channels)
    if indices in natural:
        return natural[indices]
    if len(indices) == count > _FEW:
        return f"all {count}"
    if count > _FEW and count - len(indices) in (1, 2):
        return f"without {set_label(channels, sorted(set(range(count)) - set(indices)))}"
    return set_label(channels, indices)


def _default(channels: ChannelSet, seed: int, budget: int) -> list[tuple[int, ...]]:
    """Sets that answer questions; of many channels some alone and left out, evenly spread."""
    count = len(channels)
    if 2**count - 1 <= budget:
        return channels.subset_indices()
    whole = tuple(range(count))
    asked = [whole, *natural_sets(channels.wavelengths_nm).values()]
    for i in spread(range(count), max(1, budget * 3 // 8)):
        asked += [(i,), whole[:i] + whole[i + 1 :]]
    chosen = set(list(dict.fromkeys(asked))[: max(1, budget)])
    middle = range(2, count - 1)
    left = max(0, budget - len(chosen))
    if middle and left:
        rounds = math.ceil(left / len(middle))
        for turn in range(rounds):
            sizes = spread(middle, left) if turn == rounds - 1 else list(middle)
            for size in sizes:
                chosen |= _draw(count, size, chosen, seed, turn)
            left -= len(sizes)
    return list(chosen)


def _draw(
    count: int, size: int, chosen: set[tuple[int, ...]], seed: int, turn: int
) -> set[tuple[int, ...]]:
    """A set of a size that is not known yet, none if all are."""
    if sum(len(s) == size for s in chosen) >= math.comb(count, size):
        return set()
    rng = seeded_rng("default sets", seed, size, turn)
    while True:
        drawn = tuple(sorted(rng.sample(range(count), size)))
        if drawn not in chosen:
            return {drawn}


def spread(items: Sequence[ItemT], count: int) -> list[ItemT]:
    """At most so many of the items, the first and the last and others evenly between them."""
    if count >= len(items):
        return list(items)
    if count == 1:
        return [items[len(items) // 2]]
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def parse_sets(channels: ChannelSet, text: str) -> list[tuple[int, ...]]:
    """Positions of channel sets that somebody wrote down.

    Args:
        channels: All channels of the data.
        text: Sets between commas or blanks, each a natural set (`RGB`), names joined by `+`
            (`B04+B08`), a row of single letters (`GB`), or numbers from 1 (`#1+#3`).

    Returns:
        The positions, ascending in each set.

    Raises:
        UserError: Channels that the data does not have.
    """
    natural = natural_sets(channels.wavelengths_nm)
    labels = {set_label(channels, (i,)): i for i in range(len(channels))}
    labels |= {f"#{i + 1}": i for i in range(len(channels))}
    found = []
    for item in (part for part in text.replace(",", " ").split() if part):
        parts = [part for part in item.split("+") if part]
        if item in natural:
            found.append(natural[item])
        elif parts and all(part in labels for part in parts):
            found.append(tuple(sorted({labels[part] for part in parts})))
        elif all(letter in labels for letter in item):
            found.append(tuple(sorted({labels[letter] for letter in item})))
        else:
            found.append(tuple(sorted(channels.index(item))))
    if not found:
        raise UserError("No channel set is named. Give default, all, a number or sets: RGB,B08.")
    return found
