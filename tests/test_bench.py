"""The benchmark: arms trained by the package's own code, tidy results, documents made of them."""

import io
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from tiny_runs import fresh_accelerate  # noqa: F401
from torch import nn

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import arms  # noqa: E402
import cost  # noqa: E402
import report  # noqa: E402
import run as bench  # noqa: E402
import tables  # noqa: E402
import tidy  # noqa: E402
from complexity import count_complexity  # noqa: E402

import timm_varchan  # noqa: E402
from timm_varchan import ChannelSet, hub  # noqa: E402
from timm_varchan.evaluation import wilson_interval  # noqa: E402
from timm_varchan.models import stems  # noqa: E402
from timm_varchan.training import TrainConfig  # noqa: E402

TINY = {
    "model": "test_resnet", "img_size": 16, "epochs": 2, "batch_size": 8, "workers": 0,
    "warmup_epochs": 0, "mixed_precision": "no", "val_max_sets": 0, "sets": "RGB",
    "channel_aug": "none",
}  # fmt: skip
TWIN = {**TINY, "model": "dwg_test_resnet", "channel_aug": "hcs-sample"}
ARMS = {
    "expert-RGB": arms.Arm(TINY, ("trained", "zero", "measured")),
    "expert-G": arms.Arm({**TINY, "use": "G", "sets": "G"}, only_all=True),
    "twin": arms.Arm(TWIN, ("trained", "anonymous"), against=("expert-{set}", "expert-RGB|zero")),
    "stem-only": arms.Arm(
        {**TWIN, "model": "local-dir:{run:expert-RGB}", "adapt": True, "train_only": "stem"}
    ),
    "imagenet": arms.Arm({"img_size": 16}, ("zero", "zero, estimated"), untrained=True),
    "zero": arms.Arm(arms.behind(TINY, "prior", "zero"), against=("twin",)),
}
QUESTIONS = {"RGB": [(0, 1, 2)], "G": [(1,)], "pairs": [(0, 1), (0, 2), (1, 2)]}
CLASSES = ["n01443537_goldfish", "n01768244_trilobite", "n01855672_goose"]
FIGURES = ("accuracy", "low", "high", "difference", "epochs", "train_images")
TINY_BENCHMARK = arms.Benchmark("made-up", "RGB", QUESTIONS, ARMS, seeds=(0,))


@pytest.fixture
def data(tmp_path):
    """Three classes by colour, 16 px."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as Images

    rng = np.random.default_rng(0)
    features = Features({"image": Images(), "label": ClassLabel(names=CLASSES)})
    for name, count in (("train", 24), ("validation", 12)):
        labels = [i % 3 for i in range(count)]
        images = []
        for label in labels:
            pixels = rng.integers(0, 100, (16, 16, 3), np.uint8)
            pixels[..., label] += 100
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            images.append({"bytes": buffer.getvalue(), "path": None})
        table = Dataset.from_dict({"image": images, "label": labels}, features=features)
        (tmp_path / "data").mkdir(exist_ok=True)
        table.to_parquet(str(tmp_path / "data" / f"{name}.parquet"))
    return tmp_path / "data"


@pytest.fixture
def start(data, tmp_path, monkeypatch):
    monkeypatch.setitem(bench.BENCHMARKS, "tiny", TINY_BENCHMARK)
    monkeypatch.setattr(bench, "pretrained", lambda: timm.create_model("test_efficientnet"))

    def run(*words):
        csv = tmp_path / "tiny.csv"
        bench.main(["tiny", f"--data={data}", f"--output={tmp_path}", f"--csv={csv}", *words])
        return pd.read_csv(csv, keep_default_na=False)

    return run


@pytest.mark.usefixtures("fresh_accelerate")
def test_arms_are_trained_tested_and_compared_and_nothing_is_done_twice(start, tmp_path, capsys):
    with pytest.raises(SystemExit, match="no arm other: expert-RGB"):
        start("--arms", "other")
    assert not len(start("--no-train", "--arms", "twin"))
    table = start()
    folder = tmp_path / "tiny"
    assert {f.name for f in folder.glob("*.npz")} == {f"fold-0-0-{name}.npz" for name in ARMS}
    assert not list(folder.glob("*/checkpoints"))

    found = dict(np.load(folder / "fold-0-0-twin.npz"))
    (row,) = table.query(
        "arm == 'twin' and way == 'trained' and question == 'G' and reference == 'expert-{set}'"
    ).to_dict("records")
    right = found["trained|1"] == found["labels"]
    row = {name: float(row[name] or "nan") for name in FIGURES} | {"version": row["version"]}
    assert row["accuracy"] == pytest.approx(right.mean(), abs=1e-4)
    assert (row["low"], row["high"]) == pytest.approx(wilson_interval(right.sum(), 12), abs=1e-4)
    expert = dict(np.load(folder / "fold-0-0-expert-G.npz"))
    assert set(expert) == {"trained|1", "labels"}
    gap = right.mean() - (expert["trained|1"] == expert["labels"]).mean()
    assert row["difference"] == pytest.approx(gap, abs=1e-4)
    assert (row["epochs"], row["train_images"], row["version"] != "") == (2, 24, True)
    pairs = table.query("arm == 'twin' and question == 'pairs' and way == 'trained'")
    assert list(pairs.reference_accuracy.astype(bool)) == [False, True]  # no experts for pairs

    (folder / "fold-0-0-twin.npz").unlink()
    before = (folder / "fold-0-0-twin" / "results.json").stat().st_mtime_ns
    again = start()
    pd.testing.assert_frame_equal(again, table)
    assert (folder / "fold-0-0-twin" / "results.json").stat().st_mtime_ns == before

    (folder / "fold-0-0-twin.npz").unlink()
    with pytest.raises(SystemExit, match=r"holds another run \(lr 0.002, not 0.1\)"):
        start("--set", "lr=0.1", "--arms", "twin")


def test_every_arm_is_a_configuration(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "lite0_file", lambda folder: folder / "lite0.safetensors")
    monkeypatch.setattr(bench, "correlation_of", lambda arm, dataset: {})
    for name, benchmark in arms.BENCHMARKS.items():
        for arm_name, arm in benchmark.arms.items():
            config = bench.configuration(arm, tmp_path, tmp_path, f"fold-0-0-{arm_name}", {})
            assert isinstance(config, TrainConfig), name
            assert "{lite0}" not in str(config)
            assert "{run:" not in str(config)
            for reference in arm.against:
                of = reference.partition("|")[0]
                wanted = [of.replace("{set}", str(benchmark.channel_set().take(s)))
                          for s in benchmark.questions.get("every set", [()])]  # fmt: skip
                assert set(wanted) <= set(benchmark.arms), (name, arm_name, reference)


@pytest.mark.parametrize("arm", ["dofa", "channel-vit"])
def test_peers_learn_are_counted_and_saved_and_do_not_look_at_absent_planes(arm, tmp_path):
    config, bands = arms.PEERS[arm], ChannelSet.parse(arms.BANDS)
    model = timm.create_model(config["model"], num_classes=3, **config["model_kwargs"])
    assert 0 < count_complexity(model, bands, img_size=64).stem_macs
    x, some = torch.randn(2, len(bands), 64, 64), bands.index("B08+B03")
    timm_varchan.set_channels(model, bands)
    nn.functional.cross_entropy(model(x), torch.tensor([0, 1])).backward()
    learned = [p for p in stems(model)[0].parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.any() for p in learned)
    model.eval()
    with torch.no_grad():
        present = torch.zeros(2, len(bands), dtype=torch.bool)
        present[:, some] = True
        timm_varchan.set_channels(model, bands, present=present)
        masked = model(x.masked_fill(~present[..., None, None], 9.0))
        timm_varchan.set_channels(model, "B08+B03")
        torch.testing.assert_close(masked, model(x[:, some]))
        timm_varchan.set_channels(model, bands)
        assert not torch.allclose(model(x), masked, atol=1e-3)
        names, channels = ["a", "b", "c"], bands.with_stats((0.0,) * 13, (1.0,) * 13)
        hub.save(model, tmp_path / "m", class_names=names, channels=channels, img_size=64)
        loaded = hub.load(tmp_path / "m").model.eval()
        timm_varchan.set_channels(loaded, bands)
        torch.testing.assert_close(loaded(x), model(x))


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    benchmark = arms.BENCHMARKS["eurosat"]
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 40)
    for arm, way, luck in (("tiled", "zero", 0.2), ("tiled-zero", "trained", 0.5),
                           ("twin-prior", "trained", 0.7)):  # fmt: skip
        for seed in range({"tiled": 1, "tiled-zero": 2, "twin-prior": 3}[arm]):
            found = {"labels": labels}
            for indices in {s for sets in benchmark.questions.values() for s in sets}:
                right = rng.random(40) < luck
                found[tidy.set_key(way, indices)] = np.where(right, labels, (labels + 1) % 10)
            (tmp_path / "runs").mkdir(exist_ok=True)
            np.savez(tmp_path / "runs" / f"fold-{seed}-0-{arm}.npz", **found)
    table = tidy.tidy(benchmark, "eurosat", tmp_path / "runs")
    tidy.write_csv(table, tmp_path / "eurosat-made-up.csv")
    return table


def test_seeds_are_means_over_the_same_images_with_their_spread(made_up):
    rows = made_up.query(
        "arm == 'twin-prior' and question == 'random' and reference == 'tiled-zero'"
    )
    by_seed = {row["seed"]: row for row in rows.to_dict("records")}
    assert list(by_seed) == ["0", "1", "2", "0+1"], "over the seeds that both have"
    each, together = [by_seed[seed] for seed in "01"], by_seed["0+1"]
    assert together["difference"] == pytest.approx(np.mean([r["difference"] for r in each]))
    spread = np.std([r["difference"] for r in each], ddof=1)
    assert together["sd_difference"] == pytest.approx(spread)
    narrow, wide = ([r["difference_high"] - r["difference_low"] for r in of]
                    for of in ([together], each))  # fmt: skip
    assert narrow[0] < min(wide)
    assert together["images"] == 40


def test_tables_and_picture_are_made_of_the_rows_of_all_seeds(made_up, tmp_path):
    lines = tables.made("thirteen").splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:5]] == [
        ["| plain timm, trained on all bands; absent ones are zero", "1"],
        ["| plain timm, trained with zeros", "2"],
        ["| twin (ours)", "3"],
    ]
    assert " ± " in lines[4]
    assert "Test images: 40" in tables.made("thirteen")
    minus = tables.made("thirteen-minus").splitlines()
    assert len(minus) == 5, "neither with itself nor twice"
    waits = tables.made("stains")
    assert waits == "Not measured yet: `python bench/run.py stains --data DATA`.\n"
    document = (
        "a\n<!-- table: readme -->\nstale\n<!-- /table -->\n<!-- table: x -->\nb\n<!-- /table -->"
    )
    filled = report.fill(document)
    assert "stale" not in filled
    assert filled.endswith("<!-- table: x -->\nb\n<!-- /table -->")
    assert report.fill(filled) == filled
    with Image.open(report.draw_channels_left(tmp_path / "left.png")) as picture:
        assert picture.size[0] > 800
    (tmp_path / "eurosat-made-up.csv").unlink()
    assert report.draw_channels_left(tmp_path / "left.png") is None


@pytest.mark.parametrize("path", report.DOCUMENTS, ids=lambda path: path.name)
def test_documents_hold_what_the_results_say(path):
    text = path.read_text()
    assert report.fill(text) == text, "run python bench/report.py"
    unknown = [m[2] for m in report.BLOCK.finditer(text) if m[2] not in tables.TABLES]
    assert not unknown


def test_cards_hold_what_the_results_say():
    for name, make in report.CARDS.items():
        text = (BENCH.parent / "model_cards" / f"{name}.md").read_text()
        assert make().render() == text, "run python bench/report.py"


@pytest.mark.usefixtures("fresh_accelerate")
def test_costs_are_measured_in_turns(tmp_path):
    def measure(*words):
        cost.main([*words, f"--output={tmp_path / 'cost.csv'}"])
        return pd.read_csv(tmp_path / "cost.csv")

    read = measure("loading", "--num-images", "6", "--rounds", "3")
    assert list(read.format) == [
        ".npy files", "TIFF files", "TIFF files, deflate", "Parquet, bytes of .npy"
    ]  # fmt: skip
    assert (read.of_plain_low <= read.of_plain).all()
    assert ((read.ours / read.plain / read.of_plain).between(0.2, 5)).all()
    words = ("--arch=test_resnet", "--img-size=16", "--batch-size=8", "--num-images=40")
    times = measure("latency", *words, "--batches=2", "--rounds=5")
    assert list(times.channels) == [1, 3, 8, 13]
    assert (times.to_timm_low <= times.to_timm).all()
    loops = measure("throughput", *words, "--epochs=2", "--rounds=2", "--workers=0")
    assert len(loops) == 4
    assert (loops.of_plain[0], loops.of_plain_low[0], loops.of_plain_high[0]) == (1, 1, 1)


def test_memory_that_runs_out_gives_an_empty_row(monkeypatch, tmp_path):
    def fail(row, args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(cost, "timed", fail)
    cost.main(["latency", f"--output={tmp_path / 'cost.csv'}"])
    reasons = set(pd.read_csv(tmp_path / "cost.csv").reason)
    assert reasons == {"OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"}


def test_the_interval_of_a_median_covers_it_and_ratios_are_taken_round_by_round():
    rng = np.random.default_rng(0)
    covered = [
        s["low"] <= 0 <= s["high"]
        for s in (cost.spread(rng.standard_normal(20).tolist()) for _ in range(500))
    ]
    assert 0.94 <= np.mean(covered) <= 0.985  # exactly 0.959 for 20 values
    ratio = cost.ratios({"own": [2.0, 40.0, 3.0], "timm": [1.0, 20.0, 2.0]})["timm"]
    assert ratio["median"] == 2.0, "one slow round slows both"
