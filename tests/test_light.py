"""`pip install timm-varchan` alone: the twins work, and what is missing is named in one line."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from only_light import closure, declared, hidden

ROOT = Path(__file__).parents[1]
#: More than this above `import timm` is too much, in seconds of the processor.
MAX_SECONDS = 0.3
HEAVY = {"accelerate", "datasets", "evaluate", "matplotlib", "scipy", "sklearn", "tifffile"}
FOLD_SAVE_LOAD = """
from timm_varchan import RGB, fold, hub
model = timm.create_model("dwg_test_resnet", num_classes=2).eval()
timm_varchan.adapt(timm.create_model("resnet10t"))
assert fold(model, "GB").in_chans == 2
hub.save(model, "model", class_names=["a", "b"], channels=RGB, img_size=32)
assert hub.load("model").class_names == ("a", "b")
"""


def light(*args, cwd=ROOT):
    command = [sys.executable, str(ROOT / "tests" / "only_light.py"), *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=250)


def test_what_is_declared_is_little():
    assert {"timm", "torch", "numpy", "safetensors"} <= set(declared())
    names = closure(declared())
    assert not names & {"scikit-learn", *HEAVY}
    assert hidden() >= HEAVY  # they are installed here, so the tests below show something


def test_readme_runs_with_the_dependencies_alone(tmp_path):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    assert "import timm_varchan" in code
    (tmp_path / "ten_lines.py").write_text(code + FOLD_SAVE_LOAD)
    done = light("ten_lines.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["hf_train.py", "--help"],
        ["-m", "timm_varchan", "predict", "dwg_test_resnet", "x.png", "--no-pretrained"],
        ["-m", "timm_varchan", "look", "dwg_test_resnet", "x.png", "--no-pretrained"],
    ],
    ids=lambda command: command[2] if "-m" in command else command[0],
)
def test_a_missing_extra_is_one_line(command):
    done = light(*command)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.endswith('pip install "timm-varchan[train]"')


def test_a_missing_exporter_is_one_line(tmp_path):
    args = ["dwg_test_resnet", str(tmp_path / "m.onnx"), "--no-pretrained"]
    done = light("-m", "timm_varchan", "export", *args)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert 'pip install "timm-varchan[export]"' in line


def test_help_needs_nothing_else():
    done = light("-m", "timm_varchan", "--help")
    assert done.returncode == 0, done.stderr
    assert "predict" in done.stdout


def test_importing_costs_little_more_than_timm():
    code = (
        "import time, timm, timm.models; t = time.process_time(); import timm_varchan; "
        "print(time.process_time() - t)"
    )
    for _ in range(3):  # a busy machine has bad moments
        seconds = float(subprocess.check_output([sys.executable, "-c", code]))
        if seconds <= MAX_SECONDS:
            break
    assert seconds <= MAX_SECONDS
