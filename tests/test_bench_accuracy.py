"""The accuracy and complexity benchmarks and the form of their results."""

import copy
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from scipy import stats
from torch import nn

from timm_varchan import RGB, ChannelSet, hub
from timm_varchan.data import load_data
from timm_varchan.evaluation import SetView, evaluate_channel_sets

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import accuracy  # noqa: E402
import complexity  # noqa: E402
import paired  # noqa: E402
import schema  # noqa: E402


class Sums(nn.Module):
    """Four classes by the signs of two weighted sums of three planes; order matters."""

    def __init__(self, weights):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weights))

    def forward(self, x):
        values = x.mean((2, 3)) @ self.weight
        return torch.cat([values, -values], 1)


@pytest.fixture(scope="module")
def results():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(80, 3, 4, 4, generator=rng)
    y = torch.randint(0, 4, (80,), generator=rng)
    models = {"a": Sums([[1.0, 0], [0, 1.0], [1.0, 1.0]]), "b": Sums([[0, 1.0], [1.0, 0], [0, 0]])}
    return {
        name: paired.by_view(
            evaluate_channel_sets(model, [(x, y)], RGB, num_classes=4, modes=["mask", "zero"])
        )
        for name, model in models.items()
    }


def test_paired_intervals_are_exact_and_agree_with_the_test():
    a = np.array([True] * 30 + [True] * 12 + [False] * 3 + [False] * 5)
    b = np.array([True] * 30 + [False] * 12 + [True] * 3 + [False] * 5)
    result = paired.exact_paired(a, b)
    low, high = stats.binomtest(12, 15).proportion_ci(method="exact")
    assert result["low"] == pytest.approx((2 * low - 1) * 15 / 50)
    assert result["high"] == pytest.approx((2 * high - 1) * 15 / 50)
    assert (result["only_a"], result["only_b"], result["num_images"]) == (12, 3, 50)
    for only_a in range(16):
        wins = np.arange(50) < only_a
        losses = (np.arange(50) >= only_a) & (np.arange(50) < 15)
        one = paired.exact_paired(wins, losses)
        excludes_zero = one["low"] > 0 or one["high"] < 0
        assert excludes_zero == (one["p"] < 0.05)
    same = paired.exact_paired(a, a)
    assert same["low"] == -same["high"] == pytest.approx(-(1 - 0.025 ** (1 / 50)))


def test_uniform_mean_and_worst_set_are_those_of_the_sets(results):
    own = results["a"]
    way = ("mask", "in order")
    (row,) = [r for r in paired.series_rows(own) if (r["mode"], r["order"]) == way]
    told = [r for r in own.values() if (r.mode, r.order) == way]
    sizes = [[r.correct.mean() for r in told if r.size == n] for n in (1, 2, 3)]
    assert list(map(len, sizes)) == [3, 3, 1]
    assert row["uniform_mean"] == pytest.approx(np.mean([np.mean(s) for s in sizes]))
    assert row["worst"] == pytest.approx(min(map(min, sizes)))
    assert row["full"] == pytest.approx(sizes[2][0])


def test_leaving_a_channel_out_is_compared_on_the_same_images(results):
    rows = paired.leave_one_out(results["a"], RGB)
    first = next(r for r in rows if (r["left_out"], r["mode"], r["order"])
                 == ("G", "zero", "in order"))  # fmt: skip
    without, full = (results["a"][key, "zero", "in order"] for key in ((0, 2), (0, 1, 2)))
    expected = without.correct.mean() - full.correct.mean()
    assert first["paired"]["difference"] == pytest.approx(expected)
    assert len(rows) == 3 * 2 * 2


def test_a_channel_without_weight_is_worth_nothing(results):
    rows = paired.leave_one_out(results["b"], RGB)
    assert {r["paired"]["difference"] for r in rows
            if r["left_out"] == "B" and r["order"] == "in order"} == {0.0}  # fmt: skip


def test_flips_count_changed_answers(results):
    rows = {(r["channels"], r["mode"]): r["rate"] for r in paired.flips(results["a"])}
    assert rows["R", "mask"]["value"] == 0.0, "one plane has one order"
    first, other = (results["a"][(0, 1, 2), "mask", order] for order in ("in order", "shuffled"))
    assert rows["RGB", "mask"]["value"] == np.mean(first.predictions != other.predictions) > 0


def test_pairs_and_experts_compare_what_belongs_together(results):
    modes = dict.fromkeys(results, ("mask", "zero"))
    rows = paired.pairs(results, modes)
    assert len(rows) == 7 * 2 * 2
    assert {(r["mode_a"], r["mode_b"]) for r in rows} == {("mask", "mask"), ("zero", "zero")}
    expert = results["b"][(0, 1), "zero", "in order"].correct
    gaps = paired.expert_gaps(results["a"], {"RG": expert})
    assert {g["channels"] for g in gaps} == {"RG"}
    own = results["a"][(0, 1), "mask", "in order"].correct
    gap = next(g for g in gaps if (g["mode"], g["order"]) == ("mask", "in order"))
    assert gap["paired"]["difference"] == pytest.approx(own.mean() - expert.mean())


def test_zero_and_mask_differ_by_the_scale():
    seen = []

    class Recorder(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x

    x, view = torch.randn(2, 3, 4, 4), SetView(RGB, (0, 2), "zero", "in order")
    for mode in ("zero", "mask"):
        accuracy.MODES[mode](Recorder(), x, view, range(2))
    torch.testing.assert_close(seen[0] * 1.5, seen[1])
    assert not seen[0][:, 1].any()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Three untrained models of the synthetic data's classes."""
    folder = tmp_path_factory.mktemp("models")
    data = load_data("synthetic", img_size=32, num_images={"train": 10})
    torch.manual_seed(0)
    for name in ("dwg", "plain", "rg", "few"):
        arch = "dwg_test_resnet" if name == "dwg" else "test_resnet"
        channels = ChannelSet.parse("RG" if name == "rg" else "RGB")
        names = data.class_names[:3] if name == "few" else data.class_names
        model = timm.create_model(arch, num_classes=len(names), in_chans=len(channels))
        hub.save(model, folder / name, class_names=names, channels=channels, img_size=32)
    return folder


@pytest.fixture
def command(saved, tmp_path, monkeypatch):
    """Runs the accuracy benchmark; returns its result."""

    def run(*extra, models=("dwg={0}/dwg", "gray=gray:{0}/plain", "plain={0}/plain")):
        target = tmp_path / "accuracy.json"
        given = [f"--model={m.format(saved)}" for m in models]
        argv = ["accuracy.py", "--data=synthetic", "--channels=RGB", "--limit=20", "--img-size=32",
                "--latency-rounds=3", f"--output={target}", *given,
                *(e.format(saved) for e in extra)]  # fmt: skip
        monkeypatch.setattr(sys, "argv", argv)
        accuracy.main()
        return schema.read(target, "accuracy")

    return run


def test_the_command_compares_models_and_experts(command, saved):
    result = command("--expert=RG={0}/rg")
    dwg, gray, plain = result["models"]
    assert [m["source"] for m in result["models"]] == ["dwg", "plain", "plain"]
    assert str(saved) not in json.dumps(result), "no paths in results"
    assert {s["mode"] for s in dwg["sets"]} == {"named", "anonymous", "anonymous, twice"}
    assert {s["mode"] for s in plain["sets"]} == {"mask", "zero"}
    assert len(dwg["sets"]) == 7 * 3 * 2
    for model in (dwg, gray):
        assert all(f["rate"]["value"] == 0 for f in model["flips"]), "order and duplicates"
    assert {e["channels"] for e in plain["experts"]} == {"RG"}
    assert result["settings"]["num_images"] == 20
    for model in result["models"]:
        assert [t["num_channels"] for t in model["latency"]] == [1, 2, 3]
        assert all(0 < t["ms"]["low"] <= t["ms"]["median"] for t in model["latency"])
    names = {(p["a"], p["b"]) for p in result["pairs"]}
    assert names == {("dwg", "gray"), ("dwg", "plain"), ("gray", "plain")}


@pytest.mark.parametrize(
    ("models", "extra", "message"),
    [
        (["x=no_such_model"], [], "no model or folder 'no_such_model'"),
        (["x={0}/few"], [], "x has 3 classes, which are not the 10 of the data"),
        (["x={0}/dwg", "x={0}/plain"], [], "the same name"),
        (["x=dynamic:{0}/plain"], [], "dynamic takes one channel set only"),
        (["x={0}/dwg"], ["--expert=RGN={0}/rg"], "Unknown channel"),
        (["x={0}/dwg"], ["--expert=R={0}/rg"], "was trained on RG, not on R"),
        (["x={0}/dwg"], ["--channels=R+NIR"], "Channel G, B is not among R[+]NIR"),
        (["x={0}/dwg"], ["--data=/no/such/folder"], "There is no /no/such/folder"),
    ],
)
def test_bad_input_is_refused_before_any_work(command, models, extra, message, capsys, monkeypatch):
    monkeypatch.setattr(accuracy, "compare", lambda *_: pytest.fail("work began"))
    with pytest.raises(SystemExit) as stop:
        command(*extra, models=models)
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_complexity_rows_hold_the_growth(tmp_path, monkeypatch):
    target = tmp_path / "complexity.json"
    argv = ["complexity.py", "--models", "dwg_test_resnet", "test_resnet", "--stems-of",
            "test_resnet", "--counts", "3", "5", "--img-size", "32",
            "--output", str(target)]  # fmt: skip
    monkeypatch.setattr(sys, "argv", argv)
    complexity.main()
    rows = {(r["model"], r["num_channels"]): r for r in schema.read(target, "complexity")["rows"]}
    twin, plain = rows["dwg_test_resnet", 5], rows["test_resnet", 5]
    assert twin["macs"] - rows["dwg_test_resnet", 3]["macs"] == 2 * twin["macs_per_added_channel"]
    assert plain["params"] > rows["test_resnet", 3]["params"]
    assert rows["test_resnet, stem hyper", 5]["channels"].startswith("400")
    assert ("test_resnet, stem zero_fill", 5) not in rows
    monkeypatch.setattr(sys, "argv", ["complexity.py", "--models", "nothing", "--output", "x"])
    with pytest.raises(SystemExit):
        complexity.main()


@pytest.fixture
def written(tmp_path):
    row = {
        "model": "m", "channels": "RGB", "num_channels": 3, "img_size": 32, "batch_size": 1,
        "params": 5, "stem_params": None, "macs": 7, "flops": 14, "stem_macs": 1,
        "macs_per_added_channel": None, "forward_backward_mb": 0.5, "params_mb": 1,
    }  # fmt: skip
    path = tmp_path / "complexity.json"
    return path, schema.write(path, "complexity", {"img_size": 32}, rows=[row])


def test_results_come_back_as_written(written):
    path, result = written
    assert schema.read(path, "complexity") == result


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r: r["schema"].update(version=0),
            r"version': 0.*version 1. Make it again",
        ),
        (lambda r: r["schema"].update(kind="accuracy"), "needed is 'complexity'"),
        (lambda r: r.pop("schema"), "schema None"),
        (lambda r: r["rows"][0].pop("macs"), r"rows\[0\].macs is missing"),
        (lambda r: r["rows"][0].update(macs="7"), r"rows\[0\].macs is str"),
        (lambda r: r["rows"][0].update(macs=True), r"rows\[0\].macs is bool"),
        (lambda r: r["rows"][0].update(more=1), r"rows\[0\].more is not known"),
        (lambda r: r.update(rows={}), "rows is no list"),
        (lambda r: r.update(machine=[]), "machine is no object"),
    ],
)
def test_results_of_another_form_are_refused(written, change, message):
    path, result = written
    changed = copy.deepcopy(result)
    change(changed)
    path.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=message):
        schema.read(path, "complexity")


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"bench/README.md"):
        schema.read(tmp_path / "x.json", "accuracy")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match="no JSON"):
        schema.read(tmp_path / "x.json", "accuracy")


def test_wrong_content_is_never_written(tmp_path):
    with pytest.raises(AssertionError, match="rows is missing"):
        schema.write(tmp_path / "x.json", "complexity", {})
    assert not (tmp_path / "x.json").exists()


def test_the_readme_explains_every_list_and_figure_of_the_schema():
    text = (BENCH / "README.md").read_text()
    (model,) = schema.FIELDS["accuracy"]["models"]
    lists = [name for name, form in model.items() if isinstance(form, list)]
    assert len(lists) == 7
    assert [name for name in lists if f"`models[].{name}`" not in text] == []
    assert [name for name in schema.PAIRED if f"`{name}`" not in text] == []
    assert f"Version {schema.VERSION}." in text
