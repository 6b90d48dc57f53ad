"""Titles of Fashion200k: repaired encoding and masked class names."""

import re
import time

import pytest

from ccu_jax.data.readers.fashion200k import (
    CATEGORIES,
    SUB_CATEGORIES,
    clean_title,
    compile_class_words,
)

CATEGORY_WORDS = compile_class_words(CATEGORIES)
NOT_ASCII = "noted: non-ASCII title"


@pytest.mark.parametrize(
    "raw, fixed",
    [
        ("women\u00e2\u0080\u0099s dress", "women\u2019s dress"),
        ("women\u00e2\u20ac\u2122s dress", "women\u2019s dress"),
        ("boucl\u00c3\u00a9 dress", "boucl\u00e9 dress"),
        ("boucl\u00e3\u00a9 dress", "boucl\u00e9 dress"),
        ("brand\u00e2\u0084\u00a2 dress", "brand\u2122 dress"),
        ("brand\u00e2\u00ae dress", "brand\u00ae dress"),
        ("\u00e3\u0083\u00e2\u00a9t\u00e3\u00a9 dress", "\u00e9t\u00e9 dress"),
        ("c\u00e5\u0093ur dress", "c\u0153ur dress"),
    ],
)
def test_double_encoding_is_fixed_and_noted(raw, fixed):
    assert clean_title(raw) == (fixed, ("noted: doubly encoded title", NOT_ASCII))


def test_every_doubly_encoded_character_is_fixed():
    characters = [chr(code) for code in range(0xA1, 0x100)]
    for character in [*characters, *"\u2018\u2019\u201c\u2122"]:
        for encoding in ("latin-1", "cp1252"):
            try:
                twice = f"a{character}b".encode().decode(encoding)
            except UnicodeDecodeError:  # not defined in cp1252
                continue
            assert clean_title(twice)[0] == f"a{character}b"
            if encoding == "latin-1":
                fixed, _ = clean_title(twice.lower())
                assert fixed.lower() == f"a{character.lower()}b"


@pytest.mark.parametrize(
    "title",
    [
        "caf\u00e9\u00ae dress",
        "ch\u00e2teau cr\u00eape dress",
        "\u00e3 \u00e2 \u00e9\u2122",
        "\u00e5\u00ae",
        "plain dress",
    ],
)
def test_correct_titles_are_kept(title):
    assert clean_title(title) == (title, () if title.isascii() else (NOT_ASCII,))


@pytest.mark.parametrize("character", ["\u0085", "\u0099", "\0", "\x0b", "\x1c"])
def test_control_characters_become_spaces(character):
    notes = ("noted: control characters in a title",)
    assert clean_title(f"red{character}linen dress") == ("red linen dress", notes)


def test_punctuation_becomes_words_for_tirg():
    title = "st. ives & co? wrap* dress "
    assert clean_title(title) == (title.strip(), ())
    expected = "stdotmark ives andmark coquestionmark wrapstarmark dress"
    assert clean_title(title, tirg=True) == (expected, ())


@pytest.mark.parametrize(
    "title, masked",
    [
        ("black wrap dress", "black wrap"),
        ("black dresses and skirts", "black and"),
        ("Jacket: denim JACKETS", "denim"),
        ("women's pant. pants", "women's"),
        ("v-neck-top with the top's straps", "v-neck with the straps"),
        ("red sundress or sweatpants", "red or"),
        ("laptop stop topstitched", "laptop stop topstitched"),
        ("long-sleeved blouse", "long-sleeved blouse"),
    ],
)
def test_words_of_categories_are_masked(title, masked):
    assert clean_title(title, CATEGORY_WORDS)[0] == masked


def test_words_of_sub_categories_are_masked():
    names = [name for names in SUB_CATEGORIES.values() for name in names]
    words = {word for name in names for word in re.split("[_-]", name)} - {"and"}
    title = " ".join(["blue", *sorted(words), "long-sleeved-top gown tshirt linen"])
    pattern = compile_class_words([*CATEGORIES, *names])
    assert clean_title(title, pattern)[0] == "blue linen"


def test_title_without_other_words_is_no_text():
    notes = ("noted: title with nothing but masked words",)
    assert clean_title("dress", CATEGORY_WORDS, tirg=True) == (None, notes)
    assert clean_title(" ", CATEGORY_WORDS) == (None, ("noted: empty title",))


@pytest.mark.parametrize(
    "title", ["a" + "!" * 10**6 + "a-dress", "dress" * 200_000 + "x", "\u00c3" * 10**6]
)
def test_time_does_not_grow_with_the_square_of_the_length(title):
    start_s = time.process_time()
    clean_title(title, CATEGORY_WORDS, tirg=True)
    assert time.process_time() - start_s < 3
