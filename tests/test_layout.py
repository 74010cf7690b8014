"""The direction of imports within the package."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "timm_varchan"
FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if file != PACKAGE / "__init__.py"]
#: A part imports itself and parts before it. A new file must be given its place here.
PARTS = (
    "version errors products channels input_spec measure stems models filling views data "
    "evaluation plots results hub cards training folding export predict scenes integrations "
    "commands __main__"
).split()


def imported_modules(tree):
    """Absolute names of everything that a file imports from the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            whole = node.module == "timm_varchan"
            names = [f"{node.module}.{a.name}" for a in node.names] if whole else [node.module]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "timm_varchan")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_left(file):
    importer = file.relative_to(PACKAGE).with_suffix("").parts[0]
    for module in imported_modules(ast.parse(file.read_text())):
        assert module != "timm_varchan", "a file of the package imports the package itself"
        part = module.split(".")[1]
        assert PARTS.index(part) <= PARTS.index(importer), f"{importer} imports {module}"
