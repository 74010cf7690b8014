"""`python -m timm_varchan run`: other people's programs meet the twins."""

import resource
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


def test_help_of_every_command_is_quick_and_needs_no_torch(capsys):
    from timm_varchan.__main__ import COMMANDS, main

    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    code = "import sys; from timm_varchan.__main__ import main\ntry: main(sys.argv[1:])\n"
    code += "finally: assert not {'torch', 'timm'} & set(sys.modules)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for command in COMMANDS:
        assert command in shown
        done = subprocess.run(
            [sys.executable, "-c", code, command, "--help"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "usage: timm-varchan" in done.stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < 3 * len(COMMANDS)
    assert main(["fly"]) == 1
    assert "There is no command fly" in capsys.readouterr().err
