"""Trained weights that come with the package."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import timm_varchan
from timm_varchan.models import rrdb, shipped

REAL = Path(__file__).parents[1] / "../shared/data/tinyimagenet50"
NAMES = [file.stem for file in sorted(shipped.FOLDER.glob("*.json"))]


def test_architecture_finds_its_weights(tmp_path, monkeypatch):
    """Made here: half precision in a file, a note beside it, and timm loads them as numbers."""
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    assert rrdb._cfg("rrdb_small")[0] == "rrdb_small.untrained"
    model = timm.create_model("rrdb_small", num_classes=2).eval()
    half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file(half, tmp_path / "rrdb_small.safetensors")
    fields = {"num_classes": 2, "input_size": [3, 32, 32], "label_names": ["cat", "dog"]}
    note = {"tag": "pets_32", "pretrained_cfg": fields}
    (tmp_path / "rrdb_small.json").write_text(json.dumps(note))
    name, cfg = rrdb._cfg("rrdb_small")
    assert name == "rrdb_small.pets_32"
    loaded = timm.create_model("rrdb_small", pretrained=True, pretrained_cfg=cfg).eval()
    assert loaded.pretrained_cfg["label_names"] == ("cat", "dog")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_weights_load_offline(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    note = shipped.shipped_note(name)
    file = shipped.FOLDER / f"{name}.safetensors"
    assert file.stat().st_size < 1_000_000
    model = timm.create_model(name, pretrained=True).eval()
    assert not torch.equal(next(model.parameters()), next(timm.create_model(name).parameters()))
    assert len(model.pretrained_cfg["label_names"]) == model.num_classes
    assert model.pretrained_cfg["tag"] == note["tag"]
    assert note["licence"]
    assert note["data"]


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("dwg_")])
def test_twin_takes_the_weights_of_its_base(name):
    base = timm.create_model(name, pretrained=True).eval()
    twin = timm.create_model(f"dwg_{name}", pretrained=True, pretrained_cfg=base.pretrained_cfg)
    twin.eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(twin(x), base(x), rtol=1e-4, atol=1e-5)
    assert twin.pretrained_cfg["label_names"] == base.pretrained_cfg["label_names"]


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_shipped_weights_are_as_good_as_their_note_says(name):
    if not REAL.is_dir():
        pytest.skip("the 50-class subset of Tiny-ImageNet is not beside the checkout")
    import datasets

    note = shipped.shipped_note(name)
    model = timm.create_model(name, pretrained=True).eval()
    cfg = model.pretrained_cfg
    rows = datasets.load_dataset("parquet", data_files=str(REAL / "validation.parquet"))["train"]
    rows = rows.cast_column("image", datasets.Image(decode=False))
    size = cfg["input_size"][-2:]
    mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    images, labels = [], []
    for row in rows:
        if row["label"] >= model.num_classes:
            continue
        image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        pixels = np.asarray(image.resize(size, Image.Resampling.BOX), np.float32) / 255
        images.append((torch.from_numpy(pixels).permute(2, 0, 1) - mean) / std)
        labels.append(row["label"])
    x, y = torch.stack(images), torch.tensor(labels)
    for channels, expected in note["results"].items():
        if name.startswith("dwg_"):
            timm_varchan.set_channels(model, channels)
        planes = list(timm_varchan.RGB.index(channels))
        right = torch.cat([model(part[:, planes]).argmax(1) for part in x.split(125)]) == y
        assert 100 * right.float().mean() == pytest.approx(expected["value"], abs=0.5)
