"""torch-pruning leaves the stem alone when told so. `tests/clients/run torch_pruning`"""

import pytest
import timm
import torch

from timm_varchan.models import stems

pytestmark = [
    pytest.mark.clients,
    pytest.mark.filterwarnings("ignore"),  # what it says of parameters it leaves alone
]
pruning = pytest.importorskip("torch_pruning", reason="tests/clients/run torch_pruning")


def test_ignored_layers_keep_the_stem():
    model = timm.create_model("dwg_resnet18", num_classes=2).eval()
    before = sum(p.numel() for p in model.parameters())
    pruner = pruning.pruner.MagnitudePruner(
        model, torch.randn(1, 3, 64, 64), pruning_ratio=0.5,
        importance=pruning.importance.MagnitudeImportance(p=2),
        ignored_layers=[model.get_classifier(), *stems(model)],
    )  # fmt: skip
    pruner.step()
    assert sum(p.numel() for p in model.parameters()) < before / 2
    for count in (1, 3, 5):
        assert model(torch.randn(1, count, 64, 64)).isfinite().all()


def test_snippet(run_snippet):
    assert run_snippet("torch_pruning")["logits"].shape == (2, 2)
