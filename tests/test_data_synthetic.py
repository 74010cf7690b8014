"""The embedded data: the same everywhere, balanced, and more bands tell more."""

import numpy as np
import pytest
import torch

from timm_varchan.channels import ChannelSet
from timm_varchan.data import SYNTHETIC_CHANNELS, SYNTHETIC_CLASSES, channel_stats, load_data
from timm_varchan.data.synthetic import SyntheticImage, class_reflectances

BANDS = ["R", "G", "B", "NIR", "SWIR1"]


@pytest.fixture(scope="module")
def data():
    return load_data("synthetic")


def test_what_comes_by_default(data):
    assert data.name == "synthetic"
    assert data.class_names == SYNTHETIC_CLASSES
    assert data.channels.labels == tuple(BANDS)
    assert (len(data.train), len(data.validation), len(data.test)) == (2000, 500, 500)
    image, label = data.train[13]
    assert image.shape == (5, 64, 64)
    assert image.dtype == torch.uint16
    assert label == data.train.labels()[13]
    for split in (data.train, data.validation, data.test):
        assert len({split.labels().count(c) for c in range(len(SYNTHETIC_CLASSES))}) == 1
        assert split.num_skipped == 0


def test_images_depend_on_seed_split_and_index():
    keys = [(0, "train", 3), (1, "train", 3), (0, "test", 3), (0, "train", 13)]
    images = [SyntheticImage(*key, 16)() for key in keys]
    assert np.array_equal(images[0], SyntheticImage(0, "train", 3, 16)())
    assert all(not np.array_equal(images[0], other) for other in images[1:])


def test_seed_and_size_reach_the_images():
    made = [
        load_data("synthetic", img_size=16, seed=seed, num_images={"train": 10}) for seed in (1, 2)
    ]
    assert made[0].train[0][0].shape == (5, 16, 16)
    assert len(made[0].train) == 10
    assert not torch.equal(made[0].train[0][0].float(), made[1].train[0][0].float())


def test_channels_choose_bands_by_name(data):
    chosen = load_data("synthetic", channels="NIR+G")
    assert chosen.channels.labels == ("NIR", "G")
    assert chosen.channels.mean == SYNTHETIC_CHANNELS.take([3, 1]).mean
    assert torch.equal(chosen.train[4][0].float(), data.train[4][0][[3, 1]].float())
    with pytest.raises(ValueError, match="SWIR2"):
        load_data("synthetic", channels="R+SWIR2")


def test_the_known_mean_and_deviation_are_the_measured_ones(data):
    mean, std = channel_stats(data.train, 300)
    assert mean == pytest.approx(data.channels.mean, abs=0.015)
    assert std == pytest.approx(data.channels.std, abs=0.015)


@pytest.mark.parametrize(
    ("one", "other"),
    [("vegetation", "green_paint"), ("snow", "white_paint"), ("dry_soil", "moist_soil")],
)
def test_pairs_look_alike_in_visible_light_and_differ_in_the_infrared(one, other):
    a, b = (class_reflectances()[name] for name in (one, other))
    assert a[:3] == pytest.approx(b[:3], abs=0.005)
    assert max(abs(x - y) for x, y in zip(a[3:], b[3:], strict=True)) > 0.25


def test_a_pair_differs_in_texture_only():
    reflectances = class_reflectances()
    assert reflectances["striped_asphalt"] == reflectances["checked_asphalt"]


def test_infrared_brightness_tells_snow_from_paint(data):
    """The curves arrive in the images: the brightest pixels of white paint stay so in SWIR."""
    names = [SYNTHETIC_CLASSES.index(name) for name in ("snow", "white_paint")]
    means = []
    for first in names:
        images = torch.stack([data.test[first + 10 * i][0].float() for i in range(12)])
        red, swir = images[:, 0].flatten(1), images[:, 4].flatten(1)
        bright = red > red.quantile(0.95, dim=1, keepdim=True)
        means.append((swir * bright).sum() / (red * bright).sum())
    assert means[1] > 2 * means[0]


def test_wrong_sizes_and_counts_are_refused():
    with pytest.raises(ValueError, match="img_size is 8"):
        load_data("synthetic", img_size=8)
    with pytest.raises(ValueError, match="num_images"):
        load_data("synthetic", num_images={"train": 0})
    with pytest.raises(ValueError, match="train, validation, test"):
        load_data("synthetic", num_images={"holdout": 10})


def test_no_channel_is_registered_by_it():
    assert ChannelSet.parse("NIR").mean is None
