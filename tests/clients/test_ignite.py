"""ignite's engines, average of weights and checkpoints on a twin. `tests/clients/run ignite`"""

import pytest
import timm
import torch

import timm_varchan

pytestmark = pytest.mark.clients
pytest.importorskip("ignite", reason="tests/clients/run ignite")


def test_engines(tmp_path):
    from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
    from ignite.handlers import Checkpoint, DiskSaver, EMAHandler
    from ignite.metrics import Accuracy

    model = timm.create_model("dwg_test_resnet", num_classes=2)
    timm_varchan.set_channels(model, "B02+B08")
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    trainer = create_supervised_trainer(model, optimizer, torch.nn.functional.cross_entropy)
    average = EMAHandler(model, momentum=0.1)
    average.attach(trainer, event=Events.ITERATION_COMPLETED)
    saver = Checkpoint({"model": model}, DiskSaver(str(tmp_path), create_dir=False))
    trainer.add_event_handler(Events.COMPLETED, saver)
    batches = [(torch.randn(4, 2, 32, 32), torch.tensor([0, 1, 0, 1]))] * 3
    trainer.run(batches, max_epochs=1)
    evaluator = create_supervised_evaluator(model, {"accuracy": Accuracy()})
    assert 0 <= evaluator.run(batches).metrics["accuracy"] <= 1
    assert average.ema_model(batches[0][0]).shape == (4, 2)
    fresh = timm.create_model("dwg_test_resnet", num_classes=2).eval()
    timm_varchan.set_channels(fresh, "B02+B08")
    weights = torch.load(tmp_path / saver.last_checkpoint, weights_only=True)
    Checkpoint.load_objects({"model": fresh}, {"model": weights.get("model", weights)})
    x = batches[0][0]
    torch.testing.assert_close(fresh(x), model.eval()(x))


def test_snippet(run_snippet):
    assert run_snippet("ignite")["trainer"].state.iteration == 1
