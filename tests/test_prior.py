"""The prior: what each virtual channel takes from the channels that are there."""

import itertools
import math

import numpy as np
import pytest
import torch

from timm_varchan.channels import RGB, Channel, ChannelSet
from timm_varchan.models import unexplained_variance
from timm_varchan.stems import Mixer
from timm_varchan.stems.prior import NUGGET, PRIORS, SCALES, Prior

S2 = ChannelSet.parse("B01+B02+B03+B04+B05+B06+B07+B08+B09+B10+B11+B12+B8A")
STAINS = ChannelSet((Channel("DNA", 461.0), Channel("ER", 488.0), Channel("AGP"), Channel("Mito")))


def correlated(channels, seed=0, factors=3, mean=None, std=None):
    """Channels with the correlation of random mixtures of a few factors, and some noise."""
    rng = np.random.default_rng(seed)
    loads = rng.normal(size=(len(channels), factors))
    covariance = loads @ loads.T + np.diag(rng.uniform(0.05, 0.5, len(channels)))
    deviation = np.sqrt(np.diag(covariance))
    correlation = covariance / np.outer(deviation, deviation)
    np.fill_diagonal(correlation, 1.0)
    correlation = (correlation + correlation.T) / 2
    zeros, ones = [0.0] * len(channels), [1.0] * len(channels)
    return channels.with_stats(mean or zeros, std or ones, correlation.tolist())


def solve(channels, kind, virtual=RGB, channel_stats=None, count=None, scale="plain"):
    """Coefficients `(N, K)` of one set."""
    channels = ChannelSet.parse(channels)
    prior = Prior(channels, ChannelSet.parse(virtual), kind, channel_stats, scale)
    return prior.solve(torch.ones(1, len(channels)) if count is None else count)[0]


def unexplained(mixer, channels):
    return np.array([*unexplained_variance(mixer, channels).values()])


def test_nearest_takes_the_nearest_and_splits_ties():
    assert solve("RG", "nearest").tolist() == [[1, 0, 0], [0, 1, 1]]
    assert solve(["G", None], "nearest").tolist() == [[1, 1, 1], [0, 0, 0]]
    assert solve([540, 560], "nearest")[:, 1].tolist() == [0.5, 0.5]
    assert solve([None, None], "nearest").tolist() == [[0.5] * 3] * 2


@pytest.mark.parametrize("kind", PRIORS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("spec", ["RGB", "BGR", "B04+B03+B02", "RGB+NIR", "B08+B03+B02+B11+B04"])
def test_a_virtual_channel_that_is_there_is_taken_whole(kind, scale, spec):
    channel_stats = correlated(S2) if kind == "measured" else None
    channels = ChannelSet.parse(spec)
    found = solve(channels, kind, channel_stats=channel_stats, scale=scale)
    for k, own in enumerate((("R", "B04"), ("G", "B03"), ("B", "B02"))):
        row = next(i for i, name in enumerate(channels.names) if name in own)
        assert torch.equal(found[:, k], torch.eye(len(channels)).double()[row])


def test_measured_is_the_best_linear_prediction_of_every_subset():
    channel_stats = correlated(S2)
    table = np.array(channel_stats.correlation)
    rng = np.random.default_rng(1)
    for size in (1, 2, 5, 12):
        there = sorted(rng.choice(13, size, replace=False).tolist())
        absent = [i for i in range(13) if i not in there]
        found = solve(S2.take(there), "measured", S2, channel_stats)
        block = table[np.ix_(there, there)] + NUGGET * np.eye(size)
        expected = np.linalg.solve(block, table[np.ix_(there, absent)])
        np.testing.assert_allclose(found[:, absent], expected, atol=1e-9)
        np.testing.assert_array_equal(found[:, there], np.eye(size))


def test_spectral_is_ordinary_kriging():
    waves = np.array([443.0, 705.0, 865.0, 1610.0])
    found = solve(list(waves), "spectral").numpy()
    log, virtual = np.log(waves), np.log(RGB.wavelengths_nm)

    def rho(distance):
        return np.exp(-((np.abs(distance) / 0.665) ** 1.4))

    system = np.ones((5, 5))
    system[:4, :4] = rho(log[:, None] - log) + NUGGET * np.eye(4)
    system[4, 4] = 0
    right = np.vstack([rho(log[:, None] - virtual), np.ones(3)])
    expected = np.linalg.solve(system, right)[:4]
    assert abs(waves[0] - RGB.wavelengths_nm[2]) < 30  # blue is taken whole
    np.testing.assert_allclose(found[:, :2], expected[:, :2], atol=1e-9)
    np.testing.assert_allclose(found[:, 2], [1, 0, 0, 0])


@pytest.mark.parametrize("kind", PRIORS)
def test_identical_channels_share_and_change_nothing(kind):
    channel_stats = correlated(S2) if kind == "measured" else None
    once = solve([492.4, 832.8, 1613.7], kind, channel_stats=channel_stats)
    twice = solve([492.4, 832.8, 832.8, 1613.7], kind, channel_stats=channel_stats)
    if kind != "mean":
        merged = torch.stack([twice[0], twice[1] + twice[2], twice[3]])
        torch.testing.assert_close(merged, once)
    torch.testing.assert_close(twice[1], twice[2])


@pytest.mark.parametrize("kind", PRIORS)
def test_one_solve_for_a_batch_is_the_solve_of_each_set(kind):
    channel_stats = correlated(S2) if kind == "measured" else None
    prior = Prior(S2, RGB, kind, channel_stats)
    count = (torch.rand(32, 13, generator=torch.Generator().manual_seed(0)) < 0.4).double()
    count[:, 0] = (count.sum(1) == 0).double() + count[:, 0]
    batch = prior.solve(count)
    for row, there in zip(batch, count, strict=True):
        planes = there.nonzero()[:, 0].tolist()
        alone = Prior(S2.take(planes), RGB, kind, channel_stats).solve(torch.ones(1, len(planes)))
        torch.testing.assert_close(row[planes], alone[0])
        assert not row[there == 0].any()


@pytest.mark.parametrize("kind", PRIORS)
@pytest.mark.parametrize("num_channels", [1, 2, 13, 100, 300])
@pytest.mark.parametrize("spacing_nm", [0.0, 1e-3, 1.0, 7.0])
def test_many_near_and_equal_bands_in_any_order(kind, num_channels, spacing_nm):
    waves = [400 + spacing_nm * i for i in range(num_channels)]
    channels = ChannelSet(tuple(Channel(f"b{i}", w) for i, w in enumerate(waves)))
    channel_stats = correlated(channels) if kind == "measured" else None
    found = solve(channels, kind, channel_stats=channel_stats)
    assert found.isfinite().all()
    assert found.abs().sum(0).max() < 3
    order = np.random.default_rng(0).permutation(num_channels)
    again = solve(channels.take(order), kind, channel_stats=channel_stats)
    torch.testing.assert_close(again, found[order], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("scale", SCALES)
def test_coefficients_of_unknown_virtual_channels_stay_small(scale):
    channel_stats = correlated(S2, seed=3)
    virtual = ChannelSet.parse([float(w) for w in range(400, 2401, 40)])
    rng = np.random.default_rng(0)
    count = torch.from_numpy(rng.random((400, 13)) < rng.random((400, 1))).double()
    count[count.sum(1) == 0, 0] = 1
    found = Prior(S2, virtual, "measured", channel_stats, scale).solve(count)
    assert found.isfinite().all()
    assert found.abs().sum(1).max() <= 3


def test_an_unknown_virtual_channel_takes_the_row_of_the_band_beside_it():
    channel_stats = correlated(S2)
    found = solve("B08+B11", "measured", ["R", "B04"], channel_stats)
    torch.testing.assert_close(found[:, 0], found[:, 1])


def test_planes_that_are_normalised_otherwise():
    """Least squares of the planes as they are, without a bias: second moments for covariances."""
    mean, std = np.linspace(0.2, 0.9, 13), np.linspace(0.05, 0.3, 13)
    channel_stats = correlated(S2, mean=mean.tolist(), std=std.tolist())
    moment = np.array(channel_stats.correlation) + np.outer(mean / std, mean / std)
    for there in ([0, 4, 9], [12], [1, 2, 3, 5, 8, 11]):
        absent = [i for i in range(13) if i not in there]
        found = solve(S2.take(there), "measured", S2, channel_stats).numpy()
        block = moment[np.ix_(there, there)] + NUGGET * np.eye(len(there))
        weights = np.linalg.solve(block, moment[np.ix_(there, absent)])
        expected = weights * std[absent] / std[there][:, None]
        np.testing.assert_allclose(found[:, absent], expected, rtol=1e-6)
        if len(there) > 1:  # means stay means, nearly
            np.testing.assert_allclose(mean[there] @ found, mean, rtol=0.1)
    tiny = correlated(S2, mean=[1e-4] * 13, std=[1.0] * 13)
    for there in ([0, 4, 9], [12]):
        torch.testing.assert_close(
            solve(S2.take(there), "measured", S2, tiny),
            solve(S2.take(there), "measured", S2, correlated(S2)), rtol=0, atol=1e-6,
        )  # fmt: skip


def test_scale_is_matched_up_to_a_limit_and_not_for_whole_channels():
    channel_stats = correlated(S2)
    table = torch.tensor(channel_stats.correlation).double()
    there = [0, 4, 9]
    plain = solve(S2.take(there), "measured", S2, channel_stats)
    matched = solve(S2.take(there), "measured", S2, channel_stats, scale="matched")
    block = table[there][:, there]
    deviation = (plain * (block @ plain)).sum(0).sqrt()
    absent = [i for i in range(13) if i not in there]
    torch.testing.assert_close(
        matched[:, absent], plain[:, absent] / deviation[absent].clamp(min=0.5)
    )
    torch.testing.assert_close(matched[:, there], plain[:, there])


def test_stains_of_near_wavelengths_are_two_things():
    channel_stats = correlated(STAINS)
    found = solve([STAINS.channels[0]], "measured", STAINS, channel_stats)
    assert found[0, 0] == 1
    assert abs(found[0, 1]) < 1
    assert solve([STAINS.channels[0]], "spectral", STAINS)[0, 1] == 1  # nothing measured


def test_names_without_wavelengths_need_statistics_or_take_the_mean():
    virtual = ChannelSet.parse([STAINS.channels[2], STAINS.channels[3]])
    assert torch.equal(solve([virtual.channels[0]], "spectral", virtual), torch.ones(1, 2).double())
    table = torch.tensor(correlated(STAINS).correlation)
    found = solve([virtual.channels[0]], "measured", virtual, correlated(STAINS))
    assert found[0, 0] == 1
    assert math.isclose(found[0, 1], float(table[2, 3]) / (1 + NUGGET), abs_tol=1e-6)


def test_channels_that_nobody_measured_leave_the_others_alone():
    channel_stats = correlated(S2)
    thermal = Channel("thermal", 10900.0)
    alone = solve("B08", "measured", channel_stats=channel_stats)
    both = solve(["B08", thermal], "measured", channel_stats=channel_stats)
    torch.testing.assert_close(both, torch.cat([alone, torch.zeros(1, 3).double()]))
    landsat = solve("L8_B5", "measured", channel_stats=channel_stats)  # 865 nm: B8A by another name
    torch.testing.assert_close(landsat, solve("B8A", "measured", channel_stats=channel_stats))
    assert torch.equal(
        solve([thermal], "measured", channel_stats=channel_stats), torch.ones(1, 3).double()
    )  # nothing known is there: spectral


def test_measured_needs_a_correlation_and_other_words_are_refused():
    with pytest.raises(ValueError, match="channel_stats with a correlation"):
        Mixer(prior="measured")
    with pytest.raises(ValueError, match="choose of measured, spectral, nearest, mean"):
        Mixer(prior="best")
    with pytest.raises(ValueError, match="plain, matched"):
        Mixer(prior_scale="much")
    with pytest.raises(ValueError, match="without names"):
        Mixer(channel_stats=correlated(ChannelSet.anonymous(5)))


def test_statistics_without_names_are_those_of_the_virtual_channels():
    unnamed = correlated(ChannelSet.anonymous(3))
    named = correlated(RGB)
    mixers = [Mixer(channel_stats=unnamed), Mixer(channel_stats=named)]
    assert [m.prior_name for m in mixers] == ["measured", "measured"]
    for mixer in mixers:
        mixer.set_channels("GB")
    assert torch.equal(mixers[0].prior, mixers[1].prior)


def test_unexplained_variance_is_zero_for_what_is_there_and_falls_with_every_channel():
    mixer = Mixer(S2, S2, channel_stats=correlated(S2))
    for there in itertools.combinations(range(0, 13, 3), 2):
        error = unexplained(mixer, S2.take(there))
        assert np.array_equal(error[list(there)], np.zeros(2))
        more = unexplained(mixer, S2.take([*there, 11]))
        assert (more <= error + 1e-3).all()
        assert ((error >= 0) & (error <= 1.01)).all()
    assert not unexplained(mixer, S2).any()


def test_unexplained_variance_is_what_a_prediction_misses():
    channel_stats = correlated(S2)
    root = np.linalg.cholesky(np.array(channel_stats.correlation))
    pixels = root @ np.random.default_rng(0).normal(size=(13, 200_000))
    mixer = Mixer(S2, S2, channel_stats=channel_stats)
    there = [1, 6, 10]
    mixer.set_channels(S2.take(there))
    x = torch.tensor(pixels[there], dtype=torch.float32).reshape(1, 3, 400, 500)
    predicted = mixer(x)[0].flatten(1).numpy()
    missed = ((predicted - pixels) ** 2).mean(1)
    np.testing.assert_allclose(missed, unexplained(mixer, S2.take(there)), atol=0.02)


def test_unexplained_variance_without_knowledge_is_no_number():
    assert np.isnan(unexplained(Mixer(), [Channel("VV")])).all()
    assert unexplained_variance(Mixer(), "RGB") == {"R": 0, "G": 0, "B": 0}
    with pytest.raises(ValueError, match="name them"):
        unexplained(Mixer(), "anonymous")


def test_the_default_follows_what_is_known():
    assert Mixer().prior_name == "spectral"
    assert Mixer(channel_stats=correlated(S2)).prior_name == "measured"
    assert Mixer(channel_stats=correlated(S2), prior="mean").prior_name == "mean"
    assert Mixer(channel_stats=S2).prior_name == "spectral"  # no correlation
