"""Hostile content: strings, JSON values and files, drawn from a `random.Random`.

Most of a case is well formed: a file that is broken at its first byte reaches little
code.
"""

import json
from random import Random
from typing import Any, NamedTuple

SECRET = "SECRET-5f1c"  # in every file that no reader may read


class Link(NamedTuple):
    """A symbolic link; "{outside}" stands for the folder with the secret files."""

    target: str


class Pipe(NamedTuple):
    """A named pipe, which blocks whoever opens it."""


class Folder(NamedTuple):
    """A folder in place of a file."""


class SparseFile(NamedTuple):
    """A file of zeros that takes no space."""

    size: int


Node = bytes | Link | Pipe | Folder | SparseFile
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
    """Returns a value that JSON can hold."""
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
    """Replaces, repeats or removes parts of a JSON value."""
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
    """Returns a JSON text of one line, sometimes in a wrong encoding."""
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
    """Changes, removes, repeats and inserts bytes."""
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
    rng: Random, tree: Tree, path: str, good: bytes, secret: str, probability=0.1
) -> None:
    """Adds a file to a tree, or with this probability something else, or nothing."""
    roll = rng.randrange(9) if rng.random() < probability else -1
    if roll == 5:
        return
    others = (b"", Pipe(), Folder(), SparseFile(1 << 29 if probability >= 0.1 else 9))
    if roll < 0:
        tree[path] = good
    elif roll < 3:
        tree[path] = mutate(rng, good)
    else:
        tree[path] = draw_link(rng, secret) if roll < 5 else rng.choice(others)
