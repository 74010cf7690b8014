"""Any timm model on any number, order and subset of input channels.

Importing the package registers a twin `dwg_<architecture>` with timm for every architecture that
begins with a convolution.
"""

import importlib
from typing import Any

from timm_varchan.channels import ANONYMOUS, RGB, Channel, ChannelSet, register_channel
from timm_varchan.filling import fill_missing
from timm_varchan.folding import fold
from timm_varchan.measure import measure_channels
from timm_varchan.models import (
    adapt,
    estimate_bn_buffers,
    expected_error,
    register_model,
    set_channels,
    share,
)
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
    "estimate_bn_buffers",
    "expected_error",
    "fill_missing",
    "fold",
    "measure_channels",
    "register_channel",
    "register_model",
    "set_channels",
    "share",
]

#: Modules that are imported when they are first used: they need much that `import timm` does not.
_LATE = ("export", "hub", "plots", "predict")


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
