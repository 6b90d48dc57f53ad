"""Hostile content for `fuzz_readers.py`: the files of a data set as an enemy has them.

Everything is drawn from a `random.Random`, so that a number repeats a case. Most of a
case is well formed, for what is broken at its first byte reaches no further code.
"""

import json
import random
from typing import Any, NamedTuple

SECRET = "SECRET-5f1c"  # in every planted file that no reader may read

Random = random.Random


class Link(NamedTuple):
    """A symbolic link; "{outside}" stands for the folder with the secret files."""

    target: str


class Pipe(NamedTuple):
    """A named pipe: opening it may wait for ever."""


class Folder(NamedTuple):
    """A folder where a file belongs."""


class Hole(NamedTuple):
    """A file of so many zeros that take no room."""

    size: int


Node = bytes | Link | Pipe | Folder | Hole
Tree = dict[str, Node]


CHARACTERS = (
    *" \t\n\r\0\x1b\x7f\x80\x85\x9b\xa0\u00e2\u0080\u0099\u00c3\u00a9\u0130\u1e9e",
    *"\u0301\u200b\u200e\u202e\u2028\u2029\u2581\u3000\ud800\udfff\ufdfa\ufeff\ufffd",
    *"\uffff\U0001f600\U000e0001\U0010ffff",
    *"aZ09.,:;|/\\'\"<>&*?#=+-_%$[]{}()",
)
STRINGS = (
    *("", " ", ".", "..", "./", ".//.", "/", "//", "a/..", "a/./b", "~", "~root", "#"),
    *("../outside/secret.png", "images/../../outside/secret.png", "{outside}/a.png"),
    *("/etc/passwd", "/dev/zero", "C:\\win.ini", "C:a", "\\\\server\\share", "a\\b"),
    *("# a", "a\0b", "a\nb", "a\tb", "\ud800", "\udcff", "\x85", "\u2028", "\x1b[31m"),
    *("a" * 300, "a" * 5000, "a/" * 700, "%s%n{0}", "=1+1", "<script>", "a, b", "::me"),
    *("null", "None", "nan", "-1", "0", "1", "train", "dev", "VAL", "test", "hateful"),
    *("Drama", "News", "drama", "[PAD]", "[UNK] [END]", "\u2581", "\u2603" * 40),
    *(
        "dress",
        "the dress's sundress-",
        "top.",
        "women\u00e2\u0080\u0099s",
        "\u00c3\u00a9",
    ),
)
TOKENS = (
    *(b'"', b'""', b"\\", b"\\u", b"\\ud800", b"\\u0000", b"\0", b"\r", b"\n", b"\r\n"),
    *(b"\t", b",", b";", b"|", b":", b"{", b"}", b"[", b"]", b"[" * 1500, b"9" * 5000),
    *(
        b"1e999",
        b"-0",
        b"NaN",
        b"-Infinity",
        b"null",
        b"true",
        b"\xff",
        b"\xed\xa0\x80",
    ),
    *(b"\xef\xbb\xbf", b"\xfe\xff", b"\xc2\x85", b"\xe2\x80\xa8", b"\xc3", b" ", b"#"),
)
_NUMBERS = (0, 1, -1, 2, 10**30, 10**4200, 0.5, 1.0, -0.0, 1e308, float("inf"))
_ENDS = (0, 1, 7, 8, 0x7F, 0x80, 0xFE, 0xFF)


def string(rng: Random) -> str:
    """A text that something may stumble over."""
    roll = rng.random()
    if roll < 0.5:
        return rng.choice(STRINGS)
    if roll < 0.8:
        return "".join(rng.choices(CHARACTERS, k=rng.randrange(9)))
    return rng.choice(STRINGS) + rng.choice(STRINGS)


def value(rng: Random, depth: int = 2) -> Any:
    """Anything that JSON can hold."""
    roll = rng.random()
    if roll < 0.45 or (not depth and roll > 0.8):
        return string(rng)
    if roll < 0.7:
        return rng.choice((None, True, False, float("nan"), *_NUMBERS))
    if roll < 0.8:
        return rng.randrange(100)
    if roll < 0.92:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {string(rng): value(rng, depth - 1) for _ in range(rng.randrange(3))}


def touched(rng: Random, given: Any, share: float = 0.12) -> Any:
    """A JSON value in which something may have been replaced or left out."""
    if rng.random() < share:
        return value(rng)
    if isinstance(given, dict):
        return {
            key: touched(rng, item, share)
            for key, item in given.items()
            if rng.random() > share / 3
        }
    if isinstance(given, list):
        found = [touched(rng, item, share) for item in given]
        return found + found[:1] if rng.random() < share / 3 else found
    return given


def dumped(rng: Random, given: Any, line: bool = False) -> bytes:
    """A JSON text in one of many spellings, sometimes in a wrong encoding."""
    ascii_, indent = rng.random() < 0.5, None if line else rng.choice((None, 1))
    text = json.dumps(given, ensure_ascii=ascii_, indent=indent)
    roll = rng.random()
    if roll < 0.03:
        text = text.replace("/", "\\/")
    elif roll < 0.05:
        return text.encode("utf-16", "surrogatepass")
    elif roll < 0.07:
        text = "\ufeff" + text
    elif roll < 0.08:
        return text.encode("latin-1", "replace")
    return text.encode("utf-8", "surrogatepass")


def mutated(rng: Random, data: bytes, most: int = 3) -> bytes:
    """Bytes with some of them changed, lost, repeated or put in."""
    out = bytearray(data)
    for _ in range(rng.randint(1, most)):
        at, roll = rng.randrange(len(out) + 1), rng.random()
        if roll < 0.3 and at < len(out):
            out[at] = rng.choice((rng.randrange(256), rng.choice(_ENDS), out[at] ^ 1))
        elif roll < 0.45:
            out[at : at + rng.choice((1, 2, 4, 16))] = b""
        elif roll < 0.65:
            out[at:at] = rng.choice(TOKENS)
        elif roll < 0.75:
            out[at:at] = out[max(0, at - rng.randrange(1, 40)) : at]
        elif roll < 0.85:
            width = rng.choice((2, 4, 8))
            number = rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**64 - 1, 65535))
            order = rng.choice(("little", "big"))
            out[at : at + width] = (number % 256**width).to_bytes(width, order)
        elif roll < 0.92:
            del out[at:]
        else:
            other = rng.randrange(len(out) + 1)
            width = rng.randrange(1, 12)
            out[at : at + width] = out[other : other + width]
    return bytes(out)


def maybe(rng: Random, data: bytes, share: float = 0.1) -> bytes:
    """The bytes as they are, or mutated."""
    return mutated(rng, data) if rng.random() < share else data


def link(rng: Random, secret: str) -> Link:
    """A link that leads nowhere good, or to where it may."""
    known = (f"{{outside}}/{secret}", f"../outside/{secret}", f"../../outside/{secret}")
    others = (
        "{name}",
        "{name}/a",
        ".",
        "..",
        "/",
        "/dev/zero",
        "/etc/passwd",
        "nowhere",
        "../..",
    )
    return Link(rng.choice((*known, "{outside}", "{root}", *others)))


def node(rng: Random, good: bytes, secret: str, share: float = 0.1) -> Node | None:
    """A file, or what lies in its place; None: nothing does."""
    if rng.random() > share:
        return good
    roll = rng.randrange(9)
    if roll < 3:
        return mutated(rng, good)
    if roll < 5:
        return link(rng, secret)
    return (
        None,
        b"",
        Pipe(),
        rng.choice((Folder(), Hole(1 << 29 if share >= 0.1 else 9))),
    )[roll - 5]


def put(tree: Tree, path: str, found: Node | None) -> None:
    """Adds a node to a tree, or nothing."""
    if found is not None:
        tree[path] = found
