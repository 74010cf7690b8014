"""terratorch's factory with a twin as backbone. `tests/clients/run terratorch`"""

import pytest
import torch

import timm_varchan
from timm_varchan.models import stems

pytestmark = [
    pytest.mark.clients,
    pytest.mark.filterwarnings("ignore"),  # of its many dependencies
]
terratorch = pytest.importorskip("terratorch", reason="tests/clients/run terratorch")


def test_factory_with_a_channel_set():
    from terratorch.models import EncoderDecoderFactory

    model = EncoderDecoderFactory().build_model(
        "segmentation", backbone="dwg_resnet10t", backbone_pretrained=False, decoder="FCNDecoder",
        necks=[], num_classes=3, backbone_channel_set="B02+B03+B04+B08",
    )  # fmt: skip
    assert str(stems(model)[0].channels) == "B02+B03+B04+B08"
    assert model(torch.randn(2, 4, 64, 64)).output.shape == (2, 3, 64, 64)
    with pytest.raises(ValueError, match=r"B02\+B03"):
        model(torch.randn(2, 3, 64, 64))
    timm_varchan.set_channels(model, "B08")
    assert model.eval()(torch.randn(1, 1, 64, 64)).output.isfinite().all()


def test_snippet(run_snippet):
    made = run_snippet("terratorch")
    assert made["masks"].shape == (2, 3, 64, 64)
