"""torchgeo and Lightning: tasks on twins, their checkpoints as weights, channels from a YAML.

`tests/clients/run torchgeo`
"""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

import timm_varchan
from timm_varchan.models import stems

REASON = "tests/clients/run torchgeo"
pytestmark = [
    pytest.mark.clients,
    pytest.mark.filterwarnings("ignore"),  # Lightning's advice, and its own deprecations
]
pytest.importorskip("torchgeo", reason=REASON)
from lightning.pytorch import Trainer  # noqa: E402
from torchgeo.trainers import ClassificationTask, SemanticSegmentationTask  # noqa: E402

from timm_varchan.integrations.lightning import Channels  # noqa: E402

BANDS = "B02+B03+B04+B08"
YAML = """
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: timm_varchan.integrations.lightning.Channels
      init_args: {channels: B02+B03+B04+B08}
model:
  class_path: ClassificationTask
  init_args: {model: dwg_resnet10t, in_channels: 4, num_classes: 3}
data:
  class_path: toy.ToyDataModule
"""
TOY = """
import torch
from torch.utils.data import DataLoader, Dataset
from torchgeo.datamodules import NonGeoDataModule

class ToyDataModule(NonGeoDataModule):
    def __init__(self) -> None:
        super().__init__(Dataset, batch_size=2, num_workers=0)
    def setup(self, stage: str) -> None:
        self.rows = [
            dict(image=torch.randn(4, 32, 32), label=torch.tensor(i % 3)) for i in range(4)
        ]
    def _loader(self):
        return DataLoader(self.rows, 2)
    train_dataloader = val_dataloader = test_dataloader = _loader
    def transfer_batch_to_device(self, batch, device, index):
        return batch
    def on_after_batch_transfer(self, batch, index):
        return batch
"""


def loader(channels=4, classes=3):
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"image": torch.randn(channels, 32, 32, generator=generator), "label": i % classes}
        for i in range(4)
    ]
    return torch.utils.data.DataLoader(rows, 2)


def trainer(*callbacks):
    return Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=list(callbacks),
    )  # fmt: skip


def test_callback_tells_the_channels_and_checks_those_of_a_checkpoint(tmp_path):
    task = ClassificationTask(model="dwg_resnet10t", in_channels=4, num_classes=3)
    fit = trainer(Channels(BANDS))
    fit.fit(task, loader(), loader())
    assert str(stems(task)[0].channels) == BANDS
    fit.save_checkpoint(tmp_path / "a.ckpt")
    fresh = ClassificationTask(model="dwg_resnet10t", in_channels=4, num_classes=3)
    trainer(Channels(BANDS)).test(fresh, loader(), ckpt_path=tmp_path / "a.ckpt")
    assert str(stems(fresh)[0].channels) == BANDS
    with pytest.raises(ValueError, match=r"trained on B02\+B03\+B04\+B08"):
        trainer(Channels("B08+B04+B03+B02")).fit(
            task, loader(), loader(), ckpt_path=tmp_path / "a.ckpt"
        )


def test_callback_refuses_a_model_without_a_stem():
    task = ClassificationTask(model="resnet10t", in_channels=4, num_classes=3)
    with pytest.raises(ValueError, match="has no stem"):
        trainer(Channels(BANDS)).fit(task, loader(), loader())


@pytest.mark.parametrize("classes", [3, 5])
def test_checkpoint_as_weights(tmp_path, classes):
    saved = ClassificationTask(model="dwg_resnet10t", in_channels=13, num_classes=3)
    fit = trainer()
    fit.fit(saved, loader(13), loader(13))
    fit.save_checkpoint(tmp_path / "a.ckpt")
    again = ClassificationTask(
        model="dwg_resnet10t", weights=str(tmp_path / "a.ckpt"), in_channels=13,
        num_classes=classes,
    )  # fmt: skip
    expected, found = (dict(task.model.named_parameters()) for task in (saved, again))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if not name.startswith("fc."):
            assert torch.equal(value, found[name]), name


def test_segmentation_task():
    task = SemanticSegmentationTask(
        model="unet", backbone="tu-dwg_resnet10t", in_channels=4, num_classes=2
    ).eval()
    timm_varchan.set_channels(task, BANDS)
    assert task(torch.randn(1, 4, 64, 64)).shape == (1, 2, 64, 64)
    timm_varchan.set_channels(task, "B04+B08")
    assert task(torch.randn(1, 2, 64, 64)).isfinite().all()


@pytest.mark.parametrize("start", [[], ["timm_varchan", "run", "-m"]], ids=["own", "run"])
def test_channels_by_class_path_in_a_yaml(tmp_path, start):
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "run.yaml").write_text(textwrap.dedent(YAML))
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", *start, "torchgeo", "fit", "--config", "run.yaml"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True,
        text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=False)["callbacks"]["Channels"]
    assert [c["name"] for c in saved["channels"]["channels"]] == BANDS.split("+")


def test_snippet(run_snippet):
    made = run_snippet("torchgeo")
    trainer(made["callback"]).fit(made["task"], loader(), loader())
    assert str(stems(made["task"])[0].channels) == BANDS
