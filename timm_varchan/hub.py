"""Models in the hub's form: a folder with `config.json` and `model.safetensors`."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from timm.models import save_for_hf
from torch import nn

from timm_varchan.channels import ChannelSet

__all__ = ["save_model"]


def save_model(
    model: nn.Module,
    folder: str | Path,
    *,
    class_names: Sequence[str],
    channels: ChannelSet,
    img_size: int,
) -> Path:
    """Save a classifier for `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    The folder is written under another name first, so that it is never half there.

    Args:
        model: A timm model or twin, not wrapped. What `set_channels` told it last is saved too.
        folder: Where to; replaced if it holds a saved model.
        class_names: Name of every class.
        channels: Planes of the data, with mean and standard deviation, for the preprocessing.
        img_size: Height and width that it was trained at.

    Returns:
        The folder.

    Raises:
        ValueError: The folder holds something else.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} exists and is no saved model. Choose another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    data_config: dict[str, object] = {"input_size": (len(channels), img_size, img_size)}
    if channels.mean is not None:
        data_config |= {"mean": channels.mean, "std": channels.std}
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        new = Path(temporary) / "new"
        save_for_hf(
            model,
            str(new),
            model_config={"label_names": list(class_names)},
            safe_serialization=True,
            data_config=data_config,
        )
        if folder.exists():
            shutil.move(folder, Path(temporary) / "old")
        os.replace(new, folder)
    return folder
