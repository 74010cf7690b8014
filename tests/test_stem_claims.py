"""What every stem declares that it can, and that it refuses the rest."""

import copy

import pytest
import timm
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d
from torch import nn

import timm_varchan
from timm_varchan.channels import RGB, Channel, ChannelSet
from timm_varchan.folding import fold
from timm_varchan.stems import MIXERS, make_stem
from timm_varchan.stems.kernels import KernelMixer

KERNEL_STEMS = [name for name, mixer in MIXERS.items() if issubclass(mixer, KernelMixer)]


def new(name, out=6, kind=nn.Conv2d, **kwargs):
    """A stem as at the start."""
    padding = {} if kind is Conv2dSame else {"padding": 1}
    return make_stem(name, kind(3, out, 3, stride=2, **padding), **kwargs)


def awake(name, **kwargs):
    """A stem whose parameters are as after training."""
    stem = new(name, **kwargs)
    with torch.no_grad():
        for parameter in stem.mixer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return stem


def images(count, batch=2):
    """Planes of different contrast in every sample, so that content shows."""
    contrast = torch.linspace(0.5, 2.0, batch * count).view(batch, count, 1, 1)
    return torch.randn(batch, count, 16, 16) * contrast


def run(stem, channels, x):
    stem.set_channels(channels)
    return stem(x)


@pytest.fixture(params=MIXERS)
def name(request):
    return request.param


@torch.no_grad()
def test_any_count(name):
    stem = awake(name)
    if not MIXERS[name].any_count:
        for spec in ("RG", "B", (RGB, ChannelSet.parse("RG"))):
            with pytest.raises(ValueError, match="takes exactly 3 channels"):
                stem.set_channels(spec)
        return
    for spec in ("RGB", "RB", "G"):
        x = images(len(spec))
        assert run(stem, spec, x).isfinite().all()
    assert (run(stem, "R", x) - run(stem, "B", x)).any() == (name not in ("replicate", "prior",
            "gray", "generator")), "one plane replicated is the same whatever its name"  # fmt: skip


@torch.no_grad()
def test_anonymous(name):
    stem = awake(name)
    if not MIXERS[name].supports_anonymous:
        for spec in ("anonymous", [None], ["R", None], (RGB, ChannelSet.anonymous(2))):
            with pytest.raises(ValueError, match=r"needs to know each channel|no place"):
                stem.set_channels(spec)
        with pytest.raises(ValueError, match="4 channels, but the channel set is RGB"):
            run(stem, None, images(4))
        with pytest.raises(ValueError, match="needs to know"):
            new(name, default_channels=ChannelSet.anonymous(5))
        return
    for count in (1, 3, 5):
        x = images(count)
        expected = run(stem, "anonymous", x)
        torch.testing.assert_close(stem(x.flip(1)), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(stem(torch.cat([x, x], 1)), expected, rtol=1e-4, atol=1e-4)
    assert run(stem, None, images(4)).isfinite().all()


@torch.no_grad()
def test_unseen_wavelengths(name):
    stem = awake(name)
    if not MIXERS[name].supports_unseen:
        for spec in ("NIR", [840.0, "R", "G"], (RGB, ChannelSet.parse("R+G+NIR"))):
            with pytest.raises(ValueError, match="has no place for"):
                stem.set_channels(spec)
        return
    x = images(2)
    one, other = run(stem, [840.0, 1610.0], x), run(stem, [1610.0, 840.0], x.flip(1))
    assert one.isfinite().all()
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_content(name):
    stem = awake(name)
    stem.set_channels("RGB")
    x = images(3)
    bend = stem(3 * x) - stem(x) - 2 * (stem(x) - stem(torch.zeros_like(x)))
    assert (bend.abs().max() > 1e-2) == MIXERS[name].content_dependent, "a linear map or not"
    together, alone = stem(x), torch.cat([stem(one) for one in x.split(1)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_names_move_with_their_planes(name):
    stem, x = awake(name), images(3)
    expected = run(stem, "RGB", x)
    moved = run(stem, "BRG", x[:, [2, 0, 1]])
    torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-4)
    changes = (run(stem, "RGB", x[:, [2, 0, 1]]) - expected).abs().max() > 1e-3
    assert changes == (name != "gray")


@torch.no_grad()
@pytest.mark.parametrize("kind", [nn.Conv2d, Conv2dSame])
def test_pretrained_kernels_are_kept(name, kind):
    stem, x = new(name, kind=kind), images(3)
    rgb = x.mean(1, keepdim=True).expand_as(x) if name == "gray" else x
    torch.testing.assert_close(stem(x), stem.bank(rgb), rtol=1e-4, atol=1e-5)
    if MIXERS[name].any_count and name not in ("slice", "zero_fill", "depthwise", "template"):
        tripled = x[:, :1].expand_as(x)
        torch.testing.assert_close(run(stem, "G", x[:, :1]), stem.bank(tripled))


def test_mixed_batches_equal_each_sample_alone(name):
    stem = awake(name)
    sets = [RGB, ChannelSet.parse("BRG")]
    sets += [ChannelSet.parse("GB"), ChannelSet.parse("R")] * MIXERS[name].any_count
    sets += [ChannelSet.anonymous(2)] * MIXERS[name].supports_anonymous
    sets += [ChannelSet.parse([840.0])] * MIXERS[name].supports_unseen
    x = torch.full((len(sets), 3, 16, 16), torch.nan)
    alone = []
    for sample, channels in zip(x, sets, strict=True):
        sample[: len(channels)] = images(len(channels), 1)[0]
        alone.append(run(stem, channels, sample[None, : len(channels)]))
    x.requires_grad_()
    together = run(stem, tuple(sets), x)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    together.sum().backward()
    assert x.grad.isfinite().all()
    assert not [n for n, p in stem.named_parameters() if p.grad is None]


def test_gradients_live_after_one_step(name):
    stem = new(name, **({"channel_names": ("DNA",)} if name in ("template", "depthwise") else {}))
    sets = [RGB, [Channel("DNA"), "G"]] if stem.mixer.num_virtual < len(known(stem)) else [RGB] * 2
    optimiser = torch.optim.SGD(stem.parameters(), lr=0.1)
    dead = set(dict(stem.named_parameters()))
    for channels in [*sets, *sets]:
        optimiser.zero_grad()
        stem.set_channels(channels)
        stem(images(len(ChannelSet.parse(channels))) + 1).square().mean().backward()
        assert not [n for n, p in stem.named_parameters() if p.grad is None]
        dead -= {n for n, p in stem.named_parameters() if p.grad.any()}
        optimiser.step()
    assert not dead


def known(stem):
    return stem.mixer.known() if hasattr(stem.mixer, "known") else ()


@torch.no_grad()
def test_further_names_can_be_learned():
    for name in ("template", "depthwise"):
        stem = awake(name, channel_names=("DNA", "NIR"))
        x = images(2)
        here = run(stem, [Channel("DNA"), "NIR"], x)
        assert (here - run(stem, ["NIR", Channel("DNA")], x)).abs().max() > 1e-3
        with pytest.raises(ValueError, match="no place for ER"):
            stem.set_channels([Channel("ER")])


@torch.no_grad()
def test_adapted_models_share_copy_and_load(name):
    torch.manual_seed(0)
    base = timm.create_model("test_resnet", num_classes=3).eval()
    model = timm_varchan.adapt(copy.deepcopy(base), name)
    assert model.training is base.training
    other = timm_varchan.adapt(timm.create_model("test_resnet", num_classes=3), name).eval()
    other.load_state_dict(base.state_dict())
    x = torch.randn(2, 3, 64, 64)
    if name != "gray":
        torch.testing.assert_close(other(x), base(x))
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x))
    shared = timm_varchan.share(model, "BGR")
    torch.testing.assert_close(shared(x.flip(1)), model(x), rtol=1e-3, atol=1e-4)
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(last), expected, rtol=1e-3, atol=1e-4)
    assert model.to(torch.bfloat16)(x.bfloat16()).isfinite().all()


@torch.no_grad()
def test_folding_is_exact_or_refused(name):
    torch.manual_seed(0)
    model = timm_varchan.adapt(timm.create_model("test_resnet", num_classes=3), name).eval()
    x = torch.randn(2, 3, 64, 64)
    if name in (*KERNEL_STEMS, "depthwise"):
        with pytest.raises(ValueError, match="no mixing coefficients"):
            fold(model, "RGB")
    else:
        torch.testing.assert_close(fold(model, "RGB")(x), model(x), rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", KERNEL_STEMS)
def test_generated_kernels_are_those_applied(name):
    stem, x = awake(name), images(3)
    stem.set_channels("RGB")
    kernels = stem.generated_kernels(x).expand(2, -1, -1, -1, -1)
    assert kernels.shape == (2, 6, 3, 3, 3)
    each = [nn.functional.conv2d(one[None], kernel, stem.bank.bias, stride=2, padding=1)
            for one, kernel in zip(x, kernels, strict=True)]  # fmt: skip
    torch.testing.assert_close(stem(x), torch.cat(each), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KERNEL_STEMS)
def test_whole_kernels_need_an_ordinary_convolution(name):
    for bank in (
        ScaledStdConv2d(3, 4, 3),
        nn.Sequential(nn.Conv2d(3, 4, 3)),
        nn.Conv2d(3, 3, 3, groups=3),
    ):
        with pytest.raises(ValueError, match="needs an ordinary first convolution"):
            make_stem(name, bank)


def test_replicate_fills_by_the_mean():
    x = images(2)
    mixer = make_stem("replicate", nn.Conv2d(3, 4, 1)).mixer
    mixer.set_channels("RB")
    torch.testing.assert_close(mixer(x), torch.stack([x[:, 0], x.mean(1), x[:, 1]], 1))


def test_slice_is_zero_fill_without_rescaling():
    x = images(2)
    stems = {name: new(name) for name in ("slice", "zero_fill")}
    stems["zero_fill"].bank = stems["slice"].bank
    bias = stems["slice"].bank.bias[:, None, None]
    sliced, filled = (run(stems[name], "RB", x) for name in ("slice", "zero_fill"))
    torch.testing.assert_close((sliced - bias) * 1.5, filled - bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["template", "depthwise"])
def test_a_name_that_the_bank_has_already_changes_nothing(name):
    x = torch.randn(2, 3, 16, 16)
    plain, named = (
        make_stem(name, nn.Conv2d(3, 4, 3), channel_names=names) for names in ((), ("R", "NIR"))
    )
    named.bank.load_state_dict(plain.bank.state_dict())
    torch.testing.assert_close(named(x), plain(x))


def test_whole_kernels_refuse_other_padding():
    with pytest.raises(ValueError, match="ordinary first convolution"):
        make_stem("generator", nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"))
