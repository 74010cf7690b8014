"""Task II's script: learning rates, comparison, fronts, cards, and a run on made-up data."""

import io
import json
import re
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import assert_same
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import cards  # noqa: E402
import task2  # noqa: E402
import task2_report  # noqa: E402
from finished_runs import Run, read_runs, write_run  # noqa: E402
from fronts import FRONTS  # noqa: E402
from small_images import Images  # noqa: E402


def test_search_goes_on_while_an_end_is_best():
    accuracy = dict(zip(task2.LEARNING_RATES, (3, 4, 5, 6, 1), strict=True))
    tried = {}
    while (lr := task2.next_rate(tried)) is not None:
        tried[lr] = accuracy[lr]
    assert [task2.LEARNING_RATES.index(lr) for lr in tried] == [2, 1, 3, 4]
    assert task2.next_rate(dict(zip(task2.LEARNING_RATES[:3], (3, 2, 1), strict=True))) is None


def finished(correct, arm="a"):
    labels = np.zeros(len(correct), np.uint8)
    return [Run(arm, 0, "{}", {}, [], labels, {"RGB": (~np.array(correct)).astype(np.uint8)})]


def test_comparison_with_a_reference():
    own, reference = np.arange(200) < 120, np.arange(200) % 2 == 0
    result = task2_report.compare(finished(own), finished(reference))
    assert result["difference"]["value"] == pytest.approx(10)
    ratio = result["ratio"]
    assert ratio["value"] == pytest.approx(120)
    assert ratio["low"] < 120 < ratio["high"]
    assert result["difference"]["p"] > 0.01
    same = task2_report.compare(finished(own), finished(own))["ratio"]
    assert same["low"] == same["high"] == 100


def test_several_seeds_are_compared_as_the_mean_of_each_image():
    own = [*finished(np.arange(200) < 120), *finished(np.arange(200) >= 100)]
    reference = [*finished(np.arange(200) % 2 == 0), *finished(np.arange(200) % 4 == 0)]
    result = task2_report.compare(own, reference)
    difference, ratio = result["difference"], result["ratio"]
    assert difference["value"] == pytest.approx(55 - 37.5)
    assert difference["low"] < 17.5 < difference["high"]
    assert ratio["value"] == pytest.approx(55 / 0.375)
    assert ratio["low"] < ratio["value"] < ratio["high"]
    # an image that one seed has right counts a half: less spread than two independent sets have
    alone = task2_report.compare(finished(own[0].correct("RGB")), reference[:1])["difference"]
    assert difference["high"] - difference["low"] < alone["high"] - alone["low"]


def test_the_table_has_a_row_for_each_seed_and_one_for_their_mean():
    values = {"value": 50.0, "low": 48.0, "high": 52.0}
    metrics = {"RGB": dict.fromkeys(task2_report.METRICS, values)}
    compared = {
        "difference": {**values, "value": 3.0, "p": 0.012},
        "ratio": {**values, "value": 106.0},
    }
    cost = {"params": 300_000, "macs": 2_000_000, "forward_backward_mb": 1.5}
    arm = {"complexity": {"32": cost}, "latency": {"1": {"ratio": {"median": 0.5}}},
           "seeds": {seed: {"lr": 0.01, "sets": metrics} for seed in ("0", "1")},
           "mean": {"RGB": values, "compared": compared}}  # fmt: skip
    summary = {"settings": {"img_size": 32}, "reference": "bar", "arms": {"net": arm}}
    _, _, *rows = task2_report.markdown(summary).splitlines()
    assert [row.split(" | ")[5] for row in rows] == ["0", "1", "mean of 2"]
    assert "50.0 (48.0 to 52.0) |  |  |  | 3.0 (48.0 to 52.0), p = 0.012" in rows[2]
    assert len({row.count("|") for row in rows}) == 1


def test_runs_are_read_back_and_must_have_the_same_settings(tmp_path):
    labels = np.array([0, 1, 1], np.uint8)
    one = {"history": [{"epoch": 1}], "labels": labels, "predictions": {"RGB": labels}}
    write_run(tmp_path / "b-seed3.npz", meta={"epochs": 1}, details={"lr": 2.0}, **one)
    run = read_runs(tmp_path, ["a", "b"])["b"][3]
    assert run.correct("RGB").all()
    assert (run.details, run.history) == ({"lr": 2.0}, [{"epoch": 1}])
    write_run(tmp_path / "a-seed0.npz", meta={"epochs": 2}, **one)
    with pytest.raises(SystemExit, match="2 settings"):
        read_runs(tmp_path, ["a", "b"])


def test_images_of_each_class_are_set_aside():
    images = Images(torch.arange(6).view(6, 1, 1, 1), torch.tensor([0, 1, 0, 0, 1, 1]))
    aside, others = images.split(1)
    assert aside.x.flatten().tolist() == [0, 1]
    assert others.x.flatten().tolist() == [2, 3, 4, 5]


@torch.no_grad()
@pytest.mark.parametrize("name", FRONTS)
def test_fronts_know_pixels_by_content_and_position_only(name):
    """Without the positions, permuting the pixels permutes the output; with them it does not."""
    front = FRONTS[name](8).eval()
    x = torch.randn(2, 8, 4, 4)
    order = torch.randperm(16)

    def permuted(x):
        return x.flatten(2)[..., order].view_as(x)

    assert not torch.allclose(front(permuted(x)), permuted(front(x)), atol=1e-4)
    torch.nn.init.zeros_(front.position.weight)
    assert_same(front(permuted(x)), permuted(front(x)))


@torch.no_grad()
def test_graph_convolution_is_its_formula():
    front = FRONTS["graph"](4, num_neighbours=3).eval()
    torch.nn.init.zeros_(front.position.weight)
    torch.nn.init.zeros_(front.position.bias)
    x = torch.randn(1, 4, 3, 3)
    nodes = front.inner(front.norm(x)).flatten(2)[0].T
    rows = []
    for node in nodes:
        similar = torch.cosine_similarity(nodes, node[None]).topk(3).indices
        rows.append(torch.cat([node, (nodes[similar] - node).amax(0)]))
    mixed = front.out(torch.stack(rows).T.view(1, 8, 3, 3))
    expected = x + mixed
    assert_same(front(x), expected + front.feed_forward(expected))


def parquet(path, num_images):
    generator = np.random.default_rng(0)
    rows = []
    for i in range(num_images):
        pixels = generator.integers(0, 128, (16, 16, 3), np.uint8) + np.uint8(100 * (i % 2))
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])}
    columns = {"image": rows, "label": [i % 2 for i in range(num_images)]}
    datasets.Dataset.from_dict(columns, datasets.Features(features)).to_parquet(str(path))


@pytest.mark.slow
def test_run_report_weights_and_cards(tmp_path, monkeypatch, capsys):
    parquet(tmp_path / "train.parquet", 420)
    parquet(tmp_path / "validation.parquet", 8)
    out, results = tmp_path / "out", tmp_path / "results"

    def script(*words):
        monkeypatch.setattr(sys, "argv", ["task2.py", *map(str, words)])
        task2.main()

    script("run", "--data", tmp_path, "--output", out, "--num-classes", 2, "--img-size", 16,
           "--epochs", 1, "--search-epochs", 1, "--arms", "resnet34", "rrdb_rnn_small")  # fmt: skip
    script("report", "--output", out, "--json", results / "task2.json", "--rounds", 2)
    summary = json.loads((results / "task2.json").read_text())
    assert list(summary["arms"]) == ["resnet34", "rrdb_rnn_small"]
    assert "compared" in summary["arms"]["rrdb_rnn_small"]["seeds"]["0"]
    assert (results / "task2.png").stat().st_size > 1000
    assert (results / "task2.md").read_text().count("\n") == 4
    script("weights", "--data", tmp_path, "--output", out, "--arm", "rrdb_rnn_small",
           "--folder", tmp_path / "weights")  # fmt: skip
    note = json.loads((tmp_path / "weights/rrdb_rnn_small.json").read_text())
    assert note["pretrained_cfg"]["label_names"] == ["dark", "light"]
    assert note["num_validation_images"] == 8
    texts = cards.render(results)
    assert set(texts) == {"rrdb_rnn_small", "resnet34"}
    for text in texts.values():
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            exec(compile(block.replace("pretrained=True", "pretrained=False"), "card", "exec"), {})


def test_committed_cards_are_what_the_results_say():
    """`python bench/cards.py --results bench/results --output model_cards` changes nothing."""
    committed = {file.stem: file.read_text() for file in (ROOT / "model_cards").glob("*.md")}
    assert committed == cards.render(ROOT / "bench/results")
