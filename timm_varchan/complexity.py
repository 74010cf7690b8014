"""What a model costs on a channel set, counted on the meta device: no memory, no arithmetic."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from timm_varchan.channels import ChannelSet, ChannelSetLike
from timm_varchan.errors import UserError
from timm_varchan.models import set_channels
from timm_varchan.stems import Mixer, Stem

__all__ = ["Complexity", "count_complexity"]


@dataclass(frozen=True)
class Complexity:
    """What a model costs on one channel set.

    Args:
        channels: The channel set as text.
        num_channels: C.
        img_size: Height and width of the input, in pixels.
        batch_size: B; MACs, FLOPs and sizes are of the whole batch.
        params: Parameters of the model.
        stem_params: Those of its first layers, mixer and kernel bank; None where timm does not say
            which they are.
        macs: Multiply-adds of convolutions, matrix products and attention.
        flops: Twice as many.
        stem_macs: The share of the first layers.
        macs_per_added_channel: Growth with one more anonymous channel; None for models of a fixed
            number of channels and stems that take no anonymous ones.
        forward_backward_mb: Size of the activations of all modules with parameters and of as many
            gradients, in 10^6 bytes, as torchinfo defines it. Modules with both parameters and
            children (timm's BatchNorm with activation) are counted too, which torchinfo misses;
            what functions return (the convolution of a `KernelStem`) is in neither.
        params_mb: Size of the parameters, in 10^6 bytes.
    """

    channels: str
    num_channels: int
    img_size: int
    batch_size: int
    params: int
    stem_params: int | None
    macs: int
    flops: int
    stem_macs: int | None
    macs_per_added_channel: int | None
    forward_backward_mb: float
    params_mb: float

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable form."""
        return asdict(self)


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
    mixers = [module for module in twin.modules() if isinstance(module, Mixer)]
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
        one, more = (
            _run(_told(twin, count), (batch_size, count, img_size, img_size), first).macs
            for count in (len(wanted), len(wanted) + 1)
        )
        growth = more - one
    parameters = list(model.parameters())
    stem = {id(p): p.numel() for module in first for p in module.parameters()}
    return Complexity(
        channels=str(wanted),
        num_channels=len(wanted),
        img_size=img_size,
        batch_size=batch_size,
        params=sum(p.numel() for p in parameters),
        stem_params=sum(stem.values()) if first else None,
        macs=counts.macs,
        flops=2 * counts.macs,
        stem_macs=counts.first_macs if first else None,
        macs_per_added_channel=growth,
        forward_backward_mb=2 * counts.output_bytes / 1e6,
        params_mb=sum(p.numel() * p.element_size() for p in parameters) / 1e6,
    )


@dataclass
class _Counts:
    macs: int = 0
    first_macs: int = 0
    output_bytes: int = 0


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode on the meta device; the weights are not copied."""
    memo: dict[int, Any] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        meta = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(meta) if isinstance(tensor, nn.Parameter) else meta
    return copy.deepcopy(model, memo).eval()


def _told(model: nn.Module, num_channels: int) -> nn.Module:
    set_channels(model, ChannelSet.anonymous(num_channels))
    return model


def _first_layers(model: nn.Module) -> list[nn.Module]:
    """The stems, or what timm names as the first convolutions of a plain model."""
    stems: list[nn.Module] = [module for module in model.modules() if isinstance(module, Stem)]
    if stems:
        return stems
    names = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv") or ()
    names = (names,) if isinstance(names, str) else names
    modules = dict(model.named_modules())
    return [modules[name] for name in names if name in modules]


def _run(model: nn.Module, shape: tuple[int, ...], first: list[nn.Module]) -> _Counts:
    """Run once and count."""
    counts, start = _Counts(), 0
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    x = torch.empty(shape, device="meta", dtype=like.dtype)
    # With gradients: without, PyTorch's fast path hides transformer layers from the counter.
    with ExitStack() as stack, torch.enable_grad():
        counter = stack.enter_context(FlopCounterMode(display=False))

        def enter(*_: Any) -> None:
            nonlocal start
            start = counter.get_total_flops()

        def leave(*_: Any) -> None:
            counts.first_macs += (counter.get_total_flops() - start) // 2

        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            counts.output_bytes += _num_bytes(output)

        def hook(add: Callable[[Any], Any], function: Callable[..., None]) -> None:
            stack.callback(add(function).remove)

        for module in first:
            hook(module.register_forward_pre_hook, enter)
            hook(module.register_forward_hook, leave)
        for module in model.modules():
            if module._parameters and any(p is not None for p in module._parameters.values()):
                hook(module.register_forward_hook, note)
        model(x)
        counts.macs = counter.get_total_flops() // 2
    return counts


def _num_bytes(output: Any) -> int:
    """Size of what a module returns."""
    if isinstance(output, Tensor):
        return output.numel() * output.element_size()
    return sum(map(_num_bytes, output)) if isinstance(output, (list, tuple)) else 0
