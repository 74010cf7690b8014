"""The benchmarks of reading and of training loops, on very little."""

import json
import sys
from pathlib import Path

import pytest
from tiny_runs import fresh_accelerate  # noqa: F401

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import loading
import throughput


def start(module, monkeypatch, file, *words):
    monkeypatch.setattr(sys, "argv", [module.__name__, *words, "--output", str(file)])
    module.main()
    assert file.with_suffix(".md").read_text().count("|") > 10
    return json.loads(file.read_text())


def test_every_format_is_read_whole_and_timed(tmp_path, monkeypatch):
    words = ("--num-images", "6", "--rounds", "3")
    monkeypatch.setattr(loading.torch, "set_num_threads", lambda number: None)
    result = start(loading, monkeypatch, tmp_path / "loading.json", *words)
    assert [row["format"] for row in result["rows"]] == [
        ".npy files", "TIFF files", "TIFF files, deflate", "Parquet, bytes of .npy"
    ]  # fmt: skip
    for row in result["rows"]:
        speeds = row["images_per_second"]
        assert set(speeds) == {"ours", "plain", "augmented", "torchvision"}
        for ratio, (one, other) in (
            (row["of_plain"], ("ours", "plain")),
            (row["of_torchvision"], ("augmented", "torchvision")),
        ):
            assert ratio["low"] <= ratio["median"] <= ratio["high"]
            rough = speeds[one]["median"] / speeds[other]["median"]
            assert 0.2 < ratio["median"] / rough < 5


@pytest.mark.usefixtures("fresh_accelerate")
def test_loops_are_timed_in_turns(tmp_path, monkeypatch):
    words = ("--arch", "test_resnet", "--img-size", "16", "--batch-size", "8", "--limit", "40")
    words += ("--epochs", "2", "--rounds", "2", "--workers", "0")
    result = start(throughput, monkeypatch, tmp_path / "throughput.json", *words)
    plain, *others = result["loops"].values()
    assert len(others) == 3
    assert plain["of_plain"]["low"] == plain["of_plain"]["high"] == 1
    for loop in others:
        assert len(loop["epochs"]) == 2  # an epoch of each turn warms up
        ratios = [a / b for a, b in zip(loop["epochs"], plain["epochs"], strict=True)]
        assert min(ratios) <= loop["of_plain"]["median"] <= max(ratios)
