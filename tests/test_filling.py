"""Holes of single pixels, predicted from the channels that are valid there."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import timm_varchan
from timm_varchan.channels import ChannelSet, write_channels
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


@pytest.mark.parametrize(("count", "missing"), [(2, 0.5), (24, 0.1), (24, 0.7), (24, 0.98)])
def test_dead_detectors_anywhere_are_predicted_as_absent_channels_are(count, missing):
    """Every pixel has a pattern of its own; the reference solves each one by itself."""
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(2, 3, 9, 7, generator=rng).double()
    x = torch.einsum("kc,bchw->bkhw", torch.randn(count, 3, generator=rng).double(), x)
    x = x + 0.3 * torch.randn(x.shape, generator=rng)
    channels = timm_varchan.measure_channels(x, [400.0 + 20 * i for i in range(count)])
    valid = torch.rand(x.shape, generator=rng) >= missing
    filled = timm_varchan.fill_missing(x.masked_fill(~valid, float("nan")), valid, channels)
    table, mean, std = (np.array(v) for v in (channels.correlation, channels.mean, channels.std))
    pixels, masks = (t.movedim(1, -1).flatten(0, 2).numpy() for t in (x, valid))
    for pixel, there, found in zip(pixels, masks, filled.movedim(1, -1).flatten(0, 2), strict=True):
        block = table[np.ix_(there, there)] + NUGGET * np.eye(there.sum())
        cross = np.linalg.solve(block, table[np.ix_(there, ~there)])
        expected = mean[~there] + std[~there] * (((pixel - mean) / std)[there] @ cross)
        np.testing.assert_allclose(found.numpy()[~there], expected, rtol=1e-6, atol=1e-8)


def test_one_image_and_channels_in_any_form(tmp_path):
    x = scene()
    channels = timm_varchan.measure_channels(x, BANDS)
    valid = torch.ones_like(x[0], dtype=torch.bool)
    valid[2, 3:9] = False
    whole = timm_varchan.fill_missing(x, valid, channels)
    assert torch.equal(timm_varchan.fill_missing(x[0], valid, channels), whole[0])
    file = write_channels(channels, tmp_path / "channels.json")
    torch.testing.assert_close(
        timm_varchan.fill_missing(x, valid, str(file)), whole, rtol=1e-3, atol=0.1
    )
    with pytest.raises(ValueError, match=r"correlation of RGB is not known.*measure_channels"):
        timm_varchan.fill_missing(x[:, :3], valid[:3], "RGB")


CUBE = """
import resource, torch, timm_varchan
x = torch.randn(1, 224, 96, 96)
known = timm_varchan.measure_channels(x, [400.0 + 9 * i for i in range(224)])
valid = torch.rand(x.shape) > 0.01
valid[:, 100, :48] = False
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
timm_varchan.fill_missing(x, valid, known)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10)
"""


def test_memory_does_not_grow_with_channels_times_channels():
    """A cube of 8 MB, nearly every pixel with a pattern of its own."""
    done = subprocess.run([sys.executable, "-c", CUBE], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 300, "MB"


def test_what_cannot_be_filled_is_refused():
    x, mask = scene(), torch.ones(1, 5, 1, 1, dtype=torch.bool)
    channels = timm_varchan.measure_channels([x], BANDS)
    with pytest.raises(ValueError, match=r"correlation of B02.* is not known"):
        timm_varchan.fill_missing(x, mask, BANDS)
    with pytest.raises(ValueError, match=r"needed are floating-point images \(batch, 5"):
        timm_varchan.fill_missing(x[:, :4], mask[:, :4], channels)
    with pytest.raises(ValueError, match="mask of bool"):
        timm_varchan.fill_missing(x, mask.float(), channels)


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
