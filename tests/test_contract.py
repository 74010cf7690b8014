"""What every model with a dynamic stem keeps, for one architecture of each kind."""

import copy
import itertools
import warnings

import pytest
import timm
import torch
from conftest import ARCHS, NUM_CLASSES, SMALL, assert_same, small_model, wake
from timm.layers import set_scriptable
from timm.models import GraphExtractNet, get_graph_node_names, save_for_hf
from timm.utils import ModelEmaV3
from torch.utils.flop_counter import FlopCounterMode

from timm_varchan.channels import RGB, Channel, ChannelSet
from timm_varchan.models import set_channels, stems

COUNTS = (1, 3, 5, 12)
FEATURES = ("default", "list", "dict", "getter", "hook", "fx")


def some_of(*archs):
    """All architectures, of which only these run in the default part."""
    slow = pytest.mark.slow
    return [arch if arch in archs else pytest.param(arch, marks=slow) for arch in ARCHS]


#: Compiled and exported in the default part.
TRACED = some_of("resnet18", "vit_tiny_patch16_224")
SCRIPT = pytest.mark.filterwarnings(
    "ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning"
)


def images(count, batch=2, height=64, width=64):
    return torch.randn(batch, count, height, width)


def named(count):
    """A set of as many channels with wavelengths from blue to infrared."""
    return torch.linspace(450, 2200, count).tolist()


def kept_depth(arch):
    """What a saved configuration of a small model cannot hold."""
    return {k: v for k, v in SMALL.get(arch, {}).items() if k == "blocks"}


def export(model, count, batch=2, dynamic=True):
    shapes = ({0: torch.export.Dim("b"), 1: torch.export.Dim("c")},) if dynamic else None
    return torch.export.export(model, (images(count, batch),), dynamic_shapes=shapes).module()


def run_onnx(model, folder, count, dynamic=True):
    """Export to ONNX and give a function that runs it."""
    onnxruntime = pytest.importorskip("onnxruntime")
    path = folder / "model.onnx"
    axes = {0: torch.export.Dim("b")} | ({1: torch.export.Dim("c")} if dynamic else {})
    program = torch.onnx.export(
        model, (images(count),), dynamo=True, dynamic_shapes=(axes,), input_names=["x"],
        verbose=False,
    )  # fmt: skip
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def count_graphs(model):
    """The model compiled without code generation, and the list of its graphs."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend=backend), graphs


@pytest.fixture(params=ARCHS)
def arch(request):
    return request.param


@pytest.fixture
def base(arch, pair):
    return pair(arch)[0]


@pytest.fixture
def twin(arch, pair):
    """As at the start: the residual is zero, the weights are those of `base`."""
    return pair(arch)[1]


@pytest.fixture
def trained(twin):
    """With a residual that is not zero."""
    return wake(twin)


class TestContract:
    # 1. any count and any size

    @torch.no_grad()
    def test_any_count_and_size(self, arch, trained):
        for count, (height, width) in itertools.product((1, 2, 4, 13), ((64, 64), (96, 64))):
            logits = trained(images(count, 1, height, width))
            assert logits.shape == (1, NUM_CLASSES)
            assert logits.isfinite().all()
        set_channels(trained, named(20))
        assert trained(images(20, 1)).isfinite().all()

    def test_unfit_input_is_refused(self, twin):
        set_channels(twin, "RG")
        for x, message in [
            (images(0), "at least one channel"),
            (images(2)[0], "needed is|not enough values"),  # ViTs unpack the shape first
            (images(3), r"3 channels.*RG"),
            (images(2).to(torch.int32), "floating-point"),
        ]:
            with pytest.raises(ValueError, match=message):
                twin(x)
        for spec in ("XY", [float("nan")], [float("inf")], [0.5], []):
            with pytest.raises(ValueError, match=r"Unknown|finite|micrometres|at least one"):
                set_channels(twin, spec)
        assert twin(images(2)).isfinite().all(), "refused sets leave the model as it was"

    @torch.no_grad()
    def test_nan_propagates_and_odd_values_do_not_make_it(self, trained):
        x = images(3)
        x[0, 1, 10:40, 10:40] = float("nan")
        logits = trained(x)
        assert logits[0].isnan().any()
        assert logits[1].isfinite().all()
        for x in (torch.zeros(1, 3, 64, 64), torch.full((1, 2, 64, 64), 1e3)):
            assert trained(x).isfinite().all()

    # 2. permutations and duplicates

    @torch.no_grad()
    @pytest.mark.parametrize("count", [3, 5])
    def test_anonymous_channels_have_no_order(self, trained, count):
        set_channels(trained, "anonymous")
        x = images(count)
        expected = trained(x)
        # depth makes more of the rounding: EfficientNet of 5e-7 in the stem 2e-4 in the logits
        assert_same(trained(x.flip(1)), expected, 1e-3)
        assert_same(trained(torch.cat([x, x], 1)), expected, 1e-3)

    @torch.no_grad()
    def test_named_channels_permute_with_their_names(self, trained):
        x = images(3)
        expected = trained(x)
        set_channels(trained, "BRG")
        assert_same(trained(x[:, [2, 0, 1]]), expected, 1e-3)
        assert (trained(x) - expected).abs().max() > 1e-3

    # 3. equality with timm

    @torch.no_grad()
    def test_rgb_equals_timm(self, base, twin):
        x = images(3)
        expected = base(x)
        assert expected.std() > 0.1
        assert_same(twin(x), expected)
        set_channels(twin, "RGB")
        assert_same(twin(x), expected)
        set_channels(twin, "BGR")
        assert_same(twin(x.flip(1)), expected)

    @torch.no_grad()
    def test_one_channel_equals_timm_on_the_plane_tripled(self, base, twin):
        x = images(1)
        expected = base(x.expand(-1, 3, -1, -1))
        for spec in (None, "anonymous", "G", "NIR", [1234.0], [None]):
            set_channels(twin, spec)
            assert_same(twin(x), expected)

    # 5. gradients and determinism

    @pytest.mark.parametrize("spec", [None, "anonymous", "R+B08", (RGB, ChannelSet.parse("GB"))])
    def test_every_parameter_gets_a_gradient(self, arch, twin, spec):
        set_channels(twin, spec)
        count = 2 if spec == "R+B08" else 3
        twin.train()(images(count)).square().sum().backward()
        assert not [name for name, p in twin.named_parameters() if p.grad is None]

    def test_all_gradients_of_the_stem_live_after_one_step(self, arch):
        model = small_model(f"dwg_{arch}", channel_names=("DNA",)).train()
        set_channels(model, [Channel("DNA"), "G", "B08"])
        mixer = stems(model)[0]
        optimiser = torch.optim.SGD(mixer.parameters(), lr=1.0)
        for _ in range(2):
            # float64 would hide nothing: a gradient of exactly 0 is what is looked for
            optimiser.zero_grad()
            model(images(3)).square().sum().backward()
            dead = [name for name, p in mixer.named_parameters() if not p.grad.any()]
            optimiser.step()
        assert not dead

    # 6. what is done with models

    @torch.no_grad()
    def test_bfloat16(self, trained):
        x = images(5)
        expected = trained(x)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = trained(x)
        assert (mixed.float() - expected).std() < 0.2 * expected.std() + 0.05
        low = trained.to(torch.bfloat16)(x.bfloat16())
        assert low.dtype == torch.bfloat16
        assert low.isfinite().all()
        set_channels(trained, "RG")
        assert trained(images(2).bfloat16()).isfinite().all()

    @torch.no_grad()
    def test_channels_last(self, trained):
        x = images(5)
        expected = trained(x)
        trained.to(memory_format=torch.channels_last)
        assert_same(trained(x.contiguous(memory_format=torch.channels_last)), expected, 1e-4)

    def test_grad_checkpointing(self, trained):
        x = images(5)
        expected = trained(x)
        trained.set_grad_checkpointing()
        trained.train()(x).sum().backward()
        assert not [n for n, p in trained.named_parameters() if p.grad is None]
        assert expected.shape == (2, NUM_CLASSES)

    @torch.no_grad()
    def test_copies_have_their_own_channels(self, trained):
        set_channels(trained, "RG")
        x = images(2)
        expected = trained(x)
        other = copy.deepcopy(trained)
        average = ModelEmaV3(trained, decay=0.5)
        set_channels(trained, "BR")
        assert torch.equal(other(x), expected)
        assert torch.equal(average(x), expected)
        average.update(trained)
        set_channels(average, "BR")
        assert_same(average(x), trained(x))

    @torch.no_grad()
    @pytest.mark.filterwarnings("ignore:.*NOTE. The nodes obtained by tracing:UserWarning")
    @pytest.mark.parametrize("form", FEATURES)
    def test_features_equal_those_of_timm(self, arch, form):
        kwargs = {} if form == "default" else {"feature_cls": form}
        kwargs |= {"features_only": True, "num_classes": 0}
        try:
            base = small_model(arch, **kwargs)
        except (AssertionError, IndexError, RuntimeError) as error:  # the family lacks this form
            with pytest.raises(type(error)):
                small_model(f"dwg_{arch}", **kwargs)
            return
        twin = small_model(f"dwg_{arch}", **kwargs)
        twin.load_state_dict(base.state_dict())
        assert twin.feature_info.channels() == base.feature_info.channels()
        x = images(3)
        expected, actual = base(x), twin(x)
        assert type(actual) is type(expected)
        if isinstance(expected, dict):
            expected, actual = list(expected.values()), list(actual.values())
        assert len(actual) == len(expected) >= 3
        for ours, theirs in zip(actual, expected, strict=True):
            assert_same(ours, theirs)
        set_channels(twin, named(6))
        assert len(twin(images(6))) == len(expected)

    @torch.no_grad()
    @pytest.mark.filterwarnings("ignore:.*NOTE. The nodes obtained by tracing:UserWarning")
    def test_fx(self, trained):
        last = get_graph_node_names(trained)[1][-1]
        traced = GraphExtractNet(trained, [last]).eval()
        for count in (3, 5):
            x = images(count)
            assert torch.equal(traced(x), trained(x))

    @torch.no_grad()
    @SCRIPT
    def test_torchscript(self, arch):
        with set_scriptable(True):
            model = wake(small_model(f"dwg_{arch}"))
        scripted = torch.jit.script(model)
        for count in (3, 5, 1):
            x = images(count)
            assert_same(scripted(x), model(x))

    @torch.no_grad()
    def test_saved_models_come_back(self, arch, tmp_path):
        depth = kept_depth(arch)
        model = wake(small_model(f"dwg_{arch}", in_chans=2, channel_set="R+B08", **depth))
        args = dict.fromkeys(depth)
        for argument in args:
            model._model_args = {k: v for k, v in model._model_args.items() if k != argument}
        save_for_hf(model, tmp_path, safe_serialization=True)
        assert [f.name for f in tmp_path.glob("*.bin")] == []
        place = f"local-dir:{tmp_path}"
        x = images(2)
        back = timm.create_model(place, pretrained=True, **depth).eval()
        assert stems(back)[0].channels == ChannelSet.parse("R+B08")
        assert torch.equal(back(x), model(x))
        other = timm.create_model(place, pretrained=True, num_classes=3, **depth).eval()
        assert other(x).shape == (2, 3)
        assert torch.equal(other.forward_features(x), model.forward_features(x))

    @torch.no_grad()
    @pytest.mark.parametrize("arch", TRACED, indirect=True)
    def test_compilation_does_not_follow_the_count_or_the_set(self, trained):
        compiled, graphs = count_graphs(trained)
        for count in range(1, 14):
            x = images(count)
            assert_same(compiled(x), trained(x), 1e-4)
        assert len(graphs) <= 3
        for spec in ("RG", "B02+B08", "BR", "NIR+SWIR1"):
            set_channels(trained, spec)
            x = images(2)
            assert_same(compiled(x), trained(x), 1e-4)
        assert len(graphs) <= 4

    @torch.no_grad()
    @pytest.mark.parametrize("arch", TRACED, indirect=True)
    @pytest.mark.parametrize("example", [3, pytest.param(5, marks=pytest.mark.slow)])
    def test_export_with_dynamic_channels(self, trained, example):
        exported = export(trained, example)
        for count, batch in itertools.product(COUNTS, (1, 2)):
            x = images(count, batch)
            assert_same(exported(x), trained(x))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("arch", some_of("resnet18", "convnext_atto", "vit_tiny_patch16_224"))
@pytest.mark.parametrize("example", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_onnx_with_dynamic_channels(trained, example, tmp_path):
    run = run_onnx(trained, tmp_path, example)
    for count, batch in itertools.product(COUNTS, (1, 2)):
        x = images(count, batch)
        assert_same(run(x), trained(x), 1e-4)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["stem", "resnet18"])
def test_inductor(pair, whole):
    model = wake(pair("resnet18")[1])
    module = model if whole else model.conv1
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of code generation, which differ by compiler
        compiled = torch.compile(module, fullgraph=True)
        for count in COUNTS:
            x = images(count)
            assert_same(compiled(x), module(x), 1e-4)


def test_overhead_is_small():
    def cost(name):
        model = timm.create_model(name, device="meta").eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 224, 224, device="meta"))
        return sum(p.numel() for p in model.parameters()), counter.get_total_flops()

    parameters, flops = cost("densenet121")
    more_parameters, more_flops = cost("dwg_densenet121")
    assert 0 < more_parameters - parameters < 0.001 * parameters
    assert 0 < more_flops - flops < 0.01 * flops
