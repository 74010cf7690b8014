"""timm models with stems for any number of channels."""

from timm_varchan.models import rrdb as rrdb  # isort: skip  # before the twins, which it shall have
from timm_varchan.models.adapt import (
    adapt,
    choose_virtual_channels,
    has_stems,
    set_channels,
    stems,
    unexplained_variance,
)
from timm_varchan.models.dwg_twins import register_model
from timm_varchan.models.share import estimate_bn_buffers, share

__all__ = [
    "adapt",
    "choose_virtual_channels",
    "estimate_bn_buffers",
    "has_stems",
    "register_model",
    "set_channels",
    "share",
    "stems",
    "unexplained_variance",
]
