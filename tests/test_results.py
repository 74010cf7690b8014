"""Pages and pictures of results: what they say, in a browser too, and of awkward names and data."""

import logging
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from matplotlib import font_manager
from PIL import Image

from timm_varchan import RGB, ChannelSet, plots
from timm_varchan.evaluation import Evaluation, Predictions, SetResult, classification_metrics
from timm_varchan.evaluation.sets import plan_sets
from timm_varchan.results import (
    Evaluated,
    evaluation_entry,
    headline,
    markdown_page,
    write_results,
)

EUROSAT = ChannelSet.parse("eurosat")
NAMES = ["<b>wood</b>", "a|b", "水体"]
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


class Pictures(list):
    """Images and names of a split."""

    def name(self, index):
        return f"folder/{index}.tif"


def results_of(channels, num_images=60, accuracy=0.8, names=NAMES, sets="default", **changes):
    """Results of chance with the entry that they give."""
    rng, found = np.random.default_rng(0), []
    labels = rng.integers(0, len(names), num_images)
    for one in plan_sets(channels, sets):
        right = rng.random(num_images) < accuracy * len(one.indices) / len(channels)
        said = np.where(right, labels, (labels + 1) % len(names))
        found.append(SetResult(
            one.name, one.indices, "named", "in order", num_images,
            classification_metrics(said, labels, len(names)), said, rng.random(num_images), labels,
            one.name, one.kind,
        ))  # fmt: skip
    predictions = Predictions.of(found, channels, class_names=names)
    evaluated = Evaluated("test", Evaluation(found), predictions, [None] * len(found))
    results = {
        "model": {"name": "model"}, "config": {"channel_aug": "hcs", "seed": 0},
        "data": {"name": "data", "class_names": names, "num_images": {"train": 5}},
        "training": None, "machine": {"num_processes": 1, "device": "cpu"},
        "evaluation": evaluation_entry(evaluated),
    }  # fmt: skip
    return {**results, **changes}, evaluated


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The files of an evaluation of 13 bands."""
    folder = tmp_path_factory.mktemp("results")
    results, evaluated = results_of(EUROSAT)
    images = Pictures((torch.randint(0, 4000, (13, 20, 24)), 0) for _ in range(60))
    write_results(results, evaluated, folder, EUROSAT, images)
    return folder, results, evaluated


def test_accuracy_stands_first_and_beside_what_knowing_nothing_gives(written):
    _, results, evaluated = written
    value = evaluated.sets[0].accuracy
    most = np.bincount(evaluated.sets[0].references).max() / 60
    assert headline(results).startswith(f"accuracy {100 * value:.1f} %, 95 % interval ")
    assert f"gives {100 * most:.1f} %, chance 33.3 %" in headline(results)
    assert markdown_page(results).splitlines()[2].startswith(f"**Accuracy {100 * value:.1f} %")


def test_a_few_images_say_how_little_they_tell():
    few, _ = results_of(RGB, num_images=22)
    assert "under 22.7 points (5 images) say nothing" in markdown_page(few)
    two, _ = results_of(RGB, num_images=2)
    assert "2 images are too few to tell any two channel sets apart" in markdown_page(two)
    none, _ = results_of(EUROSAT, num_images=22, accuracy=1.0)
    for band in none["evaluation"]["bands"]:
        loss = band["loss_without"]
        ranked = re.search(rf"^\| {band['name']} +\| +[+-][\d.]+ \([+-]", markdown_page(none), re.M)
        assert bool(ranked) == (not loss["low"] <= 0 <= loss["high"]), band["name"]


class Reader(HTMLParser):
    """What an HTML page holds."""

    def __init__(self, text):
        super().__init__()
        self.images, self.others, self.words, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        (self.images if tag == "img" else self.others).append((tag, dict(attrs)))
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, "tags are not nested"

    def handle_data(self, data):
        self.words.append(data)


def test_the_html_page_needs_no_other_file_and_runs_nothing(written):
    folder, _, evaluated = written
    page = Reader((folder / "results.html").read_text(encoding="utf-8"))
    sources = [attrs["src"] for _, attrs in page.images]
    assert all(source.startswith("data:image/") for source in sources)
    wrong = int((~evaluated.sets[0].correct).sum())
    assert len(sources) == 3 + wrong
    assert not {"script", "link", "iframe", "b"} & {tag for tag, _ in page.others}
    assert not page.open
    text = " ".join(page.words)
    for part in (*NAMES, "folder/", "Which channels matter", "RGB+NIR"):
        assert part in text, part


@pytest.mark.skipif(not BROWSER, reason="no chromium or chrome on this machine")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_the_page(written, tmp_path, width):
    """Every picture is decoded, and only tables that scroll are wider than the window."""
    folder, _, _ = written
    probe = """<script>onload = () => document.body.setAttribute("data-seen", [
      [...document.images].every(i => i.complete && i.naturalWidth > 0),
      document.documentElement.scrollWidth <= document.documentElement.clientWidth,
      document.images.length, document.querySelectorAll("table").length])</script>"""
    page = (folder / "results.html").read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(page.replace("</body>", probe + "</body>"), "utf-8")
    done = subprocess.run(
        [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
         f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=5000", "--dump-dom",
         f"file://{tmp_path}/page.html"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    seen = re.search(r'data-seen="(\w+),(\w+),(\d+),(\d+)"', done.stdout)
    assert seen, done.stderr[-500:]
    assert seen[1] == "true", "a picture is broken"
    assert seen[2] == "true", "the page is wider than the window"
    assert int(seen[3]) > 3
    assert int(seen[4]) >= 4


def test_markdown_tables_keep_their_columns(written):
    folder, _, _ = written
    for table in re.findall(r"(?:^\|.*\n)+", (folder / "results.md").read_text("utf-8"), re.M):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table


@pytest.mark.parametrize("names", [["a"], [str(i) for i in range(700)], ["\udcff", "$\\no$"]])
def test_any_number_of_classes_and_any_names(tmp_path, names):
    results, evaluated = results_of(RGB, names=names, sets="RGB,R")
    write_results(results, evaluated, tmp_path, RGB)
    assert (tmp_path / "results.html").stat().st_size < 2_000_000
    assert Predictions.load(tmp_path).class_names == tuple(names)
    assert len(results["evaluation"]["confusion"]) <= 60, "cells grow with the images"


def test_pictures_are_narrow_and_of_few_pixels(tmp_path):
    many = results_of(EUROSAT)[1].sets
    few = results_of(RGB)[1].sets
    history = [
        {"epoch": e, "train_loss": 2 / (e + 1), "eval_loss": math.nan, "train_accuracy": 0.1 * e,
         "eval_accuracy": 0.2, "eval_sets": {"all 13": 0.2, "RGB": 0.1}} for e in range(3)
    ]  # fmt: skip
    levels = {"most frequent class": 0.4}
    theirs = {few[0].indices: few[0].metrics["accuracy"]._asdict()}
    cells = np.array([[0.0, 2.0], [np.nan, 0.0]])
    for path in (
        plots.plot_channel_sets(few, tmp_path / "few.png", "t", baseline=theirs, levels=levels),
        plots.plot_channel_sets(many, tmp_path / "many.png", levels=levels),
        plots.plot_bands(many, tmp_path / "bands.png", "title", levels=levels),
        plots.plot_bands(few[:1] + few[-1:], tmp_path / "alone.png"),
        plots.plot_confusion(few[0], NAMES, tmp_path / "confusion.png"),
        plots.plot_curves(history, tmp_path / "curves.png", levels=levels),
        plots.plot_classes(cells, {0: "a", 2: "c"}, 3, tmp_path / "classes.png"),
    ):
        with Image.open(path) as picture:
            assert 500 <= picture.width <= 1600
    for draw, text in (
        (lambda path: plots.plot_channel_sets([], path), "no channel sets"),
        (lambda path: plots.plot_curves([], path), "no epochs"),
        (lambda path: plots.plot_bands(many[:1], path), "nothing to rank"),
    ):
        with pytest.raises(ValueError, match=text):
            draw(tmp_path / "x.png")


def test_letters_without_a_font_become_numbers(tmp_path, monkeypatch, caplog):
    """Without a warning of matplotlib, which is an error in these tests."""
    own = [f for f in font_manager.fontManager.ttflist if "DejaVu" in f.name]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    result = results_of(RGB)[1].sets[0]
    with caplog.at_level(logging.WARNING):
        plots.plot_confusion(result, NAMES, tmp_path / "p.png", "title 水")
    assert "numbers stand in" in caplog.text
    caplog.clear()
    plots.plot_confusion(result, ["δάσος", "лес", "c"], tmp_path / "p.png")
    assert not caplog.text


def test_pictures_of_images_show_red_green_and_blue():
    image = torch.zeros(13, 8, 8)
    places = [EUROSAT.names.index(name) for name in ("B04", "B03", "B02")]
    for row, place in enumerate(places):
        image[place, row] = 1000.0
    shown = plots.picture_of(image, EUROSAT)
    assert [tuple(shown[row, 0]) for row in range(3)] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert len({tuple(v) for v in shown.reshape(-1, 3)}) == 4
    gray = plots.picture_of(torch.rand(2, 8, 8), ChannelSet.parse("B08+B11"))
    assert (gray == gray[..., :1]).all()
    assert plots.picture_of(torch.full((3, 4, 4), math.nan), RGB).shape == (4, 4, 3)


def test_every_class_of_a_map_has_its_colour():
    for count in (1, 10, 20, 60):
        assert len(set(plots.class_colours(count))) == count
