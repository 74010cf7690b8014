"""What the tests of training share: a run of seconds in this process."""

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

from timm_varchan.training import TrainConfig

TINY = TrainConfig(
    channels="RG", limit=30, img_size=16, workers=0, epochs=2, batch_size=8, eval_batch_size=16,
    eval_modes=("named",), eval_orders=("in order",), model="dwg_test_resnet", warmup_epochs=0,
)  # fmt: skip


def forget_accelerate():
    """The accelerator's state is global; every run begins without one."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state.clear()


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    """No launcher, no accelerator of another test."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for name in ("WORLD_SIZE", "MASTER_ADDR", "RANK"):
        monkeypatch.delenv(name, raising=False)
    yield
    forget_accelerate()
