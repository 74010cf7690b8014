"""Twins of timm's architectures: registration, weights, arguments, special first layers."""

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
from conftest import ARCHS, assert_same, randomise, small_model, wake
from timm.utils import reparameterize_model
from torch import nn

import timm_varchan
from timm_varchan import hub
from timm_varchan.channels import ANONYMOUS, RGB, Channel, ChannelSet
from timm_varchan.models import adapt, set_channels, stems
from timm_varchan.models.dwg_twins import base_cfgs
from timm_varchan.stems import STEMS

PARAMETERS = json.loads((Path(__file__).parent / "parameters.json").read_text())
PRETRAINED = ("resnet18", "efficientnet_b0", "vit_tiny_patch16_224", "nfnet_l0", "mobileone_s0")


def images(count=3, size=64, batch=2):
    return torch.randn(batch, count, size, size)


def saved(model, folder):
    """The weights of a model in a file."""
    path = folder / "weights.pth"
    torch.save(model.state_dict(), path)
    return {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path), "num_classes": 7}}


def test_every_architecture_with_a_convolution_has_a_twin():
    twins = set(timm.list_models("dwg_*", module="dwg_twins"))
    bases = [name for name, _ in base_cfgs()]
    assert twins == {f"dwg_{name}" for name in bases}
    assert not twins & set(bases)
    if timm.__version__ == "1.0.31":
        assert len(twins) == 1351 + len(timm.list_models(module="rrdb"))  # timm's and ours


def test_tags_come_along():
    assert "dwg_densenet121.ra_in1k" in timm.list_pretrained("dwg_densenet121*")
    ours = timm.list_pretrained("dwg_resnet50*")
    assert ours == [f"dwg_{name}" for name in timm.list_pretrained("resnet50*")]
    ours, theirs = (timm.get_pretrained_cfg(p + "resnet50.a1_in1k") for p in ("dwg_", ""))
    assert (ours.hf_hub_id, ours.mean, ours.tag) == (theirs.hf_hub_id, theirs.mean, theirs.tag)
    assert ours.architecture == "dwg_resnet50"
    assert ours.first_conv == ()
    assert theirs.first_conv == "conv1"
    assert timm.is_model("dwg_resnet50")
    assert timm.get_pretrained_cfg("dwg_resnet18").tag == timm.get_pretrained_cfg("resnet18").tag


@pytest.mark.parametrize("arch", ARCHS)
def test_parameter_counts_are_pinned(arch):
    assert arch in PARAMETERS
    base = timm.create_model(arch, device="meta")
    twin = timm.create_model(f"dwg_{arch}", device="meta")
    counts = [sum(p.numel() for p in model.parameters()) for model in (twin, base)]
    assert PARAMETERS[arch] == {"twin": counts[0], "more_than_base": counts[0] - counts[1]}
    assert stems(twin)[0].num_virtual == 3


@torch.no_grad()
@pytest.mark.parametrize("arch", PRETRAINED)
def test_weights_of_the_base_load(pair, tmp_path, arch):
    base = pair(arch)[0]
    twin = small_model(f"dwg_{arch}", **saved(base, tmp_path))
    x = images()
    assert_same(twin(x), base(x))
    assert twin.pretrained_cfg["architecture"] == f"dwg_{arch}"
    assert "state_dict" not in twin.pretrained_cfg
    assert twin.pretrained_cfg["first_conv"] == ()


@torch.no_grad()
def test_weights_of_the_base_pass_its_own_filter(pair, tmp_path):
    arch = "vit_tiny_patch16_224"
    kwargs = {"img_size": 96, "num_classes": 3, **saved(pair(arch)[0], tmp_path)}
    base, twin = (small_model(prefix + arch, **kwargs) for prefix in ("", "dwg_"))
    x = images(size=96)
    assert_same(twin.forward_features(x), base.forward_features(x))
    assert twin(x).shape == (2, 3)


@torch.no_grad()
@pytest.mark.parametrize("arch", PRETRAINED)
def test_own_weights_load(pair, tmp_path, arch):
    trained = wake(pair(arch)[1])
    kwargs = saved(trained, tmp_path)
    x = images(5)
    assert torch.equal(small_model(f"dwg_{arch}", **kwargs)(x), trained(x))
    fewer = small_model(f"dwg_{arch}", **{**kwargs, "num_classes": 3})
    assert torch.equal(fewer.forward_features(x), trained.forward_features(x))


@torch.no_grad()
def test_checkpoint_path_takes_files_of_base_and_twin(pair, tmp_path):
    base, twin = pair("resnet18")
    x = images()
    for number, model in enumerate((base, wake(twin))):
        path = tmp_path / f"{number}.pth"
        torch.save(model.state_dict(), path)
        loaded = small_model("dwg_resnet18", checkpoint_path=str(path))
        assert_same(loaded(x), model(x))


def test_weights_with_other_stems_are_refused(tmp_path, pair):
    state = wake(pair("resnet18")[1]).state_dict()
    state |= {k.replace("conv1.", "more.", 1): v for k, v in state.items() if ".mixer." in k}
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    with pytest.raises((ValueError, RuntimeError)):
        small_model("dwg_resnet18", pretrained=True, pretrained_cfg_overlay={"file": str(path)})


@torch.no_grad()
@pytest.mark.parametrize(
    ("kwargs", "channels", "count"),
    [
        ({}, None, 3),
        ({"in_chans": 5}, None, 5),
        ({"in_chans": 1}, None, 1),
        ({"channel_set": "GB"}, "GB", 2),
        ({"channel_set": "B02+B08", "in_chans": 2}, "B02+B08", 2),
        ({"channel_set": "anonymous"}, "anonymous", 3),
        ({"channel_set": "anonymous", "in_chans": 4}, "anonymous", 4),
        ({"channel_set": [665, None]}, [665, None], 2),
    ],
)
def test_channels_at_creation(kwargs, channels, count):
    model = small_model("dwg_resnet18", **kwargs)
    mixer = stems(model)[0]
    assert mixer.channels == (None if channels is None else ChannelSet.parse(channels))
    assert model.in_chans == count
    assert model.conv1.bank.in_channels == 3
    assert model(images(count)).isfinite().all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"channel_set": "GB", "in_chans": 3}, r"in_chans=3 contradicts channels=GB \(2"),
        ({"channel_set": "XY"}, r"Unknown channel 'XY'"),
        ({"channel_set": [Channel("DNA")]}, r"'DNA' has no wavelength.*channel_names"),
        ({"in_chans": 0}, r"at least one channel"),
        ({"in_chans": -1}, r"at least one channel"),
    ],
)
def test_impossible_channels_at_creation(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small_model("dwg_resnet18", **kwargs)


def test_channel_names_are_learned_and_kept(tmp_path):
    names = ("DNA", "ER")
    model = wake(small_model("dwg_resnet18", channel_names=names))
    set_channels(model, [Channel("DNA")])
    assert stems(model)[0].vocabulary.num_embeddings == 3
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_args"]["channel_names"] == list(names)
    back = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = images(1)
    assert torch.equal(back(x), model(x))
    set_channels(back, [Channel("ER"), "G"])
    assert back(images(2)).isfinite().all()


@pytest.mark.parametrize("spec", [None, "anonymous", "GB", [Channel("DNA", 461)], [500.0, None]])
def test_the_channel_set_is_saved_with_the_model(tmp_path, spec):
    model = small_model("dwg_resnet18", channel_set="R")
    set_channels(model, spec)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    back = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert stems(back)[0].channels == stems(model)[0].channels
    assert back.in_chans == model.in_chans


def test_arguments_reach_the_base():
    model = small_model("dwg_resnet18", drop_rate=0.5, global_pool="max", channels=(8, 16, 32, 64))
    assert model.drop_rate == 0.5
    assert model.global_pool.pool_type == "max"
    assert model.num_features == 64
    assert small_model("dwg_vit_tiny_patch16_224", num_heads=6).blocks[0].attn.num_heads == 6
    model.reset_classifier(4, "avg")
    assert model(images(5)).shape == (2, 4)
    model.reset_classifier(0)
    assert model(images(5)).shape == (2, 64)


@torch.no_grad()
@pytest.mark.parametrize("arch", ["mobileone_s0", "repvgg_a0"])
def test_reparameterised_models_stay_equal(arch):
    model = wake(randomise(small_model(f"dwg_{arch}")))
    fused = reparameterize_model(model)
    assert sum(1 for _ in fused.modules()) < sum(1 for _ in model.modules())
    for spec, count in [(None, 3), ("R+B08", 2), ("anonymous", 5)]:
        set_channels(model, spec)
        set_channels(fused, spec)
        x = images(count)
        assert_same(fused(x), model(x), 1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("arch", "kwargs", "size"),
    [
        ("crossvit_tiny_240", {}, 240),
        ("tresnet_m", {}, 64),
        ("fastvit_t8", {}, 64),
        ("levit_128s", {}, 224),
    ],
)
def test_special_first_layers(arch, kwargs, size):
    base, twin = (small_model(p + arch, **kwargs) for p in ("", "dwg_"))
    twin.load_state_dict(base.state_dict())
    x = images(3, size, 1)
    assert_same(twin(x), base(x))
    x = images(1, size, 1)
    assert_same(twin(x), base(x.expand(-1, 3, -1, -1)))
    set_channels(wake(twin), "R+G+B08+B11")
    assert twin(images(4, size, 1)).isfinite().all()


def test_adapt_refuses_what_it_cannot_serve():
    with pytest.raises(ValueError, match="names no first convolution"):
        adapt(nn.Sequential(nn.Conv2d(3, 4, 1)))
    with pytest.raises(ValueError, match="only once"):
        adapt(small_model("dwg_resnet18"))
    with pytest.raises(ValueError, match=r"Unknown stem 'fourier'.*dwg"):
        adapt(small_model("resnet18"), "fourier")
    with pytest.raises(ValueError, match="before tracing"):
        adapt(small_model("resnet18", features_only=True, feature_cls="fx"))
    with pytest.raises(ValueError, match=r"no convolution|names no first"):
        adapt(timm.create_model("naflexvit_base_patch16_gap", device="meta"))
    with pytest.raises(ValueError, match="no stem"):
        set_channels(nn.Conv2d(3, 4, 1), RGB)


@torch.no_grad()
@pytest.mark.parametrize("stem", ["dwg", "prior"])
def test_adapt_in_place(stem):
    base = randomise(small_model("resnet18"))
    x = images()
    expected = base(x)
    assert adapt(base, stem) is base
    assert_same(base(x), expected)
    set_channels(base, "GB")
    assert base(images(2)).isfinite().all()
    assert str(stems(base)[0].channels) == "GB"
    assert ChannelSet.parse("anonymous") == ANONYMOUS
    assert timm_varchan.adapt is adapt


def test_virtual_channels_keep_a_bank_for_other_bands():
    bands = "B02+B03+B04+B08"
    base = small_model("resnet18", in_chans=4)
    twin = timm_varchan.adapt(copy.deepcopy(base), virtual_channels=bands)
    x = torch.randn(2, 4, 64, 64)
    assert_same(twin(x), base(x))
    assert twin.in_chans == 4
    timm_varchan.set_channels(twin, "B08")
    assert_same(twin(x[:, 3:]), base(x[:, [3, 3, 3, 3]]))
    created = small_model("dwg_resnet18", virtual_channels=bands)
    assert created.conv1.bank.in_channels == created.in_chans == 3
    assert created.conv1.anchors.in_channels == 1
    with pytest.raises(ValueError, match=r"ResNet takes 3\. Name as many"):
        timm_varchan.adapt(small_model("resnet18"), virtual_channels="B02+B08")


def test_adapted_models_are_saved_as_twins(tmp_path):
    model = timm_varchan.adapt(
        small_model("resnet18", in_chans=4), virtual_channels=[490, 560, 665, 842]
    )
    wake(model)
    hub.save(
        model,
        tmp_path / "m",
        class_names="abcdefg",
        channels=ChannelSet.parse([490, 560, 665, 842]),
        img_size=64,
    )
    loaded = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
    x = images(4)
    assert_same(loaded(x), model(x))
    other = timm_varchan.adapt(small_model("resnet18"), "prior")
    with pytest.raises(ValueError, match="cannot build again"):
        hub.save(other, tmp_path / "n", class_names="abcdefg", channels=RGB, img_size=64)


@pytest.mark.parametrize(
    "kwargs", [{"stem": "prior", "prior": "zero"}, {"stem": "prior", "prior": "mean"}]
)
def test_a_twin_with_another_stem_is_saved_with_it(tmp_path, kwargs):
    model, x = small_model("dwg_resnet18", **kwargs), images(2)
    set_channels(model, "GB")
    hub.save(model, tmp_path / "m", class_names="abcdefg", channels=RGB, img_size=64)
    loaded = hub.load(tmp_path / "m").model
    assert type(stems(loaded)[0]) is STEMS[kwargs["stem"]]
    assert_same(loaded(x), model(x))


def test_a_saved_set_gives_way_to_what_is_asked_for(tmp_path):
    model = small_model("dwg_resnet18", channel_set=RGB)
    hub.save(model, tmp_path / "m", class_names="abcdefg", channels=RGB, img_size=64)
    name = f"local-dir:{tmp_path / 'm'}"
    assert timm.create_model(name, pretrained=True).in_chans == 3
    four = timm.create_model(name, pretrained=True, in_chans=4)
    assert four.in_chans == 4
    assert stems(four)[0].channels is None
    green = timm.create_model(name, pretrained=True, channel_set="GB")
    assert (green.in_chans, str(stems(green)[0].channels)) == (2, "GB")


@torch.no_grad()
def test_own_weights_load_into_features(pair, tmp_path):
    trained = wake(pair("resnet18")[1])
    kwargs = saved(trained, tmp_path)
    x = images(5)
    expected = trained.forward_intermediates(x, intermediates_only=True)
    for form in ({}, {"feature_cls": "fx"}, {"feature_cls": "hook"}):
        features = small_model("dwg_resnet18", features_only=True, **form, **kwargs)
        for ours, theirs in zip(features(x), expected, strict=True):
            assert_same(ours, theirs)


def test_the_default_count_comes_back():
    model = small_model("dwg_resnet18", in_chans=5)
    for channels, count in (("R", 1), ("anonymous", 5), ("GB", 2), (None, 5)):
        set_channels(model, channels)
        assert model.in_chans == count
