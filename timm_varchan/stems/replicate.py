"""The naive way with missing channels: the mean of the others in their place."""

from typing import Any

from timm_varchan.channels import RGB, ChannelSetLike
from timm_varchan.stems.mixer import Mixer

__all__ = ["ReplicateMixer"]


class ReplicateMixer(Mixer):
    """The fixed prior `mean`: an absent virtual channel is the mean of the channels.

    One channel is replicated.

    Args:
        virtual_channels: What the K planes of the kernel bank stand for.
        default_channels: The set an input with as many channels is taken for.
        **kwargs: `device` and `dtype` of `Mixer`.
    """

    def __init__(
        self,
        virtual_channels: ChannelSetLike = RGB,
        default_channels: ChannelSetLike = RGB,
        **kwargs: Any,
    ) -> None:
        super().__init__(virtual_channels, default_channels, prior="mean", **kwargs)
