"""Several channel sets over one set of parameters, mixed batches, statistics of one set."""

import copy
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import assert_same, wake
from torch import nn

import timm_varchan
from timm_varchan import hub
from timm_varchan.channels import RGB, ChannelSet
from timm_varchan.models import estimate_bn_buffers, set_channels, share, stems

SETS = ("RGB", "GB", "B", "B02+B08", "anonymous")


def images(channels, batch=2):
    return torch.randn(batch, len(ChannelSet.parse(channels)) or 4, 64, 64)


@pytest.fixture
def model(pair):
    return wake(pair("resnet18")[1])


def buffers(model):
    return {name: value.clone() for name, value in model.named_buffers()}


@torch.no_grad()
def test_channel_sets_are_independent(model):
    twins = {spec: share(model, spec) for spec in SETS}
    assert stems(model)[0].channels is None
    for spec, twin in twins.items():
        x = images(spec)
        actual = twin(x)
        set_channels(model, spec)
        assert torch.equal(actual, model(x))
    assert [str(stems(twin)[0].channels) for twin in twins.values()] == list(SETS)
    assert twins["GB"].in_chans == 2
    assert twins["GB"]._model_args != twins["RGB"]._model_args


@torch.no_grad()
def test_threads_share_one_model_by_themselves(model, tmp_path):
    """Every thread makes its own copy of one loaded model, as a server does for each request."""
    folder = hub.save(model, tmp_path / "m", class_names=[], channels=RGB, img_size=64)
    loaded = hub.load(folder).model
    inputs = {spec: images(spec) for spec in SETS}
    alone = {spec: share(loaded, spec)(x) for spec, x in inputs.items()}
    with ThreadPoolExecutor(4) as pool:
        jobs = list(SETS) * 20
        answers = pool.map(lambda spec: share(loaded, spec)(inputs[spec]), jobs)
        for spec, actual in zip(jobs, answers, strict=True):
            assert_same(actual, alone[spec])
    assert stems(loaded)[0].channels is None


@torch.no_grad()
@pytest.mark.parametrize("arch", ["resnet18", "vit_tiny_patch16_224", "mobileone_s0"])
def test_mixed_batches_equal_each_sample_alone(pair, arch):
    model = wake(pair(arch)[1])
    sets = [RGB, ChannelSet.parse("B"), ChannelSet.parse("NIR+G"), ChannelSet.anonymous(2)]
    x = torch.full((4, 3, 64, 64), math.nan)
    expected = []
    for sample, channels in zip(x, sets, strict=True):
        sample[: len(channels)] = images(channels, 1)[0]
        expected.append(share(model, channels)(sample[None, : len(channels)]))
    mixed = share(model, tuple(sets))
    actual = mixed(x)
    assert_same(actual, torch.cat(expected))
    assert torch.equal(mixed(x.nan_to_num(7.0)), actual), "what stands in absent planes is ignored"
    with pytest.raises(ValueError, match="4 sets of up to 3"):
        mixed(x[:2])


def test_mixed_batches_train(model):
    mixed = share(model, (RGB, ChannelSet.parse("B"))).train()
    x = images("RGB")
    x[1, 1:] = math.nan
    mixed(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_training_one_trains_both(model):
    twin = share(model, "GB")
    x, y = images("RGB"), images("GB")
    before = model(x).detach(), twin(y).detach()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    twin.train()(y).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    optimiser.step()
    twin.eval()
    assert (model(x) - before[0]).abs().max() > 1e-3
    assert (twin(y) - before[1]).abs().max() > 1e-3
    set_channels(model, "GB")
    assert torch.equal(model(y), twin(y)), "statistics are shared too"


def record(model, path, batches):
    """Mean and unbiased variance of what enters a module, each averaged over batches."""
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].transpose(0, 1).flatten(1))
    )
    for batch in batches:
        model(batch)
    handle.remove()
    mean = torch.stack([planes.mean(1) for planes in seen]).mean(0)
    return mean, torch.stack([planes.var(1) for planes in seen]).mean(0)


@torch.no_grad()
def test_statistics_are_those_of_the_batches(model):
    batches = [images("GB", 4) * 2 + 1 for _ in range(3)]
    set_channels(model, "RGB")
    before, state = buffers(model), copy.deepcopy(model.state_dict())
    found = estimate_bn_buffers(model, iter(batches), "GB")
    for name, value in model.named_buffers():
        assert torch.equal(value, before[name]) or value.isnan().any(), name
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert not model.training
    assert all(m.momentum is None or m.momentum == 0.1 for m in norms(model))
    assert str(stems(model)[0].channels) == "RGB"
    # the first normalisation sees what no other statistics touch
    mean, variance = record(share(model, "GB"), "bn1", batches)
    assert_same(found["bn1.running_mean"], mean)
    assert_same(found["bn1.running_var"], variance)
    assert found["bn1.num_batches_tracked"] == 3
    assert len(found) == 3 * len(norms(model))


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@torch.no_grad()
def test_statistics_belong_to_the_shared_copy_alone(model):
    x = images("GB", 4) * 2 + 1
    plain = share(model, "GB")
    expected = plain(x)
    found = estimate_bn_buffers(model, [x], "GB")
    own = share(model, "GB", bn_buffers=found)
    assert (own(x) - expected).abs().max() > 1e-2
    assert torch.equal(plain(x), expected)
    for name, value in own.named_buffers():
        if name in found:
            assert torch.equal(value, found[name])
            assert value is not found[name]
    # one batch: evaluation with these statistics is training's normalisation, but for n / (n - 1)
    own.bn1.train()
    trained = own.bn1(own.conv1(x))
    own.bn1.eval()
    assert_same(share(model, "GB", bn_buffers=found).bn1(own.conv1(x)), trained, 1e-3)


def test_unfit_statistics_are_refused(model):
    found = estimate_bn_buffers(model, [images("GB")], "GB")
    for wrong in (
        {"bn9.running_mean": torch.zeros(64)},
        {"bn1.running_mean": torch.zeros(3)},
    ):
        with pytest.raises(ValueError, match="not fit this model"):
            share(model, "GB", bn_buffers={**found, **wrong})
    with pytest.raises(ValueError, match="No batches"):
        estimate_bn_buffers(model, [], "GB")
    with pytest.raises(ValueError, match="no stem"):
        share(nn.Conv2d(3, 4, 1), "GB")


def test_sets_without_a_count_are_refused_in_a_mixed_batch():
    model = nn.Sequential(timm_varchan.DWGMixer())
    with pytest.raises(ValueError, match="needs a count"):
        timm_varchan.share(model, [RGB, ChannelSet()])
