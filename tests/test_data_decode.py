"""Files of every kind and option against the arrays that were written: equal, or refused."""

import io

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from timm_varchan.channels import RGB, ChannelSet
from timm_varchan.data import Reading, read_image
from timm_varchan.data.decode import decode
from timm_varchan.data.plane_names import channels_of, label_of, satellite_of
from timm_varchan.errors import ImageError, UserError
from timm_varchan.input_spec import InputSpec


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def pillow_bytes(array, kind, **options):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **options)
    return file.getvalue()


def tiff_bytes(array, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def npy_bytes(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_png_is_exact_and_jpeg_is_near(rng):
    array = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    png = read_image(pillow_bytes(array, "PNG"), "RGB")
    assert np.array_equal(png.numpy(), array.transpose(2, 0, 1))
    smooth = np.tile(np.arange(30, dtype=np.uint8)[None, :, None] * 8, (20, 1, 3))
    jpeg = read_image(pillow_bytes(smooth, "JPEG", quality=95), "RGB")
    for near in (jpeg.numpy(), *(
        decode(tiff_bytes(smooth, photometric="rgb", compression="jpeg", **options)).image
        for options in ({}, {"tile": (16, 16)}, {"rowsperstrip": 8})
    )):  # fmt: skip
        assert np.abs(near.astype(int) - smooth.transpose(2, 0, 1)).max() < 10


def test_gray_becomes_rgb_and_alpha_is_dropped(rng):
    gray = rng.integers(0, 256, (8, 8), dtype=np.uint8)
    image = read_image(pillow_bytes(gray, "PNG"), "BGR")
    assert torch.equal(image[0], image[1])
    assert torch.equal(image[0], image[2])
    rgba = rng.integers(0, 256, (8, 8, 4), dtype=np.uint8)
    for data in (pillow_bytes(rgba, "PNG"), tiff_bytes(rgba, photometric="rgb", extrasamples=[2])):
        assert np.array_equal(read_image(data, "RGB").numpy(), rgba[..., :3].transpose(2, 0, 1))
        assert read_image(data, "R+G+B+NIR").shape[0] == 4
    near_infrared = tiff_bytes(rgba, photometric="rgb", extrasamples=[0])
    with pytest.raises(UserError, match=r"4 planes, but the channels are RGB \(3\)"):
        read_image(near_infrared, "RGB")


CORRUPT = {
    "no image": b"hello",
    "nothing": b"",
    "png header": b"\x89PNG\r\n\x1a\n\0\0",
    "npy of objects": npy_bytes(np.array([{}, {}])),
    "npy of complex": npy_bytes(np.zeros((2, 3, 3), complex)),
    "npy of one axis": npy_bytes(np.zeros(3)),
    "npy without pixels": npy_bytes(np.zeros((3, 0, 4))),
    "tiff of noise": b"II*\0" + np.random.default_rng(0).bytes(300),
    "npy": npy_bytes(np.ones((3, 64, 64)))[:500],
}


@pytest.mark.parametrize("kind", CORRUPT)
def test_corrupt_bytes_are_one_clear_error(kind):
    with pytest.raises(UserError, match=r"^Cannot read the image: [^\n]*planes RGB\.$") as caught:
        read_image(CORRUPT[kind], RGB)
    assert "0x" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_image("nowhere.png", "RGB")


# Writers and their options

CASES = settings(
    max_examples=120, deadline=None, database=None, derandomize=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
COMPRESSIONS = [None, "zlib", "lzw", "packbits", "lzma", "zstd", "png", "webp", "jpegxl"]


def pixels(dtype, shape, number):
    kind = np.dtype(dtype).kind
    values = np.random.default_rng(number).random(shape) * 200
    return (values - 100 * (kind in "if")).astype(dtype)


def upright(planes, orientation):
    """What a viewer shows, by the words of the standard: where row 0 and column 0 are."""
    top = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}
    turned = planes.swapaxes(1, 2) if orientation >= 5 else planes
    down, across = top[orientation]
    turned = turned[:, ::-1] if down else turned
    return turned[:, :, ::-1] if across else turned


@CASES
@given(st.data())
def test_tiff_writers_options(data):
    draw = data.draw
    dtype = draw(st.sampled_from(["u1", "u2", "u4", "i1", "i2", "i4", "f2", "f4", "f8"]))
    count = draw(st.sampled_from([1, 2, 3, 4, 13]))
    photometric = draw(st.sampled_from(["minisblack", "miniswhite", "rgb"]))
    assume(photometric != "rgb" or count >= 3)
    orientation = draw(st.integers(1, 8))
    planar = draw(st.sampled_from(["contig", "separate"]))
    options = {
        "compression": draw(st.sampled_from(COMPRESSIONS)),
        "predictor": draw(st.booleans()),
        "byteorder": draw(st.sampled_from("<>")),
        "bigtiff": draw(st.booleans()),
        "photometric": photometric,
        "extratags": [(274, "H", 1, orientation, True)] if orientation > 1 else [],
    }
    options |= draw(st.sampled_from([{}, {"tile": (16, 32)}, {"rowsperstrip": 7}]))
    written = pixels(dtype, (count, 19, 23), draw(st.integers(0, 99)))
    if count == 1:
        array = written[0]
    else:
        array = written if planar == "separate" else np.moveaxis(written, 0, -1)
        options["planarconfig"] = planar
    try:
        encoded = tiff_bytes(array, **options)
    except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError):
        assume(False)  # what the writer does not do
    if photometric == "miniswhite" and written.dtype.kind != "u":
        with pytest.raises(ImageError, match="white is zero"):
            decode(encoded)
        return
    if photometric == "miniswhite":
        written = np.iinfo(dtype).max - written
    expected = upright(written, orientation)
    found = decode(encoded).image
    assert found.dtype == (np.float32 if written.dtype.kind == "f" else written.dtype)
    np.testing.assert_array_equal(found, expected.astype(found.dtype))
    image = read_image(encoded, ChannelSet.anonymous(count))
    assert image.dtype == {"u1": torch.uint8, "u2": torch.uint16}.get(dtype, torch.float32)


@CASES
@given(
    st.sampled_from(["tiff_lzw", "tiff_deflate", "packbits", "tiff_adobe_deflate", None]),
    st.sampled_from(["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "LA"]),
    st.integers(1, 8),
)
def test_tiffs_of_pillow(compression, mode, orientation):
    """Another writer, whose own conversion to RGB or gray says what is meant."""
    soft = np.random.default_rng(orientation).integers(0, 256, (5, 6, 3), np.uint8)
    picture = Image.fromarray(soft).resize((23, 19))
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 250)
    else:
        picture = picture.convert(mode)
    file = io.BytesIO()
    picture.save(file, "TIFF", compression=compression, tiffinfo={274: orientation})
    shown = picture.convert({"P": "RGB", "CMYK": "RGB", "YCbCr": "RGB", "1": "L"}.get(mode, mode))
    array = np.asarray(shown)
    planes = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
    found = decode(file.getvalue())
    assert found.has_alpha == (mode in ("RGBA", "LA"))
    difference = np.abs(found.image.astype(int) - upright(planes, orientation))
    assert difference.max() <= (1 if mode == "YCbCr" else 0)


@pytest.mark.parametrize("bits", [2, 4, 6, 10, 12, 14])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_unusual_depths_reach_one(bits, photometric):
    top = 2**bits - 1
    dtype = np.uint8 if bits < 8 else np.uint16
    array = np.random.default_rng(0).integers(0, top, (9, 10), dtype, endpoint=True)
    encoded = tiff_bytes(array, photometric=photometric, bitspersample=bits)
    stored = top - array.astype(int) if photometric == "miniswhite" else array
    np.testing.assert_allclose(read_image(encoded, "G").numpy()[0], stored / top, rtol=1e-6)
    np.testing.assert_array_equal(read_image(encoded, "G", value_scale=2.0).numpy()[0], stored / 2)


def pages(*arrays, **options):
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for array, own in arrays:
            writer.write(array, metadata=None, **({"photometric": "minisblack"} | options | own))
    return file.getvalue()


def test_pages_are_one_image_or_refused():
    small, large = np.zeros((8, 9), np.uint8), np.arange(20 * 21, dtype=np.uint16).reshape(20, 21)
    colours, reduced = np.zeros((8, 9, 3), np.uint8), {"subfiletype": 1}
    for whole in (
        pages((small, reduced), (large, {})),
        pages((large, {}), (small.astype(np.uint16), reduced)),
    ):
        assert np.array_equal(decode(whole).image[0], large)
    stack = tiff_bytes(np.zeros((3, 4, 8, 9), np.uint8), imagej=True, metadata={"axes": "ZCYX"})
    for wrong, said in (
        (pages((small, {}), (large, {})), "holds 2 images"),
        (pages((small, {}), (small[:4], {})), "holds 2 images"),
        (pages((small, {}), (small.astype(np.uint16), {})), "holds 2 images"),
        (pages((colours, {}), (colours, {}), photometric="rgb"), "several axes"),
        (stack, r"several axes, Z \(3\) and C \(4\)"),
        (pages((small, reduced)), "nothing but previews"),
        *((animated(kind), "3 pictures") for kind in ("GIF", "PNG", "WEBP")),
    ):
        with pytest.raises(ImageError, match=said):
            decode(wrong)


def animated(kind):
    frames, file = [Image.new("L", (8, 8), value) for value in (0, 80, 160)], io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=50)
    return file.getvalue()


def test_colours_that_are_not_converted_are_refused():
    array = np.zeros((8, 9, 3), np.uint8)
    for photometric, name in ((8, "CIELAB"), (9, "ICCLAB"), (32803, "CFA"), (34892, "LINEAR_RAW")):
        encoded = bytearray(tiff_bytes(array, photometric="rgb"))
        place = encoded.index((262).to_bytes(2, "little") + b"\3\0\1\0\0\0")
        encoded[place + 8 : place + 10] = photometric.to_bytes(2, "little")
        with pytest.raises(ImageError, match=name):
            decode(bytes(encoded))
    inks = tiff_bytes(
        np.zeros((8, 9, 4), np.uint8), photometric="separated", extratags=[(332, "H", 1, 2, True)]
    )
    with pytest.raises(ImageError, match="CMYK"):
        decode(inks)


@CASES
@given(
    st.sampled_from([None, "zlib", "lzw", "packbits", "zstd"]),
    st.integers(1, 5000),
    st.booleans(),
    st.integers(0, 9),
)
def test_cut_tiffs_are_never_padded(compression, cut, tiled, number):
    """What is missing at the end of a file does not come back as zeros."""
    array = np.random.default_rng(number).integers(1, 255, (48, 64), np.uint8)
    encoded = tiff_bytes(
        array, photometric="minisblack", compression=compression, metadata=None,
        **({"tile": (16, 16)} if tiled else {"rowsperstrip": 12}),
    )  # fmt: skip
    try:
        found = decode(encoded[: max(0, len(encoded) - cut)]).image
    except ImageError:
        return
    np.testing.assert_array_equal(found[0], array)


@CASES
@given(
    st.integers(1, 65535), st.sampled_from(["P2", "P3", "P5", "P6"]), st.booleans(),
    st.integers(1, 6), st.integers(1, 6),
)  # fmt: skip
def test_netpbm_of_any_depth(largest, kind, comment, height, width):
    depth = 3 if kind in ("P3", "P6") else 1
    array = np.random.default_rng(largest).integers(0, largest + 1, (height, width, depth))
    head = f"{kind}\n" + ("# made here\n" if comment else "") + f"{width} {height}\n{largest}\n"
    if kind in ("P2", "P3"):
        body = " ".join(map(str, array.ravel())).encode()
    else:
        body = array.astype(np.uint8 if largest < 256 else ">u2").tobytes()
    channels = ChannelSet.anonymous(depth)
    scaled = read_image(head.encode() + body, channels)
    found = scaled.numpy().astype(float)
    if scaled.dtype in (torch.uint8, torch.uint16):
        found /= {torch.uint8: 255, torch.uint16: 65535}[scaled.dtype]
    np.testing.assert_allclose(found, np.moveaxis(array, -1, 0) / largest, atol=1e-6)
    if kind in ("P5", "P6"):  # in text a cut number is a number
        with pytest.raises(UserError, match="Cannot read"):
            read_image(head.encode() + body[:-1], channels)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_png_of_sixteen_bits_with_and_without_alpha(depth):
    array = np.random.default_rng(0).integers(0, 65536, (7, 8, depth), np.uint16)
    found = decode(imagecodecs.png_encode(array[..., 0] if depth == 1 else array))
    assert found.has_alpha == (depth in (2, 4))
    np.testing.assert_array_equal(found.image, np.moveaxis(array, -1, 0))


@pytest.mark.parametrize("bits", [8, 12, 15, 16])
def test_jpeg2000_keeps_its_numbers(bits):
    dtype, top = np.uint8 if bits == 8 else np.uint16, 2**bits - 1
    array = np.random.default_rng(0).integers(0, top, (32, 33), dtype, endpoint=True)
    encoded = imagecodecs.jpeg2k_encode(array, level=0, reversible=True, bitspersample=bits)
    np.testing.assert_array_equal(decode(encoded).image[0], array)
    if bits in (12, 15):  # of a range that the type does not tell
        assert read_image(encoded, "G").max() == pytest.approx(array.max() / top)


@CASES
@given(
    st.sampled_from(["u1", "u2", ">u2", "i2", "i4", "i8", "u8", "f2", ">f4", "f8", "?"]),
    st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.booleans(), st.booleans(),
)  # fmt: skip
def test_npy_of_every_type_and_layout(dtype, count, height, width, last, fortran):
    planes = pixels(dtype, (count, height, width), 0)
    array = np.moveaxis(planes, 0, -1) if last else planes
    array = np.asfortranarray(array) if fortran else np.ascontiguousarray(array)
    ends = (array.shape[0], array.shape[-1])
    if ends[0] == ends[1]:
        with pytest.raises(ImageError, match="at both ends"):
            decode(npy_bytes(array), count)
        return
    found = decode(npy_bytes(array), count).image
    expected = planes.astype(np.uint8) * 255 if dtype == "?" else planes
    np.testing.assert_array_equal(found, expected.astype(found.dtype))


@pytest.mark.parametrize(
    ("shape", "planes"),
    [
        ((13, 64, 64), 13), ((64, 64, 13), 13), ((3, 100, 600), 3), ((100, 600, 3), 3),
        ((5, 10, 12), 5), ((4, 9, 9), 4), ((13, 64, 200), 13),
        ((9, 9, 200), None), ((200, 9, 9), None), ((9, 12, 200), None), ((20, 25, 100), None),
        ((50, 64, 200), None), ((7, 7, 7), None), ((3, 5, 200), None), ((64, 13, 64), None),
    ],
)  # fmt: skip
def test_the_axis_of_the_channels_follows_from_the_shape_or_is_asked_for(shape, planes):
    for encoded in (npy_bytes(np.zeros(shape, np.uint16)),
                    tiff_bytes(np.zeros(shape, np.uint16), photometric="minisblack")):  # fmt: skip
        if planes is None:
            with pytest.raises(ImageError, match="--channels"):
                decode(encoded)
        else:
            assert len(decode(encoded).image) == planes


def geo_tiff(array, no_data, **options):
    return tiff_bytes(
        array, photometric="minisblack", extratags=[(42113, "s", 0, no_data, True)], **options
    )


@CASES
@given(
    st.sampled_from(["u1", "u2", "i2", "i4", "f4", "f8"]),
    st.sampled_from(["0", "255", "-9999", "-32768", "-3.4028234663852886e+38", "nan", "1e20", "7"]),
    st.integers(1, 8), st.integers(0, 60), st.integers(0, 50),
)  # fmt: skip
def test_no_data_is_refused_or_filled_and_nothing_else_is(dtype, text, orientation, holes, number):
    kind, value = np.dtype(dtype), float(text)
    array = (np.random.default_rng(number).random((3, 8, 9)) * 90 + 10).astype(dtype)
    with np.errstate(all="ignore"):
        stored = np.array(value).astype(kind)
    mask = np.zeros(array.shape, bool)
    if kind.kind == "f" or stored == value:  # the type holds the value
        places = np.random.default_rng(number + 1).choice(array.size, holes, replace=False)
        mask.flat[places] = True
    array[mask] = stored
    tags = [(42113, "s", 0, text, True), (274, "H", 1, orientation, True)]
    encoded = tiff_bytes(array, photometric="minisblack", planarconfig="separate", extratags=tags)
    channels = ChannelSet.anonymous(3)
    expected = upright(mask, orientation)
    if not mask.any():
        assert read_image(encoded, channels).isfinite().all()
        return
    with pytest.raises(UserError, match=rf"{mask.mean():.1%} of its values hold no data"):
        read_image(encoded, channels)
    filled = read_image(encoded, channels, no_data="mean")
    assert filled.dtype == torch.float32
    np.testing.assert_array_equal(filled.isnan().numpy(), expected)
    scaled = upright(array, orientation)[~expected].astype(np.float32)
    top = {"u1": 255, "u2": 65535}.get(dtype, 1)
    np.testing.assert_allclose(filled.numpy()[~expected], scaled / np.float32(top), rtol=1e-6)
    if text != "nan":
        kept = read_image(encoded, channels, no_data="keep")
        np.testing.assert_array_equal(
            kept.numpy(), upright(array, orientation).astype(kept.numpy().dtype)
        )


def test_usual_signs_of_no_data_need_no_tag():
    array = np.random.default_rng(0).random((2, 6, 6), np.float32)
    for value in (-9999.0, -32768.0, np.nan, np.inf, -3.4028235e38, 1e20):
        array[0, :3] = value
        with pytest.raises(UserError, match=r"25\.0% of its values hold no data"):
            read_image(npy_bytes(array), "B04+B08")
        assert read_image(npy_bytes(array), "B04+B08", no_data="mean").isnan().sum() == 18
    array[:] = -9999
    with pytest.raises(UserError, match=r"100\.0%"):
        read_image(npy_bytes(array), "B04+B08", no_data="mean")
    meant = np.full((2, 6, 6), -32768, np.int16)
    assert read_image(npy_bytes(meant), "B04+B08", no_data="keep").min() == -32768
    with pytest.raises(UserError, match="Choose from: refuse, mean, predict, keep"):
        read_image(npy_bytes(meant), "B04+B08", no_data="guess")
    with pytest.raises(ImageError, match="is no number"):
        decode(geo_tiff(meant, "none"))


def test_alpha_of_a_geotiff_is_a_mask_or_a_band():
    """GDAL tags the fourth of four bands of 8 bits as alpha, near infrared too."""
    array = np.random.default_rng(0).integers(1, 255, (4, 8, 9), np.uint8)
    geo = [(34735, "H", 4, (1, 1, 0, 0), True)]
    options = {"photometric": "rgb", "planarconfig": "separate", "extrasamples": [2]}
    assert not decode(tiff_bytes(array, extratags=geo, **options)).has_alpha
    assert decode(tiff_bytes(array, **options)).has_alpha
    array[3] = 255
    array[3, :2] = 0
    with pytest.raises(UserError, match=r"25\.0% .*the file says so"):
        read_image(tiff_bytes(array, extratags=geo, **options), "RGB")


def test_pictures_keep_what_pillow_shows():
    array = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        expected = upright(np.moveaxis(array, -1, 0), orientation)
        for encoded in (pillow_bytes(array, "PNG", exif=exif),
                        pillow_bytes(array, "WEBP", exif=exif, lossless=True)):  # fmt: skip
            np.testing.assert_array_equal(decode(encoded).image, expected)
    assert decode(imagecodecs.png_encode(array.astype(np.uint16) * 257)).image.max() > 255


# What files call their planes, and what lies beside them

BANDS, RED_FIRST = "B02+B03+B04+B08", [2, 1, 0, 3]
WORDS = (
    ["B4", "B3", "B2", "B8"], ["Band 4", "Band 3", "Band 2", "Band 8"],
    ["B04_10m", "B03_10m", "B02_10m", "B08_10m"], ["red", "green", "blue", "NIR"],
    ["S2A x B04", "S2A x B03", "S2A x B02", "S2A x B08"],
    ["665 nm", "560 nm", "0.49 um", "842 nm"], ["R", "G", "B", "N"],
)  # fmt: skip


@pytest.mark.parametrize("names", WORDS)
@pytest.mark.parametrize("kind", ["ome", "imagej", "gdal"])
def test_planes_are_found_by_what_a_file_calls_them(names, kind):
    truth = np.random.default_rng(0).integers(1, 3000, (4, 8, 9)).astype(np.uint16)
    items = "".join(
        f'<Item name="DESCRIPTION" sample="{i}" role="description">{n}</Item>'
        for i, n in enumerate(names)
    )
    xml = f"<GDALMetadata>{items}</GDALMetadata>"
    options = {
        "ome": {"ome": True, "metadata": {"axes": "CYX", "Channel": {"Name": names}}},
        "imagej": {"imagej": True, "metadata": {"axes": "CYX", "Labels": names}},
        "gdal": {"metadata": None, "extratags": [(42112, "s", 0, xml, True)]},
    }[kind]
    encoded = tiff_bytes(truth[RED_FIRST], photometric="minisblack", **options)
    assert np.array_equal(read_image(encoded, BANDS).numpy(), truth)
    reading = Reading(InputSpec.of(channels="eurosat"), partial=True)
    part, channels = reading.part(reading.decode(encoded))
    assert str(channels) == BANDS
    assert np.array_equal(part.numpy(), truth)
    for wrong in ("B05+B06+B07+B11", "eurosat"):
        with pytest.raises(UserError, match=r"the file calls its planes .*--channels"):
            read_image(encoded, wrong)


def test_a_satellites_tag_says_what_a_number_means():
    bands = ["B2", "B3", "B4", "B5"]
    landsat = channels_of(bands, (), satellite_of("SPACECRAFT_ID LANDSAT_8"))
    assert [c.name for c in landsat] == ["L8_B2", "L8_B3", "L8_B4", "L8_B5"]
    assert [c.name for c in channels_of(bands)] == ["B02", "B03", "B04", "B05"]
    assert label_of("SR_B5").wavelength_nm == 865
    assert label_of("CD8+PE, x").name == "CD8-PE-x"
    assert channels_of(["Band 1", "Band 2"]) == ()


@pytest.mark.parametrize("share", [0.3, 0.7])
@pytest.mark.parametrize("padded", [True, False])
def test_an_end_that_never_arrived_is_told(share, padded):
    y, x = np.mgrid[:96, :96]
    noise = np.random.default_rng(0).integers(0, 20, (96, 96, 3))
    colour = (np.stack([y, x, (y + x) // 2], -1) + noise).astype(np.uint8)
    files = [pillow_bytes(colour, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "JPEG2000")]
    files += [pillow_bytes(colour, "WEBP", lossless=True)]
    files += [imagecodecs.jpeg2k_encode(colour.astype(np.uint16) * 9, level=0, codecformat="jp2")]
    files += [
        tiff_bytes(colour, photometric="rgb", compression=c, rowsperstrip=24)
        for c in ("zlib", "lzw", "packbits", "zstd", "jpeg", "webp")
    ]
    for encoded in files:
        decode(encoded)
        cut = encoded[: int(len(encoded) * share)]
        with pytest.raises(ImageError):
            decode(cut.ljust(len(encoded), b"\0") if padded else cut)


def test_numbers_that_the_caller_explains(tmp_path):
    array = np.full((2, 4, 6), 5000, np.uint16)
    array[:, :, :3] = 0
    scaled = read_image(npy_bytes(array), "B04+B08", value_scale=10000, value_offset=-1000)
    assert scaled[0, 0].tolist() == pytest.approx([-0.1] * 3 + [0.4] * 3)
    filled = read_image(npy_bytes(array), "B04+B08", no_data="mean", no_data_value=0)
    assert filled.isnan().float().mean() == 0.5
    file = tmp_path / "a.png"
    file.write_bytes(pillow_bytes(array[0], "PNG"))
    (tmp_path / "a.png.msk").write_bytes(tiff_bytes((array[0] > 0).astype(np.uint8) * 255))
    assert read_image(file, "G", no_data="mean").isnan().float().mean() == 0.5
    with pytest.raises(UserError, match=r"limit of 20 .*--max-pixels"):
        read_image(file, "G", max_pixels=20)
    opaque = np.full((8, 8, 4), 255, np.uint8)
    with pytest.raises(UserError, match="alpha"):
        read_image(pillow_bytes(opaque, "PNG"), "R+G+B+NIR")
