"""Make `mine/` and `scene.tif` in the working folder, for README's commands for own data.

Two classes of 13-band patches, in the order of EuroSAT's planes, and a scene in which both are.
"""

from pathlib import Path

import numpy as np
import rasterio

LEVELS = {"forest": 1200.0, "river": 3600.0}
PLACE = {"crs": "EPSG:32632", "transform": rasterio.Affine(10, 0, 500_000, 0, -10, 5_400_000)}
NUM_BANDS, PATCH, SCENE = 13, 32, 160


def write(file, planes):
    """A GeoTIFF of 16-bit reflectances."""
    file.parent.mkdir(parents=True, exist_ok=True)
    shape = dict(zip(("count", "height", "width"), planes.shape, strict=True))
    with rasterio.open(file, "w", driver="GTiff", dtype="uint16", **shape, **PLACE) as target:
        target.write(planes.clip(1).astype(np.uint16))


def main():
    """Write everything."""
    rng = np.random.default_rng(0)
    bands = np.linspace(0.5, 1.5, NUM_BANDS)[:, None, None]
    for split, count in (("train", 40), ("validation", 12)):
        for label, level in LEVELS.items():
            for number in range(count):
                noise = rng.normal(1, 0.3, (NUM_BANDS, PATCH, PATCH))
                write(Path("mine", split, label, f"{number:04d}.tif"), level * bands * noise)
    forest, river = LEVELS.values()
    ground = np.where(np.arange(SCENE) < SCENE // 2, forest, river)
    write(Path("scene.tif"), ground * bands * rng.normal(1, 0.3, (NUM_BANDS, SCENE, SCENE)))


if __name__ == "__main__":
    main()
