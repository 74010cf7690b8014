"""Channels and channel sets: what people may write, what is refused, and chance from a seed."""

import json
import math

import numpy as np
import pytest
import timm
import torch

import timm_varchan
from timm_varchan import channels as channels_module
from timm_varchan.channels import (
    ANONYMOUS,
    RGB,
    Channel,
    ChannelSet,
    known_channels,
    register_channel,
    seeded_rng,
    write_channels,
)
from timm_varchan.input_spec import InputSpec


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(channels_module, "_registry", known_channels())


@pytest.mark.parametrize(
    ("spec", "labels"),
    [
        ("RGB", ("R", "G", "B")),
        ("GB", ("G", "B")),
        ("B", ("B",)),
        ("BGR", ("B", "G", "R")),
        ("B02+B08", ("B02", "B08")),
        ("RGB+NIR", ("R", "G", "B", "NIR")),
        (" R + NIR ", ("R", "NIR")),
        ("B8A+RG+SWIR1", ("B8A", "R", "G", "SWIR1")),
        (["R", "B08"], ("R", "B08")),
        (("G",), ("G",)),
        ([660, 550.5], ("660nm", "550.5nm")),
        ([None, None], ("?", "?")),
        (["R", None, 865.0, Channel("DNA", 461)], ("R", "?", "865nm", "DNA")),
        ((name for name in "RG"), ("R", "G")),
        (RGB, ("R", "G", "B")),
    ],
)
def test_parse_reads_what_people_write(spec, labels):
    parsed = ChannelSet.parse(spec)
    assert parsed.labels == labels
    assert len(parsed) == len(labels)
    assert ChannelSet.parse(json.loads(json.dumps(parsed.to_dict()))) == parsed


def test_parsed_channels_know_their_wavelengths_and_imagenet_statistics():
    assert RGB.wavelengths_nm == (660.0, 550.0, 470.0)
    assert RGB.mean == (0.485, 0.456, 0.406)
    assert RGB.std == (0.229, 0.224, 0.225)
    assert ChannelSet.parse("B02+B08").mean is None
    assert ChannelSet.parse("R+B08").std is None
    assert ANONYMOUS.mean is None


def test_anonymous_sets():
    assert ChannelSet.parse("anonymous") is ANONYMOUS
    assert len(ANONYMOUS) == 0
    assert bool(ANONYMOUS)
    assert ANONYMOUS.is_anonymous
    four = ChannelSet.anonymous(4)
    assert len(four) == 4
    assert four.is_anonymous
    assert four != ANONYMOUS
    assert not ChannelSet.parse([None, "R"]).is_anonymous
    with pytest.raises(ValueError, match="at least one"):
        ChannelSet.anonymous(0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("RGX", "Unknown channel 'RGX'.*NIR.*--new-names.*register_channel"),
        ("R+", "nothing stands before or after"),
        ("", "nothing stands before or after"),
        ("rgb", "'rgb': did you mean RGB"),
        ("eurosta", "did you mean eurosat"),
        ("B2+B8", "'B2': did you mean B02"),
        ("b8a", "did you mean B8A"),
        ("GRAY", "did you mean gray"),
        ("R,G,NIR", r"joined by '\+', not by ','.*'R\+G\+NIR'"),
        (["R,G"], r"joined by '\+'"),
        ("DNA=,ER=", r"joined by '\+'"),
        (["R", "Infrared"], "Unknown channel 'Infrared'"),
        ("RGR", "R comes more than once"),
        ("B02+B08+B02", "B02 comes more than once"),
        ([], "at least one channel"),
        ([0.66], "micrometres.*660"),
        ([math.nan], "not a finite number"),
        ([math.inf], "not a finite number"),
        ([-500.0], "below 100 nm"),
        ([True], "not bool"),
        ([["R"]], "not list"),
        (3, "not int"),
    ],
)
def test_parse_refuses_with_the_reason(spec, message):
    with pytest.raises(ValueError, match=message):
        ChannelSet.parse(spec)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": ""}, "empty"),
        ({"name": "a b"}, "separate channels"),
        ({"name": "a+b"}, "separate channels"),
        ({"name": "a,b"}, "separate channels"),
        ({"wavelength_nm": 0.55}, "multiply by 1000"),
        ({"wavelength_nm": math.nan}, "wavelength_nm is nan"),
        ({"wavelength_nm": -math.inf}, "wavelength_nm is -inf"),
        ({"mean": math.nan, "std": 1.0}, "mean is nan"),
        ({"mean": 0.0, "std": math.inf}, "std is inf"),
        ({"mean": 0.0, "std": 0.0}, "above 0"),
        ({"mean": 0.0, "std": -1.0}, "above 0"),
        ({"mean": 0.0}, "together"),
        ({"std": 1.0}, "together"),
    ],
)
def test_channel_refuses_impossible_values(values, message):
    with pytest.raises(ValueError, match=message):
        Channel(**values)


def test_register_channel_makes_a_name_known():
    added = register_channel("DNA", 461, mean=0.1, std=0.2)
    assert added == Channel("DNA", 461, 0.1, 0.2)
    assert ChannelSet.parse("DNA+RG").labels == ("DNA", "R", "G")
    assert register_channel("DNA", 461, mean=0.1, std=0.2) == added
    with pytest.raises(ValueError, match=r"known already.*overwrite"):
        register_channel("DNA", 470)
    register_channel("DNA", 470, overwrite=True)
    assert ChannelSet.parse("DNA").wavelengths_nm == (470,)
    register_channel("VV")
    assert ChannelSet.parse("VV").wavelengths_nm == (None,)


@pytest.mark.parametrize("name", ["GB", "anonymous", "Anonymous", "a+b", ""])
def test_register_channel_keeps_specifications_readable(name):
    with pytest.raises(ValueError, match=r"already reads as|reserved|separate channels"):
        register_channel(name)
    assert name not in known_channels()


def test_subsets_come_largest_first():
    found = [str(RGB.take(s)) for s in RGB.subset_indices()]
    assert found == ["RGB", "RG", "RB", "GB", "R", "G", "B"]
    assert RGB.subset_indices(1) == [(0,), (1,), (2,)]
    for size in (0, 4, -1):
        with pytest.raises(ValueError, match="1 to 3"):
            RGB.subset_indices(size)


def test_index_finds_channels_of_another_set():
    assert RGB.index("BR") == (2, 0)
    assert RGB.take((2, 0)) == ChannelSet.parse("BR")
    assert ChannelSet.parse([500, "R", 600]).index([600]) == (2,)
    plain = ChannelSet((Channel("R", 660.0),))
    assert RGB.index(plain) == (0,), "statistics are no part of a channel's identity"
    for other in ("NIR", [None], "anonymous", [660.0]):
        with pytest.raises(ValueError, match=r"not among RGB.*R, G, B"):
            RGB.index(other)


def test_with_stats_and_without_identity():
    changed = RGB.with_stats([1, 2, 3], [4, 5, 6])
    assert changed.names == RGB.names
    assert changed.wavelengths_nm == RGB.wavelengths_nm
    assert changed.mean == (1.0, 2.0, 3.0)
    assert changed.std == (4.0, 5.0, 6.0)
    assert RGB.mean == (0.485, 0.456, 0.406)
    anonymous = changed.without_identity()
    assert anonymous.is_anonymous
    assert anonymous.mean == changed.mean
    assert anonymous.std == changed.std
    with pytest.raises(ValueError, match="3 channels, but 2 means"):
        RGB.with_stats([1, 2], [1, 2, 3])


def test_chance_is_equal_in_every_process():
    assert seeded_rng(7, "train", 3).random() == 0.505659528102461


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("DNA@461nm+phase=", [("DNA", 461.0), ("phase", None)]),
        ("R+490nm+842.5nm", [("R", 660.0), (None, 490.0), (None, 842.5)]),
        (["DNA@461nm", "NIR"], [("DNA", 461.0), ("NIR", 850.0)]),
        ("B02@500nm", [("B02", 500.0)]),  # what is declared goes before what is known
    ],
)
def test_channels_are_declared_where_they_are_named(text, expected):
    found = ChannelSet.parse(text)
    assert [(c.name, c.wavelength_nm) for c in found] == expected


def test_new_names_are_taken_when_asked_for():
    found = ChannelSet.parse("DNA+ER+GB", new_names=True)
    assert found.names == ("DNA", "ER", "G", "B")
    with pytest.raises(ValueError, match=r"'DNA'.*DNA@461nm, or DNA= without"):
        ChannelSet.parse("DNA+ER")
    with pytest.raises(ValueError, match="empty"):
        ChannelSet.parse("DNA+=", new_names=True)
    with pytest.raises(ValueError, match="nothing stands before"):
        ChannelSet.parse("DNA+", new_names=True)


def test_own_channels_are_known_and_the_unknown_one_is_blamed():
    own = ChannelSet.parse("DNA@461nm+ER=")
    assert ChannelSet.parse("ER+DNA", own=own) == own.take((1, 0))
    with pytest.raises(ValueError, match=r"'Golgi'.* DNA, ER, R"):
        ChannelSet.parse("ER+Golgi", own=own)


def test_a_specification_is_said_anew_in_parts():
    bands = ChannelSet.parse("B02+B08").with_stats([0.1, 0.3], [0.2, 0.4]).with_scale(10_000)
    spec = InputSpec.of(channels=bands, class_names=["a", "b"], img_size=64, no_data=None)
    assert InputSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    other = InputSpec.of(spec, channels="B08", no_data="mean")
    assert other.channels == bands.take([1])
    assert other.channels.value_scale == 10_000
    assert (other.img_size, other.class_names, other.no_data) == (64, ("a", "b"), "mean")
    assert InputSpec.of(spec, channels="RGB").channels.value_scale == 10_000
    assert InputSpec.of(spec, value_scale=255).channels.value_scale == 255, "other files"
    assert InputSpec.of(value_scale=255, channels="B02").channels.value_scale == 255
    with pytest.raises(ValueError, match="by 10000, not by 255"):
        InputSpec.of(channels=bands, value_scale=255)
    with pytest.raises(TypeError, match="image_size"):
        InputSpec.of(spec, image_size=64)


def test_files_hold_all_that_is_known(tmp_path):
    table = np.corrcoef(np.random.default_rng(0).normal(size=(40, 60)))
    waves = [400.0 + 10 * i for i in range(40)]
    channels = ChannelSet.parse(waves).with_stats([0.1] * 40, [0.2] * 40, table.tolist())
    channels = channels.with_scale(3.0, -1000.0)
    file = write_channels(channels, tmp_path / "channels.json")
    assert [path.name for path in tmp_path.iterdir()] == ["channels.json"]
    for path in (file, str(file)):
        read = ChannelSet.parse(path)
        assert (read.mean, read.value_scale, read.value_offset) == (channels.mean, 3.0, -1000.0)
        np.testing.assert_allclose(read.correlation, table, atol=5.1e-5)
    same = [channels.take([3, 1]), channels.standardised(), channels.without_identity()]
    same += [channels.without_correlation(), channels.with_stats([1] * 40, [1] * 40)]
    for changed in same:
        assert (changed.value_scale, changed.value_offset) == (3.0, -1000.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version 99"),
        ({"channels": "RGB"}, "list of channels"),
        ({"channels": [{"colour": 1}]}, "described by name, wavelength_nm"),
        ({"correlation": [0.5]}, "have 3 correlations"),
        ({"correlation": [0.5, 2.0, 0.1]}, "no correlation"),
        ({"correlation": [0.5, None, 0.1]}, "no correlation"),
        ({"value_scale": 0}, "value_scale is 0"),
        ({"value_scale": "x"}, "value_scale is 'x'"),
        ({"value_offset": None}, "value_offset is None"),
    ],
)
def test_what_is_no_saved_channel_set_is_refused(change, message, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({**RGB.to_dict(), **change}))
    with pytest.raises(ValueError, match=f"holds no channels .*{message}"):
        ChannelSet.parse(tmp_path / "x.json")


def test_own_channels_bring_what_is_known_of_them():
    table = [[1, 0.5, 0.1], [0.5, 1, 0.2], [0.1, 0.2, 1]]
    own = ChannelSet.parse("R+DNA@461nm+840nm").with_stats([1, 2, 3], [4, 5, 6], table)
    own = own.with_scale(100)
    assert ChannelSet.parse("840nm+R", own=own) == own.take([2, 0])
    assert ChannelSet.parse("DNA", own=own).value_scale == 100
    mixed = ChannelSet.parse("G+DNA", own=own)
    assert (mixed.mean, mixed.correlation, mixed.value_scale) == ((0.456, 2), None, 100)
    assert ChannelSet.parse("GB", own=own) == ChannelSet.parse("GB")
    assert ChannelSet.parse(["R"], own=own).mean == (1,)
    assert ChannelSet.parse([Channel("R", 660, 7, 8)], own=own).mean == (7,), "said here"


def test_an_error_names_a_few():
    for text in ("Sentinel", "BB8", "L8_B99", "WV_Blu", "DNA"):
        with pytest.raises(ValueError, match="--new-names") as refused:
            ChannelSet.parse(text, own=[Channel(f"stain{i}") for i in range(60)])
        assert len(str(refused.value)) < 500
    with pytest.raises(ValueError, match=r"did you mean stain4"):
        ChannelSet.parse("Stain4", own=[Channel(f"stain{i}") for i in range(9)])


def test_gray_and_panchromatic_images_have_names():
    assert all(470 < nm < 660 for nm in ChannelSet.parse("gray+PAN").wavelengths_nm)
    twin = timm.create_model("dwg_test_resnet").eval()
    x = torch.randn(2, 1, 32, 32)
    timm_varchan.set_channels(twin, "gray")
    plain = twin(x)
    timm_varchan.set_channels(twin, "RGB")
    torch.testing.assert_close(plain, twin(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)
