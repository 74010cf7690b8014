"""Exported files against the model, read by other programs."""

import json

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from conftest import wake
from onnxruntime.quantization.shape_inference import quant_pre_process

import timm_varchan
from timm_varchan.__main__ import main
from timm_varchan.export import CHECK_COUNTS, Check, export
from timm_varchan.input_spec import InputSpec

# Not ours to mend: torch.onnx and torch.export use what torch itself deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]


@pytest.fixture
def model():
    return wake(timm.create_model("dwg_test_resnet", num_classes=7).eval())


def test_onnx_for_any_channels(model, tmp_path):
    path = tmp_path / "m.onnx"
    result = export(model, path, img_size=64, class_names=["a"], value_scale=10000)
    assert (result.num_channels, result.img_size, result.fixed_because) == (None, None, None)
    assert {check.shape[1] for check in result.checks} == set(CHECK_COUNTS)
    assert {check.shape[2:] for check in result.checks} == {(64, 64), (96, 128)}
    assert all(check.difference < 1e-4 * check.scale for check in result.checks)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = torch.randn(2, 4, 80, 64)
    answer = session.run(None, {"image": x.numpy()})[0]
    np.testing.assert_allclose(answer, model(x).detach().numpy(), atol=1e-5)
    stored = session.get_modelmeta().custom_metadata_map["timm_varchan"]
    spec = InputSpec.from_dict(json.loads(stored))
    assert (spec.class_names, spec.img_size, spec.channels.value_scale) == (("a",), 64, 10000)
    assert session.get_inputs()[0].shape == ["batch", "channels", "height", "width"]
    assert session.get_outputs()[0].shape == ["batch", 7]
    alone = session.run(None, {"image": np.zeros((1, 3, 64, 64), np.float32)})[0]
    assert np.isfinite(alone).all()


def test_program_for_one_channel_set(model, tmp_path):
    result = export(model, tmp_path / "m.pt2", channels="GB", img_size=64, dynamic_size=False)
    assert (result.num_channels, result.img_size) == (2, (64, 64))
    assert timm_varchan.models.stems(model)[0].channels is None
    extra = {"timm_varchan": ""}
    program = torch.export.load(result.path, extra_files=extra).module()
    x = torch.randn(3, 2, 64, 64)
    twin = timm_varchan.share(model, "GB")
    torch.testing.assert_close(program(x), twin(x))
    assert InputSpec.from_dict(json.loads(extra["timm_varchan"])).channels.labels == ("G", "B")


@pytest.mark.parametrize("is_trained", [False, True])
def test_one_set_goes_through_the_first_step_to_int8(is_trained, model, tmp_path):
    plain = timm.create_model("dwg_test_resnet", num_classes=7).eval()
    export(model if is_trained else plain, tmp_path / "m.onnx", channels="RGB", dynamic_size=False)
    quant_pre_process(tmp_path / "m.onnx", tmp_path / "pre.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "pre.onnx")
    assert session.get_inputs()[0].shape[0] == "batch"
    x = torch.randn(2, 3, 160, 160)
    answer = session.run(None, {"image": x.numpy()})[0]
    expected = (model if is_trained else plain)(x).detach().numpy()
    np.testing.assert_allclose(answer, expected, atol=1e-5)


@pytest.mark.slow
def test_fixed_size_where_the_backbone_has_one(tmp_path):
    model = timm.create_model(
        "dwg_test_vit", num_classes=7, img_size=64, dynamic_img_size=False
    ).eval()
    result = export(model, tmp_path / "m.pt2")
    assert result.img_size == (64, 64)
    assert "does not take" in result.fixed_because
    assert {check.shape[1] for check in result.checks} == set(CHECK_COUNTS)


@pytest.mark.slow
def test_a_wrong_file_is_not_kept(model, tmp_path, monkeypatch):
    monkeypatch.setattr("timm_varchan.export._reader", lambda path: lambda x: model(x) + 1)
    with pytest.raises(RuntimeError, match="nothing was written"):
        export(model, tmp_path / "m.pt2", channels="G", img_size=64, dynamic_size=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float64, marks=pytest.mark.slow)]
)
def test_what_onnxruntime_cannot_run_is_told_in_one_line(dtype, tmp_path):
    plain = timm.create_model("test_resnet", num_classes=2).eval().to(dtype)
    with pytest.raises(RuntimeError, match=r"model\.float\(\)") as caught:
        export(plain, tmp_path / "m.onnx", img_size=32, dynamic_size=False)
    assert type(caught.value) is RuntimeError
    assert len(str(caught.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_nan_is_no_agreement():
    assert not Check((1, 1, 1, 1), float("nan"), 1.0).passed


def test_refusals(model, tmp_path):
    plain = timm.create_model("test_resnet").eval()
    for broken, path, channels, text in (
        (model, "m.pt", None, "ends in neither"),
        (plain, "m.pt2", "GB", "has no stem"),
        (plain.train(), "m.pt2", None, "training mode"),
        (timm_varchan.share(model, [timm_varchan.RGB] * 2), "m.pt2", None, "mixed batch"),
        (timm.create_model("dwg_test_resnet", features_only=True).eval(), "m.pt2", None, "a list"),
    ):
        with pytest.raises(ValueError, match=text):
            export(broken, tmp_path / path, channels=channels)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_command(tmp_path, capsys):
    out = str(tmp_path / "m.pt2")
    arguments = ["export", "dwg_test_resnet", out, "--no-pretrained", "--img-size", "64"]
    assert main([*arguments, "--channels", "GB", "--fixed-size"]) == 0
    shown = capsys.readouterr().out
    assert "input 1 x 2 x 64 x 64" in shown
    assert "2 channels, checked" in shown
    assert main(["export", "dwg_nothing", out]) == 1
    assert capsys.readouterr().err.startswith("error: There is no model or folder 'dwg_nothing'")
