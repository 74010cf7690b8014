"""Transforms for any number of planes; chance that depends on seed, epoch and index alone."""

import copy

import pytest
import torch
from torch.utils.data import DataLoader

from timm_varchan.channels import RGB, ChannelSet
from timm_varchan.data import (
    ImageSplit,
    Reading,
    TransformedSplit,
    channel_stats,
    eval_transform,
    load_data,
    scale_values,
    train_transform,
)
from timm_varchan.input_spec import InputSpec


def channels_of(count):
    return ChannelSet.anonymous(count).with_stats([0.4] * count, [0.2] * count)


def split_of(images, channels):
    return ImageSplit(images, [0] * len(images), Reading(InputSpec(channels=channels)))


@pytest.fixture(scope="module")
def small():
    return load_data("synthetic", img_size=32, num_images={"train": 40, "validation": 20}, seed=3)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 13])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
@pytest.mark.parametrize("make", [train_transform, eval_transform])
def test_any_channels_and_type_come_out_normalised(count, dtype, make):
    top = {torch.uint8: 255, torch.uint16: 65535, torch.float32: 1.0}[dtype]
    image = torch.full((count, 40, 56), top * 0.6).to(dtype)
    options = {"rotation_degrees": 0.0} if make is train_transform else {}
    result = make(24, channels_of(count), **options)(image)
    assert result.shape == (count, 24, 24)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, torch.ones_like(result), atol=0.02, rtol=0)


def test_scale_values_refuses_types_without_range():
    assert scale_values(torch.tensor([65535], dtype=torch.uint16)).item() == 1.0
    assert scale_values(torch.tensor([7.5], dtype=torch.float64)).item() == 7.5
    with pytest.raises(ValueError, match=r"int32.*value_scale"):
        scale_values(torch.zeros(1, dtype=torch.int32))


def test_normalisation_goes_by_channel():
    image = torch.stack([torch.full((16, 16), m) for m in RGB.mean])
    torch.testing.assert_close(eval_transform(16, RGB)(image), torch.zeros(3, 16, 16))
    backwards = ChannelSet.parse("BGR")
    torch.testing.assert_close(eval_transform(16, backwards)(image.flip(0)), torch.zeros(3, 16, 16))


@pytest.mark.parametrize("make", [train_transform, eval_transform])
def test_channels_without_stats_or_of_other_count_are_refused(make):
    with pytest.raises(ValueError, match=r"no mean and std for the channels B08.*channel_stats"):
        make(16, ChannelSet.parse("R+B08"))
    with pytest.raises(ValueError, match=r"\(3, 20, 20\), but the channels are \?\?"):
        make(16, channels_of(2))(torch.zeros(3, 20, 20))


def test_evaluation_keeps_the_centre_and_the_shape_of_the_image():
    image = torch.zeros(1, 32, 64)
    image[:, :, 16:48] = 1.0
    channels = ChannelSet.anonymous(1).with_stats([0.0], [1.0])
    torch.testing.assert_close(
        eval_transform(32, channels, crop_pct=1.0)(image), torch.ones(1, 32, 32)
    )
    assert eval_transform(20, channels, crop_pct=0.5)(image).shape == (1, 20, 20)
    with pytest.raises(ValueError, match="crop_pct"):
        eval_transform(20, channels, crop_pct=1.5)


def one_change(**options):
    off = {
        "scale": (1.0, 1.0),
        "ratio": (1.0, 1.0),
        "hflip": 0.0,
        "rotation_degrees": 0.0,
    }
    return train_transform(16, channels_of(3), **(off | options))


@pytest.mark.parametrize(
    "options",
    [
        {"scale": (0.3, 0.5)}, {"ratio": (0.4, 0.5)}, {"hflip": 1.0}, {"vflip": 1.0},
        {"rotation_degrees": 45.0},
    ],
)  # fmt: skip
def test_every_option_of_training_changes_something(options):
    image = torch.rand(3, 16, 16)
    plain = one_change()(image)
    torch.testing.assert_close(plain, (image - 0.4) / 0.2)
    torch.manual_seed(1)
    assert not torch.allclose(one_change(**options)(image), plain)


def test_flips_are_flips():
    image = torch.rand(3, 16, 16)
    torch.testing.assert_close(one_change(hflip=1.0)(image), one_change()(image).flip(2))
    torch.testing.assert_close(one_change(vflip=1.0)(image), one_change()(image).flip(1))


def test_rotation_fills_corners_with_the_mean():
    torch.manual_seed(0)
    result = one_change(rotation_degrees=45.0)(torch.ones(3, 16, 16))
    assert result.min() == pytest.approx(0.0, abs=1e-5)


def test_augmentation_depends_on_seed_epoch_and_index_alone(small):
    transform = train_transform(24, small.channels)
    one, other = (TransformedSplit(small.train, transform, seed=5) for _ in range(2))
    order = [3, 1, 2]
    torch.manual_seed(1)
    ahead = [one[i][0] for i in order]
    torch.manual_seed(2)
    behind = [other[i][0] for i in reversed(order)]
    assert all(torch.equal(a, b) for a, b in zip(ahead, reversed(behind), strict=True))
    one.set_epoch(1)
    assert not torch.equal(one[3][0], other[3][0])
    one.set_epoch(0)
    assert torch.equal(one[3][0], other[3][0])
    assert not torch.equal(TransformedSplit(small.train, transform, seed=6)[3][0], other[3][0])
    same = TransformedSplit(split_of([small.train[0][0]] * 2, small.channels), transform)
    assert not torch.equal(same[0][0], same[1][0])


def test_the_default_generator_is_left_alone(small):
    data = TransformedSplit(small.train, train_transform(24, small.channels))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    data[0]
    assert torch.equal(torch.rand(3), expected)


def test_workers_see_the_same_samples_and_persistent_ones_the_new_epoch(small):
    transform = train_transform(24, small.channels)
    alone = TransformedSplit(small.train, transform, seed=1)
    shared = TransformedSplit(small.train, transform, seed=1)
    loader = DataLoader(shared, batch_size=8, num_workers=2, persistent_workers=True)
    for epoch in (0, 4):
        alone.set_epoch(epoch)
        shared.set_epoch(epoch)
        expected = torch.stack([alone[i][0] for i in range(len(alone))])
        assert torch.equal(torch.cat([images for images, _ in loader]), expected)
    copied = copy.deepcopy(shared)
    assert torch.equal(copied[2][0], shared[2][0])


def test_evaluation_is_the_same_in_every_epoch_and_seed(small):
    transform = eval_transform(24, small.channels)
    one, other = (TransformedSplit(small.validation, transform, seed=s) for s in (0, 9))
    other.set_epoch(8)
    assert torch.equal(one[5][0], other[5][0])
    assert other.labels() == [label for _, label in one]


def test_channel_stats_are_those_of_all_pixels():
    images = [torch.randint(0, 256, (2, 6 + i, 8), dtype=torch.uint8) for i in range(5)]
    split = split_of(images, ChannelSet.anonymous(2))
    mean, std = channel_stats(split)
    pixels = torch.cat([image.flatten(1) for image in images], dim=1).double() / 255
    assert mean == pytest.approx(pixels.mean(1).tolist(), abs=1e-6)
    assert std == pytest.approx(pixels.std(1, correction=0).tolist(), abs=1e-6)
    assert channel_stats(split, 2, seed=0) == channel_stats(split, 2, seed=0)
    assert len({tuple(channel_stats(split, 2, seed=s)[0]) for s in range(6)}) > 1
    train_transform(4, split.channels.with_stats(mean, std))(images[0])


def test_channel_stats_of_constant_and_broken_planes():
    constant = split_of([torch.full((1, 4, 4), 0.3)], ChannelSet.anonymous(1))
    mean, std = channel_stats(constant)
    assert (mean, std) == (pytest.approx([0.3]), [1.0])
    for value, said in ((torch.inf, "not finite"), (torch.nan, "no valid pixel")):
        broken = split_of([torch.tensor([[[0.1]], [[value]]])], ChannelSet.parse("R+NIR"))
        with pytest.raises(ValueError, match=f"Channel NIR .*{said}"):
            channel_stats(broken)
    with pytest.raises(ValueError, match="at least 1"):
        channel_stats(constant, 0)
    with pytest.raises(ValueError, match="at least 1"):
        channel_stats(split_of([], ChannelSet.anonymous(1)))
