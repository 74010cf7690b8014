"""`python -m timm_varchan run`: other people's programs meet the twins."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
import timm
if __name__ == "__main__":
    import beside
    print(sys.argv, __file__, timm.create_model(sys.argv[1], num_classes=2).in_chans)
    sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "train.py").write_text(PROGRAM)
    (tmp_path / "theirs" / "beside.py").write_text("")
    return tmp_path


def run(cwd, *words):
    command = [sys.executable, "-m", "timm_varchan", "run", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize("words", [["theirs/train.py"], ["-m", "train"]], ids=["script", "module"])
def test_a_program_runs_as_itself(folder, words):
    cwd = folder if words[0] != "-m" else folder / "theirs"
    done = run(cwd, *words, "dwg_test_resnet", "7", "--flag")
    assert done.returncode == 7, done.stderr
    assert "'dwg_test_resnet', '7', '--flag'] " in done.stdout
    assert done.stdout.rstrip().endswith("train.py 3")


def test_its_errors_are_its_own(folder):
    (folder / "broken.py").write_text("raise ValueError('theirs')")
    done = run(folder, "broken.py")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1] == "ValueError: theirs"


def test_what_is_not_there_is_told_in_one_line(folder, capsys):
    from timm_varchan.__main__ import main

    for words, text in (
        (["no.py"], "There is no script no.py"),
        (["-m", "no.such"], "There is no module no.such"),
        ([], "Name a program"),
        (["-m"], "Name a program"),
    ):
        assert main(["run", *words]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert text in line
