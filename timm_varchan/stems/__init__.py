"""Stems: first layers for any number of channels, one mechanism a file."""

from timm_varchan.stems.dwg import DWGMixer
from timm_varchan.stems.mixer import ChannelsLike, Mixer
from timm_varchan.stems.stem import Stem
from timm_varchan.stems.zero_fill import ZeroFillMixer

__all__ = ["MIXERS", "ChannelsLike", "DWGMixer", "Mixer", "Stem", "ZeroFillMixer"]

#: The mixers by the name that `adapt(model, stem=...)` takes.
MIXERS: dict[str, type[Mixer]] = {
    "dwg": DWGMixer,
    "prior": Mixer,
    "zero_fill": ZeroFillMixer,
}
