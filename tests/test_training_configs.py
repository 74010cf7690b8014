"""The configurations of accelerate, started where this machine can."""

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from launching import ROOT, TINY_ARGS, launched, results, with_file

from timm_varchan.training import launch

#: What each file must become.
KINDS = {
    "cpu": "NO", "cpu2": "MULTI_CPU", "one_gpu": "NO", "multi_gpu": "MULTI_GPU",
    "several_nodes": "MULTI_GPU", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "fsdp": "FSDP",
}  # fmt: skip


def test_every_file_is_known_to_accelerate_and_listed():
    files = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert files == set(KINDS)
    text = (ROOT / "configs" / "README.md").read_text()
    for name in files:
        assert f"`{name}.yaml`" in text
        config = load_config_from_file(str(ROOT / "configs" / f"{name}.yaml"))
        given = yaml.safe_load(Path(ROOT / "configs" / f"{name}.yaml").read_text())
        assert config.num_processes == given["num_processes"]


def start(name, folder, *more, **variables):
    processes = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())["num_processes"]
    args = [*TINY_ARGS, "--batch-size", "4", "--epochs", "2", "--expect-processes", str(processes)]
    args += ["--clip-grad", "0.01", "--grad-accum-steps", "2", "--output-dir", str(folder), *more]
    done = launched(with_file(f"{name}.yaml"), args, **variables)
    assert done.returncode == 0, done.stderr
    found = results(folder)
    assert found["machine"]["distributed_type"] == KINDS[name]
    assert found["machine"]["num_processes"] == processes
    return found


def losses(found):
    return [entry["train_loss"] for entry in found["training"]["history"]]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_zero_2_and_3_do_what_plain_processes_do(tmp_path):
    # Clipping by far: DeepSpeed left to itself would clip at 1. Accumulation: the same updates.
    plain = start("cpu2", tmp_path / "plain", ACCELERATE_USE_CPU="true")
    for name in ("zero2", "zero3"):
        more = ("--eval-checkpoint", "best")
        found = start(name, tmp_path / name, *more)
        assert losses(found) == pytest.approx(losses(plain), rel=1e-4)
        assert (tmp_path / name / "model" / "model.safetensors").is_file()
        again = [*TINY_ARGS, "--eval-only", str(tmp_path / name / "model")]
        again += ["--output-dir", str(tmp_path / f"{name}-again")]
        assert launched([*with_file("cpu.yaml")], again).returncode == 0
        saved = results(tmp_path / f"{name}-again")
        assert saved["evaluation"]["sets"] == found["evaluation"]["sets"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_several_nodes_train_together(tmp_path):
    """Two launchers, one process each, that meet at an address: as two machines do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    args = [*TINY_ARGS, "--batch-size", "4", "--epochs", "2", "--expect-processes", "2"]
    args += ["--clip-grad", "0.01", "--grad-accum-steps", "2"]

    def node(rank):
        here = ["--machine_rank", str(rank), "--num_processes", "2", "--mixed_precision", "no"]
        here += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
        command = [*with_file("several_nodes.yaml"), *here]
        own = [*args, "--output-dir", str(tmp_path / "nodes")]
        return launched(command, own, ACCELERATE_USE_CPU="true")

    with ThreadPoolExecutor(2) as threads:
        for done in threads.map(node, range(2)):
            assert done.returncode == 0, done.stderr
    found = results(tmp_path / "nodes")
    assert found["machine"]["num_processes"] == 2
    assert found["machine"]["distributed_type"] == "MULTI_CPU"
    assert losses(found) == losses(start("cpu2", tmp_path / "one", ACCELERATE_USE_CPU="true"))


@pytest.mark.parametrize("asked", ["DEEPSPEED", "FSDP"])
def test_what_the_launcher_left_out_is_refused(monkeypatch, asked):
    assert launch._not_as_asked(DistributedType.MULTI_CPU) is None
    monkeypatch.setenv(f"ACCELERATE_USE_{asked}", "true")
    assert launch._not_as_asked(DistributedType[asked]) is None
    refusal = launch._not_as_asked(DistributedType.MULTI_CPU)
    assert refusal.startswith(f"{asked} was asked for, but the launcher set up MULTI_CPU. ")
