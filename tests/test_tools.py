"""Tools that walk buffers, save weights alone, trace, or find layers by type, name or order."""

import copy
import importlib.util
import os
import socket

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timm.models import _registry
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval, parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import timm_varchan
from timm_varchan.channels import RGB, ChannelSet
from timm_varchan.models import stems
from timm_varchan.stems import Stem
from timm_varchan.views import CHANNEL_AUGS, DrawKey, draw_channels


def twin(name="dwg_test_resnet", **kwargs):
    """A small twin whose residual is not zero."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **kwargs).eval()
    for mixer in stems(model):
        nn.init.normal_(mixer.out.weight, std=0.02)
    return model


@torch.no_grad()
def same(first, second, x):
    torch.testing.assert_close(first(x), second(x), rtol=1e-4, atol=1e-5)


def rank(number, port, out):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=number, world_size=2)
    model = twin()
    ddp = nn.parallel.DistributedDataParallel(model)  # broadcasts buffers by default
    timm_varchan.set_channels(ddp, ["GB", "RG"][number])
    x = torch.randn(2, 2, 32, 32)
    with torch.no_grad():
        out[number] = (ddp(x) - model(x)).abs().max().item()
        model.train()
        ddp(x)  # forward in training broadcasts too
        model.eval()
        out[number] += (ddp(x) - model(x)).abs().max().item()
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_keep_their_own_channel_set():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        out = manager.dict()
        mp.spawn(rank, args=(port, out), nprocs=2)
        assert dict(out) == {0: 0.0, 1: 0.0}


def test_there_are_no_buffers_to_spoil():
    for name in ("dwg_test_resnet", "dwg_test_vit"):
        mixers = stems(twin(name))
        assert not [name for m in mixers for name, _ in m.named_buffers()]


@pytest.mark.parametrize("use_buffers", [True, False])
def test_averaged_weights_keep_the_set(use_buffers):
    model = twin()
    timm_varchan.set_channels(model, "BGR")
    average = AveragedModel(model, use_buffers=use_buffers)
    for _ in range(3):
        average.update_parameters(model)
    same(average, model, torch.randn(2, 3, 32, 32))
    with torch.no_grad():  # what some loops do by hand
        for ours, theirs in zip(average.module.buffers(), model.buffers(), strict=True):
            if ours.is_floating_point():
                ours.mul_(0.5).add_(theirs, alpha=0.5)
    same(average, model, torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("way", ["assign", "to_empty", "to_empty then set"])
@pytest.mark.parametrize("channels", [None, "GB", "anonymous"])
def test_built_without_memory_and_filled_later(way, channels):
    model = twin()
    with torch.device("meta"):
        empty = timm.create_model("dwg_test_resnet", num_classes=3).eval()
    if way != "to_empty then set":
        timm_varchan.set_channels(empty, channels)
    if way == "assign":
        empty.load_state_dict(model.state_dict(), assign=True)
    else:
        empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    for mixed in (empty, model):
        timm_varchan.set_channels(mixed, channels)
    same(empty, model, torch.randn(2, 2 if channels == "GB" else 3, 32, 32))


def test_types_that_were_assigned_without_a_word():
    model = twin()
    timm_varchan.set_channels(model, "GB")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float64)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(torch.float64) if buffer.is_floating_point() else buffer.data
    assert model(torch.randn(2, 2, 32, 32, dtype=torch.float64)).dtype == torch.float64


def test_replacing_the_convolution_keeps_the_stem():
    model = twin("dwg_test_vit", img_size=64)
    timm_varchan.set_channels(model, "BGR")
    mixer = stems(model)[0]
    model.set_input_size(img_size=64, patch_size=8)
    assert stems(model) == [mixer]
    timm_varchan.set_channels(model, "GB")
    assert model(torch.randn(2, 2, 64, 64)).isfinite().all()
    # the same size again, and a layer for other channels, which is somebody's wish
    first = next(m for m in model.modules() if isinstance(m, Stem))
    assert first.kernel_size == (8, 8)
    model.patch_embed.proj = nn.Conv2d(5, 64, 8, stride=8)
    assert type(model.patch_embed.proj) is nn.Conv2d


def test_resized_kernels_of_anchors():
    model = twin("dwg_test_vit", img_size=64, virtual_channels="R+G+B+NIR+SWIR1")
    model.set_input_size(img_size=64, patch_size=8)
    first = next(m for m in model.modules() if isinstance(m, Stem))
    assert first.anchors.kernel_size == first.bank.kernel_size == (8, 8)
    assert first.anchors.weight.any()
    timm_varchan.set_channels(model, "B02+B03+B08")
    assert model(torch.randn(2, 3, 64, 64)).isfinite().all()


@pytest.mark.parametrize("name", ["dwg_test_resnet", "dwg_resnet10t", "dwg_regnety_002"])
def test_symbolic_trace(name):
    model = twin(name)
    timm_varchan.set_channels(model, "RGB")
    size = model.pretrained_cfg["input_size"][-1]
    graph = torch.fx.symbolic_trace(model)
    x = torch.randn(2, 3, size, size)
    same(graph, model, x)
    timm_varchan.set_channels(graph, "BGR")  # the stem is one node of the graph
    timm_varchan.set_channels(model, "BGR")
    same(graph, model, x)


def test_make_fx_answers_the_set_it_saw():
    model = twin()
    timm_varchan.set_channels(model, "GB")
    x = torch.randn(2, 2, 32, 32)
    graph = torch.fx.experimental.proxy_tensor.make_fx(model)(x)
    same(graph, model, x)
    with pytest.raises(RuntimeError):
        graph(torch.randn(2, 3, 32, 32))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["dwg_mobilevit_xxs", "dwg_regnety_002", "dwg_test_vit"])
def test_script(name):
    model = twin(name, scriptable=True)
    timm_varchan.set_channels(model, "GB")
    size = min(96, model.pretrained_cfg["input_size"][-1])
    size = model.pretrained_cfg["input_size"][-1] if "vit" in name else size
    same(torch.jit.script(model), model, torch.randn(2, 2, size, size))


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_dynamic_quantisation_leaves_the_mixer():
    model = twin("dwg_test_vit")
    small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    size = model.pretrained_cfg["input_size"][-1]
    x = torch.randn(2, 3, size, size)
    assert type(stems(small)[0].out) is type(stems(model)[0].out)
    with torch.no_grad():
        assert (small(x) - model(x)).abs().max() < 0.2 * model(x).abs().max() + 0.05


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs pip install peft")
def test_low_rank_adapters_by_the_usual_names():
    from peft import LoraConfig, get_peft_model

    model = twin("dwg_test_vit")
    timm_varchan.set_channels(model, "B02+B03+B04+B08")
    size = model.pretrained_cfg["input_size"][-1]
    x = torch.randn(2, 4, size, size)
    expected = model(x).detach()
    adapted = get_peft_model(model, LoraConfig(target_modules=["qkv", "proj"]))
    torch.testing.assert_close(adapted(x), expected)
    timm_varchan.set_channels(adapted, "GB")
    assert adapted(x[:, :2]).isfinite().all()
    bank = get_peft_model(
        twin("dwg_test_vit"), LoraConfig(target_modules=["patch_embed.proj.bank"])
    )
    assert bank(x[:, :3]).isfinite().all()


def test_the_first_leaf_is_the_first_convolution():
    for name in ("dwg_test_resnet", "dwg_resnet18", "dwg_test_vit"):
        model = twin(name)
        leaf = next(m for m in model.modules() if not list(m.children()) and list(m.parameters()))
        assert isinstance(leaf, nn.Conv2d)


def test_doubled_wavelengths_have_places_of_their_own():
    channels = ChannelSet.parse([490.0, 490.0, 842.0])
    assert channels.index([490.0, 490.0]) == (0, 1)
    assert channels.index([842.0, 490.0]) == (2, 0)
    with pytest.raises(ValueError, match="not so often"):
        channels.index([490.0] * 3)


@pytest.mark.parametrize("name", ["tresnet_m", "repvgg_a0", "crossvit_9_240", "test_vit"])
@pytest.mark.parametrize("kwargs", [{"device": "meta"}, {"dtype": torch.bfloat16}])
def test_device_and_type_reach_the_mixer(name, kwargs):
    model = timm.create_model(f"dwg_{name}", **kwargs)
    for mixer in stems(model):
        tables = [getattr(mixer, table) for table in mixer.table_names]
        for tensor in [*mixer.parameters(), *tables]:
            if "device" in kwargs:
                assert tensor.device.type == "meta"
            elif tensor.is_floating_point():
                assert tensor.dtype == torch.bfloat16


def test_a_set_is_told_to_the_configuration_of_wrappers():
    class Config:
        model_args = None

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.inner = Config(), twin()

    wrapper = Wrapper()
    timm_varchan.set_channels(wrapper, "B08+B11+B12")
    again = timm.create_model("dwg_test_resnet", **wrapper.config.model_args)
    assert str(stems(again)[0].channels) == "B08+B11+B12"
    timm_varchan.set_channels(wrapper, None)
    assert "channel_set" not in wrapper.config.model_args


@pytest.fixture
def own_name():
    """A name that is forgotten again."""
    yield "dwg_test_resnet_s2"
    _registry._clear_model_entries("dwg_test_resnet_s2")
    _registry._model_entrypoints.pop("dwg_test_resnet_s2", None)


def test_a_name_of_its_own_for_programs_that_know_models_by_name(own_name):
    timm_varchan.register_model(
        own_name, "test_resnet", channel_set="B02+B03+B04+B08",
        virtual_channels="RGB+NIR",
    )  # fmt: skip
    model = timm.create_model(own_name, num_classes=3)
    assert str(stems(model)[0].channels) == "B02+B03+B04+B08"
    assert model(torch.randn(2, 4, 32, 32)).shape == (2, 3)
    again = timm.create_model(own_name, num_classes=3, channel_set="GB")
    assert str(stems(again)[0].channels) == "GB"
    with pytest.raises(ValueError, match="knows a model"):
        timm_varchan.register_model("dwg_resnet18", "resnet18")
    with pytest.raises(ValueError, match="has no twin"):
        timm_varchan.register_model("mine", "no_such_net")


def test_presence_masks():
    model = twin()
    x = torch.randn(4, 3, 32, 32)
    present = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 1, 1], [0, 0, 1]]).bool()
    timm_varchan.set_channels(model, "RGB", present=present)
    broken = x.masked_fill(~present[:, :, None, None], float("nan"))
    together = model(broken)
    torch.testing.assert_close(copy.deepcopy(model)(x), together)
    timm_varchan.set_channels(model, "RGB", present=present)  # the next batch, the same set
    torch.testing.assert_close(model(x), together)
    wider = torch.cat([broken, torch.full((4, 20, 32, 32), float("nan"))], 1)
    torch.testing.assert_close(model(wider), together)
    for row, image, there in zip(together, x, present, strict=True):
        planes = there.nonzero()[:, 0].tolist()
        timm_varchan.set_channels(model, RGB.take(planes))
        torch.testing.assert_close(model(image[planes][None])[0], row, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="no channel at all"):
        timm_varchan.set_channels(model, "RGB", present=torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="one column for each channel"):
        timm_varchan.set_channels(model, "RGB", present=torch.ones(2, 4, dtype=torch.bool))
    timm_varchan.set_channels(model, "RGB", present=present)
    with pytest.raises(ValueError, match=r"4 sets.*set_channels\(model, channels\)"):
        model(x[:2])
    with pytest.raises(ValueError, match="need one channel set with a count"):
        timm_varchan.set_channels(model, "anonymous", present=present)


def test_a_refused_mask_changes_nothing():
    model = twin("dwg_crossvit_9_240")  # two stems
    timm_varchan.set_channels(model, "RGB")
    x = torch.randn(2, 3, 240, 240)
    before = model(x)
    bad = torch.tensor([[True, False, True, True], [False] * 4])
    for channels, present in (("R+G+B+NIR", bad), ("R+G+B+NIR", bad[:, :3]), ("RGB", bad[:1, :2])):
        with pytest.raises(ValueError, match=r"no channel at all|one column for each channel"):
            timm_varchan.set_channels(model, channels, present=present)
        assert {str(m.channels) for m in stems(model)} == {"RGB"}
        torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_views_have_the_masks_of_their_forward(reentrant):
    model, x = twin(), torch.randn(2, 3, 32, 32)
    masks = [torch.tensor(m).bool() for m in ([[1, 0, 0], [1, 1, 0]], [[0, 1, 1], [0, 0, 1]])]

    def gradient(run, backward):
        model.zero_grad()
        answers = []
        for mask in masks:
            timm_varchan.set_channels(model, "RGB", present=mask)
            answers.append(run(x.clone().requires_grad_()).square().sum())
        backward(answers)
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    def one_by_one(answers):
        for answer in answers:
            answer.backward()

    def again(leaf):
        return checkpoint(model, leaf, use_reentrant=reentrant)

    for backward in (one_by_one, lambda answers: (answers[0] * answers[1]).backward()):
        torch.testing.assert_close(gradient(again, backward), gradient(model, backward))
    answer = again(x.clone().requires_grad_())
    for _ in range(20):
        timm_varchan.set_channels(model, "RGB", present=masks[0])
    with pytest.raises(ValueError, match="share"):
        answer.sum().backward()


def test_equal_masks_are_solved_once():
    bands = ChannelSet.parse([400.0 + 9.375 * i for i in range(64)])
    model = twin()
    timm_varchan.set_channels(model, bands)
    kinds = torch.rand(4, 64) < 0.7
    solved = []
    solve = torch.linalg.solve
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "solve", lambda a, b: (solved.append(len(a)), solve(a, b))[1])
        timm_varchan.set_channels(model, bands, present=kinds.repeat_interleave(50, 0))
    assert 0 < sum(solved) <= 4
    x = torch.randn(4, 64, 32, 32)
    many = model(x.repeat_interleave(50, 0))
    timm_varchan.set_channels(model, bands, present=kinds)
    torch.testing.assert_close(many[::50], model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("virtual", ["RGB", "R+G+B+NIR"])
@pytest.mark.parametrize(
    ("name", "value"), [("stride", (1, 1)), ("padding", (3, 3)), ("dilation", (2, 2))]
)
def test_numbers_set_on_the_first_layer_hold(virtual, name, value):
    base = timm.create_model("resnet18", num_classes=3).eval()
    model = twin("dwg_resnet18", virtual_channels=virtual)
    model.load_state_dict(base.state_dict())
    for one in (base, model):
        setattr(one.conv1, name, value)
        assert getattr(one.conv1, name) == value
    assert getattr(model.conv1.bank, name) == value
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x).shape, base(x).shape)
        timm_varchan.set_channels(model, "G+B")
        assert model.conv1(x[:, :2]).shape == base.conv1(x).shape


def tensors_of(kind, conv):
    """A change that other programs make to the weight of a convolution."""
    if kind == "assigned":
        conv.weight = nn.Parameter(conv.weight.detach() * 2)
        conv.bias = nn.Parameter(torch.ones(conv.out_channels))
    elif kind == "parametrised":
        parametrizations.weight_norm(conv)
        with torch.no_grad():
            conv.parametrizations.weight.original0.mul_(2)
    elif kind == "replaced by a parametrisation":
        parametrizations.weight_norm(conv)
        with torch.no_grad():
            conv.parametrizations.weight.original0.mul_(2)
        parametrize.remove_parametrizations(conv, "weight")
    elif kind == "pruned":
        prune.ln_structured(conv, "weight", 0.5, n=2, dim=0)
    elif kind == "pruned for good":
        prune.ln_structured(conv, "weight", 0.5, n=2, dim=0)
        prune.remove(conv, "weight")


TENSORS = ("assigned", "parametrised", "replaced by a parametrisation", "pruned", "pruned for good")


@pytest.mark.parametrize("kind", TENSORS)
def test_weights_changed_under_the_name_of_the_first_layer(kind):
    base = timm.create_model("resnet18", num_classes=3).eval()
    model = timm.create_model("dwg_resnet18", num_classes=3).eval()
    model.load_state_dict(base.state_dict())
    for one in (base, model):
        tensors_of(kind, one.conv1)
    x = torch.randn(2, 3, 64, 64)
    same(model, base, x)
    same(model, base, x)
    timm_varchan.set_channels(model, "BGR")
    torch.testing.assert_close(model(x.flip(1)), base(x), rtol=1e-3, atol=1e-3)
    model.conv1(x).sum().backward()
    assert all(p.grad is not None for p in model.conv1.parameters())
    if kind in ("assigned", "pruned for good", "replaced by a parametrisation"):
        same(copy.deepcopy(model), model, x)


def test_convolution_and_normalisation_are_fused():
    model = twin("dwg_resnet18")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
    timm_varchan.set_channels(model, "G+B")
    x = torch.randn(2, 2, 64, 64)
    expected = model(x)
    model.conv1, model.bn1 = fuse_conv_bn_eval(model.conv1, model.bn1), nn.Identity()
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)
    anchored = twin("dwg_resnet18", virtual_channels="R+G+B+NIR")
    with pytest.raises(ValueError, match=r"stem\.bank\.weight and stem\.anchors\.weight"):
        fuse_conv_bn_eval(anchored.conv1, anchored.bn1)
    with pytest.raises(ValueError, match=r"for 4 channels.*adapt"):
        model.conv1.weight = nn.Parameter(torch.zeros(64, 4, 7, 7))


@torch.no_grad()
@pytest.mark.parametrize("name", ["repvit_m0_9", "efficientvit_m0", "tiny_vit_5m_224", "shvit_s1"])
@pytest.mark.parametrize("virtual", ["RGB", "R+G+B+NIR"])
def test_layers_that_fuse_themselves_keep_the_stem(name, virtual):
    model = twin(f"dwg_{name}", virtual_channels=virtual)
    size = 224 if name in ("efficientvit_m0", "tiny_vit_5m_224") else 64
    fused = reparameterize_model(model)
    assert len(stems(fused)) == 1
    for channels in ("RGB", "R+NIR"):
        x = torch.randn(1, len(ChannelSet.parse(channels)), size, size)
        for one in (model, fused):
            timm_varchan.set_channels(one, channels)
        torch.testing.assert_close(fused(x), model(x), rtol=1e-3, atol=1e-4)


def test_plain_weights_for_other_channels_name_the_cure():
    plain = timm.create_model("test_resnet", num_classes=3, in_chans=13)
    bands = ChannelSet.parse("eurosat")
    for kwargs in ({}, {"virtual_channels": bands}):
        model = twin(**kwargs)
        with pytest.raises(ValueError, match=r"for 13 channels.*adapt"):
            model.load_state_dict(plain.state_dict())
    adapted = timm_varchan.adapt(plain, virtual_channels=bands)
    assert adapted(torch.randn(2, 13, 32, 32)).shape == (2, 3)
    unnamed = twin(virtual_channels=ChannelSet.anonymous(13))
    unnamed.load_state_dict(
        timm.create_model("test_resnet", num_classes=3, in_chans=13).state_dict()
    )


def test_the_first_layer_keeps_its_name_in_traced_features():
    feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = twin("dwg_resnet18")
    timm_varchan.set_channels(model, "B02+B08")
    assert feature_extraction.get_graph_node_names(model)[1][:3] == ["x", "conv1", "bn1"]
    x = torch.randn(2, 2, 64, 64)
    extractor = feature_extraction.create_feature_extractor(model, ["conv1", "layer2"]).eval()
    found = extractor(x)
    torch.testing.assert_close(found["conv1"], model.conv1(x))
    assert found["layer2"].shape == (2, 128, 8, 8)


class DeviceReads(TorchDispatchMode):
    """Counts what makes a program wait for its device: numbers read, shapes set by values."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if any(t.device.type == "meta" for t in tensors):
            moved = name == "_to_copy" and (kwargs or {}).get("device") == torch.device("cpu")
            if moved or name in (
                "_local_scalar_dense",
                "nonzero",
                "equal",
                "_unique2",
                "unique_dim",
            ):
                self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("aug", sorted(CHANNEL_AUGS))
def test_a_training_step_reads_nothing_from_the_device(aug):
    model = twin(device="meta").train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    with DeviceReads() as reads:
        for step in range(2):
            x = torch.empty(4, 3, 32, 32, device="meta")
            key = DrawKey(0, 0, step)
            view = draw_channels(aug, x, RGB, key, identity="named", full_share=0.5)
            view.tell(model)
            loss = nn.functional.cross_entropy(model(view.planes), x.new_zeros(4, dtype=torch.long))
            loss.backward()
            optimiser.step()
    assert reads.found == []


@pytest.mark.parametrize("nested", [False, True])
def test_backbones_that_forget_their_channels_say_so(nested):
    class Config:
        backbone = "dwg_test_resnet"

    class Detector:
        backbone_config = Config()

    model = twin()
    model.config = Detector() if nested else Config()
    with pytest.warns(UserWarning, match=r"not the channels GB.*register_model"):
        timm_varchan.set_channels(model, "GB")
