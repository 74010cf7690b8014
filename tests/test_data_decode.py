"""Decoding: every kind of file, both layouts, every bit depth; what does not fit says so."""

import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from timm_varchan.channels import RGB, ChannelSet
from timm_varchan.data import read_image
from timm_varchan.data.decode import decode
from timm_varchan.errors import ImageError

THIRTEEN = ChannelSet.anonymous(13)


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


def png16_bytes(array):
    """A 16-bit colour PNG, which Pillow cannot write; all five row filters are used."""
    height, width, depth = array.shape
    rows = np.frombuffer(array.astype(">u2").tobytes(), np.uint8).reshape(height, -1).astype(int)
    step, body, above = 2 * depth, b"", np.zeros(rows.shape[1], int)
    for number, row in enumerate(rows):
        left = np.concatenate([np.zeros(step, int), row[:-step]])
        corner = np.concatenate([np.zeros(step, int), above[:-step]])
        guess = left + above - corner
        near = [abs(guess - x) for x in (left, above, corner)]
        paeth = np.where(
            (near[0] <= near[1]) & (near[0] <= near[2]),
            left,
            np.where(near[1] <= near[2], above, corner),
        )
        predicted = [0, left, above, (left + above) // 2, paeth][number % 5]
        body += bytes([number % 5]) + ((row - predicted) % 256).astype(np.uint8).tobytes()
        above = row

    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    colour = {1: 0, 3: 2, 4: 6}[depth]
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(body))
        + chunk(b"IEND", b"")
    )


def test_png_is_exact_and_jpeg_is_near(rng):
    array = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    png = read_image(pillow_bytes(array, "PNG"), "RGB")
    assert png.dtype == torch.uint8
    assert np.array_equal(png.numpy(), array.transpose(2, 0, 1))
    smooth = np.tile(np.arange(30, dtype=np.uint8)[None, :, None] * 8, (20, 1, 3))
    jpeg = read_image(pillow_bytes(smooth, "JPEG", quality=95), "RGB")
    assert np.abs(jpeg.numpy().astype(int) - smooth.transpose(2, 0, 1)).max() < 10


@pytest.mark.parametrize("depth", [1, 3, 4])
def test_sixteen_bit_png_keeps_all_bits(rng, depth):
    array = rng.integers(0, 65536, (11, 13, depth), dtype=np.uint16)
    image = read_image(png16_bytes(array), ChannelSet.anonymous(depth))
    assert image.dtype == torch.uint16
    assert np.array_equal(image.numpy(), array.transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("uint8", torch.uint8), ("uint16", torch.uint16), (">u2", torch.uint16),
        ("int16", torch.float32), ("float32", torch.float32), ("float64", torch.float32),
    ],
)  # fmt: skip
@pytest.mark.parametrize("layout", ["planar", "interleaved", "pages"])
def test_thirteen_band_tiff_in_every_layout(rng, dtype, expected, layout):
    planes = rng.integers(0, 100, (13, 20, 24)).astype(dtype)
    if layout == "interleaved":
        data = tiff_bytes(
            np.ascontiguousarray(planes.transpose(1, 2, 0)),
            planarconfig="contig",
            photometric="minisblack",
        )
    else:
        separate = {"planarconfig": "separate"} if layout == "planar" else {}
        data = tiff_bytes(planes, photometric="minisblack", **separate)
    image = read_image(data, THIRTEEN)
    assert image.dtype == expected
    assert np.array_equal(image.numpy(), planes.astype(image.numpy().dtype))


@pytest.mark.parametrize(("options", "mode"), [({"compression": "tiff_lzw"}, "RGB"), ({}, "P")])
def test_tiff_that_needs_pillow(rng, options, mode):
    file = io.BytesIO()
    array = rng.integers(0, 256, (9, 8, 3), dtype=np.uint8)
    Image.fromarray(array).convert(mode).save(file, "TIFF", **options)
    image = read_image(file.getvalue(), "RGB")
    assert image.shape == (3, 9, 8)
    if mode == "RGB":
        assert np.array_equal(image.numpy(), array.transpose(2, 0, 1))


@pytest.mark.parametrize("last", [False, True])
def test_npy_finds_the_axis_of_the_channels(rng, last):
    planes = rng.random((5, 4, 6)).astype(np.float32)  # more channels than rows
    array = planes.transpose(1, 2, 0) if last else planes
    image = read_image(npy_bytes(array), ChannelSet.anonymous(5))
    assert np.array_equal(image.numpy(), planes)
    tall = rng.random((9, 8, 2)) if last else rng.random((2, 9, 8))
    assert decode(npy_bytes(tall)).image.shape == (2, 9, 8)


def test_one_plane_and_boolean_npy(rng):
    image = read_image(npy_bytes(rng.random((4, 6)) > 0.5), [850])
    assert image.shape == (1, 4, 6)
    assert set(image.unique().tolist()) == {0, 255}


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
    with pytest.raises(ValueError, match="4 planes"):
        read_image(near_infrared, "RGB")


def test_palette_and_orientation(rng):
    array = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(array).convert("P").save(file, "PNG")
    assert read_image(file.getvalue(), "RGB").shape == (3, 6, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    assert read_image(pillow_bytes(array, "JPEG", exif=exif), "RGB").shape == (3, 8, 6)


def test_value_scale_gives_reflectance():
    array = np.full((2, 4, 4), 5000, dtype=np.uint16)
    image = read_image(npy_bytes(array), "B04+B08", value_scale=10000)
    assert image.dtype == torch.float32
    assert torch.equal(image, torch.full((2, 4, 4), 0.5))


def test_wrong_number_of_planes_names_both(rng):
    with pytest.raises(ValueError, match=r"3 planes, but the channels are B02\+B08 \(2\)"):
        read_image(pillow_bytes(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), "PNG"), "B02+B08")


CORRUPT = {
    "no image": b"hello",
    "nothing": b"",
    "png header": b"\x89PNG\r\n\x1a\n\0\0",
    "npy of objects": npy_bytes(np.array([{}, {}])),
    "npy of complex": npy_bytes(np.zeros((2, 3, 3), complex)),
    "npy of one axis": npy_bytes(np.zeros(3)),
    "npy without pixels": npy_bytes(np.zeros((3, 0, 4))),
    "tiff of noise": b"II*\0" + np.random.default_rng(0).bytes(300),
    "png": pillow_bytes(np.eye(64, dtype=np.uint8), "PNG")[:-40],
    "png of 16 bits": png16_bytes(np.ones((20, 20, 3), np.uint16))[:60],
    "jpeg": pillow_bytes(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8), "JPEG")[
        :1500
    ],
    "tiff": tiff_bytes(np.ones((5, 64, 64), np.uint16))[:9000],
    "npy": npy_bytes(np.ones((3, 64, 64)))[:500],
}


@pytest.mark.parametrize("kind", CORRUPT)
def test_corrupt_bytes_are_one_clear_error(kind):
    with pytest.raises(ImageError):
        decode(CORRUPT[kind])
    with pytest.raises(ValueError, match=r"^Cannot read the image: [^\n]*planes RGB\.$") as caught:
        read_image(CORRUPT[kind], RGB)
    assert "0x" not in str(caught.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_image(tmp_path / "nowhere.png", "RGB")
