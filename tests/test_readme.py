"""README's Python, word for word, on images that somebody might have."""

import re
from pathlib import Path

import timm
import torch

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_python_runs_word_for_word():
    torch.manual_seed(0)
    brightness = torch.rand(8, 1, 1, 1)
    images = 0.2 * torch.randn(8, 4, 64, 64) + brightness * torch.tensor([1, 2, 2, 3]).view(4, 1, 1)
    present = torch.ones(8, 4).bool()
    present[0, 1] = present[1, 3] = False
    labels = torch.arange(8)
    missing = images.masked_fill(~present[:, :, None, None], float("nan"))
    own, plain = (code for code in re.findall(r"```python\n(.*?)```", README, re.S)[1:])

    names = {"timm": timm, "torch": torch}
    names |= {"complete": [images], "loader": [(missing, present, labels)]}
    exec("import timm_varchan\n" + own, names)
    assert names["loss"].isfinite()
    assert all(p.isfinite().all() for p in names["model"].parameters())

    model = timm.create_model("resnet10t", in_chans=4, num_classes=10).eval()
    before = model(images)
    names = {"model": model, "loader": [images]}
    exec("import timm_varchan\n" + plain, names)
    shares = names["timm_varchan"].expected_error(model, "B02+B04+B08")
    assert 0 < shares["B03"] < 1
    assert shares["B08"] < 1e-6
    names["timm_varchan"].set_channels(model, "B02+B03+B04+B08")
    assert torch.allclose(model(images), before, atol=1e-4)
