"""The subword tokenizer."""

import numpy as np

from ccu_jax.data.tokenizer import (
    END,
    PAD,
    UNKNOWN,
    encode,
    load_tokenizer,
    train_tokenizer,
)


def test_tokenizer_does_not_depend_on_the_order_of_texts(tmp_path):
    texts = [f"The {a} sees a {b}" for a in ("lion", "lynx") for b in ("ship", "sheep")]
    first, second = train_tokenizer(texts, 120), train_tokenizer(texts[::-1], 120)
    assert first.to_str() == second.to_str()
    assert first.get_vocab_size() <= 120
    first.save(str(tmp_path / "tokenizer.json"))
    tokens = encode(load_tokenizer(tmp_path / "tokenizer.json"), texts, 9)
    np.testing.assert_array_equal(tokens, encode(first, texts, 9))


def test_each_text_is_truncated_and_ends_with_the_end_token():
    tokenizer = train_tokenizer(["one two three four"] * 3, 200)
    tokens = encode(tokenizer, ["one two three four", "ONE", None, "\u4e16"], 4)
    assert tokens.shape == (4, 4)
    assert tokens.dtype == np.int32
    assert tokens[0, 3] == END
    assert (tokens[0] > 0).all()
    assert tokens[1, 1:].tolist() == [END, 0, 0]
    assert tokens[2].tolist() == [END, 0, 0, 0]
    assert tokens[3, 1:].tolist() == [UNKNOWN, END, 0]


def test_names_of_special_tokens_in_a_text_are_encoded_as_text():
    tokenizer = train_tokenizer(["pad end [ ] words"] * 3, 200)
    tokens = encode(tokenizer, ["[PAD] [END] [UNK] words"], 30)[0]
    length = int((tokens != PAD).sum())
    assert (tokens[: length - 1] > END).sum() >= 8
    assert tokens[length - 1] == END
    assert (tokens[:length] != PAD).all()
