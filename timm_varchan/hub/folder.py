"""The folder of a saved model: writing it, and refusing what is none."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import timm
from timm.models import save_for_hf
from torch import nn

from timm_varchan.channels import MAX_TEXT_CHANNELS, ChannelSet
from timm_varchan.errors import UserError
from timm_varchan.models import has_stems, set_channels, stems
from timm_varchan.version import __version__

CONFIG, WEIGHTS = "config.json", "model.safetensors"
#: Endings of files that may run code when they are opened.
PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".tar"})


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    class_names: Sequence[str],
    channels: ChannelSet,
    img_size: int,
    crop_pct: float | None = None,
    value_scale: float | None = None,
    files: Iterable[str | Path] = (),
) -> Path:
    """Save a classifier for `load` and `timm.create_model("local-dir:FOLDER", pretrained=True)`.

    The folder is written under another name first, so that it is never half there.

    Args:
        model: A timm model or twin, not wrapped. What `set_channels` told it last is saved too.
        folder: Where to; replaced if it holds a saved model.
        class_names: Name of every class.
        channels: Planes of the data, with mean and standard deviation, for the preprocessing.
        img_size: Height and width that it was trained at, in pixels.
        crop_pct: Share of the resized image's side that evaluation keeps; the architecture's own
            by default.
        value_scale: What stored numbers were divided by, where that is not their type's largest.
        files: Further files to put beside it: results, curves, a model card.

    Returns:
        The folder.

    Raises:
        UserError: The folder holds something else, or a further file is a pickle.
        FileNotFoundError: A further file is not there.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / CONFIG).is_file():
        raise UserError(f"{folder} exists and is no saved model. Choose another folder.")
    _normalise(model)
    beside = [Path(file) for file in files]
    refuse_pickles(beside)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # timm wants the model's own count here; a stem may take the data's channels all the same
    num_channels = int(getattr(model, "in_chans", len(channels)))
    data_config: dict[str, Any] = {"input_size": (num_channels, img_size, img_size)}
    if channels.mean is not None and len(channels) == num_channels:
        data_config |= {"mean": channels.mean, "std": channels.std}
    if crop_pct is not None:
        data_config["crop_pct"] = crop_pct
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        new = Path(temporary) / "new"
        save_for_hf(
            model,
            str(new),
            model_config={
                "label_names": list(class_names),
                "channels": channels.to_config(),
                **_correlation(channels),
                "value_scale": value_scale,
                "timm_varchan": __version__,
            },
            safe_serialization=True,
            data_config=data_config,
        )
        _say_classes_once(new / CONFIG)
        for file in beside:
            shutil.copy(file, new / file.name)
        if folder.exists():
            shutil.move(folder, Path(temporary) / "old")
        os.replace(new, folder)
    return folder


def _say_classes_once(file: Path) -> None:
    """Leave `num_classes` out of the model's arguments: transformers would pass it twice."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config.get("model_args", {}).pop("num_classes", None)
    file.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _correlation(channels: ChannelSet) -> dict[str, Any]:
    """The correlation for the configuration; that of many channels is among the weights."""
    if channels.correlation is None or len(channels) > MAX_TEXT_CHANNELS:
        return {}
    return {"correlation": channels.to_dict()["correlation"]}


def _normalise(model: nn.Module) -> None:
    """Put the channel set into the form that is saved; refuse stems that no architecture has."""
    if not has_stems(model):
        return
    set_channels(model, stems(model)[0].channels)
    architecture = model.pretrained_cfg["architecture"]  # type: ignore[index]
    if not str(architecture).startswith("dwg_"):
        raise UserError(
            f"This {architecture} has a stem that timm.create_model cannot build again (another "
            f"mechanism than 'dwg', or further arguments). Keep its state_dict() and adapt() anew."
        )


def read_config(folder: Path, named: str) -> dict[str, Any]:
    """Read and check `config.json`."""
    file = folder / CONFIG
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no {file}. Give a folder that timm_varchan.hub.save or timm's save_for_hf "
            f"wrote."
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{CONFIG} of {named} is no JSON ({error}). Save the model anew."
        ) from error
    architecture = config.get("architecture") if isinstance(config, dict) else None
    if not isinstance(architecture, str):
        raise UserError(
            f"{CONFIG} of {named} names no architecture, so it is not that of a timm model. Save "
            f"the model with timm_varchan.hub.save, or give another repository."
        )
    if not timm.is_model(architecture):
        raise UserError(
            f"{named} holds a {architecture!r}, which timm {timm.__version__} with timm_varchan "
            f"{__version__} does not have. Install the versions that it was made with."
        )
    return config


def check_weights(folder: Path, named: str) -> None:
    """Refuse a folder without safetensors."""
    if (folder / WEIGHTS).is_file():
        return
    pickles = sorted(file.name for file in folder.glob("*") if file.suffix in PICKLES)
    if pickles:
        raise pickled_error(named, pickles[0])
    raise FileNotFoundError(f"{named} has no {WEIGHTS}. Save the model with timm_varchan.hub.save.")


def pickled_error(named: str, file: str) -> UserError:
    """The error for weights that are a pickle, with the command that converts them."""
    return UserError(
        f"{named} has no {WEIGHTS} but {file}, a pickle, which may run code when opened. If you "
        f'trust it, convert it: python -c "import torch, safetensors.torch as s; '
        f"s.save_file(torch.load('{file}', weights_only=True), '{WEIGHTS}')\""
    )


def refuse_pickles(files: Iterable[Path]) -> None:
    """Refuse files that may run code when they are opened."""
    pickles = sorted(str(file) for file in files if file.suffix in PICKLES)
    if pickles:
        raise UserError(
            f"{pickles[0]} is a pickle, which may run code when opened. Only safetensors are "
            f"saved and pushed: remove it or convert it with safetensors.torch.save_file."
        )
