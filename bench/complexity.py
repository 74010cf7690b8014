"""What a model costs on a channel set, counted on the meta device: no memory, no arithmetic."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from timm_varchan.channels import ChannelSet, ChannelSetLike
from timm_varchan.errors import UserError
from timm_varchan.models import has_stems, set_channels, stems
from timm_varchan.stems import Stem

__all__ = ["Complexity", "count_complexity"]


@dataclass(frozen=True)
class Complexity:
    """What a batch costs on one channel set; sizes are in 10^6 bytes.

    Args:
        params: Parameters of the model.
        macs: Multiply-adds of convolutions, matrix products and attention.
        macs_per_added_channel: Growth with one more anonymous channel; None for models of a fixed
            number of channels and stems that take no anonymous ones.
        stem_macs: The share of the first layers, mixer and kernel bank; None where timm does not
            say which they are.
        forward_backward_mb: Size of the activations of all modules with parameters and of as many
            gradients, as torchinfo defines it. Modules with both parameters and children (timm's
            BatchNorm with activation) are counted too, which torchinfo misses.
        params_mb: Size of the parameters.
    """

    params: int
    macs: int
    macs_per_added_channel: int | None
    stem_macs: int | None
    forward_backward_mb: float
    params_mb: float


def count_complexity(
    model: nn.Module, channels: ChannelSetLike, *, img_size: int = 224, batch_size: int = 1
) -> Complexity:
    """Count parameters, operations and sizes of a model on one channel set.

    Operations by `torch.utils.flop_counter`, which sees functional convolutions and products too.

    Args:
        model: On any device, also meta; it is not changed.
        channels: The channel set; `ChannelSet.anonymous(n)` for n channels without identity.
        img_size: Height and width of the input, in pixels.
        batch_size: Images at once.

    Returns:
        The counts.

    Raises:
        UserError: A channel set without a count, or one that the model does not take.
    """
    wanted = ChannelSet.parse(channels)
    if not len(wanted):
        raise UserError(f"The set {wanted} has no count. Give ChannelSet.anonymous(n).")
    twin = _on_meta(model)
    mixers = stems(twin) if has_stems(twin) else []
    if not mixers and getattr(model, "in_chans", len(wanted)) != len(wanted):
        raise UserError(
            f"The model takes {model.in_chans} channels, the set {wanted} has {len(wanted)}. "
            f"Create it with in_chans={len(wanted)}, or put a stem into it by timm_varchan.adapt."
        )
    if mixers:
        set_channels(twin, wanted)
    shape = (batch_size, len(wanted), img_size, img_size)
    first = _first_layers(twin)
    counts = _run(twin, shape, first)
    growth = None
    if mixers and all(mixer.supports_anonymous for mixer in mixers):
        fewer, more = (
            _run(twin, (batch_size, count, img_size, img_size), first, anonymous=True).macs
            for count in (len(wanted), len(wanted) + 1)
        )
        growth = more - fewer
    parameters = list(model.parameters())
    return Complexity(
        params=sum(p.numel() for p in parameters),
        macs=counts.macs,
        macs_per_added_channel=growth,
        stem_macs=counts.first_macs if first else None,
        forward_backward_mb=2 * counts.output_bytes / 1e6,
        params_mb=sum(p.numel() * p.element_size() for p in parameters) / 1e6,
    )


class _Counts(NamedTuple):
    macs: int
    first_macs: int
    output_bytes: int


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode on the meta device; the weights are not copied."""
    memo: dict[int, Any] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        meta = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(meta) if isinstance(tensor, nn.Parameter) else meta
    return copy.deepcopy(model, memo).eval()


def _first_layers(model: nn.Module) -> list[nn.Module]:
    """The stems, or what timm names as the first convolutions of a plain model."""
    found: list[nn.Module] = [module for module in model.modules() if isinstance(module, Stem)]
    if found:
        return found
    names = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv") or ()
    names = (names,) if isinstance(names, str) else names
    modules = dict(model.named_modules())
    return [modules[name] for name in names if name in modules]


def _run(
    model: nn.Module, shape: tuple[int, ...], first: list[nn.Module], anonymous: bool = False
) -> _Counts:
    """Run once and count."""
    if anonymous:
        set_channels(model, ChannelSet.anonymous(shape[1]))
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    x = torch.empty(shape, device="meta", dtype=like.dtype)
    # Not the counter's counts a module: a stem stands under another name than its own.
    marks: list[int] = []
    sizes: list[int] = []

    def mark(*_: Any) -> None:
        marks.append(counter.get_total_flops())

    def measure(module: nn.Module, inputs: Any, output: Any) -> None:
        sizes.append(_num_bytes(output))

    hooks = [module.register_forward_pre_hook(mark) for module in first]
    hooks += [module.register_forward_hook(mark) for module in first]
    hooks += [
        module.register_forward_hook(measure)
        for module in model.modules()
        if any(parameter is not None for parameter in module._parameters.values())
    ]
    # With gradients: without, PyTorch's fast path hides transformer layers from the counter.
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    for hook in hooks:
        hook.remove()
    first_flops = sum(marks[1::2]) - sum(marks[::2])
    return _Counts(counter.get_total_flops() // 2, first_flops // 2, sum(sizes))


def _num_bytes(output: Any) -> int:
    """Size of what a module returns."""
    if isinstance(output, Tensor):
        return output.numel() * output.element_size()
    return sum(map(_num_bytes, output)) if isinstance(output, (list, tuple)) else 0
