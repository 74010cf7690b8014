"""The model of a configuration."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import is_model, model_entrypoint, resolve_model_input_args
from torch import nn

from timm_varchan.channels import RGB, ChannelSet
from timm_varchan.data import ImageData
from timm_varchan.errors import UserError
from timm_varchan.hub import load
from timm_varchan.models import adapt, choose_virtual_channels, has_stems
from timm_varchan.training.configuration import TrainConfig
from timm_varchan.views import FIXED_COUNT_AUGS

__all__ = ["architecture", "build_model"]


def build_model(config: TrainConfig, data: ImageData) -> nn.Module:
    """The model to train, for the data's channels and classes.

    Raises:
        UserError: An unknown model, one that cannot be loaded, or an augmentation that changes
            the number of planes for a model without a stem.
    """
    resolved = _resolve(config)
    kwargs: dict[str, Any] = {"num_classes": len(data.class_names), "in_chans": len(data.channels)}
    if resolved["pretrained_cfg"]["fixed_input_size"]:
        kwargs["img_size"] = config.pixels
    kwargs |= _channel_names(resolved, data.channels) | _prediction(config, resolved, data.channels)
    if config.drop_path:
        kwargs["drop_path_rate"] = config.drop_path
    if config.adapt:
        del kwargs["in_chans"]  # the stem's kernels stay those of the saved model
    kwargs |= config.model_kwargs
    model = _load(config, kwargs)
    if config.adapt:
        statistics = _statistics(data.channels)
        adapt(model, in_chans=len(data.channels), **_words(data.channels), **statistics)
    if config.grad_checkpointing:
        model.set_grad_checkpointing()  # type: ignore[operator]  # every timm model has it
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    if not has_stems(model) and config.channel_aug not in FIXED_COUNT_AUGS:
        raise UserError(_fixed_count(config, architecture(model)))
    return model.train()


def _load(config: TrainConfig, kwargs: dict[str, Any]) -> nn.Module:
    try:
        return load(
            config.model, pretrained=config.pretrained or ":" in config.model, **kwargs
        ).model
    except ValueError as error:
        if config.drop_path and "drop_path_rate" in str(error.__cause__):
            raise UserError(
                f"{config.model} has no stochastic depth. Add --drop-path 0."
            ) from error
        raise


def _resolve(config: TrainConfig) -> dict[str, Any]:
    """Architecture, configuration and saved arguments behind the name of a model."""
    try:
        return resolve_model_input_args(config.model, config.model_kwargs)
    except (AssertionError, KeyError, RuntimeError) as error:  # timm's words for an unknown name
        raise UserError(f"Cannot load --model {config.model}: {error!r}.") from error


def _is_twin(resolved: dict[str, Any]) -> bool:
    return model_entrypoint(resolved["model_name"]).__module__.endswith("models.dwg_twins")


def _prediction(
    config: TrainConfig, resolved: dict[str, Any], channels: ChannelSet
) -> dict[str, Any]:
    """The virtual channels of a new twin, and what is known of the channels' correlation."""
    if not _is_twin(resolved) or ":" in config.model:  # a saved model keeps its own
        return {}
    virtual = (
        choose_virtual_channels(channels)
        if config.virtual_channels is None
        else ChannelSet.parse(config.virtual_channels)
    )
    named = {} if virtual == RGB else {"virtual_channels": virtual.to_config()}
    return {**named, **_statistics(channels)}


def _statistics(channels: ChannelSet) -> dict[str, Any]:
    """The correlation of the normalised planes, where it is known and belongs to names."""
    if channels.correlation is None or any(c.is_anonymous for c in channels):
        return {}
    return {"statistics": channels.standardised().to_dict()}


def _channel_names(resolved: dict[str, Any], channels: ChannelSet) -> dict[str, Any]:
    """Names without a wavelength, of which a twin learns a code: those that it has come first."""
    if not _is_twin(resolved):
        return {}
    return _words(channels, tuple(resolved.get("channel_names", ())))


def _words(channels: ChannelSet, known: tuple[str, ...] = ()) -> dict[str, Any]:
    words = [c.name for c in channels if c.name is not None and c.wavelength_nm is None]
    names = known + tuple(word for word in words if word not in known)
    return {"channel_names": names} if names else {}


def _fixed_count(config: TrainConfig, name: str) -> str:
    twin = f"dwg_{name}"
    cure = (
        f"--model {twin}"
        if ":" not in config.model and is_model(twin)
        else "--adapt, which puts a stem into it"
    )
    return (
        f"{config.model} takes a fixed number of channels, --channel-aug {config.channel_aug} "
        f"changes it. Choose {cure}, or --channel-aug {', '.join(FIXED_COUNT_AUGS)}."
    )


def architecture(model: nn.Module) -> str:
    """What timm calls a model."""
    cfg: Any = model.pretrained_cfg
    return str(cfg["architecture"])
