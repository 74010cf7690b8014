"""Products by name: their planes in the order of the files, and the errors that name them."""

import numpy as np
import pytest
import tifffile

from timm_varchan import ChannelSet
from timm_varchan.__main__ import main
from timm_varchan.channels import known_channels
from timm_varchan.data import read_image
from timm_varchan.products import PRODUCTS, natural_sets, products_with


@pytest.mark.parametrize("name", PRODUCTS)
def test_every_product_is_a_channel_set(name):
    product, channels = PRODUCTS[name], ChannelSet.parse(name)
    assert channels.names == product.bands == ChannelSet.parse(name.upper()).names
    assert len(set(product.bands)) == len(product.bands)
    assert all(nm is not None and 400 < nm < 13_000 for nm in channels.wavelengths_nm)
    assert channels.mean is None, "statistics depend on the data"
    assert product.about
    assert product.source
    assert set(product.bands) <= set(known_channels())
    assert name in products_with(len(product.bands))


def test_orders_in_which_silent_mistakes_are_made():
    assert ChannelSet.parse("eurosat").names[-3:] == ("B11", "B12", "B8A")
    assert ChannelSet.parse("sentinel2-l1c").names[7:10] == ("B08", "B8A", "B09")
    assert "B10" not in ChannelSet.parse("sentinel2-l2a").names
    assert ChannelSet.parse("naip").names == ("R", "G", "B", "NIR")
    assert ChannelSet.parse("planetscope-4b").names[0] == "PS_Blue"
    assert ChannelSet.parse("planetscope-8b").names[5] == "PS_Red"


def test_natural_sets_need_every_band():
    assert natural_sets([665.0, 560.0, None, 490.0]) == {"RGB": (0, 1, 3)}
    assert natural_sets([665.0, 560.0, 490.0]) == {}, "all channels are no subset"
    assert natural_sets([665.0, 490.0, 850.0]) == {}
    assert natural_sets([None] * 5) == {}
    near = natural_sets([865.0, 833.0, 665.0, 560.0, 490.0])
    assert near["RGB+NIR"] == (1, 2, 3, 4), "the wide near infrared, not the narrow one"


@pytest.mark.parametrize(("planes", "expected"), [(12, "sentinel2-l2a"), (13, "eurosat")])
def test_a_wrong_number_of_planes_names_the_products_that_have_it(tmp_path, planes, expected):
    file = tmp_path / "a.tif"
    tifffile.imwrite(file, np.zeros((planes, 8, 8), np.uint16), photometric="minisblack")
    with pytest.raises(ValueError, match=f"it has {planes} planes.*{expected}"):
        read_image(file, "B02+B03+B04+B08")
    assert read_image(file, expected).shape == (planes, 8, 8)


def test_the_command_lists_products(capsys):
    assert main(["channels"]) == 0
    text = capsys.readouterr().out
    assert all(name in text and product.source in text for name, product in PRODUCTS.items())
    assert main(["channels", "eurosat"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["plane", "13", "B8A", "864.7", "nm"]
    assert main(["channels", "landsat77"]) == 1
    assert "landsat8" in capsys.readouterr().err
