"""What the tests of the core share: the architectures, small models of them, comparison."""

import copy
import functools
import os
import sys
from pathlib import Path

# Several test processes at once (pytest -n): one thread each, also in what they start. More threads
# than cores wait for each other, which made tests of seconds last minutes.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import timm
import torch
from PIL import Image
from timm.models.byobnet import model_cfgs

import timm_varchan
from timm_varchan.stems import STEMS

if "PYTEST_XDIST_WORKER" in os.environ:  # where torch was imported before
    torch.set_num_threads(1)

#: The package's own stems, read before any test registers those of `bench/peers.py`.
OWN_STEMS = tuple(STEMS)
#: One architecture of each kind of first layer and of each way to normalise.
ARCHS = (
    "densenet121",
    "resnet18",
    "convnext_atto",
    "vit_tiny_patch16_224",
    "efficientnet_b0",
    "mobileone_s0",
    "swin_tiny_patch4_window7_224",
    "nfnet_l0",
)
#: Arguments that make a model fit 64 px, and shallower where its family lets it.
SMALL = {
    "resnet18": {"layers": (1, 1, 1, 1)},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
    "vit_tiny_patch16_224": {"img_size": 64, "depth": 3, "dynamic_img_size": True},
    "mobileone_s0": {"blocks": tuple(b[:2] for b in model_cfgs["mobileone_s0"].blocks)},
    "swin_tiny_patch4_window7_224": {
        "img_size": 64, "depths": (1, 1, 1, 1), "strict_img_size": False,
    },
    "nfnet_l0": {"depths": (1, 1, 1, 1)},
}  # fmt: skip
NUM_CLASSES = 7


def small_model(name, **kwargs):
    """A model for 64 px and `NUM_CLASSES` classes, in evaluation mode."""
    small = SMALL.get(name.removeprefix("dwg_"), {})
    return timm.create_model(name, **{"num_classes": NUM_CLASSES, **small, **kwargs}).eval()


def randomise(model, seed=0):
    """Make everything that starts at zero or one differ, so that no path is silent.

    Afterwards the logits have about the scale of one.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None
                module.reset_running_stats()
        # statistics that fit the random weights: else activations vanish or explode with depth
        model.train()(torch.randn(4, 3, 64, 64, generator=generator))
        model.eval()
        logits = model(torch.randn(4, 3, 64, 64, generator=generator))
        classifier = model.get_classifier()
        classifier.weight.div_(logits.std())
        classifier.bias.div_(logits.std())
    return model


def wake(model, seed=0):
    """Give the residuals of all stems random last layers, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for mixer in timm_varchan.models.stems(model):
        for parameter in mixer.out.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_((0.2 / mixer.gain) * noise.to(parameter))
    return model


def assert_same(actual, expected, tolerance=1e-5):
    """Equal within a tolerance that is relative to the largest expected value."""
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=tolerance * expected.abs().max().item()
    )


@functools.cache
def _pair(arch):
    base = randomise(small_model(arch))
    twin = small_model(f"dwg_{arch}")
    twin.load_state_dict(base.state_dict())
    return base, twin


@pytest.fixture(scope="module", autouse=True)
def quick_pictures(request):
    """Pictures of runs are drawn but not rendered, which takes longer than such a run.

    Those of the modules that test pictures are, and those of processes that tests start.
    """
    plots = sys.modules.get("timm_varchan.plots")
    if plots is None or request.module.__name__ in ("test_results", "test_look"):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_saved", lambda figure, path, *_: write_picture(path))
        yield


def write_picture(path):
    """A picture of one pixel."""
    Image.new("RGB", (1, 1)).save(path, "PNG")
    return Path(path)


@pytest.fixture
def pair():
    """A function that gives a base model and its twin with equal weights; neither is cached."""
    return lambda arch: copy.deepcopy(_pair(arch))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
