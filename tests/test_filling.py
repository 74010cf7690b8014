"""Holes of single pixels, predicted from the channels that are valid there."""

import numpy as np
import pytest
import torch

import timm_varchan
from timm_varchan.channels import ChannelSet
from timm_varchan.stems.prior import NUGGET

BANDS = ChannelSet.parse("B02+B03+B04+B08+B11")


def scene(batch=2, size=24):
    """Five bands made of two, with noise, in units of their own."""
    rng = torch.Generator().manual_seed(0)
    base = torch.randn(batch, 2, size, size, generator=rng)
    noise = 0.2 * torch.randn(batch, 5, size, size, generator=rng)
    mix = torch.tensor([[1.0, 0], [0.8, 0.2], [0.5, 0.5], [0.1, 1], [-0.3, 0.9]])
    x = torch.einsum("kc,bchw->bkhw", mix, base) + noise
    return x * torch.tensor([1.0, 10, 100, 2, 5])[:, None, None] + 7


def test_valid_values_stay_and_missing_ones_are_predicted():
    x = scene()
    channels = timm_varchan.measure_channels([x], BANDS)
    valid = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.7
    broken = x.masked_fill(~valid, float("nan"))
    filled = timm_varchan.fill_missing(broken, valid, channels)
    assert torch.equal(filled[valid], x[valid])
    assert filled.isfinite().all()
    std = torch.tensor(channels.std)[:, None, None]
    with_mean = torch.tensor(channels.mean)[:, None, None].expand_as(x)
    error, naive = (((y - x) / std)[~valid].square().mean() for y in (filled, with_mean))
    assert error < 0.5 * naive


def test_a_pixel_is_predicted_by_least_squares_of_its_own_valid_channels():
    x = scene()
    channels = timm_varchan.measure_channels([x], BANDS)
    valid = torch.ones_like(x, dtype=torch.bool)
    valid[0, [1, 4], 3, 5] = False
    valid[1, :, 0, 0] = False
    filled = timm_varchan.fill_missing(x, valid, channels).double().numpy()
    table, mean, std = (np.array(v) for v in (channels.correlation, channels.mean, channels.std))
    there, absent = [0, 2, 3], [1, 4]
    z = (x[0, :, 3, 5].double().numpy() - mean) / std
    weights = np.linalg.solve(table[np.ix_(there, there)] + NUGGET * np.eye(3),
                              table[np.ix_(there, absent)])  # fmt: skip
    expected = mean[absent] + std[absent] * (z[there] @ weights)
    np.testing.assert_allclose(filled[0, absent, 3, 5], expected, rtol=1e-4)
    np.testing.assert_allclose(filled[1, :, 0, 0], mean, rtol=1e-5)  # nothing valid: the means


def test_masks_broadcast_types_stay_and_whole_images_are_copied():
    x = scene().to(torch.float64)
    channels = timm_varchan.measure_channels([x], BANDS)
    rows = torch.ones(1, 5, 24, 1, dtype=torch.bool)
    rows[:, 2, ::2] = False
    filled = timm_varchan.fill_missing(x, rows, channels)
    assert filled.dtype == torch.float64
    assert torch.equal(filled[:, :2], x[:, :2])
    whole = timm_varchan.fill_missing(x, torch.ones(1, 1, 1, 1, dtype=torch.bool), channels)
    assert torch.equal(whole, x)
    assert whole.data_ptr() != x.data_ptr()
    half = timm_varchan.fill_missing(x.to(torch.bfloat16), rows, channels)
    assert half.dtype == torch.bfloat16


def test_what_cannot_be_filled_is_refused():
    x, mask = scene(), torch.ones(1, 5, 1, 1, dtype=torch.bool)
    channels = timm_varchan.measure_channels([x], BANDS)
    with pytest.raises(ValueError, match=r"correlation of B02.* is not known"):
        timm_varchan.fill_missing(x, mask, BANDS)
    with pytest.raises(ValueError, match=r"needed are floating-point images \(batch, 5"):
        timm_varchan.fill_missing(x[:, :4], mask[:, :4], channels)
    with pytest.raises(ValueError, match="mask of bool"):
        timm_varchan.fill_missing(x, mask.float(), channels)
