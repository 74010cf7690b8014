"""A model's own names, with what is known of them, wherever channels are said."""

import importlib
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import timm
import torch

import timm_varchan
from timm_varchan import ChannelSet, hub
from timm_varchan.__main__ import main
from timm_varchan.channels import write_channels
from timm_varchan.errors import UserError
from timm_varchan.models import stems, unexplained_variance
from timm_varchan.predict import predict
from timm_varchan.scenes import predict_scene

TABLE = [[1.0, 0.6, 0.2], [0.6, 1.0, 0.4], [0.2, 0.4, 1.0]]
STAINS = (
    ChannelSet.parse("DNA@461nm+ER=+AGP@617nm")
    .with_stats([0.2, 0.3, 0.4], [0.05, 0.06, 0.07], TABLE)
    .with_scale(4000.0)
)


@pytest.fixture
def model():
    return timm.create_model(
        "dwg_test_resnet", num_classes=2, channel_names=("ER",), virtual_channels=STAINS,
        channel_stats=STAINS.standardised(), channel_set="ER+DNA+AGP",
    ).eval()  # fmt: skip


@pytest.fixture
def folder(model, tmp_path):
    return hub.save(
        model,
        tmp_path / "model",
        class_names=["a", "b"],
        channels=STAINS,
        img_size=32,
        crop_pct=1.0,
    )


@pytest.fixture
def images(tmp_path):
    """Files of two planes, ER and DNA."""
    rng = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            image = rng.normal(1000, 250, (2, 32, 32)).clip(0, 4000).astype(np.uint16)
            tifffile.imwrite(tmp_path / "data" / name / f"{i}.tif", image, photometric="minisblack")
    return tmp_path / "data"


def test_python_calls_know_them(model):
    assert stems(model)[0].channels.names == ("ER", "DNA", "AGP")
    x = torch.randn(2, 2, 32, 32)
    twin = timm_varchan.share(model, "ER+DNA").eval()
    assert stems(twin)[0].channels == ChannelSet.parse("ER=+DNA@461nm")
    timm_varchan.set_channels(model, "ER+DNA")
    torch.testing.assert_close(model(x), twin(x))
    assert timm_varchan.fold(model, "ER+DNA", [x])(x).shape == (2, 2)
    assert unexplained_variance(model, "ER+DNA")["AGP"] > unexplained_variance(model, "AGP")["AGP"]
    plain = timm.create_model("test_resnet", num_classes=2)
    adapted = timm_varchan.adapt(
        plain, channels="ER+DNA", channel_names=("ER",), virtual_channels="DNA+ER+AGP",
        channel_stats=STAINS.standardised(),
    ).eval()  # fmt: skip
    assert adapted(x).shape == (2, 2)
    with pytest.raises(ValueError, match="'Golgi'"):
        timm_varchan.set_channels(model, "ER+Golgi")


def test_predictions_without_a_specification_know_them(model, images, tmp_path):
    normalisation = {"mean": [0.3, 0.2], "std": [0.06, 0.05]}
    options = {"channels": "ER+DNA", "img_size": 32, "value_scale": 4000.0}
    file = images / "a" / "0.tif"
    (found,) = predict(model, [file], **normalisation, **options)
    assert found.error is None
    with pytest.raises(UserError, match="mean"):
        list(predict(model, [file], **options))
    options["channels"] = ChannelSet.parse("ER=+DNA@461nm").with_stats(*normalisation.values())
    (again,) = predict(model, [file], **options)
    assert again == found
    rasterio = pytest.importorskip("rasterio", reason="pip install 'timm-varchan[geo]'")
    with rasterio.open(
        tmp_path / "s.tif", "w", "GTiff", 32, 32, 2, "EPSG:32633",
        rasterio.Affine(10, 0, 400000, 0, -10, 5400000), "uint16",
    ) as scene:  # fmt: skip
        scene.write(tifffile.imread(file))
    with pytest.raises(UserError, match="no mean and std"):  # known, and without statistics
        list(predict_scene(model, tmp_path / "s.tif", tmp_path / "m.csv", channels="ER+DNA",
                           img_size=32))  # fmt: skip
    *_, row = predict_scene(model, tmp_path / "s.tif", tmp_path / "map.csv", **options)
    assert row.done == row.total


def test_the_callback_of_lightning_knows_them(model, monkeypatch):
    lightning = SimpleNamespace(Callback=object, LightningModule=object, Trainer=object)
    monkeypatch.setitem(sys.modules, "lightning", SimpleNamespace(pytorch=lightning))
    monkeypatch.setitem(sys.modules, "lightning.pytorch", lightning)
    callback = importlib.import_module("timm_varchan.integrations.lightning").Channels("ER+DNA")
    callback.setup(None, model, "fit")
    assert stems(model)[0].channels.names == ("ER", "DNA")
    callback.load_state_dict(callback.state_dict())
    other = type(callback)("DNA+ER")
    with pytest.raises(ValueError, match=r"trained on ER\+DNA"):
        other.load_state_dict(callback.state_dict())


def test_the_saved_statistics_hold(folder):
    saved = hub.load(folder, channel_set="ER+DNA")
    assert saved.channels.mean == (0.3, 0.2)
    assert saved.channels.correlation == ((1.0, 0.6), (0.6, 1.0))
    assert saved.channels.value_scale == 4000
    assert hub.load(folder).channels == STAINS


@pytest.mark.parametrize("how", ["names", "file"])
def test_commands_know_them(folder, images, tmp_path, capsys, how):
    channels = "ER+DNA"
    if how == "file":
        channels = str(write_channels(STAINS.take([1, 0]), tmp_path / "two.json"))
    file, onnx = str(images / "a" / "0.tif"), tmp_path / "m.onnx"
    assert main(["predict", str(folder), file, "--channels", channels, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)["classes"]
    assert main(["evaluate", str(folder), "--dataset", str(images), "--channels", channels,
                 "--output", str(tmp_path / "judged")]) == 0  # fmt: skip
    results = json.loads((tmp_path / "judged" / "results.json").read_text())
    used = ChannelSet.from_dict(results["data"]["channels"])
    assert (used, used.value_scale) == (STAINS.take([1, 0]), 4000)
    if how == "file":
        return
    picture = str(tmp_path / "stem.png")
    assert main(["look", str(folder), file, "--channels", channels, "--output", picture,
                 "--sets", "ER", "DNA"]) == 0  # fmt: skip
    assert main(["export", str(folder), str(onnx), "--channels", channels]) == 0
    assert main(["fold", str(folder), str(tmp_path / "folded"), "--channels", channels]) == 0
    folded = hub.load(tmp_path / "folded")
    assert folded.channels.mean == (0.3, 0.2)
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "folded"), file, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["classes"]
    assert {c["name"]: c["probability"] for c in again} == pytest.approx(
        {c["name"]: c["probability"] for c in answer}, abs=0.02
    )


def test_an_unknown_name_is_refused_with_theirs(folder, images, capsys):
    for command in (["predict", str(folder), str(images)], ["export", str(folder), "x.onnx"]):
        assert main([*command, "--channels", "ER+dna"]) == 1
        assert "'dna': did you mean DNA?" in capsys.readouterr().err
