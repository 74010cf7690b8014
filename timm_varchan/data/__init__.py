"""Data sets, transforms for any number of channels, and batches."""

from timm_varchan.data.cached import cached
from timm_varchan.data.channel_file import read_channels, write_channels
from timm_varchan.data.channel_stats import channel_stats, measure_split
from timm_varchan.data.collate import collate_padded
from timm_varchan.data.images import read_image
from timm_varchan.data.loading import load_data
from timm_varchan.data.split import ImageData, ImageSplit
from timm_varchan.data.streaming import ImageStream, check_workers, stream_data
from timm_varchan.data.synthetic import SYNTHETIC_CHANNELS, SYNTHETIC_CLASSES
from timm_varchan.data.transformed import TransformedSplit
from timm_varchan.data.transforms import eval_transform, scale_values, train_transform

__all__ = [
    "SYNTHETIC_CHANNELS",
    "SYNTHETIC_CLASSES",
    "ImageData",
    "ImageSplit",
    "ImageStream",
    "TransformedSplit",
    "cached",
    "channel_stats",
    "check_workers",
    "collate_padded",
    "eval_transform",
    "load_data",
    "measure_split",
    "read_channels",
    "read_image",
    "scale_values",
    "stream_data",
    "train_transform",
    "write_channels",
]
