"""Small trees of files for the tests of data."""

import io
import itertools
import re

import numpy as np
import tifffile
from PIL import Image


def picture(number):
    """Noise `(12, 12, 3)` whose first pixel is a number."""
    image = np.random.default_rng(number).integers(0, 256, (12, 12, 3), np.uint8)
    image[0, 0] = number
    return image


def bands(number, count=5):
    """Planes `(count, 10, 12)` of 16 bits whose first pixel is a number."""
    planes = np.random.default_rng(number).integers(0, 65536, (count, 10, 12), np.uint16)
    planes[:, 0, 0] = number
    return planes


def png_bytes(number):
    file = io.BytesIO()
    Image.fromarray(picture(number)).save(file, "PNG")
    return file.getvalue()


def npy_bytes(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def write(path, number=0):
    """An image by the ending of its name, a text for other endings, a folder without."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, bands(number))
    elif path.suffix in (".tif", ".tiff"):
        tifffile.imwrite(path, bands(number), photometric="minisblack")
    elif path.suffix in (".png", ".jpg"):
        Image.fromarray(picture(number)).save(path)
    elif path.suffix:
        path.write_text("x")
    else:
        path.mkdir(exist_ok=True)


def names_of(pattern):
    """The names that a pattern with {braces,of,words} and {0..3} stands for, in order."""
    parts = re.split(r"\{([^}]*)\}", pattern)
    for at in range(1, len(parts), 2):
        first, _, last = parts[at].partition("..")
        numbers = [str(i) for i in range(int(first), int(last) + 1)] if last else None
        parts[at] = numbers or parts[at].split(",")
    choices = [[part] if isinstance(part, str) else part for part in parts]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def grow(root, *patterns, first=0):
    """Write the files of patterns, which hold the numbers from the first on, each pattern anew."""
    for pattern in patterns:
        for number, name in enumerate(names_of(pattern), start=first):
            write(root / name, number)
    return root


def numbers_in(split):
    """The numbers and labels of a split's images."""
    return [(int(image[0, 0, 0]), label) for image, label in split]
