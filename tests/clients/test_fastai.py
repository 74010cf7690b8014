"""fastai's `vision_learner` on a twin. `tests/clients/run fastai`"""

import pytest
import torch

import timm_varchan
from timm_varchan.models import stems

pytestmark = [
    pytest.mark.clients,
    pytest.mark.filterwarnings("ignore"),  # of its many dependencies
]
pytest.importorskip("fastai", reason="tests/clients/run fastai")


def test_vision_learner():
    from fastai.vision.all import DataLoaders, vision_learner

    rows = [(torch.randn(5, 32, 32), torch.tensor(i % 3)) for i in range(24)]
    loaders = DataLoaders.from_dsets(rows, rows, bs=8, device="cpu", num_workers=0)
    learner = vision_learner(
        loaders, "dwg_resnet10t", pretrained=False, n_in=5, n_out=3, normalize=False,
        loss_func=torch.nn.CrossEntropyLoss(),
    )  # fmt: skip
    timm_varchan.set_channels(learner.model, "B02+B03+B04+B08+B11")
    (mixer,) = stems(learner.model)
    before = mixer.out.weight.detach().clone()
    learner.unfreeze()
    with learner.no_bar(), learner.no_logging():
        learner.fit(1)
    assert not torch.equal(before, mixer.out.weight)
    timm_varchan.set_channels(learner.model, "B04+B08")
    assert learner.model.eval()(torch.randn(1, 2, 32, 32)).shape == (1, 3)


def test_snippet(run_snippet):
    learner = run_snippet("fastai")["learner"]
    assert str(stems(learner.model)[0].channels) == "B02+B03+B04+B08+B11"
    with learner.no_bar(), learner.no_logging():
        learner.fit(1)
