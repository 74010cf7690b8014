"""The RRDB family: what its blocks compute, what its options do, what it costs."""

import inspect
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import assert_same
from torch import nn

from timm_varchan.models.rrdb import RRDB, ConvRecurrence, DenseBlock

NAMES = ("rrdb_small", "rrdb_base", "rrdb_rnn_small", "rrdb_rnn_base")
#: Options that change the model, and with the default of each architecture argument another one.
OPTIONS = {
    "dims": (16, 24, 40),
    "growth": 8,
    "num_layers": 2,
    "num_blocks": 1,
    "res_scale": 0.5,
    "steps": 2,
    "stem_stride": 4,
    "norm_layer": "layernorm2d",
    "act_layer": "gelu",
    "num_classes": 5,
    "in_chans": 4,
    "global_pool": "max",
    "drop_rate": 0.5,
    "device": "meta",
    "dtype": torch.float64,
}


def small(**kwargs):
    """A model that is fast enough for a test, the same whenever it is made."""
    torch.manual_seed(0)
    kwargs = {"dims": (8, 12, 16), "growth": 4, "steps": 3, "num_classes": 7, **kwargs}
    return RRDB(**kwargs)


@pytest.mark.parametrize("option", inspect.signature(RRDB).parameters)
def test_each_option_changes_something(option):
    base, other = small(), small(**{option: OPTIONS[option]})

    def facts(model):
        return [(n, p.shape, p.dtype, p.device) for n, p in model.named_parameters()]

    if facts(base) != facts(other):
        return
    x = torch.randn(2, 3, 32, 32)
    torch.manual_seed(0)  # of dropout
    assert not torch.allclose(base.train()(x), other.train()(x))


def test_parameters_as_the_report_prints_them():
    def count(name):
        return sum(p.numel() for p in timm.create_model(name, num_classes=50).parameters())

    assert [f"{count(name) / 1e6:.2f}" for name in ("rrdb_small", "rrdb_rnn_small")] == [
        "0.17",
        "0.30",
    ]
    assert count("rrdb_base") > 3 * count("rrdb_small")
    assert count("rrdb_rnn_base") > 3 * count("rrdb_rnn_small")


@pytest.mark.parametrize("name", NAMES)
def test_layers_are_counted_as_the_graph_has_them(name):
    """The longest path through convolutions in the traced graph."""
    model = timm.create_model(name, num_classes=7)
    graph = torch.fx.symbolic_trace(model).graph
    modules = dict(model.named_modules())
    depth = {}
    for node in graph.nodes:
        before = max((depth[n] for n in node.all_input_nodes), default=0)
        is_conv = node.op == "call_module" and isinstance(modules[node.target], nn.Conv2d)
        depth[node] = before + is_conv
    assert model.count_convs() == max(depth.values())
    num_layers = len(model.stages) + isinstance(model.recurrence, ConvRecurrence)
    assert 2 <= num_layers <= 4


def test_recurrence_is_its_equations():
    block, x = ConvRecurrence(4, steps=3), torch.randn(2, 4, 6, 5)
    (W_c, W_g), (b_c, b_g) = (t.split([4, 8]) for t in (block.input.weight, block.input.bias))
    h = x
    for _ in range(3):
        z, r = torch.sigmoid(F.conv2d(x, W_g, b_g) + block.gates(h)).chunk(2, dim=1)
        c = torch.tanh(F.conv2d(x, W_c, b_c) + block.candidate(r * h))
        h = (1 - z) * h + z * c
    assert_same(block(x), h)


@pytest.mark.parametrize("steps", [1, 2])
def test_each_step_widens_the_receptive_field(steps):
    block = ConvRecurrence(3, steps=steps)
    x = torch.randn(1, 3, 25, 25, requires_grad=True)
    block(x)[..., 12, 12].sum().backward()
    seen = (x.grad.abs().sum((0, 1, 2)) > 0).nonzero()
    assert seen.max() - seen.min() + 1 == 1 + steps * 4


def test_steps_share_their_weights():
    counts = {sum(p.numel() for p in small(steps=n).parameters()) for n in (1, 2, 5)}
    assert len(counts) == 1
    with pytest.raises(ValueError, match="at least one step"):
        ConvRecurrence(4, steps=0)


def test_dense_block_is_its_equations():
    block = DenseBlock(4, 2, 2, 0.2, norm_layer="batchnorm2d", act_layer="leaky_relu").eval()
    x = torch.randn(1, 4, 5, 5)
    first = block.layers[0](x)
    second = block.layers[1](torch.cat([x, first], 1))
    fused = block.fuse.bn(block.fuse.conv(torch.cat([x, first, second], 1)))
    assert_same(block(x), x + 0.2 * fused)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (17, 9), (33, 64)])
def test_any_size(size):
    model = small().train()
    logits = model(torch.randn(2, 3, *size))
    logits.sum().backward()
    assert logits.shape == (2, 7)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", ["rrdb_small", "rrdb_rnn_small"])
def test_it_starts_calmly(name):
    """Loss of a guess, maps of about the scale of one, and a gradient for every weight."""
    model = timm.create_model(name, num_classes=10).train()
    x, y = torch.randn(8, 3, 32, 32), torch.arange(8)
    _, maps = model.forward_intermediates(x)
    assert all(0.1 < m.std() < 10 for m in maps)
    loss = F.cross_entropy(model(x), y)
    assert abs(loss.item() - math.log(10)) < 0.2
    loss.backward()
    missing = [n for n, p in model.named_parameters() if not p.grad.abs().sum() > 0]
    assert not missing


@pytest.mark.parametrize("name", NAMES)
def test_twin_is_the_base_on_rgb_and_takes_other_channels(name):
    twin = timm.create_model(f"dwg_{name}", num_classes=7).eval()
    base = timm.create_model(name, num_classes=7).eval()
    twin.load_state_dict(base.state_dict())
    x = torch.randn(1, 3, 16, 16)
    assert_same(twin(x), base(x))
    assert twin(torch.randn(1, 5, 16, 16)).shape == (1, 7)
