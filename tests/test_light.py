"""`pip install timm-varchan` alone: the twins work, and what is missing is named in one line."""

import json
import os
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
#: Run where nothing but the declared dependencies is to be found: README's ten lines, a model that
#: is folded, saved and loaded, and what commands say. One process, since every one imports timm.
TOUR = """
import contextlib, io, json, runpy, sys, time
import timm, timm.models
start = time.process_time()
import timm_varchan
found = {"seconds": time.process_time() - start}
from timm_varchan import RGB, fold, hub
from timm_varchan.__main__ import main

def said(name, call, *args, **kwargs):
    code, shown = 0, (io.StringIO(), io.StringIO())
    with contextlib.redirect_stdout(shown[0]), contextlib.redirect_stderr(shown[1]):
        try:
            code = call(*args, **kwargs)
        except SystemExit as stop:
            code = stop.code
            if isinstance(code, str):
                print(code, file=sys.stderr)
                code = 1
    found[name] = [code, *(text.getvalue() for text in shown)]

said("README", exec, open("ten_lines.py").read(), {})
model = timm.create_model("dwg_test_resnet", num_classes=2).eval()
timm_varchan.adapt(timm.create_model("resnet10t"))
assert fold(model, "GB").in_chans == 2
hub.save(model, "model", class_names=["a", "b"], channels=RGB, img_size=32)
assert hub.load("model").spec.class_names == ("a", "b")
said("help", main, ["--help"])
for command in ("predict", "look", "export"):
    said(command, main, [command, "dwg_test_resnet", "x.onnx", "--no-pretrained"])
sys.argv = ["hf_train.py", "--help"]
said("hf_train.py", runpy.run_path, ROOT + "/hf_train.py", run_name="__main__")
json.dump(found, open("found.json", "w"))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What a process with the declared dependencies alone met: code, output and errors by name."""
    folder = tmp_path_factory.mktemp("light")
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    assert "import timm_varchan" in code
    (folder / "ten_lines.py").write_text(code)
    (folder / "tour.py").write_text(f"ROOT = {str(ROOT)!r}\n{TOUR}")
    command = [sys.executable, str(ROOT / "tests" / "only_light.py"), "tour.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=250, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())


def test_what_is_declared_is_little():
    assert {"timm", "torch", "numpy", "safetensors"} <= set(declared())
    names = closure(declared())
    assert not names & {"scikit-learn", *HEAVY}
    assert hidden() >= HEAVY  # they are installed here, so the tests below show something


def test_readme_and_help_need_nothing_else(found):
    assert found["README"][0] is None, found["README"]
    assert found["help"][0] == 0
    assert "predict" in found["help"][1]


@pytest.mark.parametrize(
    ("command", "extra"),
    [("hf_train.py", "train"), ("predict", "train"), ("look", "train"), ("export", "export")],
)
def test_a_missing_extra_is_one_line(found, command, extra):
    code, _, errors = found[command]
    assert code == 1
    (line,) = errors.splitlines()
    assert line.endswith(f'pip install "timm-varchan[{extra}]"')


def test_importing_costs_little_more_than_timm(found):
    code = (
        "import time, timm, timm.models; t = time.process_time(); import timm_varchan; "
        "print(time.process_time() - t)"
    )
    seconds = found["seconds"]
    for _ in range(2):  # a busy machine has bad moments
        if seconds > MAX_SECONDS:
            seconds = float(subprocess.check_output([sys.executable, "-c", code]))
    assert seconds <= MAX_SECONDS
