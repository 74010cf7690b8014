"""A Lightning callback, also by its class path in a YAML of torchgeo or LightningCLI."""

from __future__ import annotations

from typing import Any, Union

from timm_varchan.channels import ChannelSet, ChannelSetLike
from timm_varchan.errors import MissingExtraError
from timm_varchan.models import has_stems, set_channels
from timm_varchan.models.adapt import parse_channels

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError:
    try:
        from pytorch_lightning import Callback, LightningModule, Trainer
    except ModuleNotFoundError:
        raise MissingExtraError(
            "lightning is not installed. It comes with: pip install lightning", name="lightning"
        ) from None

__all__ = ["Channels"]


class Channels(Callback):  # type: ignore[misc]  # of a package that need not be there
    """Tells every model with a stem in a `LightningModule` what the channels of its input are.

    It does so at the beginning of fit, validate, test and predict, for the set is no weight and
    stands in no checkpoint of Lightning's.

    Args:
        channels: As `timm_varchan.set_channels` takes them: `"B02+B03+B04"`, `"anonymous"`, a list
            of names, wavelengths in nm and null, or names that the model itself has learned.

    Raises:
        ValueError: When it starts: channels that neither the model nor anybody else knows, a model
            without a stem.
    """

    def __init__(self, channels: Union[str, list[Union[str, float, None]]]) -> None:
        self.channels: ChannelSetLike = channels

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before anything runs; a model that `configure_model` builds comes later."""
        if has_stems(pl_module):
            self._start(trainer, pl_module)

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.channels = parse_channels(pl_module, self.channels)
        set_channels(pl_module, self.channels)

    on_fit_start = on_validation_start = on_test_start = on_predict_start = _start

    def state_dict(self) -> dict[str, Any]:
        """The channel set, so that a checkpoint says what it was trained on."""
        return {"channels": ChannelSet.parse(self.channels).to_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to go on with other channels than the checkpoint's.

        Raises:
            ValueError: They differ.
        """
        saved = ChannelSet.from_dict(state_dict["channels"])
        channels = ChannelSet.parse(self.channels, own=saved)
        if saved.labels != channels.labels:
            raise ValueError(
                f"The checkpoint was trained on {saved}, and this run's channels are "
                f"{channels}. Name the checkpoint's."
            )
