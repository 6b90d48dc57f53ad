"""Titles of Fashion200k: encoding errors repaired, words of the class names masked."""

import re
from collections.abc import Iterable

# The character that a continuation byte of UTF-8 (0x80 to 0x9F) became when it was read
# as Windows-1252. Read as Latin-1, every byte keeps its value.
_WINDOWS = {
    bytes([byte]).decode("cp1252"): byte
    for byte in range(0x80, 0xA0)
    if byte not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)  # not defined
}
_CONTINUATION = "[\u0080-\u00bf" + "".join(_WINDOWS) + "]"
# The titles were lowercased after that, so the first byte may be 0x20 too high.
# "\u00e4" and "\u00e5" count as such a byte only before a control character: before
# others they are far more often letters.
_DOUBLE_ENCODED = re.compile(
    f"\u00e2{_CONTINUATION}{{2}}|[\u00c2\u00c3\u00e2\u00e3]{_CONTINUATION}"
    "|[\u00c4\u00c5\u00e4\u00e5][\u0080-\u009f]"
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_LETTER = re.compile(r"[^\W_]")
_TIRG = ((".", "dotmark"), ("?", "questionmark"), ("&", "andmark"), ("*", "starmark"))


def clean_title(
    raw: str, masked_words: re.Pattern[str] | None = None, tirg: bool = False
) -> tuple[str | None, tuple[str, ...]]:
    """Repairs the encoding of a title; removes control characters and masked words.

    Args:
        raw: the title as the label file has it.
        masked_words: words to remove, from `compile_class_words`.
        tirg: whether punctuation becomes words, as in TIRG (Vo et al., 2019).

    Returns:
        The title, None if nothing is left of it; notes to count.
    """
    notes = []
    title = fix_double_encoding(raw)
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
    if masked_words and words:
        words = _remove_masked(words, masked_words)
        if not words:
            notes.append("noted: title with nothing but masked words")
    title = " ".join(words)
    for mark, word in _TIRG if tirg else ():
        title = title.replace(mark, word)
    return title or None, tuple(notes)


def fix_double_encoding(text: str) -> str:
    """Repairs UTF-8 that was read as Latin-1 or Windows-1252 and encoded again."""
    for _ in range(3):  # some titles were encoded more than twice
        before, text = text, _DOUBLE_ENCODED.sub(_decode, text)
        if text == before:
            break
    return text


def _decode(match: re.Match[str]) -> str:
    data = bytes(_WINDOWS.get(character) or ord(character) for character in match[0])
    if len(data) == 2 and data[0] >= 0xE0:
        data = bytes([data[0] - 0x20, data[1]])
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return match[0]
    return text.lower() if match[0].islower() else text


def compile_class_words(names: Iterable[str]) -> re.Pattern[str]:
    """Compiles a pattern of the words in class names, singular and plural.

    Args:
        names: such as "dress" or "long_sleeved_tops". The last word of a name also
            matches the end of a longer word, such as "sundress", unless it is as short
            as "top".
    """
    exact, endings = set(), set()
    for name in names:
        *others, last = re.split("[_-]", name)
        exact.update(_singular(word) for word in others if word != "and")
        (endings if len(_singular(last)) > 3 else exact).add(_singular(last))
    words = [*(rf"\w*{word}" for word in sorted(endings)), *sorted(exact)]
    return re.compile(
        rf"(?<!\w)(?:{'|'.join(words)})(?:e?s)?(?:['\u2019]s)?(?!\w)", re.IGNORECASE
    )


def _singular(word: str) -> str:
    if word.endswith("sses"):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _remove_masked(words: list[str], masked: re.Pattern[str]) -> list[str]:
    remaining = []
    for word in words:
        rest = masked.sub("", word)
        if rest != word:  # "v-neck-top" becomes "v-neck" and "top." becomes ""
            # A pattern with "$" would take hours for a long row of marks.
            letters = [match.start() for match in _LETTER.finditer(rest)]
            rest = rest[letters[0] : letters[-1] + 1] if letters else ""
        if rest:
            remaining.append(rest)
    return remaining
