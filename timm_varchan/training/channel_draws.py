"""What is done to the channels of a training batch, and what the model is told of it.

Every draw depends on seed, epoch, step and place in the step alone, never on a worker's or a
process's generator: a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from timm_varchan.channels import ANONYMOUS, ChannelSet, seeded_rng

__all__ = ["CHANNEL_AUGS", "ChannelDraw", "DrawKey", "Told", "draw_channels"]

#: What `set_channels` is given: one set, or one a sample.
Told = ChannelSet | tuple[ChannelSet, ...]


@dataclass(frozen=True)
class DrawKey:
    """What a draw depends on.

    Args:
        seed: Of the run.
        epoch: From 0.
        step: In the epoch, from 0; the same on every process.
        start: Place in the step of the batch's first sample, counted over all processes.
    """

    seed: int
    epoch: int
    step: int
    start: int = 0


ChannelDraw = Callable[[Tensor, ChannelSet, DrawKey], tuple[Tensor, Told]]


def _none(x: Tensor, channels: ChannelSet, key: DrawKey) -> tuple[Tensor, Told]:
    """All channels, as they come."""
    return x, channels


def _shuffle(x: Tensor, channels: ChannelSet, key: DrawKey) -> tuple[Tensor, Told]:
    """The planes of every sample in random order, of which the model hears nothing.

    Source: the reference report's channel shuffling (Chia-Ming Lee, Deep Learning Assignment II).
    """
    rows = [
        channels.shuffled_indices(seeded_rng("shuffle", key.seed, key.epoch, key.step, place))
        for place in range(key.start, key.start + len(x))
    ]
    order = torch.tensor(rows, device=x.device)
    return x.gather(1, order[:, :, None, None].expand(-1, -1, *x.shape[2:])), ANONYMOUS


def _hcs(x: Tensor, channels: ChannelSet, key: DrawKey) -> tuple[Tensor, Told]:
    """Hierarchical channel sampling: one subset a step, the same on every process."""
    indices = channels.sample_indices(seeded_rng("hcs", key.seed, key.epoch, key.step))
    return x[:, indices], channels.take(indices)


def _hcs_sample(x: Tensor, channels: ChannelSet, key: DrawKey) -> tuple[Tensor, Told]:
    """Hierarchical channel sampling for each sample: its planes come first, then zeros."""
    chosen = [
        channels.sample_indices(seeded_rng("hcs-sample", key.seed, key.epoch, key.step, place))
        for place in range(key.start, key.start + len(x))
    ]
    longest = max(len(indices) for indices in chosen)
    order = torch.tensor(
        [indices + (0,) * (longest - len(indices)) for indices in chosen], device=x.device
    )
    counts = torch.tensor([len(indices) for indices in chosen], device=x.device)
    absent = torch.arange(longest, device=x.device) >= counts[:, None]
    planes = x.gather(1, order[:, :, None, None].expand(-1, -1, *x.shape[2:]))
    planes = planes.masked_fill(absent[:, :, None, None], 0.0)
    return planes, tuple(channels.take(indices) for indices in chosen)


def _hcs_mask(x: Tensor, channels: ChannelSet, key: DrawKey) -> tuple[Tensor, Told]:
    """For models of a fixed C: the absent channels of a step are zero, the others times C/m.

    Source: the fixed-channel baseline of ChannelViT, arXiv:2309.16108.
    """
    indices = channels.sample_indices(seeded_rng("hcs", key.seed, key.epoch, key.step))
    scale = x.new_zeros(x.shape[1])
    scale[list(indices)] = x.shape[1] / len(indices)
    return x * scale[:, None, None], channels


#: By the name that `--channel-aug` takes.
CHANNEL_AUGS: dict[str, ChannelDraw] = {
    "none": _none,
    "shuffle": _shuffle,
    "hcs": _hcs,
    "hcs-sample": _hcs_sample,
    "hcs-mask": _hcs_mask,
}
#: Those that keep the number of planes, which models without a stem need.
FIXED_COUNT_AUGS = ("none", "shuffle", "hcs-mask")


def draw_channels(
    name: str, x: Tensor, channels: ChannelSet, key: DrawKey, *, identity: str
) -> tuple[Tensor, Told]:
    """Augment the channels of a batch.

    Args:
        name: One of `CHANNEL_AUGS`.
        x: `(B, C, H, W)`, normalised, with all channels.
        channels: What they are.
        key: What the draw depends on.
        identity: `named` or `anonymous`: whether the model is told the names.

    Returns:
        The batch `(B, C', H, W)` and what to tell `set_channels`.
    """
    drawn, told = CHANNEL_AUGS[name](x, channels, key)
    if identity == "named" and not channels.is_anonymous:
        return drawn, told
    if isinstance(told, tuple):
        return drawn, tuple(channel_set.without_identity() for channel_set in told)
    return drawn, ANONYMOUS
