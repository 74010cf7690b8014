"""What 0.1 wrote loads and answers as it did: written by 0.1.0 itself (tests/saved_by_0_1)."""

import json
import logging
from pathlib import Path

import pytest
import timm
import torch

import timm_varchan
from timm_varchan import hub
from timm_varchan.channels import ChannelSet, read_channel_file
from timm_varchan.models import stems

SAVED = Path(__file__).parent / "saved_by_0_1"
ANSWERS = json.loads((SAVED / "answers.json").read_text())
SMALL = {"channels": (8, 8, 8, 8), "stem_width": 8, "num_classes": 3}


def images(count):
    return torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(1))[:, :count]


def check(model, key):
    spec = json.loads(key)
    timm_varchan.set_channels(model, spec)
    count = 4 if spec in (None, "anonymous") else len(ChannelSet.parse(spec))
    torch.testing.assert_close(model(images(count)), torch.tensor(ANSWERS[key]))


@pytest.mark.parametrize("key", [key for key in ANSWERS if key != "virtual"])
def test_a_saved_model_answers_as_before(key):
    model = hub.load(SAVED / "bands").model
    assert str(stems(model)[0].channels) == "B02+B03+B04+B08"
    assert stems(model)[0].prior_name == "nearest"
    check(model, key)


def test_a_bank_for_all_bands_stays_one():
    model = timm.create_model(f"local-dir:{SAVED / 'virtual'}", pretrained=True).eval()
    assert model.conv1[0].bank.in_channels == 4
    torch.testing.assert_close(model(images(2)), torch.tensor(ANSWERS["virtual"]))


def test_a_state_dict_that_torch_saved(caplog):
    model = timm.create_model("dwg_resnet10t", **SMALL).eval()
    with caplog.at_level(logging.INFO):
        model.load_state_dict(torch.load(SAVED / "weights.pt", weights_only=True))
    assert "nearest" in caplog.text
    for key in ("null", '"B02+B08"'):
        check(model, key)


def test_weights_without_arguments_are_taken_for_those_of_0_1_aloud(caplog):
    file = {"file": str(SAVED / "bands" / "model.safetensors"), "num_classes": 3}
    model = timm.create_model(
        "dwg_resnet10t", pretrained=True, pretrained_cfg_overlay=file, **SMALL
    ).eval()
    assert "do not say with which prior" in caplog.text
    check(model, '"B02+B08"')
    told = timm.create_model(
        "dwg_resnet10t", pretrained=True, pretrained_cfg_overlay=file, prior="spectral", **SMALL
    )
    assert stems(told)[0].prior_name == "spectral"


def test_a_file_of_channels_that_is_a_list():
    channels, scale = read_channel_file(SAVED / "channels.json")
    assert channels == ChannelSet.parse("B02+B03+B04+B08").with_stats(
        [0.1, 0.12, 0.13, 0.3], [0.05, 0.06, 0.07, 0.1]
    )
    assert scale is None
    assert channels.correlation is None


def test_what_is_saved_now_says_its_prior(tmp_path):
    model = timm.create_model("dwg_resnet10t", **SMALL).eval()
    timm_varchan.set_channels(model, "B02+B08")
    bands = ChannelSet.parse("B02+B08")
    hub.save(model, tmp_path / "m", class_names="abc", channels=bands, img_size=32)
    again = hub.load(tmp_path / "m").model
    assert stems(again)[0].prior_name == "spectral"
    torch.testing.assert_close(again(images(2)), model(images(2)))
