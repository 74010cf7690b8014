"""`timm-varchan COMMAND`: train, evaluate, use, export and publish models for any channels.

Exit codes: 0 done, 1 an error (one line on stderr), 2 wrong arguments, 3 some image files could
not be read, 130 or 143 training was interrupted and has saved a checkpoint.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from timm_varchan.errors import MissingExtraError, UserError, needs

#: What `timm-varchan --help` says of each command.
COMMANDS = {
    "train": "train a model for any number of channels, then test it on channel sets",
    "evaluate": "accuracy on channel sets: which channels matter, what is lost without",
    "predict": "classify image files, or a large scene into a map",
    "preview": "a picture of what training would read, and what speaks against it",
    "look": "a picture of what the first layer makes of images",
    "measure": "mean, deviation and correlation of the channels of data",
    "channels": "products whose planes have a name, as Sentinel-2",
    "export": "write ONNX or torch.export",
    "fold": "a plain timm model for one channel set",
    "push": "upload a saved model, with its card, to the hub",
    "run": "run another program with the twins registered: run SCRIPT | -m MODULE [ARGS]",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; errors that a user can cure are one line."""
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # a console that has no letters for a class name
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    command, *rest = words or ["--help"]
    if command in ("-h", "--help") or (command == "run" and rest[:1] in (["-h"], ["--help"])):
        print("usage: timm-varchan COMMAND [--help | ARGUMENTS]\n")
        print("\n".join(f"  {name:10}{text}" for name, text in COMMANDS.items()))
        return 0
    if command == "run" and (problem := no_program(rest)) is None:
        return run_program(rest)
    try:
        if command == "run" or command not in COMMANDS:
            cure = f"There is no command {command}. Choose from: {', '.join(COMMANDS)}."
            raise UserError(problem if command == "run" else cure)
        with needs("export" if command == "export" else "train"):
            commands = importlib.import_module("timm_varchan.commands")
        return int(commands.call(command, rest))
    except (UserError, OSError, MissingExtraError) as error:
        if os.environ.get("RANK", "0") == "0":  # one of the processes speaks
            print(f"error: {one_line(error)}", file=sys.stderr)
        return 1


def one_line(error: Exception) -> str:
    """The text of an error, also where a worker met it and torch added its traceback."""
    text = str(error)
    if "Original Traceback" not in text:
        return text
    return text.rstrip().splitlines()[-1].partition("Error: ")[2]


def no_program(words: Sequence[str]) -> str | None:
    """What is wrong with the name of a program to run, or None."""
    is_module = list(words[:1]) == ["-m"]
    name = next(iter(words[is_module:]), "")
    if not name or (name.startswith("-") and not is_module):
        return "Name a program: timm-varchan run SCRIPT | -m MODULE [ARGS]"
    if is_module and not _is_module(name):
        return f"There is no module {name}. Install it, or give the path of a script."
    if not is_module and not os.path.exists(name):
        return f"There is no script {name}. For a module: timm-varchan run -m {name}"
    return None


def run_program(words: Sequence[str]) -> int:
    """Run what `python` would run for these words, as `__main__`; what it raises is its own."""
    is_module = words[0] == "-m"
    name, *arguments = words[is_module:]
    sys.argv = [name, *arguments]
    if is_module:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(name))
        runpy.run_path(name, run_name="__main__")
    return 0


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # a package before a dot
        return False


if __name__ == "__main__":
    sys.exit(main())
