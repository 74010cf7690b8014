"""What the tests of training share: a run of seconds in this process."""

import dataclasses

import numpy as np
import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

from timm_varchan.errors import UserError
from timm_varchan.training import TrainConfig

#: What a user can cure: one line, and nothing was trained.
REFUSED = (UserError, OSError)

TINY = TrainConfig(
    channels="RG", limit=30, img_size=16, workers=0, epochs=2, batch_size=8, eval_batch_size=16,
    eval_modes=("named",), eval_orders=("in order",), model="dwg_test_resnet", warmup_epochs=0,
)  # fmt: skip


def image_folder(folder, image, counts, names="ab"):
    """Arrays `folder/SPLIT/CLASS/NUMBER.npy` that `image(label, number)` gives; the folder.

    `counts` says how many of each class a split has; a split without a name lies in no folder.
    """
    for split, count in counts.items():
        for label, name in enumerate(names):
            place = folder / split / name
            place.mkdir(parents=True)
            for number in range(count):
                np.save(place / f"{number}.npy", image(label, number))
    return str(folder)


def flags_of(config):
    """The flags of `hf_train.py` that differ from the usual."""
    args = []
    for field in dataclasses.fields(config):
        name, value = "--" + field.name.replace("_", "-"), getattr(config, field.name)
        if value == getattr(TrainConfig(), field.name):
            continue
        if isinstance(value, bool):
            args.append(name if value else name.replace("--", "--no-", 1))
        elif isinstance(value, dict):
            args += [name, *(f"{k}={v!r}" for k, v in value.items())]
        else:
            args += [name, *map(str, value if isinstance(value, tuple) else [value])]
    return args


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
