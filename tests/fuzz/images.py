"""Images for fuzzing: small ones in all formats and modes, and damaged ones."""

import io
import random
import zlib

from PIL import Image

from tests.fuzz.contents import mutate


def _encode_all() -> dict[str, bytes]:
    """Returns small images in all formats, and in all modes of each."""
    encoded: dict[str, bytes] = {}

    def save(name: str, image: Image.Image, format_: str, **options) -> None:
        file = io.BytesIO()
        # Saving leaves attributes in an image that other formats trip over.
        if "append_images" in options:
            options["append_images"] = [i.copy() for i in options["append_images"]]
        image.copy().save(file, format_, **options)
        encoded[name] = file.getvalue()

    rgb = Image.frombytes("RGB", (19, 13), random.Random(0).randbytes(19 * 13 * 3))
    alpha = rgb.convert("RGBA")
    alpha.putalpha(rgb.convert("L"))
    palette, grey, bits = rgb.convert("P"), rgb.convert("L"), rgb.convert("1")
    deep = grey.convert("I").point(lambda level: level * 257).convert("I;16")
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a"
    frames = {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)]}
    save("jpeg", rgb, "JPEG", exif=exif, comment=b"a", icc_profile=b"a" * 200)
    save("jpeg progressive", rgb.resize((40, 40)), "JPEG", progressive=True)
    save("jpeg grey", grey, "JPEG")
    save("jpeg cmyk", rgb.convert("CMYK"), "JPEG")
    save("jpeg mpo", rgb, "MPO", **frames)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        source = alpha if mode in ("LA", "RGBA") else rgb
        save(f"png {mode}", source.convert(mode), "PNG")
    save("png I;16", deep, "PNG")
    save("png P transparent", palette, "PNG", transparency=3)
    save("png P alphas", palette, "PNG", transparency=bytes(range(256)))
    save("png RGB transparent", rgb, "PNG", transparency=(1, 2, 3))
    save("png L transparent", grey, "PNG", transparency=9, exif=exif, dpi=(72, 72))
    save("png 1 transparent", bits, "PNG", transparency=0)
    save("png animated", rgb, "PNG", **frames, duration=9)
    save("gif", palette, "GIF")
    save("gif transparent", palette, "GIF", transparency=0, interlace=1, comment=b"a")
    save("gif animated", rgb, "GIF", **frames, disposal=2)
    save("webp", rgb, "WEBP", exif=exif)
    save("webp lossless", alpha, "WEBP", lossless=True)
    save("webp animated", alpha, "WEBP", **frames)
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        save(f"bmp {mode}", alpha.convert(mode), "BMP")
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F"):
        save(f"tiff {mode}", alpha.convert("RGB").convert(mode), "TIFF")
    save("tiff I;16", deep, "TIFF")
    for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "tiff_deflate"):
        save(f"tiff {name}", rgb, "TIFF", compression=name)
    for name in ("group3", "group4", "tiff_ccitt"):
        save(f"tiff {name}", bits, "TIFF", compression=name)
    save("tiff pages", rgb, "TIFF", **frames)
    for mode in ("1", "L", "RGB", "I", "F"):
        save(f"ppm {mode}", rgb.convert(mode), "PPM")
    encoded["ppm text"] = b"P3\n# a\n2 2 255\n" + b"1 2 3 " * 4
    encoded["ppm bits"] = b"P1 4 2\n1 0 1 0\n0 1 0 1\n"
    return encoded


IMAGES = _encode_all()
SMALL = [IMAGES[name] for name in ("png RGB", "jpeg", "png P", "gif", "webp")]


def draw_image(rng: random.Random) -> bytes:
    """Returns an image for a row, sometimes a damaged one."""
    return rng.choice(SMALL) if rng.random() < 0.9 else draw_hostile_image(rng)


def draw_hostile_image(rng: random.Random) -> bytes:
    roll = rng.random()
    if roll < 0.03:
        heads = (b"", b"<html>", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"BM", b"P6")
        return rng.choice(heads)
    data = rng.choice(list(IMAGES.values()))
    start = 0 if rng.random() < 0.05 else rng.choice((4, 8, 12, 16, 24))
    end = start + rng.randrange(1, 90) if rng.random() < 0.6 else len(data)
    data = data[:start] + mutate(rng, data[start:end], 4) + data[end:]
    if roll < 0.1:
        other = rng.choice(list(IMAGES.values()))
        data = data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other)) :]
    if data.startswith(b"\x89PNG") and rng.random() < 0.7:
        data = fix_png_checksums(data)
    return data


def fix_png_checksums(data: bytes) -> bytes:
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        end = at + 8 + int.from_bytes(out[at : at + 4], "big")
        if end + 4 > len(out):
            break
        out[end : end + 4] = zlib.crc32(out[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(out)
