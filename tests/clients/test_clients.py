"""Other people's programs on our models: segmentation, detection, scikit-learn, W&B.

Run with `pip install ".[clients]" && pytest -m clients tests/clients`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torchvision.ops import FeaturePyramidNetwork

import timm_varchan
from timm_varchan.models import stems

pytestmark = pytest.mark.clients
COUNTS = (1, 3, 5, 12)


@pytest.mark.parametrize("encoder", ["tu-dwg_resnet18", "tu-dwg_convnext_atto"])
@pytest.mark.parametrize("decoder", ["Unet", "FPN"])
def test_segmentation_models_pytorch(encoder, decoder):
    smp = pytest.importorskip("segmentation_models_pytorch", reason="pip install '.[clients]'")
    model = getattr(smp, decoder)(encoder, encoder_weights=None, in_channels=3, classes=2)
    for count in COUNTS:
        model.train().zero_grad()
        masks = model(torch.randn(2, count, 64, 64))
        assert masks.shape == (2, 2, 64, 64)
        masks.square().mean().backward()
        assert all(p.grad is not None for p in stems(model)[0].parameters())
    timm_varchan.set_channels(model, "B02+B08")
    assert model.eval()(torch.randn(1, 2, 64, 64)).isfinite().all()
    with pytest.raises(ValueError, match="B02"):
        model(torch.randn(1, 3, 64, 64))


def test_segmentation_models_pytorch_with_another_default():
    smp = pytest.importorskip("segmentation_models_pytorch", reason="pip install '.[clients]'")
    model = smp.Unet("tu-dwg_resnet18", encoder_weights=None, in_channels=7, classes=2).eval()
    for count in (7, 2):
        assert model(torch.randn(1, count, 64, 64)).shape == (1, 2, 64, 64)


def test_segmentation_models_pytorch_with_a_channel_set(tmp_path):
    smp = pytest.importorskip("segmentation_models_pytorch", reason="pip install '.[clients]'")
    model = smp.Unet(
        "tu-dwg_resnet18", encoder_weights=None, in_channels=4, channel_set="B02+B03+B04+B08"
    )
    model.save_pretrained(tmp_path)
    x = torch.randn(1, 4, 64, 64)
    again = smp.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(x), model.eval()(x))
    with pytest.raises(ValueError, match=r"B02\+B03"):
        again(x[:, :3])


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "getter", "fx"])
def test_feature_extraction_of_timm(feature_cls):
    kwargs = {} if feature_cls == "list" else {"feature_cls": feature_cls}
    model = timm.create_model("dwg_resnet18", features_only=True, **kwargs).eval()
    channels = model.feature_info.channels()
    for count in COUNTS:
        features = model(torch.randn(1, count, 64, 64))
        features = list(features.values()) if isinstance(features, dict) else features
        assert [f.shape[1] for f in features] == channels
    timm_varchan.set_channels(model, "GB")
    with pytest.raises(ValueError, match="GB"):
        model(torch.randn(1, 3, 64, 64))


def test_feature_pyramid_of_torchvision():
    body = timm.create_model("dwg_resnet18", features_only=True, out_indices=(1, 2, 3, 4))
    pyramid = FeaturePyramidNetwork(body.feature_info.channels(), out_channels=32)
    for count in COUNTS:
        body.zero_grad()
        features = body(torch.randn(2, count, 64, 64))
        levels = pyramid({str(i): f for i, f in enumerate(features)})
        assert [v.shape for v in levels.values()] == [(2, 32, s, s) for s in (16, 8, 4, 2)]
        sum(v.mean() for v in levels.values()).backward()
        assert all(p.grad is not None for p in stems(body)[0].parameters())


def test_embeddings_in_a_pipeline_of_sklearn():
    torch.manual_seed(0)
    model = timm.create_model("dwg_test_resnet", num_classes=0).eval()
    labels = torch.arange(40) % 2
    x = torch.randn(40, 5, 32, 32) + labels[:, None, None, None]
    with torch.inference_mode():
        embeddings = model(x).numpy()
    pipeline = make_pipeline(StandardScaler(), LogisticRegression())
    pipeline.fit(embeddings[:20], labels[:20].numpy())
    assert pipeline.score(embeddings[20:], labels[20:].numpy()) > 0.9


def test_weights_and_biases_offline(tmp_path):
    pytest.importorskip("wandb", reason="pip install '.[clients]'")
    args = ["--channels", "RGB", "--limit", "24", "--img-size", "16", "--workers", "0"]
    args += ["--batch-size", "8", "--epochs", "2", "--eval-max-sets", "3", "--trackers", "wandb"]
    env = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    command = [sys.executable, "hf_train.py", *args, "--output-dir", str(tmp_path)]
    done = subprocess.run(
        command, env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    written = log.read_bytes()
    for name in (b"eval/eval_accuracy_RGB", b"train/train_loss", b"run/images_per_second"):
        assert written.count(name) >= 2  # once an epoch
    assert b"hcs-sample" in written  # the configuration


def test_snippet_of_segmentation_models_pytorch(run_snippet):
    pytest.importorskip("segmentation_models_pytorch", reason="pip install '.[clients]'")
    made = run_snippet("segmentation_models_pytorch")
    assert made["masks"].shape == (2, 1, 64, 64)
    assert str(stems(made["model"])[0].channels) == "B04+B08"
