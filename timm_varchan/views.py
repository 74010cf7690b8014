"""One view of a batch: which planes, in which order, and what the model is told of them.

The only place where training, validation, evaluation and benchmarks choose planes. A draw depends
on seed, epoch, step and place in the step alone, never on a worker's or a process's generator: a
resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from timm_varchan.channels import ANONYMOUS, ChannelSet, seeded_rng
from timm_varchan.models import has_stems, set_channels
from timm_varchan.stems.mixer import sent

ORDERS = ("in order", "shuffled")


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
        """
        if self.order == "in order":
            return _take(x, self.indices)
        rows = [
            seeded_rng("plane order", self.seed, position).sample(self.indices, len(self.indices))
            for position in positions[: len(x)]
        ]
        return _permuted(x, torch.tensor(rows))


def _permuted(x: Tensor, order: Tensor) -> Tensor:
    """The planes of each sample in an order of its own, `(B, M)`."""
    place = sent(order, x.device)
    return x.gather(1, place[:, :, None, None].expand(-1, -1, *x.shape[2:]))


def _take(x: Tensor, indices: Sequence[int]) -> Tensor:
    """These planes of a batch, without waiting for its device (which an index by a list does)."""
    if list(indices) == list(range(x.shape[1])):
        return x
    return x.index_select(1, sent(torch.tensor(indices), x.device))


def _named(model: nn.Module, x: Tensor, view: SetView, positions: range) -> Tensor:
    """The model is told the channels; shuffled, the planes move together with their names."""
    order = view.reordered()
    set_channels(model, view.channels.take(order))
    return model(_take(x, order))


def _anonymous(model: nn.Module, x: Tensor, view: SetView, positions: range) -> Tensor:
    """The model is told nothing."""
    set_channels(model, ANONYMOUS)
    return model(view.planes(x, positions))


def _mask(model: nn.Module, x: Tensor, view: SetView, positions: range) -> Tensor:
    """Absent channels are zeros and the rest is scaled by C/m: for models of a fixed C.

    Source: how ChannelViT, arXiv:2309.16108, tests models of a fixed number of channels.
    """
    place = sent(torch.tensor(view.indices), x.device)
    scaled = view.planes(x, positions) * (x.shape[1] / len(view.indices))
    return model(torch.zeros_like(x).index_copy(1, place, scaled))


Mode = Callable[[nn.Module, Tensor, SetView, range], Tensor]

#: How a model can meet a channel set: `(model, full batch, view, positions) -> logits`. Add to it
#: to evaluate another way; the name then goes into `evaluate_channel_sets(modes=...)`.
MODES: dict[str, Mode] = {"named": _named, "anonymous": _anonymous, "mask": _mask}


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

    def uniform(self, purpose: str, num_samples: int, num_columns: int) -> Tensor:
        """Numbers in 0..1, `(num_samples, num_columns)`, of the samples from `start` on."""
        rng = seeded_rng(purpose, self.seed, self.epoch, self.step)
        numbers = np.random.default_rng(rng.getrandbits(64))
        drawn = numbers.random((self.start + num_samples, num_columns))
        return torch.from_numpy(drawn[self.start :])


@dataclass(frozen=True)
class View:
    """Planes, and what a model is told of them.

    Args:
        planes: `(B, C, H, W)`.
        channels: What they are.
        present: `(B, C)`, bool: which of them a sample has; None: all.
    """

    planes: Tensor
    channels: ChannelSet
    present: Tensor | None = None

    def __str__(self) -> str:
        return f"channels {self.channels}" if self.present is None else "mixed channel sets"

    def tell(self, model: nn.Module) -> None:
        """Tell a model with stems; others need not know."""
        if has_stems(model):
            set_channels(model, self.channels, present=self.present)


#: What `--channel-aug` takes. `none`: all channels, as they come. `shuffle`: the planes of every
#: sample in random order, of which the model hears nothing (the reference report's channel
#: shuffling, Chia-Ming Lee, Deep Learning Assignment II). `hcs`: hierarchical channel sampling
#: (ChannelViT, arXiv:2309.16108, section 3.3), one subset a step, the same on every process.
#: `hcs-sample`: the same for each sample; the planes stay where they are. `hcs-mask`: for models of
#: a fixed C, the absent channels of a step are zero, the others times C/m (its baseline there).
CHANNEL_AUGS = ("none", "shuffle", "hcs", "hcs-sample", "hcs-mask")
#: From so many channels on, half of the images show all of them: uniform sampling shows the whole
#: set to one image in C.
MANY_CHANNELS, MANY_FULL_SHARE = 5, 0.5


def full_share_for(num_channels: int) -> float:
    """The fraction of images that training shows whole, beyond those of hierarchical sampling."""
    return MANY_FULL_SHARE if num_channels >= MANY_CHANNELS else 0.0


def _presence(num_samples: int, num_channels: int, key: DrawKey, full_share: float) -> Tensor:
    """Hierarchical channel sampling, `(num_samples, num_channels)`: first the size, then which."""
    drawn = key.uniform("hcs", num_samples, num_channels + 2)
    whole, size, rank = drawn[:, :1], drawn[:, 1:2], drawn[:, 2:].argsort(1).argsort(1)
    return (whole < full_share) | (rank <= (size * num_channels).floor())


def _drawn(name: str, x: Tensor, channels: ChannelSet, key: DrawKey, full_share: float) -> View:
    """The view of a named draw, see `CHANNEL_AUGS`."""
    B, C = x.shape[:2]
    if name == "shuffle":
        order = key.uniform("shuffle", B, C).argsort(1)
        return View(_permuted(x, order), ANONYMOUS)
    if name == "hcs-sample":
        return View(x, channels, _presence(B, C, key, full_share))
    if name == "none":
        return View(x, channels)
    present = _presence(1, C, replace(key, start=0), full_share)[0]  # of the whole step
    if name == "hcs-mask":
        scale = present * (C / present.sum())
        return View(x * sent(scale.to(x.dtype), x.device)[:, None, None], channels)
    indices = present.nonzero()[:, 0].tolist()
    return View(_take(x, indices), channels.take(indices))


def draw_channels(
    name: str,
    x: Tensor,
    channels: ChannelSet,
    key: DrawKey,
    *,
    identity: str,
    full_share: float = 0.0,
    has_absent: bool = False,
) -> View:
    """Augment the channels of a batch.

    Args:
        name: One of `CHANNEL_AUGS`.
        x: `(B, C, H, W)`, normalised, with all channels.
        channels: What they are.
        key: What the draw depends on.
        identity: `named` or `anonymous`: whether the model is told the names.
        full_share: Fraction of images (of steps, where one subset is drawn for all) that show all.
        has_absent: Whether planes that an image does not have are NaN: its other channels are
            drawn from then (`hcs-sample`, `none`).

    Returns:
        The planes and what to tell the model.
    """
    view = _drawn(name, x, channels, key, full_share)
    if has_absent:
        whole = ~x.flatten(2).isnan().any(2).cpu()
        drawn = whole if view.present is None else whole & view.present
        present = torch.where(drawn.any(1, keepdim=True), drawn, whole)
        present |= ~present.any(1, keepdim=True)  # mixed of images that have no channel in common
        view = View(view.planes.nan_to_num(), view.channels, present)
    if identity == "named" and not channels.is_anonymous:
        return view
    nameless = ANONYMOUS if view.present is None else channels.without_identity()
    return replace(view, channels=nameless)
