"""The examples, run as they are, with random weights."""

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
SAYS = {
    "dropped_channel": "R+G+B+NIR: class",
    "fluorescence": "DNA+phase: cosine similarity",
    "grayscale": "difference from timm: ",
    "look_into_a_model": "stem.png",
    "missing_band": "NIR   17% of its variance",
    "sentinel2": "B02+B03+B04+B08+B11: ",
    "sklearn_embeddings": "100% right",
}
MAX_LINES = 60


@pytest.fixture(autouse=True)
def known_channels(monkeypatch):
    """What an example registers is forgotten."""
    monkeypatch.setattr("timm_varchan.channels._registry", dict(_registry()))


def _registry():
    from timm_varchan import channels

    return channels._registry


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda file: file.stem)
def test_example(file, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(file.read_text().splitlines()) < MAX_LINES
    runpy.run_path(str(file))["main"]([])
    said = capsys.readouterr().out
    assert SAYS[file.stem] in said
    if file.stem == "sentinel2":
        with_infrared = said.partition(SAYS["sentinel2"])[2]
        assert int(with_infrared.partition("%")[0]) > 80
    if file.stem == "grayscale":
        assert all(float(line.split()[-1]) < 1e-4 for line in said.splitlines())
    if file.stem == "dropped_channel":
        assert said.count("as alone: True") == 3
