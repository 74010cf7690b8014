"""Mixer and kernel bank as one module, in the place and under the name of a first convolution."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import Conv2dSame, resample_patch_embed
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.overrides import TorchFunctionMode

from timm_varchan.errors import UserError
from timm_varchan.stems.mixer import ChannelsLike, Mixer

__all__ = ["Stem", "effective_weight", "like_bank"]

#: What backbones and checkpoint filters of timm read from a first convolution.
BANK_NUMBERS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "groups")
BANK_TENSORS = frozenset({"weight", "bias"})


class _RecordWeight(TorchFunctionMode):
    """Notes the weight that a convolution is called with, standardised or not."""

    weight: Tensor | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d:
            self.weight = args[1] if len(args) > 1 else kwargs["weight"]
        return func(*args, **kwargs)


@register_notrace_module
class Stem(nn.Module):
    """A first layer for any number of channels: a mixer before the untouched original convolution.

    `(B, C, H, W) -> (B, out, H', W')`. It loads the state dict of the convolution that it replaced
    as well as its own, and answers for the convolution's attributes where a backbone reads them.
    Tools that look layers up by name find its parts, the bank first, and the stem itself under
    `<name>.stem`: adapters and quantisers that replace `<name>` would take the mixer away with it.

    Args:
        mixer: Makes K virtual channels of C.
        bank: The original convolution for K channels, or the block that begins with it.
        anchors: A convolution without bias for the virtual channels that the bank has no kernels
            for (the last ones), with the bank's output; None: there are none.
    """

    def __init__(self, mixer: Mixer, bank: nn.Module, anchors: nn.Conv2d | None = None) -> None:
        super().__init__()
        # The bank comes first: some programs take the first leaf for the first convolution.
        self.bank = bank
        self.anchors = anchors
        self.mixer = mixer
        self.num_bank: int = mixer.num_virtual - (0 if anchors is None else anchors.in_channels)
        for name in BANK_NUMBERS:
            if hasattr(bank, name):
                setattr(self, name, getattr(bank, name))

    def forward(self, x: Tensor) -> Tensor:
        """Mix, then convolve.

        Raises:
            UserError: The input does not fit the channel set.
            RuntimeError: From the convolution: another floating-point type than its weights have,
                or fewer pixels than its kernel.
        """
        x = self.mixer(x)
        if self.anchors is None:
            return self.bank(x)
        return self.bank(x[:, : self.num_bank]) + self.anchors(x[:, self.num_bank :])

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Forward; for any tracer of torch.fx one node of its graph, under the stem's own name."""
        if isinstance(x, torch.fx.Proxy):
            tracer: Any = x.tracer
            path = tracer.path_of_module(self).removesuffix(".stem")
            if getattr(tracer, "submodule_paths", None):
                tracer.submodule_paths[self] = path
            if not tracer.is_leaf_module(self, path):
                return tracer.create_proxy("call_module", path, (x,), {})
        return super().__call__(x, *args, **kwargs)

    __jit_unused_properties__ = ("stem",)

    @property
    def stem(self) -> "Stem":
        """Itself, so that `get_submodule` finds it by the name of `named_modules`."""
        return self

    def named_modules(
        self,
        memo: set[nn.Module] | None = None,
        prefix: str = "",
        remove_duplicate: bool = True,
    ) -> Iterator[tuple[str, nn.Module]]:
        """As of any module, with itself as `<prefix>.stem`."""
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            yield f"{prefix}.stem" if module is self and prefix else name, module

    def with_bank(self, bank: nn.Conv2d) -> "Stem":
        """A stem with the same mixer and another convolution of as many virtual channels."""
        anchors = self.anchors
        if anchors is not None and anchors.kernel_size != bank.kernel_size:
            old = anchors.weight
            anchors = like_bank(bank, anchors.in_channels)
            with torch.no_grad():
                anchors.weight.copy_(resample_patch_embed(old, list(bank.kernel_size)))
        return type(self)(self.mixer, bank, anchors).train(self.training)

    @torch.jit.ignore
    def set_channels(self, channels: ChannelsLike) -> None:
        """Say which channels the input has (see `Mixer.set_channels`)."""
        self.mixer.set_channels(channels)

    @torch.jit.ignore
    def generated_kernels(self, x: Tensor) -> Tensor:
        """The kernels that the stem applies to the channels of an input.

        For looking at and for tests; the forward pass never makes them.

        Args:
            x: `(B, C, H, W)`.

        Returns:
            `(B or 1, out, C, kh, kw)`, with `W[b, :, c] = sum_k a[b, c, k] bank[:, k]`.

        Raises:
            UserError: The bank is not a single convolution.
        """
        if not isinstance(self.bank, nn.Conv2d):
            raise UserError(
                f"The bank is a {type(self.bank).__name__}, not one convolution, so there is no "
                f"single kernel a channel. Look at stem.mixer.coefficients(x) instead."
            )
        weight = effective_weight(self.bank)
        if self.anchors is not None:
            weight = torch.cat([weight, self.anchors.weight], 1)
        return torch.einsum("bck,okij->bocij", self.mixer.coefficients(x), weight)

    def __getattr__(self, name: str) -> Any:
        """Answer for the bank where a backbone reads attributes of its first convolution."""
        if name in BANK_TENSORS:
            return getattr(self.bank, name)
        return super().__getattr__(name)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Take the keys of the layer that this stem replaced; the mixer then stays as it is."""
        base_keys = [prefix + key for key in self.bank.state_dict()]
        mixed = any(key.startswith(f"{prefix}mixer.") for key in state_dict)
        if not mixed and all(key in state_dict for key in base_keys):
            for key in base_keys:
                state_dict[f"{prefix}bank.{key.removeprefix(prefix)}"] = state_dict.pop(key)
            for name in ("mixer", "anchors"):
                own = getattr(self, name)
                for key, value in ({} if own is None else own.state_dict()).items():
                    state_dict[f"{prefix}{name}.{key}"] = value
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def effective_weight(conv: nn.Conv2d) -> Tensor:
    """The weight `(out, in, kh, kw)` that a convolution applies, standardised or not."""
    size = [d * (k - 1) + 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    with _RecordWeight() as record:
        conv(conv.weight.new_zeros(1, conv.in_channels, *size))
    assert record.weight is not None
    return record.weight


def like_bank(bank: nn.Conv2d, in_channels: int) -> nn.Conv2d:
    """A convolution without bias that answers in the bank's shape, all zero.

    Raises:
        UserError: A bank with groups, whose output belongs to some of its channels.
    """
    if bank.groups != 1 or bank.padding_mode != "zeros":
        raise UserError(
            f"Further virtual channels need an ordinary first convolution, not one with "
            f"{bank.groups} groups and padding {bank.padding_mode!r}."
        )
    kind = Conv2dSame if _pads_same(bank) else nn.Conv2d
    conv = kind(
        in_channels,
        bank.out_channels,
        bank.kernel_size,  # type: ignore[arg-type]
        stride=bank.stride,  # type: ignore[arg-type]
        padding=0 if kind is Conv2dSame else bank.padding,  # type: ignore[arg-type]
        dilation=bank.dilation,  # type: ignore[arg-type]
        bias=False,
        device=bank.weight.device,
        dtype=bank.weight.dtype,
    )
    nn.init.zeros_(conv.weight)
    return conv


def _pads_same(bank: nn.Conv2d) -> bool:
    """Whether a convolution of timm pads as TensorFlow does, depending on the input's size."""
    return isinstance(bank, Conv2dSame) or bool(getattr(bank, "same_pad", False))


def _keep_stem(parent: nn.Module, name: str, module: nn.Module | None) -> nn.Module | None:
    """Where a convolution replaces a stem (timm's `set_input_size`), it becomes its bank."""
    old = parent._modules.get(name)
    if isinstance(old, Stem) and type(module) is type(old.bank) and isinstance(module, nn.Conv2d):
        if module.in_channels == old.num_bank:
            return old.with_bank(module)
    return None


register_module_module_registration_hook(_keep_stem)  # type: ignore[arg-type]  # may return
