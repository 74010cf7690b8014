"""Run other people's programs with the twins registered, without a change to them."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec

__all__ = ["program"]


def program(words: Sequence[str]) -> Callable[[], object]:
    """Find the program that `python` would run for these words.

    Args:
        words: `SCRIPT` or `-m MODULE`, then its arguments.

    Returns:
        Runs it as `__main__`, with its arguments in `sys.argv`; what it raises is its own.

    Raises:
        ValueError: Nothing is named, or a module that is not there.
        FileNotFoundError: There is no such script.
    """
    is_module = list(words[:1]) == ["-m"]
    name, *arguments = list(words[is_module:]) or [""]
    if not name or (name.startswith("-") and not is_module):
        raise ValueError("Name a program: python -m timm_varchan run SCRIPT | -m MODULE [ARGS]")
    if is_module and not _is_module(name):
        raise ValueError(f"There is no module {name}. Install it, or give the path of a script.")
    if not is_module and not os.path.exists(name):
        raise FileNotFoundError(f"There is no script {name}. For a module: run -m {name}")

    def run() -> object:
        sys.argv = [name, *arguments]
        if is_module:
            return runpy.run_module(name, run_name="__main__", alter_sys=True)
        sys.path[0] = os.path.dirname(os.path.abspath(name))
        return runpy.run_path(name, run_name="__main__")

    return run


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # a package before a dot
        return False
