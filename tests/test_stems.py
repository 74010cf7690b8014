"""Stems alone, in an ordinary network: prior, residual, kernels, gradients, odd values."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import OWN_STEMS
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d, pad_same
from torch import nn

import timm_varchan
from timm_varchan.channels import ANONYMOUS, RGB, Channel, ChannelSet
from timm_varchan.stems import STEMS, DWGMixer, Mixer, Stem, make_stem

DNA = Channel("DNA")
#: Modes by what they ask of a mixer with the vocabulary (DNA, ER).
MODES = {
    "default": (None, 3),
    "default, other count": (None, 4),
    "anonymous": ("anonymous", 3),
    "named": ("R+B08", 2),
    "wavelengths": ([560, 840.0, None], 3),
    "vocabulary": ([DNA, "G"], 2),
    "vocabulary alone": ([DNA, Channel("ER")], 2),
    "mixed": ((RGB, ChannelSet.parse([DNA])), 3),
}


def awake(**kwargs):
    """A mixer whose residual is not zero."""
    mixer = DWGMixer(channel_names=("DNA", "ER"), **kwargs)
    nn.init.normal_(mixer.out.weight, std=1 / mixer.gain)
    nn.init.normal_(mixer.out.bias, std=1 / mixer.gain)
    return mixer


def any_stem(name, **kwargs):
    """A stem of any kind with 8 outputs, for RGB."""
    return make_stem(name, nn.Conv2d(3, 8, 3, padding=1, bias=False, **kwargs))


def prior_of(spec, mixer=None):
    mixer = mixer or DWGMixer()
    mixer.set_channels(spec)
    count = 4 if spec is None or not len(ChannelSet.parse(spec)) else len(ChannelSet.parse(spec))
    return mixer.coefficients(torch.randn(1, count, 4, 4))[0].detach()


@pytest.mark.parametrize("make", [DWGMixer, Mixer])
@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("RGB", [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
        ("BGR", [[0, 0, 1], [0, 1, 0], [1, 0, 0]]),
        ("G", [[1, 1, 1]]),
        ("RGB+NIR", [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]),
        (["G", None], [[1, 1, 1], [0, 0, 0]]),
        ([None, None], [[0.5] * 3, [0.5] * 3]),
        ("anonymous", [[0.25] * 3] * 4),
        (None, [[0.25] * 3] * 4),
    ],
)
def test_coefficients_start_as_the_prior(make, spec, expected):
    assert torch.equal(prior_of(spec, make()), torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("bank", [nn.Conv2d, Conv2dSame, StdConv2d, ScaledStdConv2d])
@pytest.mark.parametrize("mode", ["default", "default, other count", "named", "vocabulary"])
def test_factored_path_equals_generated_kernels(bank, mode):
    spec, count = MODES[mode]
    padding = {} if bank is Conv2dSame else {"padding": 1}
    stem = Stem(awake(), bank(3, 6, 3, stride=2, bias=True, **padding))
    stem.mixer.set_channels(spec)
    x = torch.randn(3, count, 9, 8)
    kernels = stem.generated_kernels(x)
    assert kernels.shape == (3, 6, count, 3, 3)
    padded = pad_same(x, (3, 3), (2, 2)) if bank is Conv2dSame else F.pad(x, (1, 1, 1, 1))
    B, C, H, W = padded.shape
    grouped = F.conv2d(padded.view(1, B * C, H, W), kernels.flatten(0, 1), stride=2, groups=B)
    explicit = grouped.view(B, 6, *grouped.shape[2:]) + stem.bank.bias[:, None, None]
    torch.testing.assert_close(stem(x), explicit, rtol=1e-4, atol=1e-4)


def test_generated_kernels_of_a_block_are_refused():
    with pytest.raises(ValueError, match=r"not one convolution.*coefficients"):
        Stem(Mixer(), nn.Sequential(nn.Conv2d(3, 4, 1))).generated_kernels(torch.randn(1, 3, 4, 4))


def residual(mixer, spec, x):
    mixer.set_channels(spec)
    return (mixer.coefficients(x) - mixer.prior[:, : x.shape[1]]).detach()


def test_residual_depends_on_content_identity_and_set():
    mixer, x = awake(), torch.randn(1, 2, 6, 6)
    here = residual(mixer, "RG", x)
    brighter = torch.stack([x[:, 0] * 3 + 1, x[:, 1]], 1)
    assert (residual(mixer, "RG", brighter) - here).abs().min() > 1e-5, "content, also the other's"
    assert (residual(mixer, ["R", 840], x) - here).abs().min() > 1e-5, "identity"
    assert (residual(mixer, [DNA, "G"], x) - here).abs().min() > 1e-5, "vocabulary"
    assert (residual(mixer, [DNA, "G"], x) - residual(mixer, [Channel("ER"), "G"], x)).any()
    alone = residual(mixer, "R", x[:, :1])
    assert (here[:, :1] * 2 - alone).abs().min() > 1e-5, "set, beyond the division by its size"


@pytest.mark.parametrize("kwargs", [{}, {"gain": 4.0}])
def test_residual_starts_at_zero_and_is_divided_by_the_count(kwargs):
    mixer = DWGMixer(**kwargs)
    assert mixer.gain == kwargs.get("gain", mixer.gain)
    x = torch.randn(2, 3, 6, 6)
    assert not residual(mixer, "RGB", x).any()
    nn.init.ones_(mixer.out.bias)
    expected = torch.full((2, 3, 3), mixer.gain / 3)
    torch.testing.assert_close(residual(mixer, "RGB", x), expected)


@pytest.mark.parametrize("count", [15, 16, 17, 33])
def test_tables_grow_in_steps(count):
    mixer = awake()
    wavelengths = torch.linspace(400, 2400, count).tolist()
    mixer.set_channels(wavelengths)
    x = torch.randn(1, count, 4, 4)
    assert mixer.prior.shape[1] == math.ceil(count / 16) * 16
    expected = mixer(x)
    assert expected.isfinite().all()
    order = torch.randperm(count).tolist()
    mixer.set_channels([wavelengths[i] for i in order])
    torch.testing.assert_close(mixer(x[:, order]), expected, rtol=1e-4, atol=1e-4)
    mixer.set_channels(None)
    assert mixer(x).isfinite().all()


CHANNEL_STATS = RGB.with_stats((0,) * 3, (1,) * 3, [[1, 0.5, 0.5], [0.5, 1, 0.5], [0.5, 0.5, 1]])


@pytest.mark.parametrize(
    "kwargs",
    [
        {"virtual_channels": "RG", "default_channels": "RG"},
        {"default_channels": "BGR"},
        {"device": "meta"},
        {"dtype": torch.float64},
        {"prior": "nearest"},
        {"channel_stats": CHANNEL_STATS},
        {"channel_names": ("DNA",)},
        {"width": 16},
        {"num_frequencies": 4},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_every_argument_changes_something(kwargs):
    def facts(mixer):
        if len(mixer.virtual_channels) == 3:
            mixer.set_channels("RG")  # with all there is nothing to fill
        tables = {name: getattr(mixer, name) for name in mixer.table_names}
        tensors = [*tables.values(), *mixer.parameters()]
        prior = mixer.prior.tolist() if mixer.prior.device.type == "cpu" else None
        return prior, mixer.default_channels, [(t.shape, t.dtype, t.device) for t in tensors]

    made = DWGMixer(**kwargs)
    assert facts(made) != facts(DWGMixer())
    for tensor in [*made.parameters(), made.prior, made.code]:
        assert tensor.device.type == kwargs.get("device", "cpu")
        assert tensor.dtype == kwargs.get("dtype", tensor.dtype)


ODD = {
    "width 1": torch.randn(2, 3, 5, 1),
    "height 1": torch.randn(2, 3, 1, 5),
    "one pixel": torch.randn(2, 3, 1, 1),
    "zeros": torch.zeros(2, 3, 6, 6),
    "constant": torch.full((2, 3, 6, 6), 0.3),
    "tiny": torch.randn(2, 3, 6, 6) * 1e-38,
    "huge": torch.randn(2, 3, 6, 6) * 1e30,
    "one bright pixel": F.pad(torch.full((2, 3, 1, 1), 1e20), (0, 5, 0, 5)),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("spec", ["RGB", "anonymous", None])
def test_finite_input_never_gives_nan(odd, spec):
    mixer = awake()
    mixer.set_channels(spec)
    x = ODD[odd].clone().requires_grad_()
    y = mixer(x)
    assert y.isfinite().all()
    y.mean().backward()
    assert x.grad.isfinite().all()
    assert not [name for name, p in mixer.named_parameters() if p.grad.isnan().any()]


@pytest.mark.parametrize("name", OWN_STEMS)
def test_a_count_that_contradicts_the_names_is_refused(name):
    stem = any_stem(name)
    stem.mixer.set_channels("BGR")
    with pytest.raises(ValueError, match=r"2 channels, but the channel set is BGR.*set_channels"):
        stem(torch.randn(1, 2, 4, 4))
    stem.mixer.set_channels((RGB, ChannelSet.parse("BGR")))
    for shape in [(2, 2, 4, 4), (3, 3, 4, 4)]:
        with pytest.raises(ValueError, match=r"2 sets of up to 3 channels.*padded"):
            stem(torch.randn(shape))


def test_a_contradiction_is_loud_where_it_cannot_raise():
    mixer = DWGMixer()
    mixer.set_channels("RG")
    compiled = torch.compile(mixer, backend="eager", fullgraph=True)
    assert compiled(torch.randn(1, 2, 4, 4)).isfinite().all()
    assert compiled(torch.randn(1, 3, 4, 4)).isnan().all()


def test_unknown_vocabulary_is_refused():
    mixer = DWGMixer(channel_names=("DNA",))
    for spec in ([Channel("VV")], (RGB, ChannelSet.parse([Channel("VV")]))):
        with pytest.raises(ValueError, match=r"'VV' has no wavelength.*knows: DNA.*channel_names"):
            mixer.set_channels(spec)
    assert mixer.channels is None, "a refused set changes nothing"
    with pytest.raises(ValueError, match="'VV'"):
        DWGMixer(default_channels=[Channel("VV")])


def test_zero_leaves_absent_channels_out_and_refuses_what_it_has_no_place_for():
    mixer = Mixer(prior="zero")
    assert torch.equal(prior_of("RGB", mixer), torch.eye(3))
    assert torch.equal(prior_of("BR", mixer), torch.tensor([[0.0, 0, 1], [1, 0, 0]]))
    assert torch.equal(prior_of("B04", mixer), torch.tensor([[1.0, 0, 0]])), "the same band"
    for spec in ("NIR", "anonymous", [None], (RGB, ChannelSet.parse("NIR")), ["R", None]):
        with pytest.raises(ValueError, match="no place for"):
            mixer.set_channels(spec)
    with pytest.raises(ValueError, match="4 channels"):
        Mixer(prior="zero")(torch.randn(1, 4, 4, 4))
    unnamed = ChannelSet.anonymous(3)
    for default in ("RGB", unnamed):
        with pytest.raises(ValueError, match="no place for"):
            Mixer(unnamed, default, prior="zero")
    x = torch.randn(3, 3, 4, 4)
    mixer.set_channels((RGB, ChannelSet.parse("G"), ChannelSet.parse("BR")))
    expected = torch.zeros(3, 3, 4, 4)
    expected[0], expected[1, 1], expected[2, 2], expected[2, 0] = x[0], x[1, 0], x[2, 0], x[2, 1]
    assert torch.equal(mixer(x), expected)
    mixer.set_channels("RGB", torch.tensor([[1, 0, 1]] * 3).bool())
    assert torch.equal(mixer(x), x * torch.tensor([1.0, 0, 1]).view(1, 3, 1, 1))


def test_mixer_needs_a_count_of_virtual_channels():
    with pytest.raises(ValueError, match="needs a count"):
        DWGMixer(ANONYMOUS)
    assert DWGMixer(ChannelSet.anonymous(6))(torch.randn(1, 2, 4, 4)).shape == (1, 6, 4, 4)


def test_stem_loads_the_keys_of_the_convolution_and_its_own():
    conv = nn.Conv2d(3, 4, 3)
    model = nn.Sequential(Stem(awake(), nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))
    residual = model[0].mixer.out.weight.clone()
    base = nn.Sequential(conv, nn.BatchNorm2d(4)).state_dict()
    keys = set(base)
    model.load_state_dict(base)
    assert set(base) == keys, "the caller's state dict stays as it was"
    assert torch.equal(model[0].bank.weight, conv.weight)
    assert torch.equal(model[0].mixer.out.weight, residual), "the mixer stays"
    other = nn.Sequential(Stem(awake(), nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other[0].mixer.out.weight, residual)
    assert torch.equal(other[0].bank.weight, conv.weight)
    with pytest.raises(RuntimeError, match="Missing"):
        other.load_state_dict({k: v for k, v in base.items() if k != "0.weight"})


def test_tables_are_not_saved_and_follow_the_module():
    mixer = awake()
    assert not set(mixer.state_dict()) & set(mixer.table_names)
    mixer.set_channels("RG")
    assert copy.deepcopy(mixer).channels == mixer.channels
    half = copy.deepcopy(mixer).to(torch.bfloat16)
    half.set_channels("RGB")
    assert not list(half.buffers())
    tables = {name: getattr(half, name) for name in half.table_names}
    assert {t.dtype for n, t in tables.items() if n != "word"} == {torch.bfloat16}
    assert half(torch.randn(1, 3, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", OWN_STEMS)
def test_every_floating_type_runs(name, dtype):
    stem = any_stem(name, dtype=dtype)
    x = torch.randn(2, 3, 6, 6, dtype=dtype)
    y = stem(x)
    assert y.dtype == dtype
    assert torch.equal(y, stem.bank(x)), "RGB at the start"


def test_tables_come_back_after_meta():
    mixer = DWGMixer(device="meta")
    mixer.set_channels("GB")
    mixer.to_empty(device="cpu")
    expected = DWGMixer()
    expected.set_channels("GB")
    for name in mixer.table_names:
        table, wanted = getattr(mixer, name), getattr(expected, name)
        torch.testing.assert_close(table, wanted, rtol=0, atol=0, equal_nan=True)


def test_a_stem_of_ones_own():
    class Doubled(Mixer):
        def coefficients(self, x):
            return 2 * super().coefficients(x)

    timm_varchan.register_stem("doubled", Doubled)
    try:
        x = torch.randn(1, 3, 32, 32)
        base = timm.create_model("test_resnet", num_classes=3).eval()
        model = timm.create_model("dwg_test_resnet", num_classes=3, stem="doubled").eval()
        model.load_state_dict(base.state_dict())
        torch.testing.assert_close(model(x), base(2 * x))
        with pytest.raises(ValueError, match="'doubled' already"):
            timm_varchan.register_stem("doubled", Doubled)
    finally:
        del STEMS["doubled"]
    with pytest.raises(ValueError, match="is no class of"):
        timm_varchan.register_stem("number", int)
    with pytest.raises(ValueError, match="Unknown stem 'doubled'"):
        make_stem("doubled", nn.Conv2d(3, 4, 3))


@pytest.mark.parametrize("value", [1e38, 3e38])
def test_the_largest_values_are_still_described(value):
    x = torch.tensor([value, -value]).repeat(2, 3, 4, 8)
    for spec in ("RGB", "anonymous"):
        mixer = awake()
        mixer.set_channels(spec)
        assert mixer.coefficients(x).isfinite().all()
