"""The networks of Task II."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import timm
import torch
from fronts import FRONTS
from small_images import Images
from torch import nn

from timm_varchan import RGB
from timm_varchan.evaluation import SetView, predict_channel_sets

BAR, OWN, TWIN = "resnet34", "rrdb_rnn_small", "dwg_rrdb_rnn_small"


@dataclass(frozen=True)
class Arm:
    """One network.

    Args:
        architecture: timm's name.
        options: Of the architecture.
        front: Key of `FRONTS`, to stand in the recurrence's place.
        search: Whether it has a learning rate of its own; if not it takes that of `OWN`.
        aug: Key of `CHANNEL_AUGS`: what training does to the channels.
    """

    architecture: str
    options: Mapping[str, Any] = field(default_factory=dict)
    front: str | None = None
    search: bool = False
    aug: str = "none"


ARMS = {
    BAR: Arm(BAR, search=True),
    OWN: Arm(OWN, search=True),
    "rrdb_small": Arm("rrdb_small"),
    "no-recurrence": Arm(OWN, {"steps": 0}),
    TWIN: Arm(TWIN, aug="hcs-sample"),
    "attention": Arm(OWN, {"steps": 0}, front="attention"),
    "graph": Arm(OWN, {"steps": 0}, front="graph"),
    "1-step": Arm(OWN, {"steps": 1}),
    "no-gates": Arm(OWN, {"gating": "none"}),
    "one-gate": Arm(OWN, {"gating": "minimal"}),
    "6-steps": Arm(OWN, {"steps": 6}),
    "rrdb_rnn_base": Arm("rrdb_rnn_base"),
}


def build(arm: Arm, num_classes: int) -> nn.Module:
    """The arm's network, from random weights."""
    model = timm.create_model(arm.architecture, num_classes=num_classes, **arm.options)
    if arm.front is not None:
        model.recurrence = FRONTS[arm.front](model.stem.conv.out_channels)
    return model.to(memory_format=torch.channels_last)


def predict(model: nn.Module, data: Images, views: list[SetView]) -> dict[str, np.ndarray]:
    """Predicted classes by channel set."""
    predicted, _ = predict_channel_sets(model, data.batches(500), views)
    return {str(v.channel_set): p for v, p in zip(views, predicted.T, strict=True)}


def test_views(arm: Arm, seed: int) -> list[SetView]:
    """RGB; for a twin every subset of it, with the channels named."""
    if not arm.architecture.startswith("dwg_"):
        return [SetView(RGB, (0, 1, 2), "mask", "in order", seed)]
    subsets = [RGB.index(subset) for subset in RGB.subsets()]
    return [SetView(RGB, indices, "named", "in order", seed) for indices in subsets]
