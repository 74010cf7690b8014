"""Stems: first layers for any number of channels."""

from timm_varchan.stems.dwg import DWGMixer
from timm_varchan.stems.mixer import ChannelsLike, Mixer
from timm_varchan.stems.stem import STEMS, Stem, make_stem, register_stem

__all__ = [
    "STEMS",
    "ChannelsLike",
    "DWGMixer",
    "Mixer",
    "Stem",
    "make_stem",
    "register_stem",
]
