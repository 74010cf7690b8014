"""What people do to any torch module: DDP as it comes, quantisation, meta devices, resizing."""

import socket

import pytest
import timm
import torch
from torch import nn

import timm_varchan
from timm_varchan.models import has_stems

pytestmark = pytest.mark.clients


def _forward_in_ddp(rank, port, answers):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    model = timm.create_model("dwg_test_resnet", num_classes=3).eval()
    wrapped = nn.parallel.DistributedDataParallel(model)
    timm_varchan.set_channels(wrapped, ["GB", "RG"][rank])
    x = torch.randn(2, 2, 32, 32)
    with torch.no_grad():
        alone = model(x)
        answers[rank] = (wrapped(x) - alone).abs().max().item()
    torch.distributed.destroy_process_group()


def test_ddp_with_its_defaults_leaves_every_process_its_channels():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    answers = torch.multiprocessing.Manager().dict()
    torch.multiprocessing.spawn(_forward_in_ddp, args=(port, answers), nprocs=2)
    assert dict(answers) == pytest.approx({0: 0, 1: 0}, abs=1e-6)


@pytest.mark.filterwarnings("ignore")  # torch.ao says that it will move
@pytest.mark.parametrize("name", ["dwg_vit_tiny_patch16_224", "dwg_convnext_atto"])
def test_dynamic_quantisation(name):
    kwargs = {"img_size": 64} if "vit" in name else {}
    model = timm.create_model(name, num_classes=3, **kwargs).eval()
    small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    for count in (1, 3, 5):
        x = torch.randn(2, count, 64, 64)
        exact, rough = model(x), small(x)
        assert (rough - exact).abs().max() < 0.2 * exact.abs().max()


def _assign(state, folder):
    with torch.device("meta"):
        model = timm.create_model("dwg_resnet10t", num_classes=3)
    model.load_state_dict(state, assign=True)
    return model


def _dispatch(state, folder):
    accelerate = pytest.importorskip("accelerate")
    file = str(folder / "pytorch_model.bin")
    torch.save(state, file)
    with accelerate.init_empty_weights():
        model = timm.create_model("dwg_resnet10t", num_classes=3)
    return accelerate.load_checkpoint_and_dispatch(model, file, device_map={"": "cpu"})


def _to_empty(state, folder):
    with torch.device("meta"):
        model = timm.create_model("dwg_resnet10t", num_classes=3)
    junk = [torch.full((n,), float("nan")) for n in (1, 16, 48, 256) for _ in range(64)]
    del junk  # memory that was used before
    model.to_empty(device="cpu")
    model.load_state_dict(state)  # everything that is saved is there
    return model


@pytest.mark.parametrize("way", [_assign, _dispatch, _to_empty])
@pytest.mark.parametrize("channels", [None, "GB", [490.0, 842.0, None]])
def test_built_on_the_meta_device(way, channels, tmp_path):
    reference = timm.create_model("dwg_resnet10t", num_classes=3).eval()
    model = way(reference.state_dict(), tmp_path).eval()
    for one in (reference, model):
        if channels is not None:
            timm_varchan.set_channels(one, channels)
    for count in (3, 5) if channels is None else (len(channels),):
        x = torch.randn(2, count, 64, 64)
        torch.testing.assert_close(model(x), reference(x))


@pytest.mark.parametrize("sizes", [{"patch_size": 8}, {"img_size": 96}])
def test_set_input_size_of_timm_keeps_the_stem(sizes):
    model = timm.create_model("dwg_vit_tiny_patch16_224", num_classes=3, img_size=64).eval()
    timm_varchan.set_channels(model, "BGR")
    x = torch.randn(1, 3, 64, 64)
    before = model(x)
    try:
        model.set_input_size(**{"img_size": 64, **sizes})
    except ValueError:
        if "patch_size" not in sizes:
            raise
        torch.testing.assert_close(model(x), before)  # a refusal leaves the model as it was
        return
    assert has_stems(model)
    size = sizes.get("img_size", 64)
    bgr = torch.randn(1, 3, size, size)
    answer = model(bgr)
    timm_varchan.set_channels(model, "RGB")
    torch.testing.assert_close(model(bgr.flip(1)), answer)
