"""Virtual channels beyond the kernels that a base has: kernels of their own, from zero."""

import pytest
import timm
import torch
from torch import nn

import timm_varchan
from timm_varchan.channels import ChannelSet
from timm_varchan.models import choose_virtual_channels
from timm_varchan.stems import Stem

ANCHORED = "R+G+B+NIR+SWIR1+SWIR2"
EUROSAT = ChannelSet.parse("B01+B02+B03+B04+B05+B06+B07+B08+B09+B10+B11+B12+B8A")
#: A family for each kind of first convolution: plain, TensorFlow's padding, standardised weights.
BASES = ["test_resnet", "tf_efficientnet_lite0", "resnetv2_50x1_bit", "nf_regnet_b0", "test_vit"]


def both(base, tmp_path, **kwargs):
    """A base with random weights and its twin that was given them as pretrained ones."""
    torch.manual_seed(0)
    plain = timm.create_model(base, num_classes=5).eval()
    file = tmp_path / "base.pt"
    torch.save(plain.state_dict(), file)
    overlay = {"file": str(file), "num_classes": 5}
    twin = timm.create_model(
        f"dwg_{base}", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, **kwargs
    )
    return plain, twin.eval()


def stem_of(model):
    return next(module for module in model.modules() if isinstance(module, Stem))


@pytest.mark.parametrize("base", BASES)
def test_rgb_stays_timms_and_the_other_kernels_learn(base, tmp_path):
    plain, twin = both(base, tmp_path, virtual_channels=ANCHORED)
    size = plain.pretrained_cfg["input_size"][-1]
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(twin(x), plain(x), rtol=1e-4, atol=1e-4)
    stem = stem_of(twin)
    assert stem.bank.in_channels == stem.anchors.in_channels == 3
    assert not stem.anchors.weight.any()
    timm_varchan.set_channels(twin, "B02+B04+B08+B11")
    twin.train()(torch.randn(2, 4, size, size)).square().sum().backward()
    gradients = stem.anchors.weight.grad.abs().sum((0, 2, 3))
    assert (gradients > 0).all(), "each further virtual channel learns at the first step"


def test_three_planes_are_rgb_and_bands_beside_them_are_taken_for_them(tmp_path):
    _, twin = both("test_resnet", tmp_path, virtual_channels="B02+B03+B04+B08+B11")
    assert str(stem_of(twin).mixer.virtual_channels) == "R+G+B+B08+B11"
    x = torch.randn(2, 3, 64, 64)
    default = twin(x)
    timm_varchan.set_channels(twin, "B04+B03+B02")
    torch.testing.assert_close(twin(x), default)


def test_zeros_for_absent_bands_where_all_have_kernels_need_no_names_yet():
    zeros = {"stem": "prior", "prior": "zero", "virtual_channels": ANCHORED}
    twin = timm.create_model("dwg_test_resnet", in_chans=6, **zeros)  # as training builds it
    assert str(stem_of(twin).mixer.default_channels) == str(ChannelSet.parse(ANCHORED))
    with pytest.raises(ValueError, match="no place for"):
        timm.create_model("dwg_test_resnet", in_chans=5, **zeros)


def test_saved_loaded_folded_and_looked_at(tmp_path):
    _, twin = both("test_resnet", tmp_path, virtual_channels=ANCHORED)
    stem = stem_of(twin)
    nn.init.normal_(stem.anchors.weight, std=0.1)
    timm_varchan.set_channels(twin, "B03+B08+B12")
    x = torch.randn(2, 3, 64, 64)
    expected = twin(x).detach()
    timm_varchan.hub.save(
        twin, tmp_path / "saved", class_names="abcde", channels=ChannelSet.parse("B03+B08+B12"),
        img_size=64,
    )  # fmt: skip
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    torch.testing.assert_close(again(x), expected)
    kernels = stem.generated_kernels(x)
    assert kernels.shape[:3] == (1, stem.out_channels, 3) or kernels.shape[0] == 2
    padding = stem.bank.padding
    by_hand = torch.cat([
        nn.functional.conv2d(image[None], kernel, stem.bank.bias, stem.bank.stride, padding)
        for image, kernel in zip(x, kernels.expand(2, -1, -1, -1, -1), strict=True)
    ])  # fmt: skip
    torch.testing.assert_close(by_hand, stem(x), rtol=1e-4, atol=1e-4)
    folded = timm_varchan.fold(twin, "B03+B08+B12")
    torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-4)


def test_base_weights_load_into_a_model_that_has_anchors():
    plain = timm.create_model("test_resnet", num_classes=5).eval()
    twin = timm.create_model("dwg_test_resnet", num_classes=5, virtual_channels=ANCHORED).eval()
    kept = stem_of(twin).anchors.weight.clone()
    twin.load_state_dict(plain.state_dict())
    assert torch.equal(stem_of(twin).anchors.weight, kept)
    first = next(module for module in plain.modules() if isinstance(module, nn.Conv2d))
    assert torch.equal(stem_of(twin).bank.weight, first.weight)


@pytest.mark.parametrize("base", ["repvgg_a0", "mobileone_s0"])
def test_blocks_of_several_convolutions_say_why_not(base):
    with pytest.raises(ValueError, match="not one convolution, so it takes no further"):
        timm.create_model(f"dwg_{base}", virtual_channels=ANCHORED)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="they need R, G and B"):
        timm_varchan.adapt(timm.create_model("test_resnet"), virtual_channels="B08+B09+B11+B12")
    with pytest.raises(ValueError, match="Name as many, in its order"):
        timm_varchan.adapt(timm.create_model("test_resnet"), virtual_channels="RG")


def test_other_channels_build_the_bank_for_all_of_them():
    names = ("DNA", "ER", "RNA", "AGP")
    stains = [timm_varchan.Channel(name) for name in names]
    twin = timm.create_model("dwg_test_resnet", virtual_channels=stains, channel_names=names)
    assert stem_of(twin).bank.in_channels == 4
    assert stem_of(twin).anchors is None


def test_the_rule_for_virtual_channels():
    every = choose_virtual_channels(EUROSAT)
    assert str(every.take([0, 1, 2])) == "RGB"
    assert set(every.names[3:]) == set(EUROSAT.names) - {"B02", "B03", "B04"}
    chosen = choose_virtual_channels(EUROSAT, 6)
    assert len(chosen) == 6
    assert set(chosen.names) < set(every.names)
    hyper = ChannelSet.parse([400.0 + 5 * i for i in range(200)])
    assert len(choose_virtual_channels(hyper)) == 16
    shuffled = EUROSAT.take([5, 12, 0, 3, 9, 1, 7, 2, 11, 4, 10, 8, 6])
    assert choose_virtual_channels(shuffled, 6) == chosen
    assert choose_virtual_channels(shuffled) == every
    for few in ("RGB", "G", "B04+B08"):
        assert str(choose_virtual_channels(ChannelSet.parse(few))) == "RGB"
    assert str(choose_virtual_channels(ChannelSet.parse("RGB+NIR"))) == "R+G+B+NIR"
    stains = ChannelSet.parse([timm_varchan.Channel(n, mean=0.1, std=0.2) for n in ("DNA", "ER")])
    assert choose_virtual_channels(stains).names == ("DNA", "ER")
    assert str(choose_virtual_channels(ChannelSet.anonymous(5))) == "RGB"


def test_weights_alone_fit_the_same_virtual_channels():
    wide = timm.create_model("dwg_test_resnet", virtual_channels=ANCHORED)
    plain = timm.create_model("dwg_test_resnet")
    for ours, theirs in ((wide, plain), (plain, wide)):
        with pytest.raises(RuntimeError, match=r"same, or keep whole models by timm_varchan.hub"):
            ours.load_state_dict(theirs.state_dict())
    wide.load_state_dict(wide.state_dict())


def test_random_kernels_where_nothing_is_pretrained():
    stem = stem_of(timm.create_model("dwg_test_resnet", virtual_channels=ANCHORED))
    assert 0.5 < stem.anchors.weight.std() / stem.bank.weight.std() < 2
    assert timm.create_model("dwg_test_resnet", virtual_channels=ANCHORED, device="meta")
