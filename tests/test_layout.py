"""The shape of the package: direction of imports and names of files."""

import ast
from pathlib import Path

import pytest
import timm.models

import timm_varchan

PACKAGE = Path(timm_varchan.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
#: A row imports only itself and rows before it. A new file must be given its place here.
ROWS = (
    {"version", "errors"},
    {"products"},
    {"channels"},
    {"input_spec"},
    {"measure"},
    {"stems"},
    {"models", "filling"},
    {"views"},
    {"data"},
    {"evaluation"},
    {"plots", "hub"},
    {"results"},
    {"cards"},
    {"training"},
    {"export", "folding", "integrations", "predict"},
    {"scenes"},
    {"commands"},
    {"__main__"},
)
ROW_OF = {part: number for number, row in enumerate(ROWS) for part in row}


def part_of(module):
    """The part of the package that a dotted module name belongs to."""
    return module.split(".")[1]


def imported_modules(tree):
    """Absolute names of everything that a file imports from the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            known = node.module == "timm_varchan"
            names = [f"{node.module}.{a.name}" for a in node.names] if known else [node.module]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "timm_varchan")


def name_of(file):
    return str(file.relative_to(PACKAGE))


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_point_left(file):
    if file == PACKAGE / "__init__.py":
        return
    own = file.relative_to(PACKAGE).with_suffix("").parts[0]
    assert own in ROW_OF, f"{own} has no place in ROWS"
    for module in imported_modules(ast.parse(file.read_text())):
        assert module != "timm_varchan", "a file of the package imports the package itself"
        part = part_of(module)
        assert part in ROW_OF, f"{module} has no place in ROWS"
        left = ROW_OF[part] < ROW_OF[own]
        assert part == own or left, f"{own} imports {module}, which stands beside or right of it"


def test_no_file_is_named_like_a_module_of_timm():
    theirs = {path.stem for path in Path(timm.models.__file__).parent.rglob("*.py")}
    ours = {file.stem for file in FILES}
    # hub stands in timm as a shim that registers nothing, as ours does
    assert ours & theirs <= {"__init__", "hub"}, "timm's registry keys modules by their last name"
