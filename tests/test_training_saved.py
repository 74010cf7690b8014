"""Runs that begin with a saved model: evaluating it, training it further."""

import dataclasses

import pytest
import timm
import torch
from PIL import Image
from tiny_runs import TINY, fresh_accelerate  # noqa: F401

import timm_varchan
from timm_varchan import Channel, ChannelSet
from timm_varchan.hub import save
from timm_varchan.training import SetupError, run
from timm_varchan.training.build import build_model

STAINS = ChannelSet((Channel("DNA"), Channel("ER"))).with_stats((0.5, 0.5), (0.25, 0.25))


def saved(folder, name, channels, class_names="abc", **kwargs):
    model = timm.create_model(
        name, num_classes=len(class_names), in_chans=len(channels), **kwargs
    ).eval()
    if name.startswith("dwg_"):
        timm_varchan.set_channels(model, channels)
    save(
        model, folder, class_names=class_names, channels=channels, img_size=24, crop_pct=0.75,
    )  # fmt: skip
    return model


def colours(folder, names):
    """A folder of images whose class is their colour."""
    for name in names:
        (folder / "test" / name).mkdir(parents=True)
        for number in range(4):
            colour = {"red": (250, 9, number), "blue": (0, number, 250), "grey": (99,) * 3}[name]
            Image.new("RGB", (30, 26), colour).save(folder / "test" / name / f"{number}.png")
    return str(folder)


def test_a_plain_model_is_evaluated_as_it_was_saved(tmp_path):
    # Its classes are in another order than the folder's, and one of them has no images.
    rgb = timm_varchan.RGB.with_stats((0.5,) * 3, (0.5,) * 3)
    names = ("red", "grey", "blue")
    model = saved(tmp_path / "m", "test_resnet", rgb, names)
    data = colours(tmp_path / "data", ("blue", "red"))
    config = dataclasses.replace(
        TINY, eval_only=str(tmp_path / "m"), dataset=data, channels=None, img_size=None,
        limit=None, output_dir=str(tmp_path / "run"), channel_aug="hcs-sample", eval_modes=None,
    )  # fmt: skip
    outcome = run(config)
    assert outcome.results["model"]["name"] == "test_resnet"
    assert outcome.results["data"]["class_names"] == list(names)
    assert outcome.results["config"]["img_size"] == 24
    assert outcome.results["config"]["crop_pct"] == 0.75
    assert {s.mode for s in outcome.sets} == {"mask"}
    expected = []
    for colour in ((0, 0, 250), (250, 9, 0)):
        x = (torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, 24, 24) / 255 - 0.5) / 0.5
        expected += [int(model(x).argmax())] * 4
    whole = next(s for s in outcome.sets if s.size == 3)
    assert whole.references.tolist() == [2] * 4 + [0] * 4
    assert whole.predictions.tolist() == expected


def test_other_data_than_the_models_is_refused(tmp_path):
    saved(tmp_path / "m", "dwg_test_resnet", STAINS, channel_names=("DNA", "ER"))
    config = dataclasses.replace(
        TINY, eval_only=str(tmp_path / "m"), output_dir=str(tmp_path / "run"), channels="RG"
    )
    with pytest.raises(SetupError, match="3 classes, the data 10"):
        run(config)
    with pytest.raises(SetupError, match="no"):
        run(dataclasses.replace(config, eval_only=str(tmp_path / "nothing")))
    assert not any((tmp_path / "run").glob("*"))


def test_no_twin_of_a_twin_is_suggested(tmp_path):
    rgb = timm_varchan.RGB.with_stats((0.5,) * 3, (0.5,) * 3)
    saved(tmp_path / "m", "test_resnet", rgb)
    config = dataclasses.replace(
        TINY, model=f"local-dir:{tmp_path / 'm'}", channels=None, output_dir=str(tmp_path / "run")
    )
    with pytest.raises(SetupError, match="Choose --adapt") as error:
        run(config)
    assert "dwg_" not in str(error.value)


class Data:
    """As much of `ImageData` as a model needs."""

    def __init__(self, channels, class_names):
        self.channels, self.class_names = channels, class_names


def test_a_saved_model_takes_further_arguments_and_new_names(tmp_path):
    before = saved(tmp_path / "m", "dwg_test_resnet", STAINS, channel_names=("DNA", "ER"))
    config = dataclasses.replace(
        TINY, model=f"local-dir:{tmp_path / 'm'}", model_kwargs={"drop_rate": 0.25}
    )
    more = ChannelSet((*STAINS.channels, Channel("AGP"), Channel("NIR", wavelength_nm=842.0)))
    model = build_model(config, Data(more, "abcde"))
    assert model.drop_rate == 0.25
    assert model.num_classes == 5
    (mixer,) = timm_varchan.models.stems(model)
    assert mixer.channel_names == ("DNA", "ER", "AGP")
    (old,) = timm_varchan.models.stems(before)
    assert torch.equal(mixer.vocabulary.weight[:3], old.vocabulary.weight)
    timm_varchan.set_channels(model, more)
    assert model(torch.randn(2, 4, 32, 32)).shape == (2, 5)
