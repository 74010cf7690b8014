"""How a model meets a channel set: which planes, in which order, and what it is told."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from timm_varchan.channels import ANONYMOUS, ChannelSet, seeded_rng
from timm_varchan.errors import UserError
from timm_varchan.models import set_channels

__all__ = ["MAX_SETS", "MODES", "ORDERS", "Mode", "SetView", "choose_sets"]

ORDERS = ("in order", "shuffled")
#: All subsets are evaluated up to this many (8 channels); of more, a sample for each size.
MAX_SETS = 255


@dataclass(frozen=True)
class SetView:
    """One channel set as one row of the results sees it.

    Args:
        channels: All planes of the loader's batches.
        indices: Which of them are there.
        mode: How the model meets the set: a key of `MODES`.
        order: One of `ORDERS`.
        seed: Of the permutations.
    """

    channels: ChannelSet
    indices: tuple[int, ...]
    mode: str
    order: str
    seed: int = 0

    @property
    def channel_set(self) -> ChannelSet:
        """The channels that are there."""
        return self.channels.take(self.indices)

    def reordered(self) -> tuple[int, ...]:
        """The indices in one order other than the given, where the view is shuffled."""
        if self.order == "in order" or len(self.indices) < 2:
            return self.indices
        rng = seeded_rng("set order", self.seed, *self.indices)
        drawn = self.indices
        while drawn == self.indices:
            drawn = tuple(rng.sample(self.indices, len(self.indices)))
        return drawn

    def planes(self, x: Tensor, positions: range) -> Tensor:
        """The planes that are there, permuted anew for every image where the view is shuffled.

        The permutation depends on the image's place in the data alone, not on batches or processes.

        Args:
            x: `(B, C, H, W)`.
            positions: Places of the images in the data.

        Returns:
            `(B, len(indices), H, W)`.
        """
        if self.order == "in order":
            return x[:, self.indices]
        rows = [
            seeded_rng("plane order", self.seed, position).sample(self.indices, len(self.indices))
            for position in positions[: len(x)]
        ]
        place = torch.tensor(rows, device=x.device)
        return x.gather(1, place[:, :, None, None].expand(-1, -1, *x.shape[2:]))


def _named(model: nn.Module, x: Tensor, view: SetView, positions: range) -> Tensor:
    """The model is told the channels; shuffled, the planes move together with their names."""
    order = view.reordered()
    set_channels(model, view.channels.take(order))
    return model(x[:, order])


def _anonymous(model: nn.Module, x: Tensor, view: SetView, positions: range) -> Tensor:
    """The model is told nothing."""
    set_channels(model, ANONYMOUS)
    return model(view.planes(x, positions))


def _mask(model: nn.Module, x: Tensor, view: SetView, positions: range) -> Tensor:
    """Absent channels are zeros and the rest is scaled by C/m: for models of a fixed C.

    Source: how ChannelViT, arXiv:2309.16108, tests models of a fixed number of channels.
    """
    masked = torch.zeros_like(x)
    masked[:, view.indices] = view.planes(x, positions) * (x.shape[1] / len(view.indices))
    return model(masked)


Mode = Callable[[nn.Module, Tensor, SetView, range], Tensor]

#: How a model can meet a channel set: `(model, full batch, view, positions) -> logits`. Add to it
#: to evaluate another way; the name then goes into `evaluate_channel_sets(modes=...)`.
MODES: dict[str, Mode] = {"named": _named, "anonymous": _anonymous, "mask": _mask}


def choose_sets(
    channels: ChannelSet, *, max_sets: int = MAX_SETS, seed: int = 0
) -> list[tuple[int, ...]]:
    """Positions of the subsets to evaluate, largest first.

    Args:
        channels: All channels.
        max_sets: Every subset where there are at most so many; else a sample that is divided
            evenly over the sizes.
        seed: Of the sample.

    Returns:
        The subsets.

    Raises:
        UserError: Fewer sets than sizes.
    """
    count = len(channels)
    if max_sets < count:
        raise UserError(f"{max_sets} sets are too few for {count} sizes: allow {count} or more.")
    if 2**count - 1 <= max_sets:
        return channels.subset_indices()
    each = max_sets // count
    chosen: list[tuple[int, ...]] = []
    for size in range(count, 0, -1):
        if math.comb(count, size) <= each:
            chosen += channels.subset_indices(size)
            continue
        rng, drawn = seeded_rng("sets", seed, size), set[tuple[int, ...]]()
        while len(drawn) < each:
            drawn.add(tuple(sorted(rng.sample(range(count), size))))
        chosen += sorted(drawn)
    return chosen
