"""Folding: exact where it can be, measured where not, loaded by timm alone."""

import json
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import assert_same, randomise, wake
from timm.models import save_for_hf

import timm_varchan
import timm_varchan.hub
from timm_varchan import ChannelSet, fold
from timm_varchan.__main__ import main
from timm_varchan.folding import measure_change

NUM_CLASSES = 5
#: Kinds of first layers: a convolution, one with "same" padding, two in a block, one a scale.
PLAIN = ("test_vit", "tf_mobilenetv3_small_minimal_100", "repvgg_a0")


def twin(arch, **kwargs):
    size = {"img_size": 64} if "vit" in arch else {}
    model = timm.create_model(f"dwg_{arch}", num_classes=NUM_CLASSES, **size, **kwargs).eval()
    return randomise(model) if arch == "test_resnet" else model


def logits(model, x, channels):
    with torch.no_grad():
        return timm_varchan.share(model, channels)(x)


@pytest.mark.parametrize(
    ("arch", "channels"),
    [
        *[pytest.param(arch, "GB", marks=pytest.mark.slow) for arch in PLAIN],
        ("test_resnet", "B08"),
        ("test_resnet", [None, 500.0, "R", None]),
    ],
)
def test_exact_where_coefficients_are_constant(arch, channels):
    model = twin(arch)
    folded = fold(model, channels)
    x = torch.randn(2, len(ChannelSet.parse(channels)), 64, 64)
    assert_same(folded(x), logits(model, x, channels))
    assert not any("timm_varchan" in type(m).__module__ for m in folded.modules())
    plain = timm.create_model(arch, num_classes=NUM_CLASSES, in_chans=x.shape[1],
                              **({"img_size": 64} if "vit" in arch else {}))  # fmt: skip
    plain.load_state_dict(folded.state_dict())
    assert_same(plain.eval()(x), folded(x))


@pytest.mark.parametrize("arch", ["test_resnet", pytest.param("repvgg_a0", marks=pytest.mark.slow)])
def test_calibrated_on_one_image_is_exact_for_it(arch):
    model = wake(twin(arch))
    x = torch.randn(8, 2, 64, 64) * torch.rand(8, 2, 1, 1) * 3
    with pytest.raises(ValueError, match="Give calibration images"):
        fold(model, "GB")
    with pytest.raises(ValueError, match="no calibration images"):
        fold(model, "GB", [])
    assert_same(fold(model, "GB", [x[:1]])(x[:1]), logits(model, x[:1], "GB"), 1e-4)
    in_one, in_two = fold(model, "GB", [x]), fold(model, "GB", [x[:5], x[5:]])
    assert_same(in_two(x), in_one(x), 1e-4)


def test_change_is_measured():
    model = wake(twin("test_resnet"))
    x = torch.randn(40, 2, 64, 64) * torch.rand(40, 2, 1, 1) * 3
    labels = logits(model, x, "GB").argmax(1)
    folded = fold(model, "GB", [x[:20]])
    change = measure_change(model, folded, [(x[:30], labels[:30]), (x[30:], labels[30:])], "GB")
    expected = (folded(x) - logits(model, x, "GB")).abs()
    assert change.num_images == 40
    assert change.max_logit == pytest.approx(expected.max().item(), rel=1e-3)
    assert change.mean_logit == pytest.approx(expected.mean().item(), rel=1e-3)
    assert 0 < change.mean_logit < change.logit_std
    assert change.accuracy == 1
    assert change.folded_accuracy == pytest.approx(change.agreement)
    assert change.difference.difference == pytest.approx(change.agreement - 1)
    assert measure_change(model, folded, [(x, None)], "GB").accuracy is None
    with pytest.raises(ValueError, match="no images"):
        measure_change(model, folded, [], "GB")


def test_model_is_not_changed():
    model = twin("test_resnet")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded = fold(model.train(), "GB")
    with torch.no_grad():
        for parameter in folded.parameters():
            parameter.zero_()
    assert model.training
    assert timm_varchan.models.stems(model)[0].channels is None
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name])


def test_standardised_weights():
    """Where the mix of standardised kernels has mean 0 a gain can express it; else nothing can."""
    x = torch.randn(1, 2, 64, 64)
    model = twin("test_nfnet")
    folded = fold(model, "GB")
    assert folded.pretrained_cfg["architecture"] == "test_nfnet"
    assert_same(folded(x), logits(model, x, "GB"), 1e-4)
    plain = timm.create_model("test_nfnet", num_classes=NUM_CLASSES, in_chans=2).eval()
    plain.load_state_dict(folded.state_dict())
    assert_same(plain(x), logits(model, x, "GB"), 1e-4)
    folded = fold(wake(model), "GB", [x])
    assert folded.pretrained_cfg["architecture"] == "test_nfnet_folded"
    assert_same(folded(x), logits(model, x, "GB"), 1e-4)


def test_arguments_of_the_stem_stay_behind(tmp_path):
    """What the base does not take is not saved, so that timm builds it anew."""
    bands = "B02+B03+B04+B08"
    model = twin("test_resnet", virtual_channels=bands, channel_names=["VV"])
    adapted = timm_varchan.adapt(timm.create_model("test_resnet", num_classes=5), "dwg", width=8)
    for made in (model, adapted.eval()):
        folded = fold(made, "B08+B02")
        assert set(folded._model_args) <= {"num_classes", "in_chans"}
        save_for_hf(folded, str(tmp_path), safe_serialization=True)
        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        x = torch.randn(1, 2, 64, 64)
        assert_same(again(x), logits(made, x, "B08+B02"))


def test_refusals():
    for other in (
        torch.nn.Sequential(timm_varchan.DWGMixer()),
        timm_varchan.Stem(timm_varchan.DWGMixer(), torch.nn.Conv2d(3, 4, 3)),
    ):
        with pytest.raises(ValueError, match="Fold the timm model itself"):
            fold(other, "GB")
    with pytest.raises(ValueError, match=r"is a SpaceToDepth.*Export"):
        fold(twin("tresnet_m"), "GB")
    with pytest.raises(ValueError, match=r"Give ChannelSet.anonymous\(n\)"):
        fold(twin("test_resnet"), "anonymous")
    with pytest.raises(ValueError, match="no stem"):
        fold(timm.create_model("test_resnet"), "GB")


ALONE = """
import json, sys
import timm, torch
model = timm.create_model(f"local-dir:{sys.argv[1]}", pretrained=True).eval()
x = torch.linspace(-1, 1, 2 * 2 * 64 * 64).view(2, 2, 64, 64)
other = timm.create_model(f"local-dir:{sys.argv[1]}", pretrained=True, in_chans=1)
seen = [model(x).tolist(), other(x[:, :1]).shape[1], model.pretrained_cfg["mean"]]
assert "timm_varchan" not in sys.modules
print(json.dumps(seen))
"""


def test_timm_loads_it_alone(tmp_path, capsys):
    model = wake(twin("test_resnet", channel_names=["DNA"]))
    names = [f"class{i}" for i in range(NUM_CLASSES)]
    source = timm_varchan.hub.save(
        model, tmp_path / "twin", class_names=names, channels=timm_varchan.RGB, img_size=64
    )
    data = tmp_path / "data"
    for split in ("train", "validation"):
        for name in names:
            (data / split / name).mkdir(parents=True)
            image = torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8).numpy()
            np.save(data / split / name / "0.npy", image)
    out = tmp_path / "folded"
    assert main(["fold", str(source), str(out), "--channels", "GB"]) == 1
    assert "--data FOLDER" in capsys.readouterr().err
    assert main(["fold", str(source), str(out), "--channels", "GB", "--data", "DATA"]) == 1
    assert "There is no file or folder DATA" in capsys.readouterr().err
    assert main(["fold", str(source), str(out), "--channels", "GB", "--data", str(data)]) == 0
    shown = capsys.readouterr().out
    assert "On 5 other images: logits change by" in shown
    assert "accuracy" in shown
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answer, num_classes, mean = json.loads(done.stdout)
    x = torch.linspace(-1, 1, 2 * 2 * 64 * 64).view(2, 2, 64, 64)
    assert_same(torch.tensor(answer), timm_varchan.hub.load(out).model(x).detach())
    assert num_classes == NUM_CLASSES
    assert mean == [0.456, 0.406]
