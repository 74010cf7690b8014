"""Any timm model on any number, order and subset of input channels."""

from timm_varchan.channels import ANONYMOUS, RGB, Channel, ChannelSet, register_channel
from timm_varchan.version import __version__

__all__ = ["ANONYMOUS", "RGB", "Channel", "ChannelSet", "__version__", "register_channel"]
