"""Means, deviations and correlations of planes, of everything in which images come."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from timm_varchan import ChannelSet, measure_channels

X = torch.randn(12, 3, 8, 9, generator=torch.Generator().manual_seed(0)) * 2 + 1
Y = torch.arange(12) % 2


class Images:
    """A data set of torch: no iterator, only a length and items."""

    def __len__(self):
        return len(X)

    def __getitem__(self, row):
        return X[row], int(Y[row])


KINDS = {
    "a loader of (x, y)": lambda: DataLoader(TensorDataset(X, Y), batch_size=5),
    "a data set": Images,
    "a tuple of batches": lambda: X.split(4),
    "a list of (x, y)": lambda: [(X[:5], Y[:5]), (X[5:], Y[5:])],
    "one tensor of images": lambda: X,
    "a list of images": lambda: list(X),
    "a generator of batches": lambda: (part for part in X.split(4)),
    "dictionaries": lambda: [{"pixel_values": X, "labels": Y}],
    "a dictionary": lambda: {"image": X},
}


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_of_images_are_measured_alike(kind):
    found = measure_channels(KINDS[kind](), "RGB")
    planes = X.movedim(1, 0).flatten(1).double().numpy()
    np.testing.assert_allclose(found.mean, planes.mean(1), rtol=1e-9)
    np.testing.assert_allclose(found.std, planes.std(1), rtol=1e-9)
    np.testing.assert_allclose(found.correlation, np.corrcoef(planes), atol=1e-9)
    assert found.names == ("R", "G", "B")


def test_one_image_and_some_batches():
    one = measure_channels(X[0])
    assert one.is_anonymous
    assert one == measure_channels([X[0]])
    assert measure_channels(X.split(4), num_batches=1) == measure_channels(X[:4])


def test_pixels_without_data_do_not_count_and_the_scale_is_kept():
    holes = X.clone()
    holes[:, 1, :4] = float("nan")
    found = measure_channels(holes, ChannelSet.parse("B02+B03+B04").with_scale(10000))
    assert found.mean[1] == pytest.approx(X[:, 1, 4:].mean().item(), rel=1e-6)
    assert found.mean[0] == pytest.approx(X[:, 0].mean().item(), rel=1e-6)
    assert found.value_scale == 10000


@pytest.mark.parametrize(
    ("images", "channels", "message"),
    [
        ([], None, "at least one image"),
        (X.to(torch.uint8), None, "uint8.*255"),
        (["a.png"], None, "came as str"),
        ((X, Y), None, r"came as \(12,\)"),
        ([torch.zeros(3)], None, r"came as \(3,\)"),
        ([{"label": Y}], None, "came as dict"),
        ([X, X[:, :2]], None, "2 planes, those before had 3"),
        (X, "GB", "3 planes, but GB are 2"),
        (X / 0, "RGB", "not finite"),
        (X * float("nan"), "RGB", "no valid pixel"),
    ],
)
def test_what_cannot_be_measured_is_refused(images, channels, message):
    with pytest.raises(ValueError, match=message):
        measure_channels(images, channels)
