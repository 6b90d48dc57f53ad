"""Titles of Fashion200k: mended, without the words that name a class, as TIRG's."""

import re
from collections.abc import Iterable

# What a continuation byte of UTF-8 (0x80 to 0xBF) became when it was read as Latin-1
# or, for the second half, as Windows' code page.
_WINDOWS = {
    bytes([byte]).decode("cp1252"): byte
    for byte in range(0x80, 0xA0)
    if byte not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)  # which it has nothing for
}
_AGAIN = "[\u0080-\u00bf" + "".join(_WINDOWS) + "]"
# The titles were put in lower case only afterwards, so the first byte may be 0x20 too
# high. An "\u00e4" or "\u00e5" is taken for such a byte only before a character that
# nobody writes: before others it is far more often a letter.
_TWICE = re.compile(
    f"\u00e2{_AGAIN}{{2}}|[\u00c2\u00c3\u00e2\u00e3]{_AGAIN}"
    "|[\u00c4\u00c5\u00e4\u00e5][\u0080-\u009f]"
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_LETTER = re.compile(r"[^\W_]")
_TIRG = ((".", "dotmark"), ("?", "questionmark"), ("&", "andmark"), ("*", "starmark"))


def cleaned(
    raw: str, masked: re.Pattern[str] | None = None, tirg: bool = False
) -> tuple[str | None, tuple[str, ...]]:
    """A title fit for use, and what there is to note about it.

    Args:
        raw: the title as the file has it.
        masked: words to take out, from `naming`; None: none.
        tirg: whether marks become words as Vo et al. (2019) have it.

    Returns:
        The title, None if nothing of it is left; keys for `Counts.add`.
    """
    notes = []
    title = mended(raw)
    if title != raw:
        notes.append("noted: doubly encoded title")
    spaced = _CONTROL.sub(" ", title)
    if spaced != title:
        notes.append("noted: control characters in a title")
    words = spaced.split()
    if not words:
        notes.append("noted: empty title")
    if not spaced.isascii():
        notes.append("noted: non-ASCII title")
    if masked and words:
        words = _without(words, masked)
        if not words:
            notes.append("noted: title with nothing but masked words")
    title = " ".join(words)
    for mark, word in _TIRG if tirg else ():
        title = title.replace(mark, word)
    return title or None, tuple(notes)


def mended(text: str) -> str:
    """Undoes what came of UTF-8 that was taken for Latin-1 and encoded once more."""
    for _ in range(3):  # some went through it more than once
        before, text = text, _TWICE.sub(_decoded, text)
        if text == before:
            break
    return text


def _decoded(match: re.Match[str]) -> str:
    data = bytes(_WINDOWS.get(character) or ord(character) for character in match[0])
    if len(data) == 2 and data[0] >= 0xE0:
        data = bytes([data[0] - 0x20, data[1]])
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return match[0]
    return text.lower() if match[0].islower() else text


def naming(names: Iterable[str]) -> re.Pattern[str]:
    """What finds the words of class names, singular and plural, in a title.

    Args:
        names: such as "dress" or "long_sleeved_tops". The last word of a name is also
            found as the end of a longer one, as in "sundress", unless it is as short
            as "top".
    """
    exact, ends = set(), set()
    for name in names:
        *others, last = re.split("[_-]", name)
        exact.update(_singular(word) for word in others if word != "and")
        (ends if len(_singular(last)) > 3 else exact).add(_singular(last))
    words = [*(rf"\w*{word}" for word in sorted(ends)), *sorted(exact)]
    # With an end of its own: "the dress's".
    return re.compile(
        rf"(?<!\w)(?:{'|'.join(words)})(?:e?s)?(?:['\u2019]s)?(?!\w)", re.IGNORECASE
    )


def _singular(word: str) -> str:
    if word.endswith("sses"):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _without(words: list[str], masked: re.Pattern[str]) -> list[str]:
    left = []
    for word in words:
        rest = masked.sub("", word)
        if rest != word:  # of "v-neck-top" neither "v-neck-" nor of "top." a "."
            # Not by a pattern with "$", which takes hours for a long row of marks.
            places = [match.start() for match in _LETTER.finditer(rest)]
            rest = rest[places[0] : places[-1] + 1] if places else ""
        if rest:
            left.append(rest)
    return left
