"""Hostile input: every case ends in a right answer or in an exception that the docstrings name.

Never a crash, a hang, a silent broadcast or NaN out of finite numbers. The default suite draws a
few cases of each property, the slow one more than ten thousand in all, from fixed seeds.
"""

import io
import json
import math
import re
import shutil
import struct
import tempfile
import warnings
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tifffile
import timm
import torch
from conftest import OWN_STEMS, assert_same, randomise, wake
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import timm_varchan
from timm_varchan import RGB, Channel, ChannelSet, hub
from timm_varchan.__main__ import main
from timm_varchan.data import eval_transform, read_image
from timm_varchan.predict import predict
from timm_varchan.stems import make_stem

NUM_CASES = 10_000
#: Of every property, cases in the default suite and in the slow one.
PROPERTIES = {}


def prop(strategy, few, many):
    """Register a property of what a strategy draws."""

    def register(function):
        PROPERTIES[function.__name__] = (function, strategy, few, many)
        return function

    return register


def sizes():
    for name, (_, _, few, many) in PROPERTIES.items():
        yield pytest.param(name, few, id=name)
        yield pytest.param(name, many, id=f"{name}-many", marks=pytest.mark.slow)


# Channel sets -----------------------------------------------------------------------------------

numbers = st.one_of(
    st.floats(), st.integers(-(10**20), 10**20), st.booleans(), st.sampled_from([470.0, 842, 0])
)
names = st.one_of(
    st.sampled_from(["R", "G", "B", "B08", "NIR", "RGB", "GB", "anonymous", "", "+", "r", "é"]),
    st.text(max_size=6),
)
anything = st.one_of(names, numbers, st.none(), st.binary(max_size=3), st.just(()))
fields = st.sampled_from(["name", "wavelength_nm", "mean", "std", "colour"])
items = st.one_of(anything, st.dictionaries(fields, anything, max_size=4))
specs = st.one_of(
    items, st.lists(items, max_size=6), st.lists(names, max_size=4).map("+".join), st.text()
)


@prop(specs, 100, 3000)
def channel_sets(spec):
    """What people write for channels is read or refused; what is read survives a file."""
    try:
        channels = ChannelSet.parse(spec)
    except ValueError as error:
        assert len(str(error)) > 20
        return
    again = ChannelSet.from_dict(json.loads(json.dumps(channels.to_dict())))
    assert again == channels
    assert all(nm is None or math.isfinite(nm) for nm in channels.wavelengths_nm)
    assert len(str(channels)) > 0


# Stems ------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OTHER_DTYPES = [torch.uint8, torch.int64, torch.bool, torch.complex64]
#: The largest input that a convolution of these sizes itself keeps finite.
LARGEST = {torch.float16: 1e2, torch.bfloat16: 1e30, torch.float32: 1e30, torch.float64: 1e200}
SPECS = [None, "anonymous", "RGB", "BGR", "GB", "B", "B08", [490.0, None, "R", 842.0], [None] * 5]
KINDS = ("normal", "constant", "largest", "tiny", "zeros", "mixed", "nan")


@dataclass(frozen=True)
class Planes:
    """An input of a stem."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str
    seed: int

    def make(self):
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        factor = {"tiny": 1e-7, "zeros": 0.0, "largest": LARGEST.get(self.dtype, 1.0)}
        x = x.clamp(-3, 3) * (factor.get(self.kind, 1.0) / 3)
        if self.kind == "constant" and x.ndim > 1:
            x = x[..., :1, :1].expand(self.shape)
        if self.kind == "mixed" and x.ndim == 4:
            x = x * torch.tensor([1e-4, 1.0, 30.0, 5.0]).repeat(9)[: x.shape[1], None, None]
        x = x.to(self.dtype)
        if self.kind == "nan" and x.numel() and x.is_floating_point():
            x.view(-1)[self.seed % x.numel()] = math.nan
        return x


shapes = st.one_of(
    st.tuples(*[st.integers(0, 3), st.integers(0, 6), st.integers(0, 9), st.integers(0, 9)]),
    st.tuples(*[st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)]),
    st.lists(st.integers(0, 5), max_size=6).map(tuple),
)
planes = st.builds(
    Planes, shapes, st.sampled_from(DTYPES * 3 + OTHER_DTYPES), st.sampled_from(KINDS),
    st.integers(0, 2**31),
)  # fmt: skip
stem_cases = st.tuples(
    st.sampled_from(sorted(OWN_STEMS)), st.sampled_from(SPECS), st.sampled_from(DTYPES), planes
)


def fits(mixer, spec, x):
    """Whether a stem has to take an input: the rule of the README."""
    if x.ndim != 4 or 0 in x.shape[1:] or not x.is_floating_point():
        return False
    if spec == "anonymous" or (spec is None and mixer.supports_anonymous):
        return True
    return x.shape[1] == (3 if spec is None else len(ChannelSet.parse(spec)))


@prop(stem_cases, 100, 3000)
def stems(case, monkeypatch):
    """Any shape, type and content, with any stem told any channel set."""
    name, spec, dtype, drawn = case
    # On CPUs with AMX a plain convolution of tiny bfloat16 planes gives NaN in oneDNN (torch 2.14).
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", dtype != torch.bfloat16)
    torch.manual_seed(0)
    stem = make_stem(name, nn.Conv2d(3, 4, 3, stride=2, padding=1)).to(dtype)
    if name == "dwg":
        wake(stem)
    try:
        stem.mixer.set_channels(spec)
    except ValueError as error:
        assert re.search("anonymous", str(error))
        return
    x = drawn.make()
    if not fits(stem.mixer, spec, x):
        with pytest.raises(ValueError, match=r"needed|has \d+ channels"):
            stem(x)
        return
    if x.dtype != dtype:
        with pytest.raises(RuntimeError, match="type"):  # torch's own, as from a convolution
            stem(x)
        return
    x.requires_grad_()
    y = stem(x)
    B, _, H, W = x.shape
    assert y.shape == (B, 4, -(-H // 2), -(-W // 2))
    assert y.dtype == dtype
    check_answer(stem, x, y, drawn.kind)


def check_answer(stem, x, y, kind):
    """Finite where the input is; every sample as if it were alone; gradients finite too."""
    good = x.detach().isfinite().flatten(1).all(1)
    assert y.isfinite().flatten(1).all(1)[good].all(), "not finite out of finite planes"
    assert y[~good].isnan().any() or good.all(), "NaN was swallowed"
    for number in range(len(x)):
        if x.dtype in (torch.float32, torch.float64) and good[number]:
            assert_same(stem(x[number : number + 1])[0], y[number], 1e-4)
    if good.all() and kind != "largest":
        y.mean().backward()
        assert x.grad.isfinite().all()
        grads = [p.grad for p in stem.parameters() if p.grad is not None]
        assert all(grad.isfinite().all() for grad in grads)


sets = st.sampled_from([s for s in SPECS if s not in (None, "anonymous")]).map(ChannelSet.parse)


@prop(st.tuples(st.lists(sets, min_size=1, max_size=5), st.integers(0, 2**31)), 30, 600)
def mixed_batches(case):
    """One set a sample: what stands in absent planes changes nothing, not even NaN."""
    chosen, number = case
    torch.manual_seed(number)
    stem = wake(make_stem("dwg", nn.Conv2d(3, 4, 3)))
    longest = max(map(len, chosen))
    x = torch.full((len(chosen), longest, 6, 7), math.nan)
    expected = []
    for sample, channels in zip(x, chosen, strict=True):
        sample[: len(channels)] = torch.randn(len(channels), 6, 7)
        stem.mixer.set_channels(channels)
        expected.append(stem(sample[None, : len(channels)]))
    stem.mixer.set_channels(chosen)
    assert_same(stem(x), torch.cat(expected))
    for wrong in (x[:, :-1], torch.cat([x, x]), x[0]):
        with pytest.raises(ValueError, match=r"samples of|needed is"):
            stem(wrong)


MODELS = {}


def classifier():
    if not MODELS:
        MODELS["one"] = wake(randomise(timm.create_model("dwg_test_resnet", num_classes=3).eval()))
    return MODELS["one"]


@prop(st.tuples(st.sampled_from(SPECS), planes), 20, 300)
def models(case):
    """A whole classifier, by `share`: its stem's rule, and the model stays as it is."""
    spec, drawn = case
    model, x = classifier(), drawn.make()
    twin = timm_varchan.share(model, spec)
    mixer = timm_varchan.models.stems(twin)[0]
    assert timm_varchan.models.stems(model)[0].channels is None
    if not fits(mixer, spec, x):
        with pytest.raises(ValueError, match=r"needed|channels"):
            twin(x)
    elif x.dtype != torch.float32:
        with pytest.raises(RuntimeError, match="type"):
            twin(x)
    else:
        with torch.no_grad():
            logits = twin(x)
            assert logits.shape == (len(x), 3)
            good = x.isfinite().flatten(1).all(1)
            assert logits[good].isfinite().all() or drawn.kind == "largest"
            order = torch.randperm(x.shape[1])
            if spec == "anonymous" and good.all() and drawn.kind != "largest" and len(x):
                torch.testing.assert_close(twin(x[:, order]), logits, rtol=1e-3, atol=1e-3)


DEVICES = ["cpu", "cuda", "cuda:7", "mps", "xpu", "meta", "nonsense", ""]
#: All that there are.
NUM_DEVICE_CASES = len(DEVICES) * len(OWN_STEMS)
device_cases = st.tuples(st.sampled_from(DEVICES), st.sampled_from(sorted(OWN_STEMS)))


@prop(device_cases, NUM_DEVICE_CASES, NUM_DEVICE_CASES)
def devices(case):
    """A device that is not there is torch's error, at once; meta computes shapes."""
    device, name = case
    bank = nn.Conv2d(3, 4, 3, padding=1)
    try:
        there = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError):
        with pytest.raises((RuntimeError, AssertionError)):
            make_stem(name, bank, device=device)
        with pytest.raises((RuntimeError, AssertionError)):
            make_stem(name, bank).to(device)
        return
    stem = make_stem(name, bank).to(there)
    stem.mixer.set_channels("RGB")
    assert stem(torch.randn(2, 3, 5, 5, device=there)).shape == (2, 4, 5, 5)


# Files ------------------------------------------------------------------------------------------


def encoded(form, array):
    """The bytes of an image file, or None where the format cannot hold the array."""
    out = io.BytesIO()
    if form == "npy":
        np.save(out, array)
    elif form == "tiff":
        tifffile.imwrite(out, array, photometric="minisblack")
    elif array.dtype != np.uint8 or array.shape[0] not in (1, 3, 4):
        return None
    else:
        shown = np.moveaxis(array, 0, -1)[..., 0] if len(array) == 1 else np.moveaxis(array, 0, -1)
        mode = {"JPEG": "RGB", "GIF": "L", "BMP": "RGB"}.get(form)
        picture = Image.fromarray(shown)
        (picture.convert(mode) if mode else picture).save(out, form)
    return out.getvalue()


FORMS = ["npy", "tiff", "PNG", "JPEG", "GIF", "BMP", "WEBP"]
arrays = st.tuples(
    st.integers(1, 5), st.integers(1, 9), st.integers(1, 9),
    st.sampled_from(["u1", "u2", "<f4", ">f4", "f2", "f8", "i4", "i8", "u8", "?", "c8"]),
    st.integers(0, 99),
)  # fmt: skip
damages = st.lists(
    st.one_of(
        st.tuples(st.just("cut"), st.integers(0, 400)),
        st.tuples(st.just("flip"), st.integers(0, 400), st.integers(1, 255)),
        st.tuples(st.just("insert"), st.integers(0, 400), st.binary(min_size=1, max_size=9)),
    ),
    max_size=3,
)


def make_array(case):
    C, H, W, dtype, number = case
    values = np.random.default_rng(number).random((C, H, W)) * 250
    return values.astype(dtype)


def damage(data, changes):
    data = bytearray(data)
    for kind, place, *value in changes:
        place = min(place, len(data))
        if kind == "cut":
            del data[place:]
        elif kind == "flip" and place < len(data):
            data[place] ^= value[0]
        elif kind == "insert":
            data[place:place] = value[0]
    return bytes(data)


files = st.one_of(st.binary(max_size=60), st.tuples(st.sampled_from(FORMS), arrays, damages))


@prop(st.tuples(files, st.sampled_from(["RGB", "G", "GB", [None] * 5])), 200, 3000)
def image_files(case):
    """Files of every format, whole and damaged: the planes that were asked for, or a ValueError."""
    drawn, spec = case
    channels = ChannelSet.parse(spec)
    data, whole = drawn, None
    if isinstance(drawn, tuple):
        form, array, changes = drawn
        array = make_array(array)
        data = encoded(form, array)
        if data is None:
            return
        whole = array if form in ("npy", "tiff") and not changes else None
        data = damage(data, changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # decoders warn of what they then refuse
        try:
            image = read_image(data, channels)
        except ValueError as error:
            assert str(error).startswith("Cannot read the image: ")
            assert "\n" not in str(error)
            return
    assert image.ndim == 3
    assert len(image) == len(channels)
    assert image.dtype in (torch.uint8, torch.uint16, torch.float32)
    if whole is not None and whole.dtype.kind != "b" and len(whole) == len(channels):
        # else TIFF itself does not tell rows from planes
        same_order = len(whole) not in whole.shape[1:] and 1 not in whole.shape[1:]
        if same_order:
            np.testing.assert_allclose(image.numpy(), whole.astype(np.float32), rtol=1e-6)


@prop(
    st.tuples(arrays, st.integers(1, 40), st.floats(0.05, 1.0), st.sampled_from(["RGB", "G"])),
    50, 1000,
)  # fmt: skip
def transforms(case):
    """Images of any size and type: `(C, size, size)`, finite, or a ValueError."""
    array, size, crop_pct, spec = case
    array = make_array(array)
    channels = ChannelSet.parse(spec)
    if array.dtype.kind == "c" or array.dtype == np.uint64:
        return
    image = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    transform = eval_transform(size, channels, crop_pct=crop_pct)
    known = image.is_floating_point() or image.dtype in (torch.uint8, torch.uint16)
    if len(image) != len(channels) or not known:
        with pytest.raises(ValueError, match=r"channels are|whose range nothing tells"):
            transform(image)
        return
    x = transform(image)
    assert x.shape == (len(channels), size, size)
    assert x.dtype == torch.float32
    assert x.isfinite().all()


@prop(st.lists(st.tuples(st.sampled_from(FORMS), arrays, damages), min_size=1, max_size=4), 5, 100)
def predictions(cases):
    """Every file gets probabilities or a reason, in the order of the files."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        paths = []
        for number, (form, array, changes) in enumerate(cases):
            data = encoded(form, make_array(array))
            paths.append(Path(folder) / f"{number}.{form}")
            if data is not None:
                paths[-1].write_bytes(damage(data, changes))
        options = {"channels": "anonymous", "img_size": 32, "mean": [0.5], "std": [0.2]}
        answers = list(predict(classifier(), paths, **options, top=3))
    assert [one.file for one in answers] == paths
    for one in answers:
        assert (one.error is None) == (len(one.classes) == 3)
        if one.error is None:
            assert sum(p for _, p in one.classes) == pytest.approx(1, abs=1e-4)
        else:
            assert one.error
            assert "\n" not in one.error


# Configurations ---------------------------------------------------------------------------------

#: Neither so large that a right answer takes all memory nor so small that none is tried.
values = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.integers(2**40, 2**70), st.floats(),
    st.text(max_size=5), st.lists(st.integers(-2, 9), max_size=4), st.just({}), st.just([{}]),
    st.sampled_from(["GB", "anonymous", "dwg_test_vit", "test_resnet", "resnet18"]),
    st.just([{"name": "B", "wavelength_nm": 1}]), st.just([{"name": "DNA"}]),
)  # fmt: skip
keys = st.sampled_from(
    [
        "architecture", "num_classes", "label_names", "channels", "model_args", "pretrained_cfg",
        "model_args.in_chans", "model_args.num_classes", "model_args.channel_set",
        "model_args.channel_names", "model_args.virtual_channels", "model_args.block",
        "pretrained_cfg.input_size", "pretrained_cfg.mean", "pretrained_cfg.std",
        "pretrained_cfg.crop_pct", "pretrained_cfg.classifier", "pretrained_cfg.first_conv",
        "pretrained_cfg.num_classes", "pretrained_cfg.custom_load", "pretrained_cfg.nonsense",
    ]
)  # fmt: skip
configs = st.one_of(
    st.tuples(st.just("config"), st.dictionaries(keys, values, min_size=1, max_size=3)),
    st.tuples(st.just("text"), damages),
    st.tuples(st.just("header"), damages),
    st.tuples(st.just("length"), st.integers(0, 2**64 - 1)),
)


@pytest.fixture(scope="module")
def saved_folder(tmp_path_factory):
    return hub.save(
        classifier(), tmp_path_factory.mktemp("hostile") / "m", class_names=["a", "b", "c"],
        channels=RGB, img_size=32,
    )  # fmt: skip


def broken_folder(source, folder, kind, how):
    """A copy of a saved model with something wrong."""
    shutil.copytree(source, folder)
    config, weights = folder / "config.json", folder / "model.safetensors"
    if kind == "config":
        content = json.loads(config.read_text())
        for key, value in how.items():
            *path, last = key.split(".")
            place = content
            for part in path:
                place = place[part] if isinstance(place.get(part), dict) else {}
            place[last] = value
        config.write_text(json.dumps(content))
    elif kind == "text":
        config.write_bytes(damage(config.read_bytes(), how))
    elif kind == "header":
        weights.write_bytes(damage(weights.read_bytes(), how))
    else:
        weights.write_bytes(struct.pack("<Q", how) + weights.read_bytes()[8:])


@prop(configs, 15, 500)
def saved_models(case, saved_folder):
    """Broken folders: a model that answers, or one line that `load` documents."""
    with tempfile.TemporaryDirectory() as parent, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(parent) / "m"
        broken_folder(saved_folder, folder, *case)
        try:
            saved = hub.load(folder)
        except (ValueError, FileNotFoundError, RuntimeError) as error:
            assert "\n" not in str(error)
            assert len(str(error)) > 20
            return
    channels = saved.channels
    assert all(isinstance(name, str) for name in saved.spec.class_names)
    assert 0 < saved.spec.crop_pct <= 1
    assert saved.spec.img_size > 0
    if timm_varchan.models.has_stems(saved.model):
        with torch.no_grad():
            timm_varchan.share(saved.model, None)(torch.randn(1, 3, 32, 32))
    assert ChannelSet.from_dict(channels.to_dict()) == channels


arguments = st.lists(
    st.one_of(
        st.sampled_from(
            ["predict", "look", "export", "fold", "push", "--channels", "GB", "B02+B08", "--mean",
             "0.5", "nan", "--std", "0", "--top", "-1", "--img-size", "0", "dwg_test_resnet",
             "--no-pretrained", "nowhere.png", "--batch-size", "--value-scale", "1e999", "x.onnx"]
        ),
        st.text(max_size=4),
    ),
    max_size=8,
)  # fmt: skip


@prop(arguments, 30, 300)
def command_lines(given_arguments):
    """Wrong commands: 1 and one line, or 2 and the usage."""
    said = io.StringIO()
    with redirect_stderr(said):
        try:
            code = main(given_arguments)
        except SystemExit as stop:
            code = stop.code
    assert code in (0, 1, 2, 3)
    if code == 1:
        assert said.getvalue().startswith("error: ")
        assert said.getvalue().count("\n") == 1


@pytest.mark.parametrize(("name", "num_cases"), list(sizes()))
def test_hostile(name, num_cases, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function, strategy, _, _ = PROPERTIES[name]
    fixtures = function.__code__.co_varnames[1 : function.__code__.co_argcount]
    kwargs = {fixture: request.getfixturevalue(fixture) for fixture in fixtures}

    @seed(0)
    @settings(
        max_examples=num_cases, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def check(case):
        seen.append(case)
        function(case, **kwargs)

    seen = []
    check()
    assert len(seen) >= num_cases


def test_there_are_enough_cases():
    assert sum(many for _, _, _, many in PROPERTIES.values()) >= NUM_CASES


def test_a_channel_is_refused_in_its_own_words():
    for wrong in ({"colour": 1}, {"wavelength_nm": "500"}, {"name": 5}, {"mean": b"", "std": 1}):
        with pytest.raises(ValueError, match=r"[Cc]hannel"):
            ChannelSet.parse([wrong])
    with pytest.raises(ValueError, match="name"):
        Channel(5)
