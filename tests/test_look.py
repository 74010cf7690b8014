"""The picture of what a stem makes of images, by function and by command."""

import numpy as np
import pytest
import timm
import torch
from conftest import wake
from PIL import Image

import timm_varchan
from timm_varchan import ChannelSet, plots
from timm_varchan.__main__ import main

BANDS = ChannelSet.parse("R+G+NIR")


@pytest.fixture
def drawn(monkeypatch):
    """The texts and the arrays of every axes that was drawn."""
    figures = []
    make = plots._figure
    monkeypatch.setattr(plots, "_figure", lambda *size: figures.append(make(*size)) or figures[-1])
    return lambda: [
        ([t.get_text() for t in axes.texts], [i.get_array() for i in axes.images])
        for axes in figures[-1].axes
    ]


def test_cells_show_coefficients_and_kernels(tmp_path, drawn):
    model = wake(timm.create_model("dwg_test_resnet").eval())
    x = torch.randn(2, 3, 32, 32) * torch.tensor([1.0, 4.0])[:, None, None, None]
    path = plots.plot_stem(model, x, BANDS, tmp_path / "p.png", sets=[(0, 1, 2), (2, 0)])
    with Image.open(path) as picture:
        assert min(picture.size) > 100
    cells = drawn()
    assert len(cells) == 2 * 2 * 2  # image and set, each beside its picture
    twin = timm_varchan.share(model, "NIR+R")
    stem = twin.get_submodule("conv1.0")
    a = stem.mixer.coefficients(x[:, [2, 0]])
    kernels = stem.generated_kernels(x[:, [2, 0]])
    for image, (texts, arrays) in zip((0, 1), (cells[3], cells[7]), strict=True):
        assert texts == [f"{v:.2f}" for v in a[image].flatten().tolist() if abs(v) >= 0.005]
        np.testing.assert_allclose(arrays[0], a[image].detach(), rtol=1e-6)
        assert len(arrays) == 1 + 2 * plots.NUM_KERNELS
        for array in arrays[1:]:
            close = np.isclose(kernels[image].detach(), np.asarray(array), atol=1e-6)
            assert close.all((-1, -2)).any(), "no such generated kernel"
    assert cells[3][0] != cells[7][0], "images of different content look alike"


def test_blocks_have_coefficients_only(tmp_path, drawn):
    model = timm.create_model("dwg_repvgg_a0")
    plots.plot_stem(model, torch.randn(1, 2, 32, 32), "GB", tmp_path / "p.png")
    cells = drawn()
    assert [len(arrays) for _, arrays in cells] == [1, 1, 1, 1]
    red_of_green, green, red_of_blue, blue = cells[1][0]  # zeros are left blank
    assert float(red_of_green) + float(red_of_blue) == pytest.approx(1.0, abs=0.02)
    assert (green, blue) == ("1.00", "1.00")


def test_refusals(tmp_path):
    model = timm.create_model("dwg_test_resnet")
    x = torch.randn(1, 3, 32, 32)
    for other, images, options, text in (
        (timm.create_model("test_resnet"), x, {}, "has no stem"),
        (torch.nn.Sequential(timm_varchan.DWGMixer()), x, {}, "has a mixer but no"),
        (model, x[:, :2], {}, r"Give \(B, 3, H, W\)"),
        (model, x[:0], {}, "at least one image"),
    ):
        with pytest.raises(ValueError, match=text):
            plots.plot_stem(other, images, BANDS, tmp_path / "p.png", **options)
    assert not list(tmp_path.iterdir())


def test_command(tmp_path, capsys):
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(0).random((2, 40, 40), np.float32))
    (tmp_path / "c.png").write_bytes(b"no image")
    out = tmp_path / "out.png"
    command = ["look", "dwg_test_resnet", str(tmp_path), "--no-pretrained", "--output", str(out)]
    channels = ["--channels", "GB", "--mean", "0.5", "--std", "0.25"]
    assert main([*command, *channels, "--img-size", "32", "--sets", "R"]) == 1
    assert "Channel R is not among" in capsys.readouterr().err
    assert main([*command, *channels, "--img-size", "32", "--sets", "B", "GB"]) == 3
    shown = capsys.readouterr()
    assert shown.out == f"{out}\n"
    assert "c.png: not read, it is no image" in shown.err
    assert out.stat().st_size > 1000
    (tmp_path / "a.npy").unlink()
    (tmp_path / "b.npy").unlink()
    out.unlink()
    assert main([*command, *channels]) == 1
    assert "None of the files" in capsys.readouterr().err
