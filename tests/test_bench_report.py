"""Tables and pictures of the benchmark, and that documents hold what the results say."""

import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from timm_varchan import RGB
from timm_varchan.stems import make_stem
from timm_varchan.training import DrawKey, draw_channels

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import pictures  # noqa: E402
import report  # noqa: E402
import tables  # noqa: E402
import task1_arms  # noqa: E402
import task1_report  # noqa: E402
from finished_runs import Run  # noqa: E402

SERIES = {"mode": "named", "order": "in order"}


def estimate(value):
    return {"value": value, "low": value - 0.05, "high": value + 0.05}


def paired(difference):
    return {"difference": difference, "low": difference - 0.1, "high": difference + 0.1,
            "p": 0.012, "only_a": 3, "only_b": 2, "num_images": 100}  # fmt: skip


def sizes(num_channels):
    return {"median": float(num_channels), "q25": 0.5, "q75": 4.0, "low": 0.5, "high": 9.0}


@pytest.fixture
def accuracy():
    sets = [
        SERIES | {"channels": name, "indices": list(range(len(name))), "size": len(name),
                  "num_images": 100, **dict.fromkeys(("precision_macro", "recall_macro", "f1_macro",
                                                      "accuracy"), estimate(value))}
        for name, value in (("RG", 0.5), ("R", 0.25), ("G", 0.4))
    ]  # fmt: skip
    model = {
        "name": "dwg", "source": "dwg", "channels": "RG", "sets": sets,
        "sizes": [SERIES | {"size": n, "num_sets": 1, "mean": 0.3, "std": 0.1, "worst": 0.2,
                            "worst_set": "R"} for n in (2, 1)],
        "series": [SERIES | {"full": 0.5, "uniform_mean": 0.4125, "worst": 0.25, "worst_set": "R"}],
        "leave_one_out": [SERIES | {"left_out": "G", "paired": paired(-0.25)}],
        "flips": [{"channels": name, "mode": "named", "change": "shuffled", "rate": estimate(rate)}
                  for name, rate in (("RG", 0.1), ("R", 0.05))],
        "experts": [SERIES | {"channels": "R", "expert": "expert R", "paired": paired(-0.031)}],
        "latency": [{"num_channels": n, "batch_size": 8, "rounds": 3, "ms": sizes(n)}
                    for n in (1, 2)],
    }  # fmt: skip
    pair = {"a": "dwg", "b": "plain", "channels": "RG", "mode_a": "named", "mode_b": "mask",
            "order": "in order", "paired": paired(0.2)}  # fmt: skip
    less = pair | {"channels": "R", "paired": paired(0.05)}
    return {"models": [model], "pairs": [pair, less, pair | {"order": "shuffled"}]}


@pytest.fixture
def complexity():
    def row(model, channels, macs, growth):
        return {"model": model, "channels": "?" * channels, "num_channels": channels,
                "img_size": 32, "batch_size": 1, "params": 5_000_000, "stem_params": 100,
                "macs": macs, "flops": 2 * macs, "stem_macs": macs // 4,
                "macs_per_added_channel": growth, "forward_backward_mb": 1.5,
                "params_mb": 20}  # fmt: skip

    rows = [row("densenet121", 1, 10**9, None), row("densenet121", 3, 3 * 10**9, None),
            row("dwg_densenet121", 3, 3 * 10**9, 150_000),
            row("densenet121, stem gray", 3, 3 * 10**9 + 5 * 10**6, 7)]  # fmt: skip
    return {"rows": rows}


@pytest.fixture
def latency():
    figures = {"model": "dwg_x", "num_channels": 3, "batch_size": 8, "rounds": 3,
               "ms": {"dwg_x": sizes(3), "timm": sizes(2)},
               "ratios": {"timm": {"median": 1.0123, "low": 1.0, "high": 1.1, "q25": 1, "q75": 1}},
               "peak_mib": {"dwg_x": 10.0, "timm": 9.0}}  # fmt: skip
    empty = {"model": "dwg_x", "num_channels": 13, "batch_size": 64, "reason": "out of memory"}
    return {"benchmarks": [{"extra_info": figures}], "empty_rows": [empty]}


@pytest.fixture
def loading():
    speeds = {kind: sizes(2) for kind in ("plain", "ours", "augmented")}
    row = {"format": "TIFF files", "of_plain": sizes(0.5), "images_per_second": speeds,
           "of_torchvision": sizes(2)}  # fmt: skip
    return {"rows": [row]}


@pytest.fixture
def throughput():
    return {"loops": {"plain loop": {"images_per_second": sizes(2), "of_plain": sizes(1)}}}


def test_tables_show_the_figures_of_the_results(accuracy, complexity, latency, loading, throughput):
    made = report.make_tables({"accuracy": accuracy, "complexity": complexity, "latency": latency,
                               "loading": loading, "throughput": throughput})  # fmt: skip
    assert set(made) == set(tables.TABLES)
    assert (
        "| TIFF files | 2 | 2 | 0.500 (0.500 to 9.000) | 2 | 2.000 (0.500 to 9.000) |"
        in made["loading"]
    )
    assert "| plain loop | 2.0 | 1.000 (0.500 to 9.000) |" in made["throughput"]
    assert "| R | 25.0 (20.0 to 30.0) |" in made["accuracy"]
    assert "| dwg | named | in order | 50.0 | 41.2 | 25.0 (R) |" in made["series"]
    assert "R minus its expert | -3.1 (-13.1 to +6.9), p 0.012 |" in made["gaps"]
    assert "without G minus with all | -25.0" in made["gaps"]
    assert "| dwg, named | plain, mask | 2 | 1 | 0 | +12.5 | +20.0" in made["pairs"]
    assert "shuffled | 1 | 10.0 | 10.0 (5.0 to 15.0), RG |" in made["flips"], "R has no order"
    assert (
        "| densenet121 | 1 | 5.000 | 1.000 | 1.50 | 20.00 | 25.00 | 1000.00 |" in made["complexity"]
    )
    assert (
        "| dwg_densenet121 | 3 | 5.000 | 3.000 | 1.50 | 20.00 | 25.00 | 0.15 |"
        in made["complexity"]
    )
    assert "stem" not in made["complexity"]
    assert "| gray | yes | yes | yes | no | 0 | +5.00 |" in made["stems"]
    assert "| 8 | 3 | 3.0 | 2.0 | 1.012 (1.000 to 1.100) |  | 10 | 9 |" in made["latency"]
    assert "| 64 | 13 | out of memory |" in made["latency"], "the reason in place of figures"
    for table in made.values():
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_only_tables_with_results_are_made(complexity):
    assert set(report.make_tables({"complexity": complexity})) == {"complexity", "stems"}


def test_blocks_are_filled_and_the_rest_is_left_alone():
    text = "a\n<!-- table: x -->\nold\n<!-- /table -->\nb\n<!-- table: y -->\n<!-- /table -->\n"
    filled = tables.fill(text, {"x": "| 1 |\n"})
    assert filled == text.replace("old\n", "| 1 |\n")
    assert tables.fill(filled, {"x": "| 1 |\n"}) == filled
    assert tables.block_names(text) == ["x", "y"]


def test_pictures_are_drawn(accuracy, complexity, latency, tmp_path):
    names = report.draw(
        {"accuracy": accuracy, "complexity": complexity, "latency": latency}, tmp_path
    )
    assert names == ["cost.png", "accuracy_latency.png", "sizes.png"]
    assert pictures.draw_cost(complexity, None, tmp_path / "alone.png").is_file()
    history = [{"epoch": e, "train_loss": 1 / e, "train_accuracy": 50, "test_accuracy": 40}
               for e in (1, 2)]  # fmt: skip
    pictures.draw_curves({"none": history, "shuffle": history}, tmp_path / "curves.png")
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes()[:4] == b"\x89PNG"


def test_foreign_results_are_refused(tmp_path):
    (tmp_path / "latency.json").write_text(json.dumps({"benchmarks": []}))
    with pytest.raises(ValueError, match="has no 'empty_rows'"):
        report.read_results(tmp_path)
    (tmp_path / "complexity.json").write_text(json.dumps({"schema": None}))
    with pytest.raises(ValueError, match="version 1"):
        report.read_results(tmp_path)


def test_every_step_names_a_command_that_is_there(tmp_path):
    for step in report.STEPS.values():
        commands = step(tmp_path)
        assert commands
        for command in commands:
            script = command[1] if command[1] != "-m" else command[3]
            assert (report.ROOT / script).exists()
    names = {command[-1] for command in report.measure_accuracy(tmp_path)[:-1]}
    assert len(names) == len(report.MODELS) + len(report.EXPERTS)
    for name in report.MODELS:
        (tmp_path / name / "model").mkdir(parents=True)
    again = report.measure_accuracy(tmp_path)
    assert len(again) == len(report.EXPERTS) + 1, "what is there is not trained again"


@pytest.mark.parametrize("path", report.DOCUMENTS, ids=lambda path: path.name)
def test_documents_hold_the_tables_of_the_results(path):
    results = report.read_results(report.RESULTS)
    made = report.make_tables(results)
    text = path.read_text()
    assert tables.fill(text, made) == text, "run: python bench/report.py"
    if path == report.REPORT:
        missing = set(made) - set(tables.block_names(text)) - {"batchnorm"}
        assert not missing, "tables that the report leaves out"


def test_the_pictures_of_the_report_are_there():
    for name in re.findall(r"\]\((results/[^)]*\.png)\)", report.REPORT.read_text()):
        kind = {"cost": "complexity", "task1_curves": "task1"}.get(Path(name).stem, "accuracy")
        if (report.RESULTS / f"{kind}.json").is_file():
            assert (BENCH / name).is_file()


def test_every_arm_of_task1_can_be_told_what_its_augmentation_draws():
    x = torch.randn(8, 3, 8, 8)
    for name, arm in task1_arms.ARMS.items():
        if arm.stem is None:
            assert arm.aug in ("none", "shuffle", "hcs-mask"), name
            continue
        stem = make_stem(arm.stem, torch.nn.Conv2d(3, 4, 3))
        view = draw_channels(arm.aug, x, RGB, DrawKey(0, 0, 0), identity=arm.identity)
        view.tell(stem)
        assert stem(view.planes).isfinite().all(), name
        for mode, channels in itertools.product(arm.modes, arm.test_sets):
            stem.set_channels(channels if mode == "named" else "anonymous")


@pytest.fixture
def task1():
    def accuracy(mean):
        return {"accuracy": {"mean": mean, "low": mean - 1.5, "high": mean + 1.5},
                "accuracy_by_seed": [mean], "precision_macro": 51.25, "recall_macro": 50.0,
                "f1_macro": 49.0}  # fmt: skip

    def row(mode, order, mean, statistics="running", names=("RGB", "R")):
        gap = {"mean": 2.0, "low": 1.0, "high": 3.0, "seeds": [0, 1], "by_seed": [1.5, 2.5]}
        return {"mode": mode, "order": order, "statistics": statistics,
                "sets": {name: accuracy(mean) for name in names}, "loss_rgb": gap}  # fmt: skip

    history = {"0": [{"epoch": 1, "train_loss": 3, "train_accuracy": 9, "test_accuracy": 8}]}
    return {
        "settings": {"num_classes": 25, "img_size": 32},
        "arms": {
            "expert-R": {"seeds": [0], "results": [row("mask", "in order", 40.0, names=["R"])],
                         "history": history},
            "dwg-none": {"seeds": [0, 1], "history": history, "results": [
                row("named", "in order", 52.0), row("named", "in order", 53.0, "estimated"),
                row("anonymous", "in order", 33.0), row("anonymous", "shuffled", 34.0)]},
        },
    }  # fmt: skip


def test_arms_are_compared_on_the_same_images_and_seeds():
    labels = np.zeros(100, np.uint8)
    wrong = np.arange(100) < 20

    def arm(name, *errors):
        keys = [f"{one}|{task1_report.TOLD}" for one in task1_arms.TEST_SETS]
        return {seed: Run(name, seed, "{}", {}, [], labels, {k: e.astype(np.uint8) for k in keys})
                for seed, e in enumerate(errors)}  # fmt: skip

    found = task1_report.versus(arm("a", ~wrong & False, wrong), arm("b", wrong))
    assert list(found) == ["RGB", "pairs", "singles", "all sets"]
    for group in found.values():
        assert group["mean"] == pytest.approx(20), "of the seed that both have"
        assert group["low"] < 20 < group["high"]
    assert task1_report.versus({}, arm("b", wrong)) is None
    expert = Run("e", 0, "{}", {}, [], labels, {"R|mask|in order|running": labels})
    assert task1_report.versus(arm("a", wrong), {0: expert}) is None
    row = {"reference_minus_it": found}
    made = report.versus_table({"arms": {"zero_fill-hcs": row, "expert-R": {}}})
    assert "| zero_fill-hcs | +20.0 (+12.1 to +27.9) |" in made
    assert "expert" not in made


def test_task1_stands_beside_the_report_with_its_own_figures(task1, tmp_path):
    made = {name: make(task1) for name, make in report.TASK1_TABLES.items()}
    assert "| dwg-none | 0, 1 | named, in order | 52.0 ± 1.5 |" in made["task1"]
    assert "+2.0 (+1.0 to +3.0); seeds +1.5, +2.5 |" in made["task1"]
    assert "53.0" not in made["task1"], "running statistics alone"
    assert "33.0" not in made["task1"], "anonymous planes come shuffled"
    assert "53.0 ± 1.5" in made["batchnorm"]
    assert "expert" not in made["batchnorm"].split("\n", 1)[1]
    beside = made["task1-beside-report"]
    assert "| accuracy (%) | 52.0 ± 1.5 | 65.78 | 76.00 |" in beside
    assert "| precision (%) | 51.2 | 69.79 | 76.61 |" in beside
    assert "report: DWG DenseNet-121" in beside
    parameters = float(re.search(r"parameters \(M\) \| ([\d.]+)", beside)[1])
    assert 0.1 < parameters < 2
    assert report.draw_task1(task1, tmp_path / "curves.png").is_file()
