"""Several channel sets at once over one set of parameters, and statistics per channel set."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from timm_varchan.channels import ChannelSet
from timm_varchan.errors import UserError
from timm_varchan.measure import batches_of
from timm_varchan.models.adapt import set_channels
from timm_varchan.stems import ChannelsLike

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def share(
    model: ModuleT,
    channels: ChannelsLike | Sequence[ChannelSet] = None,
    *,
    bn_buffers: Mapping[str, Tensor] | None = None,
) -> ModuleT:
    """A second module tree over the same parameters and statistics, with its own channel set.

    Training one trains both. Both may run at the same time, also in threads.

    Args:
        model: A model with a stem.
        channels: What `set_channels` takes; for a mixed batch one `ChannelSet` a sample.
        bn_buffers: BatchNorm buffers for this channel set, from `estimate_bn_buffers`; the copy
            then has its own statistics and the model keeps its own.

    Returns:
        The copy.

    Raises:
        UserError: No stem, unsuitable channels, or statistics of another model.
    """
    tensors = itertools.chain(model.parameters(), model.buffers())
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    set_channels(twin, channels)
    if bn_buffers is not None:
        _put_buffers(twin, bn_buffers)
    return twin


def _put_buffers(model: nn.Module, bn_buffers: Mapping[str, Tensor]) -> None:
    """Replace BatchNorm buffers by copies of these, leaving tensors that others share alone."""
    buffers = dict(model.named_buffers())
    for name, value in bn_buffers.items():
        if name not in buffers or buffers[name].shape != value.shape:
            raise UserError(
                f"Buffer {name!r} {tuple(value.shape)} does not fit this model. Make them with "
                f"timm_varchan.estimate_bn_buffers(model, ...) from the same architecture."
            )
        path, _, buffer = name.rpartition(".")
        setattr(model.get_submodule(path), buffer, value.to(buffers[name], copy=True))


@torch.no_grad()
def estimate_bn_buffers(
    model: nn.Module, batches: Iterable[Any], channels: ChannelsLike
) -> dict[str, Tensor]:
    """Estimate BatchNorm's statistics anew for one channel set.

    A network trained on many channel sets has running statistics that mix them all. Estimated
    anew on images of one set, they fit that set. The model itself is not changed.

    Source: post-statistics of universally slimmable networks, arXiv:1903.05134, section 3.4.

    Args:
        model: A model with a stem.
        batches: Of this channel set, from the training data, in any form that `measure_channels`
            takes; each batch counts the same. A few hundred images are enough.
        channels: Which channels they have.

    Returns:
        BatchNorm's buffers by name, for `share(model, channels, bn_buffers=...)`. Empty if the
        model has no BatchNorm.

    Raises:
        UserError: No batches.
    """
    twin = share(model, channels)
    norms = {
        name: module
        for name, module in twin.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    }
    twin.eval()
    for norm in norms.values():
        _renew(norm)
    count = 0
    for batch in batches_of(batches):
        twin(batch)
        count += 1
    if not count:
        raise UserError("No batches to estimate buffers from: pass at least one input.")
    return {
        f"{name}.{buffer}": value.clone()
        for name, norm in norms.items()
        for buffer, value in norm.named_buffers(recurse=False)
    }


def _renew(norm: _BatchNorm) -> None:
    """Give a BatchNorm fresh statistics that average over all batches to come."""
    for name, value in list(norm.named_buffers(recurse=False)):
        setattr(norm, name, torch.zeros_like(value))
    norm.momentum = None
    norm.train()
