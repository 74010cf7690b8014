"""The latency benchmark: as many interleaved steps as asked for, refusals, empty rows."""

import argparse
import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import cost  # noqa: E402
import test_latency as latency  # noqa: E402
from cost import EMPTY_ROWS  # noqa: E402

OPTIONS = {"--model": "dwg_test_resnet", "--counts": "1,3", "--batches": "2", "--img-size": "32",
           "--rounds": "5", "--warmup": "2"}  # fmt: skip


def conftest():
    spec = importlib.util.spec_from_file_location("bench_conftest", BENCH / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def configured(**changes):
    """What the benchmark's conftest makes of its options."""
    module, parser = conftest(), argparse.ArgumentParser()
    group = SimpleNamespace(addoption=parser.add_argument)
    module.pytest_addoption(SimpleNamespace(getgroup=lambda *_: group))
    words = [f"{name}={value}" for name, value in {**OPTIONS, **changes}.items()]
    config = SimpleNamespace(option=parser.parse_args(words), stash={})
    module.pytest_configure(config)
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--model": "dwg_no_such_net"}, "such as dwg_densenet121"),
        ({"--model": "resnet18"}, "is no twin"),
        ({"--counts": "1,two"}, "whole numbers"),
        ({"--batches": "0"}, "whole numbers above 0"),
        ({"--device": "tpu"}, "choose cpu or cuda"),
        ({"--rounds": "0"}, "must be above 0"),
        ({"--rounds": "1,2"}, "one whole number"),
        ({"--warmup": "-1"}, "not below 0"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(changes, message, capsys):
    with pytest.raises(SystemExit):
        configured(**changes)
    assert message in capsys.readouterr().err


def test_no_cuda_is_said_at_once(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        configured(**{"--device": "cuda"})
    assert "there is no CUDA device here" in capsys.readouterr().err


def test_times_of_another_machine_are_not_compared():
    here = {"node": "me", "machine": "x86_64", "cpu": {"brand_raw": "A", "hz_actual": 1}}
    conftest().pytest_benchmark_update_machine_info(None, here)
    assert "node" not in here
    assert here["cpu"] == {"brand_raw": "A"}, "without what changes from run to run"
    newer = {"machine_info": {**here, "torch": "9.9"}}
    conftest().pytest_benchmark_compare_machine_info(here, newer)
    for change in ({"threads": 99}, {"cpu": {"brand_raw": "B"}}, {"accelerator": "other"}):
        other = {"machine_info": {**here, **change}}
        with pytest.raises(pytest.UsageError, match="of another machine"):
            conftest().pytest_benchmark_compare_machine_info(here, other)


@pytest.mark.parametrize(("rounds", "warmup"), [(1, 0), (5, 2)])
def test_every_model_is_timed_as_often_as_asked_and_in_turn(benchmark, monkeypatch, rounds, warmup):
    monkeypatch.setattr(benchmark, "disabled", False)  # pytest -n switches benchmarks off
    calls = []

    class Recorder(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            calls.append(self.name)
            return x

    models = {name: Recorder(name) for name in ("own", "timm", "folded")}
    steps = latency.race(benchmark, models, torch.zeros(1), rounds=rounds, warmup=warmup)
    assert calls == ["timm", "folded", "own"] * (rounds + warmup)
    assert {name: len(seconds) for name, seconds in steps.items()} == dict.fromkeys(models, rounds)
    assert benchmark.stats.stats.rounds == rounds
    assert all(second > 0 for seconds in steps.values() for second in seconds)


def test_ratios_are_taken_round_by_round():
    steps = {"own": [2.0, 40.0, 3.0], "timm": [1.0, 20.0, 2.0]}
    ratio = cost.ratios(steps)["timm"]
    assert ratio["median"] == 2.0, "one slow round slows both"
    assert (ratio["low"], ratio["high"]) == (1.5, 2.0)


def test_the_interval_of_a_median_covers_it():
    rng = np.random.default_rng(0)
    covered = [
        s["low"] <= 0 <= s["high"]
        for s in (cost.spread(rng.standard_normal(20).tolist()) for _ in range(500))
    ]
    assert 0.94 <= np.mean(covered) <= 0.985  # exactly 0.959 for 20 values


def test_peak_memory_is_that_of_the_largest_moment():
    class TwoAtOnce(nn.Module):
        def forward(self, x):
            y = x + 1  # 1 MiB
            z = torch.cat([y, y])  # and 2 MiB
            del y
            return z.sum()

    assert cost.peak_mib(TwoAtOnce(), torch.zeros(2**18)) == pytest.approx(3, abs=0.01)


def test_memory_that_runs_out_gives_an_empty_row(monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    config = configured()
    monkeypatch.setattr(latency, "race", fail)
    with pytest.raises(pytest.skip.Exception, match="no smaller batch"):
        latency.test_latency(SimpleNamespace(), 3, 2, config)
    (row,) = config.stash[EMPTY_ROWS]
    assert row["batch_size"] == 2
    assert row["reason"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert not cost.is_out_of_memory(RuntimeError("shapes do not fit"))
    assert cost.is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))


@pytest.mark.slow
def test_the_command_writes_ratios_to_baselines(tmp_path):
    target = tmp_path / "latency.json"
    command = [sys.executable, "-m", "pytest", "bench", "-q", f"--benchmark-json={target}"]
    for name in ("--model", "--counts", "--batches", "--img-size", "--rounds", "--warmup"):
        command.append(f"{name}={OPTIONS[name]}")
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}  # no -n
    done = subprocess.run(command, cwd=BENCH.parent, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(target.read_text())
    assert "node" not in result["machine_info"]
    assert result["machine_info"]["torch"] == torch.__version__
    assert result["empty_rows"] == []
    cost.main(["latency", f"--json={target}", f"--output={tmp_path / 'latency.csv'}"])
    with (tmp_path / "latency.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["channels"], row["batch"]) for row in rows] == [("1", "2"), ("3", "2")]
    for row, timed in zip(rows, result["benchmarks"], strict=True):
        assert timed["stats"]["rounds"] == int(row["rounds"]) == 5
        for baseline in ("to_timm", "to_folded"):
            low, middle, high = (float(row[baseline + end]) for end in ("_low", "", "_high"))
            assert low <= middle <= high
        assert float(row["twin_mib"]) > 0
