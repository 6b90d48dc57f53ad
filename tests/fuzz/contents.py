"""Generates hostile strings, JSON values, files and images.

Most of a case is valid: a file that is invalid at its first byte exercises little code.
"""

import io
import json
import os
import zlib
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

from PIL import Image

SECRET = "SECRET-5f1c"  # in every file that no reader may read


class Link(NamedTuple):
    """A symbolic link; "{outside}" is replaced with the folder of the secret files."""

    target: str


# A file's bytes, the size of a sparse file of zeros, a link, or a function that makes
# something else at a path.
Node = bytes | int | Link | Callable[[str], None]
Tree = dict[str, Node]

CHARACTERS = (
    *" \t\n\r\0\x1b\x7f\x80\x85\x9b\xa0\u00e2\u0080\u0099\u00c3\u00a9\u0130\u1e9e",
    *"\u0301\u200b\u200e\u202e\u2028\u2029\u2581\u3000\ud800\udfff\ufdfa\ufeff\ufffd",
    *"\uffff\U0001f600\U000e0001\U0010ffffaZ09.,:;|/\\'\"<>&*?#=+-_%$[]{}()",
)
STRINGS = (
    *("", " ", ".", "..", "./", ".//.", "/", "//", "a/..", "a/./b", "~", "~root", "#"),
    *("../outside/secret.png", "images/../../outside/secret.png", "{outside}/a.png"),
    *("/etc/passwd", "/dev/zero", "C:\\win.ini", "C:a", "\\\\server\\share", "a\\b"),
    *("# a", "a\0b", "a\nb", "a\tb", "\ud800", "\udcff", "\x85", "\u2028", "\x1b[31m"),
    *("a" * 300, "a" * 5000, "a/" * 700, "%s%n{0}", "=1+1", "<script>", "a, b", "::me"),
    *("null", "None", "nan", "-1", "0", "1", "train", "dev", "VAL", "test", "hateful"),
    *("Drama", "News", "drama", "[PAD]", "[UNK] [END]", "\u2581", "\u2603" * 40),
    *("dress", "the dress's sundress-", "top.", "women\u00e2\u0080\u0099s"),
    "\u00c3\u00a9",
)
TOKENS = (
    *(b'"', b'""', b"\\", b"\\u", b"\\ud800", b"\\u0000", b"\0", b"\r", b"\n", b"\r\n"),
    *(b"\t", b",", b";", b"|", b":", b"{", b"}", b"[", b"]", b"[" * 1500, b"9" * 5000),
    *(b"1e999", b"-0", b"NaN", b"-Infinity", b"null", b"true", b"\xff", b" ", b"#"),
    *(b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xfe\xff", b"\xc2\x85", b"\xe2\x80\xa8"),
    b"\xc3",
)
_NUMBERS = (0, 1, -1, 2, 10**30, 10**4200, 0.5, 1.0, -0.0, 1e308, float("inf"))
_CONSTANTS = (None, True, False, float("nan"), *_NUMBERS)
_EDGE_BYTES = (0, 1, 7, 8, 0x7F, 0x80, 0xFE, 0xFF)
_EDGE_NUMBERS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**64 - 1, 65535)


def draw_string(rng: Random) -> str:
    roll = rng.random()
    if roll < 0.5:
        return rng.choice(STRINGS)
    if roll < 0.8:
        return "".join(rng.choices(CHARACTERS, k=rng.randrange(9)))
    return rng.choice(STRINGS) + rng.choice(STRINGS)


def draw_value(rng: Random, depth: int = 2) -> Any:
    """Returns a random value that JSON can represent."""
    roll = rng.random()
    if roll < 0.45 or (not depth and roll > 0.8):
        return draw_string(rng)
    if roll < 0.7:
        return rng.choice(_CONSTANTS)
    if roll < 0.8:
        return rng.randrange(100)
    if roll < 0.92:
        return [draw_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {draw_string(rng): draw_value(rng, depth - 1) for _ in range(2)}


def mutate_value(rng: Random, value: Any, probability: float = 0.12) -> Any:
    """Randomly replaces, repeats or removes parts of a JSON value."""
    if rng.random() < probability:
        return draw_value(rng)
    if isinstance(value, dict):
        return {
            key: mutate_value(rng, item, probability)
            for key, item in value.items()
            if rng.random() > probability / 3
        }
    if isinstance(value, list):
        items = [mutate_value(rng, item, probability) for item in value]
        return items + items[:1] if rng.random() < probability / 3 else items
    return value


def dump_json(rng: Random, value: Any) -> bytes:
    """Encodes a value as one line of JSON, sometimes not in UTF-8."""
    text, roll = json.dumps(value, ensure_ascii=rng.random() < 0.5), rng.random()
    if roll < 0.03:
        text = text.replace("/", "\\/")
    elif roll < 0.05:
        return text.encode("utf-16", "surrogatepass")
    elif roll < 0.07:
        text = "\ufeff" + text
    elif roll < 0.08:
        return text.encode("latin-1", "replace")
    return text.encode("utf-8", "surrogatepass")


def mutate(rng: Random, data: bytes, max_changes: int = 3) -> bytes:
    """Randomly changes, removes, repeats and inserts bytes."""
    out = bytearray(data)
    for _ in range(rng.randint(1, max_changes)):
        at, roll = rng.randrange(len(out) + 1), rng.random()
        if roll < 0.3 and at < len(out):
            choices = (rng.randrange(256), rng.choice(_EDGE_BYTES), out[at] ^ 1)
            out[at] = rng.choice(choices)
        elif roll < 0.45:
            out[at : at + rng.choice((1, 2, 4, 16))] = b""
        elif roll < 0.65:
            out[at:at] = rng.choice(TOKENS)
        elif roll < 0.75:
            out[at:at] = out[max(0, at - rng.randrange(1, 40)) : at]
        elif roll < 0.85:
            width, order = rng.choice((2, 4, 8)), rng.choice(("little", "big"))
            number = rng.choice(_EDGE_NUMBERS) % 256**width
            out[at : at + width] = number.to_bytes(width, order)
        elif roll < 0.92:
            del out[at:]
        else:
            other, width = rng.randrange(len(out) + 1), rng.randrange(1, 12)
            out[at : at + width] = out[other : other + width]
    return bytes(out)


def maybe_mutate(rng: Random, data: bytes, probability: float = 0.1) -> bytes:
    return mutate(rng, data) if rng.random() < probability else data


def draw_link(rng: Random, secret: str) -> Link:
    targets = (f"{{outside}}/{secret}", f"../outside/{secret}", "{name}", "{name}/a")
    targets += (f"../../outside/{secret}", "{outside}", "{root}", "/", "/dev/zero")
    targets += (".", "..", "../..", "/etc/passwd", "nowhere")
    return Link(rng.choice(targets))


def add_node(
    rng: Random, tree: Tree, path: str, content: bytes, secret: str, probability=0.1
) -> None:
    """Adds a file; with `probability` a damaged file, another node or nothing."""
    roll = rng.randrange(9) if rng.random() < probability else -1
    if roll == 5:
        return
    replacements = (b"", os.mkfifo, os.mkdir, 1 << 29 if probability >= 0.1 else 9)
    if roll < 0:
        tree[path] = content
    elif roll < 3:
        tree[path] = mutate(rng, content)
    else:
        tree[path] = draw_link(rng, secret) if roll < 5 else rng.choice(replacements)


def _encode_all_formats() -> dict[str, bytes]:
    """Returns small images in all formats and their modes, by name."""
    encoded: dict[str, bytes] = {}

    def save(name: str, image: Image.Image, format_: str, **options) -> None:
        file = io.BytesIO()
        # Saving sets attributes of an image that make other formats fail.
        if "append_images" in options:
            options["append_images"] = [i.copy() for i in options["append_images"]]
        image.copy().save(file, format_, **options)
        encoded[name] = file.getvalue()

    rgb = Image.frombytes("RGB", (19, 13), Random(0).randbytes(19 * 13 * 3))
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


IMAGES = _encode_all_formats()
SMALL = [IMAGES[name] for name in ("png RGB", "jpeg", "png P", "gif", "webp")]


def draw_image(rng: Random) -> bytes:
    """Returns an encoded image, which is sometimes damaged."""
    return rng.choice(SMALL) if rng.random() < 0.9 else draw_hostile_image(rng)


def draw_hostile_image(rng: Random) -> bytes:
    roll = rng.random()
    if roll < 0.03:
        headers = (b"", b"<html>", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"BM", b"P6")
        return rng.choice(headers)
    data = rng.choice(list(IMAGES.values()))
    start = 0 if rng.random() < 0.05 else rng.choice((4, 8, 12, 16, 24))
    end = start + rng.randrange(1, 90) if rng.random() < 0.6 else len(data)
    data = data[:start] + mutate(rng, data[start:end], 4) + data[end:]
    if roll < 0.1:
        other = rng.choice(list(IMAGES.values()))
        data = data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other)) :]
    is_fixed = data.startswith(b"\x89PNG") and rng.random() < 0.7
    return fix_png_checksums(data) if is_fixed else data


def fix_png_checksums(data: bytes) -> bytes:
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        end = at + 8 + int.from_bytes(out[at : at + 4], "big")
        if end + 4 > len(out):
            break
        out[end : end + 4] = zlib.crc32(out[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(out)
