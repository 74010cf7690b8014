"""Data sets, transforms for any number of channels, and batches."""

from timm_varchan.errors import needs

with needs("train"):
    from timm_varchan.data.dataset import (
        ImageData,
        ImageSplit,
        TransformedSplit,
        cached,
        channel_stats,
        load_data,
        load_fingerprints,
        measure_split,
        save_fingerprints,
        unseen,
    )
    from timm_varchan.data.preview import Preview, preview_data
    from timm_varchan.data.reading import Reading, read_image
    from timm_varchan.data.sources import find_images
    from timm_varchan.data.streaming import ImageStream, check_workers, stream_data
    from timm_varchan.data.synthetic import SYNTHETIC_CHANNELS, SYNTHETIC_CLASSES
    from timm_varchan.data.transforms import (
        eval_transform,
        scale_values,
        train_transform,
    )

__all__ = [
    "SYNTHETIC_CHANNELS",
    "SYNTHETIC_CLASSES",
    "ImageData",
    "ImageSplit",
    "ImageStream",
    "Preview",
    "Reading",
    "TransformedSplit",
    "cached",
    "channel_stats",
    "check_workers",
    "eval_transform",
    "find_images",
    "load_data",
    "load_fingerprints",
    "measure_split",
    "preview_data",
    "read_image",
    "save_fingerprints",
    "scale_values",
    "stream_data",
    "train_transform",
    "unseen",
]
