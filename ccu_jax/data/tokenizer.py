"""The subword tokeniser: trained on the training texts, stored with the data.

Ids: 0 pads, 1 stands for an unknown character, 2 ends every text.
"""

import collections
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ccu_jax.errors import UserError

PAD, UNKNOWN, END = 0, 1, 2
_SPECIAL = ("[PAD]", "[UNK]", "[END]")
_START = "\u2581"
# Learning subwords takes the square of a word's length: longer ones are cut up.
_LONG = re.compile(r"\S{100}(?=\S)")


def _library() -> Any:
    # Its threads and a later fork do not go together, and it says so on stderr.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import tokenizers

    return tokenizers


def train(texts: Iterable[str], vocabulary: int) -> Any:
    """Learns subwords (byte-pair encoding, lower-cased, accents dropped) from texts.

    Args:
        texts: Training texts; the result depends on them and not on their order.
        vocabulary: Largest number of ids; a quarter of it may be single characters.

    Returns:
        A `tokenizers.Tokenizer`.
    """
    tok = _library()
    tokenizer = tok.Tokenizer(tok.models.BPE(unk_token=_SPECIAL[UNKNOWN]))
    tokenizer.normalizer = tok.normalizers.BertNormalizer(lowercase=True)
    # The first piece of a word carries a mark, so "ant" is not a piece of "elephant".
    mark = tok.pre_tokenizers.Metaspace(replacement=_START, prepend_scheme="always")
    words = tok.pre_tokenizers.BertPreTokenizer()
    tokenizer.pre_tokenizer = tok.pre_tokenizers.Sequence([words, mark])
    texts = sorted(_LONG.sub(r"\g<0> ", text) for text in texts)
    alphabet = _alphabet(map(tokenizer.normalizer.normalize_str, texts), vocabulary)
    # The library is the same from run to run only if it need not choose characters
    # itself, and never so for WordPiece: it numbers them in the order of a hash table.
    trainer = tok.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(_SPECIAL),
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _alphabet(texts: Iterable[str], vocabulary: int) -> list[str]:
    counted = collections.Counter(character for text in texts for character in text)
    ordered = sorted(counted, key=lambda character: (-counted[character], character))
    letters = [c for c in ordered if not c.isspace() and c != _START]
    return [_START, *letters[: vocabulary // 4]]


def load(path: pathlib.Path) -> Any:
    """Reads a stored tokeniser.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return _library().Tokenizer.from_file(str(path))
    except Exception as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def encode(tokenizer: Any, texts: Sequence[str | None], length: int) -> np.ndarray:
    """Token ids of texts, each cut to fit and closed by the end token.

    Args:
        tokenizer: From `train` or `load`.
        texts: N texts; None is no text at all and becomes the end token alone.
        length: T, tokens a row, at least 1.

    Returns:
        int32 [N, T], padded with 0.
    """
    tokens = np.full((len(texts), length), PAD, np.int32)
    tokenizer.encode_special_tokens = True  # a text that says "[PAD]" pads nothing
    step = 1024
    for first in range(0, len(texts), step):
        chunk = [
            _LONG.sub(r"\g<0> ", text or "") for text in texts[first : first + step]
        ]
        for row, encoding in enumerate(tokenizer.encode_batch(chunk), start=first):
            ids = encoding.ids[: length - 1] + [END]
            tokens[row, : len(ids)] = ids
    return tokens
