"""Any timm model on any number, order and subset of input channels.

Importing the package registers a twin `dwg_<architecture>` with timm for every architecture that
begins with a convolution.
"""

from timm_varchan.channels import ANONYMOUS, RGB, Channel, ChannelSet, register_channel
from timm_varchan.models import adapt, channel_statistics, set_channels, share
from timm_varchan.stems import DWGMixer, Stem
from timm_varchan.version import __version__

__all__ = [
    "ANONYMOUS",
    "RGB",
    "Channel",
    "ChannelSet",
    "DWGMixer",
    "Stem",
    "__version__",
    "adapt",
    "channel_statistics",
    "register_channel",
    "set_channels",
    "share",
]
