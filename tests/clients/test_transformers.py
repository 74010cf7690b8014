"""transformers and PEFT: Auto classes, Trainer, detectors around a twin, LoRA."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import timm_varchan
from timm_varchan import RGB, hub
from timm_varchan.models import stems

pytestmark = [
    pytest.mark.clients,
    pytest.mark.filterwarnings("ignore"),  # its own deprecations
]
transformers = pytest.importorskip("transformers", reason="pip install '.[clients]'")
SMALL = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 4,
    "num_labels": 2,
}  # fmt: skip
BANDS = "B08+B11+B12"  # three that are not RGB


@pytest.fixture
def poisoned():
    """Memory that was used before, as in any real program: what nobody fills is NaN."""
    junk = [torch.full((n,), float("nan")) for n in (1, 16, 48, 256) for _ in range(64)]
    del junk


def wake(model):
    for mixer in stems(model):
        torch.nn.init.normal_(mixer.out.weight, std=0.5)
    return model.eval()


def saved(folder, channels=RGB, **kwargs):
    model = wake(timm.create_model("dwg_test_resnet", num_classes=2, **kwargs))
    names = ["cat", "dog"]
    hub.save(model, folder, class_names=names, channels=channels, img_size=32, crop_pct=1.0)
    return model


def test_our_folder_opens_in_the_auto_classes(tmp_path):
    model, x = saved(tmp_path / "m"), torch.randn(2, 3, 32, 32)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "m").eval()
    assert again.config.id2label == {0: "cat", 1: "dog"}
    torch.testing.assert_close(again(x).logits, model(x))
    features = transformers.AutoModel.from_pretrained(tmp_path / "m").eval()
    torch.testing.assert_close(features(x).last_hidden_state, model.forward_features(x))
    classify = transformers.pipeline("image-classification", str(tmp_path / "m"))
    image = Image.fromarray(np.zeros((40, 40, 3), np.uint8))
    assert {one["label"] for one in classify(image)} == {"cat", "dog"}
    more = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "m", num_labels=5, ignore_mismatched_sizes=True
    )
    assert more(x).logits.shape == (2, 5)


def test_our_folder_keeps_its_channels_there_and_back(tmp_path):
    channels = timm_varchan.ChannelSet.parse(BANDS).with_stats([0.5] * 3, [0.2] * 3)
    model, x = saved(tmp_path / "m", channels, channel_set=BANDS), torch.randn(2, 3, 32, 32)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "m").eval()
    torch.testing.assert_close(theirs(x).logits, model(x))
    theirs.save_pretrained(tmp_path / "n")
    ours = hub.load(tmp_path / "n")
    assert str(ours.channels) == BANDS
    assert ours.spec.class_names == ("cat", "dog")
    torch.testing.assert_close(ours.model(x), model(x))


@pytest.mark.parametrize("how", ["model_args", "set_channels"])
def test_the_wrapper_keeps_the_channel_set(tmp_path, how):
    args = {"channel_set": BANDS} if how == "model_args" else {}
    config = transformers.TimmWrapperConfig(
        architecture="dwg_test_resnet", num_labels=4, model_args=args
    )
    model = wake(transformers.TimmWrapperForImageClassification(config))
    if how == "set_channels":
        timm_varchan.set_channels(model, BANDS)
    x = torch.randn(1, 3, 64, 64) + torch.tensor([0.0, 2.0, -2.0])[:, None, None]
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert str(stems(again)[0].channels) == BANDS
    torch.testing.assert_close(again(pixel_values=x).logits, model(pixel_values=x).logits)


def test_the_wrapper_takes_any_count():
    config = transformers.TimmWrapperConfig(architecture="dwg_resnet18", num_labels=4)
    model = transformers.TimmWrapperForImageClassification(config).eval()
    for count in (1, 3, 5, 12):
        assert model(pixel_values=torch.randn(1, count, 64, 64)).logits.shape == (1, 4)


def test_trainer(tmp_path):
    config = transformers.TimmWrapperConfig(
        architecture="dwg_test_resnet", num_labels=2, model_args={"channel_set": "B02+B08"}
    )
    model = transformers.TimmWrapperForImageClassification(config)
    rows = [{"pixel_values": torch.randn(2, 32, 32), "labels": i % 2} for i in range(8)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=4, use_cpu=True, report_to=[],
        learning_rate=1e-3, save_steps=2, disable_tqdm=True,
    )  # fmt: skip
    before = stems(model)[0].out.weight.detach().clone()
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert not torch.equal(before, stems(model)[0].out.weight)
    assert trainer.predict(rows).predictions.shape == (8, 2)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "checkpoint-4")
    x = torch.stack([row["pixel_values"] for row in rows])
    torch.testing.assert_close(again.eval()(x).logits, model.eval()(x).logits)


@pytest.mark.parametrize("kind", ["Detr", "ConditionalDetr"])
@pytest.mark.parametrize("count", [3, 5])
def test_a_detector_around_a_twin_comes_back_from_its_folder(tmp_path, kind, count, poisoned):
    backbone = transformers.TimmBackboneConfig(
        backbone="dwg_resnet10t", num_channels=count, use_pretrained_backbone=False,
        out_indices=(4,),
    )  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(backbone_config=backbone, **SMALL)
    model = wake(getattr(transformers, f"{kind}ForObjectDetection")(config))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    x = torch.randn(1, count, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            again(pixel_values=x).logits, model(pixel_values=x).logits, rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("dwg_vit_tiny_patch16_224", ["qkv", "proj"]),
        ("dwg_convnext_atto", ["fc1", "fc2"]),
        ("dwg_resnet18", "all-linear"),
    ],
)
def test_lora(name, targets, tmp_path):
    peft = pytest.importorskip("peft", reason="pip install '.[clients]'")
    kwargs = {"img_size": 64} if "vit" in name else {}
    torch.manual_seed(0)
    base = timm.create_model(name, num_classes=3, **kwargs).eval()
    head = base.pretrained_cfg["classifier"]
    config = peft.LoraConfig(target_modules=targets, modules_to_save=[head])
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    model = peft.get_peft_model(base, config)
    for count in (3, 5):
        assert model(torch.randn(2, count, 64, 64)).shape == (2, 3)
    model(torch.randn(2, 5, 64, 64)).sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None for p in trained)
    x = torch.randn(2, 2, 64, 64)
    timm_varchan.set_channels(model, "GB")
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.02 * torch.randn_like(parameter))
    expected = model.eval()(x)
    model.save_pretrained(tmp_path)
    fresh = timm.create_model(name, num_classes=3, **kwargs)
    fresh.load_state_dict(weights)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    timm_varchan.set_channels(again, "GB")
    torch.testing.assert_close(again(x), expected)


def test_snippet(run_snippet):
    made = run_snippet("transformers")
    assert made["logits"].shape == (2, 4)
    assert str(stems(made["model"])[0].channels) == "B02+B08"
