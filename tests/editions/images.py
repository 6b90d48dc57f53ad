"""Defects of images, and what is counted for them."""

import pathlib
import shutil
from collections import Counter
from collections.abc import Iterator

import numpy as np
from PIL import Image

OUTSIDE = "../" * 12 + "elsewhere.png"


def damage_images(paths: Iterator[pathlib.Path]) -> Counter[str]:
    """Damages images, saves others in unusual forms; returns the change of counts."""
    counts: Counter[str] = Counter()

    def take(*keys: str) -> pathlib.Path:
        path = next(paths)
        counts.update(keys)
        with Image.open(path) as image:
            counts["noted: grayscale image"] -= image.mode == "L"
        return path

    take("skipped: image missing").unlink()
    (path := take("skipped: image is no plain file")).unlink()
    path.mkdir()
    (path := take("skipped: image outside of the folder")).unlink()
    path.symlink_to(OUTSIDE)
    take("skipped: image empty").write_bytes(b"")
    page = b"<!doctype html><title>404 Not Found</title>"
    take("skipped: not an image").write_bytes(page)
    path = take("skipped: image damaged")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    Image.new("1", (12_000, 11_000)).save(take("skipped: image too large"), "png")
    original, copy = take(), take("noted: near-duplicate image")
    shutil.copyfile(original, copy)
    with Image.open(original) as image:
        counts["noted: grayscale image"] += 2 * (image.mode == "L")
    for path, image, format_, options in _unusual_forms(take):
        image.save(path, format_, **options)
    return counts


def _unusual_forms(take):
    """Yields a path, an image, and the format to save it in."""

    def rgb(path):
        with Image.open(path) as image:
            return image.convert("RGB")

    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    for keys, mode, format_, options in (
        (["noted: grayscale image"], "L", "png", {}),
        (["noted: CMYK image"], "CMYK", "jpeg", {}),
        (["noted: palette image"], "P", "png", {}),
        (["noted: progressive JPEG"], "RGB", "jpeg", {"progressive": True}),
        (["noted: EXIF orientation ignored"], "RGB", "jpeg", {"exif": exif}),
        ([], "RGB", "tiff", {}),
    ):
        path = take(*keys)
        yield path, rgb(path).convert(mode), format_, options
    path = take("noted: transparent image")
    image = rgb(path).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    yield path, image, "png", {}
    path = take("noted: grayscale image", "noted: 16-bit image")
    wide = np.asarray(rgb(path).convert("L")).astype(np.uint16) * 257
    yield path, Image.fromarray(wide), "png", {}
    path = take("noted: palette image", "noted: animated image")
    frames = {"save_all": True, "append_images": [rgb(path).rotate(90)]}
    yield path, rgb(path), "gif", frames
