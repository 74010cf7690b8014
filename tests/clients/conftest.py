"""The snippets of docs/clients.md, which the tests run."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "clients.md"


@pytest.fixture
def run_snippet(tmp_path, monkeypatch):
    """A function that runs the snippet of a client and gives the names that it made."""

    def run(client):
        mark = re.escape(f"<!-- test: {client} -->")
        (code,) = re.findall(rf"{mark}\n```python\n(.*?)```", PAGE.read_text(), re.S)
        monkeypatch.chdir(tmp_path)
        names = {}
        exec(compile(code, f"{PAGE.name}: {client}", "exec"), names)
        return names

    return run
