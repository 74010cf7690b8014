"""The stems by name, and how one is put before a first convolution."""

from typing import Any

from torch import nn

from timm_varchan.channels import ChannelSet, ChannelSetLike
from timm_varchan.errors import UserError
from timm_varchan.stems.depthwise import DepthwiseMixer
from timm_varchan.stems.dwg import DWGMixer
from timm_varchan.stems.dynamic import DynamicMixer
from timm_varchan.stems.generator import GeneratorMixer
from timm_varchan.stems.gray import GrayMixer
from timm_varchan.stems.hyper import HyperMixer
from timm_varchan.stems.kernels import KernelMixer, KernelStem
from timm_varchan.stems.mixer import Mixer
from timm_varchan.stems.replicate import ReplicateMixer
from timm_varchan.stems.slice import SliceMixer
from timm_varchan.stems.stem import Stem, like_bank
from timm_varchan.stems.template import TemplateMixer
from timm_varchan.stems.zero_fill import ZeroFillMixer

__all__ = ["MIXERS", "make_stem"]

#: The mixers by the name that `adapt(model, stem=...)` takes.
MIXERS: dict[str, type[Mixer]] = {
    "dwg": DWGMixer,
    "prior": Mixer,
    "zero_fill": ZeroFillMixer,
    "replicate": ReplicateMixer,
    "gray": GrayMixer,
    "slice": SliceMixer,
    "template": TemplateMixer,
    "depthwise": DepthwiseMixer,
    "dynamic": DynamicMixer,
    "hyper": HyperMixer,
    "generator": GeneratorMixer,
}


def make_stem(
    name: str,
    bank: nn.Module,
    virtual_channels: ChannelSetLike = "RGB",
    default_channels: ChannelSetLike = "RGB",
    *,
    num_bank: int | None = None,
    **kwargs: Any,
) -> Stem:
    """A stem before a first convolution, on its device and in its type.

    Args:
        name: Key of `MIXERS`.
        bank: The first convolution, or the block that begins with it.
        virtual_channels: What its channels stand for, then those it has no kernels for.
        default_channels: The set an input with as many channels is taken for.
        num_bank: How many of the virtual channels the bank has kernels for; all where None. The
            others get kernels that start at zero.
        **kwargs: Further arguments of the mixer.

    Returns:
        The stem, in the bank's mode (training or evaluation).

    Raises:
        UserError: A mixer that generates whole kernels, before anything but a convolution; further
            virtual channels where there is no single convolution to stand beside.
    """
    virtual = ChannelSet.parse(virtual_channels)
    num_anchors = 0 if num_bank is None else len(virtual) - num_bank
    anchors = None
    if num_anchors > 0:
        if not isinstance(bank, nn.Conv2d):
            raise UserError(
                f"The first layer is a {type(bank).__name__}, not one convolution, so it takes no "
                f"further virtual channels. Name the {num_bank} that it has kernels for."
            )
        anchors = like_bank(bank, num_anchors).requires_grad_(bank.weight.requires_grad)
    like = next(bank.parameters(), None)
    if like is not None:
        kwargs = {"device": like.device, "dtype": like.dtype, **kwargs}
    make = MIXERS[name]
    if not issubclass(make, KernelMixer):
        stem = Stem(make(virtual, default_channels, **kwargs), bank, anchors)
    else:
        weight = getattr(bank, "weight", None)
        shape = (1, 1, 1) if weight is None else (len(weight), *weight.shape[2:])
        mixer = make(virtual, default_channels, kernel_shape=shape, **kwargs)
        stem = KernelStem(mixer, bank, anchors)
    return stem.train(bank.training)
