"""Counts against cases worked out by hand."""

import copy
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import timm_varchan
from timm_varchan import RGB, ChannelSet
from timm_varchan.stems import Stem, make_stem

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from complexity import count_complexity


def plain(channels=3):
    """8 kernels of 3x3 and stride 2, BatchNorm, 5 classes."""
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


def test_a_plain_network_by_hand():
    counts = count_complexity(plain(4), ChannelSet.anonymous(4), img_size=16, batch_size=2)
    conv, linear = 2 * 8 * 8 * 8 * 4 * 9, 2 * 8 * 5
    assert counts.macs == conv + linear
    assert counts.params == 8 * 4 * 9 + 16 + 45
    assert counts.params_mb == pytest.approx(4e-6 * counts.params)
    activations = 2 * (8 * 8 * 8 + 8 * 8 * 8 + 5)  # of convolution, BatchNorm, linear
    assert counts.forward_backward_mb == pytest.approx(2 * 4e-6 * activations)
    assert counts.stem_macs is counts.macs_per_added_channel is None


@pytest.mark.parametrize("count", [1, 3, 7])
def test_a_mixing_stem_by_hand(count):
    model = plain()
    model[0] = make_stem("dwg", model[0])
    counts = count_complexity(model, ChannelSet.anonymous(count), img_size=16)
    D, K, F = 32, 3, 16  # width, virtual channels, Fourier features
    each = (2 + F) * D + D * 2 * D + D * K  # content and identity, exchange, out
    mix = count * K * 16 * 16
    conv = 8 * 8 * 8 * 3 * 9
    assert counts.stem_macs == conv + mix + count * each
    assert counts.macs == counts.stem_macs + 8 * 5
    assert counts.macs_per_added_channel == K * 16 * 16 + each


def test_the_reports_columns():
    """ResNet34 on 50 classes: 59.81 MB forward/backward and 3.66 G multi-adds in the report."""
    counts = count_complexity(timm.create_model("resnet34", num_classes=50), RGB)
    assert round(counts.forward_backward_mb, 2) == 59.81
    assert round(counts.macs / 1e9, 2) == 3.66


def test_the_model_stays_as_it_was():
    model = timm_varchan.adapt(timm.create_model("test_resnet", num_classes=3)).train()
    timm_varchan.set_channels(model, "RG")
    before = copy.deepcopy(model.state_dict())
    count_complexity(model, "RGB+NIR", img_size=64)
    assert model.training
    stem = next(m for m in model.modules() if isinstance(m, Stem))
    assert str(stem.mixer.channels) == "RG"
    assert not any(m._forward_hooks for m in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_errors_say_what_is_needed():
    model = timm.create_model("test_resnet", num_classes=3)
    with pytest.raises(ValueError, match=r"takes 3 channels, the set RG has 2.*in_chans=2"):
        count_complexity(model, "RG")
    with pytest.raises(ValueError, match="no count"):
        count_complexity(timm_varchan.adapt(model), "anonymous")
    other = timm_varchan.adapt(timm.create_model("test_resnet"), "prior", prior="zero")
    with pytest.raises(ValueError, match="no place for NIR"):
        count_complexity(other, "NIR")
