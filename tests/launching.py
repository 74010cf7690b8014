"""`hf_train.py` in real processes, for the tests that need them."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ONE = [sys.executable]
_LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
TWO = [
    *_LAUNCH, "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision",
    "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1",
    "--main_process_port", "0",
]  # fmt: skip
LAUNCHED_ONE = [*_LAUNCH, "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
                "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]  # fmt: skip
TINY_ARGS = ["--channels", "RGB", "--limit", "47", "--img-size", "16", "--workers", "0"]
TINY_ARGS += ["--batch-size", "8", "--eval-batch-size", "10", "--sets", "4"]


def with_file(name):
    """The launcher with a configuration of this project."""
    return [*_LAUNCH, "--config_file", f"configs/{name}", "--num_cpu_threads_per_process", "1"]


def environment(**changes):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE", "RANK", "WORLD"))}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {**env, **offline, "CUDA_VISIBLE_DEVICES": "", **changes}


def evaluate_args(model, folder):
    """The arguments of `evaluate` for what `TINY_ARGS` trained."""
    tiny = [*TINY_ARGS]
    at = tiny.index("--batch-size")
    return [model, *tiny[:at], *tiny[at + 2 :], "--output", str(folder)]


def launched(command, args, script="hf_train.py", **changes):
    """Run a script, or a command of the package where the name is none of a file."""
    program = [script] if script.endswith(".py") else ["-m", "timm_varchan", script]
    return subprocess.run(
        [*command, *program, *args], cwd=ROOT, env=environment(**changes), text=True,
        capture_output=True, timeout=550, start_new_session=True,
    )  # fmt: skip


def results(folder):
    return json.loads((folder / "results.json").read_text())
