"""Run a program as if only the package's own dependencies were installed, and what those need.

python only_light.py SCRIPT | -m MODULE, and arguments
"""

import importlib.metadata
import re
import runpy
import sys
from importlib.machinery import PathFinder
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras):
    """The names in `dependencies` of pyproject.toml, and in these extras."""
    found = []
    for name in ("dependencies", *extras):
        pattern = rf"^{name} = \[(.*?)\]\s*(?:#[^\n]*)?$"
        block = re.search(pattern, PYPROJECT.read_text(), re.M | re.S)
        found += re.findall(r'"([\w.-]+)', block[1])
    return found


def closure(names):
    """Distributions that pip installs with these, none of their extras."""
    found, left = set(), list(names)
    while left:
        name = normal(left.pop())
        if name not in found:
            try:
                needed = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:
                continue
            found.add(name)
            left += [re.match(r"[\w.-]+", line)[0] for line in needed if "extra ==" not in line]
    return found


def hidden():
    """Top-level modules of everything else that is installed here."""
    light = closure(declared())
    return {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not light & set(map(normal, owners)) and module not in ("timm_varchan", "setuptools")
    }


class Light(PathFinder):
    """Finds nothing of what is hidden, as if it were not there."""

    hidden = frozenset()

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname.partition(".")[0] in cls.hidden:
            return None
        return super().find_spec(fullname, path, target)


if __name__ == "__main__":
    Light.hidden = frozenset(hidden())
    sys.meta_path[sys.meta_path.index(PathFinder)] = Light
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path.cwd())
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
