"""README's Python and its commands for one's own data, on images that somebody might have."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import tifffile
import timm
import torch
from tiny_runs import fresh_accelerate  # noqa: F401

import timm_varchan
from timm_varchan.__main__ import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def python_of(text):
    """The Python snippets of a page."""
    return re.findall(r"```python\n(.*?)```", text, re.S)


def test_the_python_runs_word_for_word(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    brightness = torch.rand(8, 1, 1, 1)
    images = 0.2 * torch.randn(8, 4, 64, 64) + brightness * torch.tensor([1, 2, 2, 3]).view(4, 1, 1)
    present = torch.ones(8, 4).bool()
    present[0, 1] = present[1, 3] = False
    labels = torch.arange(8)
    missing = images.masked_fill(~present[:, :, None, None], float("nan"))
    own, plain = python_of(README)[1:]

    names = {"timm": timm, "torch": torch}
    names |= {"complete": [images], "loader": [(missing, present, labels)]}
    exec("import timm_varchan\n" + own, names)
    assert names["loss"].isfinite()
    assert all(p.isfinite().all() for p in names["model"].parameters())
    model, loaded = names["model"].eval(), names["saved"].model.eval()
    timm_varchan.set_channels(model, "B02+B08")
    timm_varchan.set_channels(loaded, "B02+B08")
    x = images[:, ::3]  # a saved correlation has four digits
    assert torch.allclose(model(x), loaded(x), atol=1e-4)

    model = timm.create_model("resnet10t", in_chans=4, num_classes=10).eval()
    before = model(images)
    names = {"model": model, "loader": [images]}
    exec("import timm_varchan\n" + plain, names)
    shares = names["timm_varchan"].unexplained_variance(model, "B02+B04+B08")
    assert 0 < shares["B03"] < 1
    assert shares["B08"] < 1e-6
    names["timm_varchan"].set_channels(model, "B02+B03+B04+B08")
    assert torch.allclose(model(images), before, atol=1e-4)


def test_the_page_of_gray_images_runs_from_top_to_bottom():
    torch.manual_seed(0)
    names = {}
    for code in python_of((ROOT / "docs" / "gray.md").read_text()):
        exec(code, names)
    with torch.no_grad():
        gray = names["gray"]
        tripled = names["model"](gray.expand(-1, 3, -1, -1))
        assert torch.allclose(names["camera"](gray), tripled, atol=1e-4)
        assert torch.allclose(names["fixed"](gray), tripled, atol=1e-4)


def own_data(folder, num_planes, dtype):
    """Two classes of small TIFFs, as the README shows them."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("validation", 2)):
        for level, label in enumerate(("forest", "river")):
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                image = rng.integers(100, 4000 + 3000 * level, (num_planes, 20, 20)).astype(dtype)
                file = folder / split / label / f"{number:04d}.tif"
                tifffile.imwrite(file, image, photometric="minisblack")


COMMANDS = re.findall(r"^timm-varchan train (--dataset mine .*)$", README, re.M)
#: What the images of each of them are.
PLANES = {"runs/bands": (13, np.uint16), "runs/stains": (3, np.uint16), "runs/rgb": (3, np.uint16)}
assert len(COMMANDS) == len(PLANES)


@pytest.mark.parametrize("command", COMMANDS)
def test_own_data_train_and_predict_by_its_commands(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = shlex.split(command, comments=True)
    folder = given[given.index("--output-dir") + 1]
    own_data(tmp_path / "mine", *PLANES[folder])
    given = [word for word in given if word != "--pretrained"]  # needs the hub
    small = "--model dwg_test_resnet --img-size 16 --epochs 1 --batch-size 4 --workers 0".split()
    assert main(["train", *given, *small]) == 0
    results = json.loads((Path(folder) / "results.json").read_text())
    assert results["data"]["num_images"]["train"] == 12
    saved = timm_varchan.hub.load(Path(folder) / "model")
    assert len(saved.spec.channels) == PLANES[folder][0]
    assert saved.spec.class_names == ("forest", "river")
    assert main(["predict", f"{folder}/model", "mine/validation/river/0000.tif"]) == 0
    assert re.search("(forest|river) +[0-9.]+%", capsys.readouterr().out)
