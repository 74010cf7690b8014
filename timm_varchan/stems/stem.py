"""Mixer and kernel bank as one module, in the place and under the name of a first convolution."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from timm_varchan.errors import UserError
from timm_varchan.stems.mixer import ChannelsLike, Mixer

__all__ = ["Stem"]

#: What backbones and checkpoint filters of timm read from a first convolution.
BANK_ATTRIBUTES = frozenset(
    {"weight", "bias", "in_channels", "out_channels", "kernel_size", "stride", "padding"}
)


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

    Args:
        mixer: Makes K virtual channels of C.
        bank: The original convolution for K channels, or the block that begins with it.
    """

    def __init__(self, mixer: Mixer, bank: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer
        self.bank = bank

    def forward(self, x: Tensor) -> Tensor:
        """Mix, then convolve.

        Raises:
            UserError: The input does not fit the channel set.
            RuntimeError: From the convolution: another floating-point type than its weights have,
                or fewer pixels than its kernel.
        """
        return self.bank(self.mixer(x))

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
        with _RecordWeight() as record:
            self.bank(self.mixer(x))
        assert record.weight is not None
        return torch.einsum("bck,okij->bocij", self.mixer.coefficients(x), record.weight)

    def __getattr__(self, name: str) -> Any:
        """Answer for the bank where a backbone reads attributes of its first convolution."""
        if name in BANK_ATTRIBUTES:
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
            for key, value in self.mixer.state_dict().items():
                state_dict[f"{prefix}mixer.{key}"] = value
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
