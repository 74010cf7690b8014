"""Stems: first layers for any number of channels, one mechanism a file."""

from timm_varchan.stems.by_name import MIXERS, make_stem
from timm_varchan.stems.dwg import DWGMixer
from timm_varchan.stems.mixer import ChannelsLike, Mixer
from timm_varchan.stems.stem import Stem
from timm_varchan.stems.zero_fill import ZeroFillMixer

__all__ = [
    "MIXERS",
    "ChannelsLike",
    "DWGMixer",
    "Mixer",
    "Stem",
    "ZeroFillMixer",
    "make_stem",
]
