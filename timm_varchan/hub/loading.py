"""Load a model from anywhere, with what its input and output are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models._input import get_model_input_config
from torch import nn

from timm_varchan.channels import FILE_VERSION, RGB, ChannelSet
from timm_varchan.errors import ToolError, UserError
from timm_varchan.hub.folder import CONFIG, WEIGHTS, check_weights, read_config
from timm_varchan.hub.remote import CLIENT_ERRORS, download, hub_reason

#: What timm and its architectures raise on values that make no sense.
_WRONG = (
    TypeError, LookupError, AttributeError, AssertionError, ArithmeticError, MemoryError,
)  # fmt: skip


@dataclass(frozen=True)
class SavedModel:
    """A loaded model and what its input and output are.

    Args:
        model: The model, in evaluation mode.
        channels: Planes of the data that it was trained on, with mean and standard deviation.
        class_names: Name of every class, empty where nobody knows them.
        img_size: Height and width that it was trained at, in pixels.
        crop_pct: Share of the resized image's side that evaluation keeps.
        value_scale: What stored numbers were divided by, where that is not their type's largest.

    Raises:
        UserError: A size or share that none can have, or class names that are no text.
    """

    model: nn.Module
    channels: ChannelSet
    class_names: tuple[str, ...]
    img_size: int
    crop_pct: float
    value_scale: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.crop_pct <= 1 or self.img_size < 1:
            raise UserError(
                f"The configuration names {self.img_size} px and a crop of {self.crop_pct}; needed "
                f"are 1 px or more, and a share above 0 and at most 1."
            )
        if self.value_scale is not None and not 0 < self.value_scale < float("inf"):
            raise UserError(
                f"The configuration's value_scale is {self.value_scale}; it must be above 0."
            )
        if not all(isinstance(name, str) for name in self.class_names):
            raise UserError("The configuration's label names are no texts. Save the model anew.")

    def select(self, spec: str) -> ChannelSet:
        """Read a channel set as people write it; the data's own channels keep their statistics.

        Args:
            spec: As `ChannelSet.parse` takes it, and names that only this model's data has.

        Raises:
            UserError: Unknown or doubled names.
        """
        return ChannelSet.parse(spec, own=self.channels)


def load(source: str | Path, *, cache_dir: str | Path | None = None, **kwargs: Any) -> SavedModel:
    """Load a model by name, from a folder or from the hub; never from a pickle.

    Args:
        source: A name (`"dwg_resnet18"`), a folder or `"local-dir:FOLDER"`, or
            `"hf-hub:ORG/NAME[@REVISION]"`.
        cache_dir: Where downloads are kept.
        **kwargs: What `timm.create_model` takes: `in_chans`, `num_classes`, `features_only`,
            `channel_set`, ...; `pretrained=False` leaves the weights random.

    Returns:
        The model with its channels, class names and image size.

    Raises:
        FileNotFoundError: No such folder, repository or file in it.
        UserError: Pickled weights, a broken configuration, an architecture that is not there,
            weights that do not fit.
        ToolError: The hub cannot be reached or refuses.
    """
    text = str(source)
    kwargs = {"pretrained": True, "cache_dir": cache_dir, **kwargs}
    config: dict[str, Any] = {}
    if text.startswith(("hf-hub:", "hf_hub:")):
        folder: Path | None = download(text.partition(":")[2], cache_dir)
    elif text.startswith("local-dir:"):
        folder = Path(text.removeprefix("local-dir:"))
    else:
        folder = Path(text) if Path(text).is_dir() or isinstance(source, Path) else None
    if folder is not None:
        config = read_config(folder, text)
        check_weights(folder, text)
    elif not timm.is_model(text.partition(".")[0]):
        raise UserError(
            f"There is no model or folder {text!r}. Give a name of timm.list_models(), "
            f"local-dir:FOLDER or hf-hub:ORG/NAME."
        )
    model = _create(text if folder is None else f"local-dir:{folder}", text, kwargs)
    try:
        return _describe(model.eval(), config, kwargs)
    except _WRONG as error:
        raise UserError(
            f"{CONFIG} of {text} describes its input or its classes wrongly ({error}). Save the "
            f"model anew."
        ) from error


def _create(name: str, named: str, kwargs: dict[str, Any]) -> nn.Module:
    """`timm.create_model`, its errors in one line."""
    try:
        return timm.create_model(name, **kwargs)
    except CLIENT_ERRORS as error:
        raise ToolError(
            f"Cannot load the weights of {named}: {hub_reason(error, named)} pretrained=False does "
            f"without."
        ) from error
    except SafetensorError as error:
        raise UserError(
            f"{WEIGHTS} of {named} is damaged ({error}). Download or save it again."
        ) from error
    except (*_WRONG, RuntimeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        detail = lines[1] if len(lines) > 1 and lines[0].endswith(":") else "".join(lines[:1])
        raise UserError(
            f"Cannot load {named}: {detail.rstrip('.')}. The weights, the configuration and the "
            f"arguments ({', '.join(kwargs)}) have to be of one model."
        ) from error


def _describe(model: nn.Module, config: dict[str, Any], kwargs: dict[str, Any]) -> SavedModel:
    """What goes in and comes out, from our configuration or from what timm knows."""
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    return SavedModel(
        model=model,
        channels=_channels(cfg, config, kwargs),
        class_names=_class_names(model, cfg),
        img_size=int(get_model_input_config(model)["input_size"][-1]),
        crop_pct=float(cfg.get("crop_pct") or 1.0),
        value_scale=None if (scale := config.get("value_scale")) is None else float(scale),
    )


def _channels(cfg: dict[str, Any], config: dict[str, Any], kwargs: dict[str, Any]) -> ChannelSet:
    """The channels of the input: those asked for, else those of the data, else RGB."""
    if kwargs.get("channel_set") is not None:
        return ChannelSet.parse(kwargs["channel_set"])
    num = int(kwargs.get("in_chans") or cfg["input_size"][0])
    channels = RGB if num == len(RGB) else ChannelSet.anonymous(num)
    mean, std = cfg.get("mean"), cfg.get("std")
    if mean and std and len(mean) == len(std) == num:
        channels = channels.with_stats(mean, std)
    if not config.get("channels"):
        return channels
    try:
        correlation = config.get("correlation")
        saved = ChannelSet.from_config(
            {"version": FILE_VERSION, "channels": config["channels"], "correlation": correlation}
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"{CONFIG} describes its channels wrongly: {error}") from error
    return saved if len(saved) == num or not kwargs.get("in_chans") else channels


def _class_names(model: nn.Module, cfg: dict[str, Any]) -> tuple[str, ...]:
    """Names from the configuration, else ImageNet's where timm can tell which ImageNet it is."""
    num_classes = int(getattr(model, "num_classes", 0))
    names = cfg.get("label_names") or ()
    if isinstance(names, dict):
        names = [names.get(str(i), str(i)) for i in range(num_classes)]
    if len(names) == num_classes:
        return tuple(names)
    subset = infer_imagenet_subset(model) if num_classes else None
    if not subset:
        return ()
    info = ImageNetInfo(subset)
    return tuple(info.index_to_description(i) for i in range(num_classes))
