"""The subword tokenizer, trained on the training texts and stored with the data.

Token ids: 0 is padding, 1 an unknown character, 2 the end of a text.
"""

import collections
import os
import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from ccu_jax.errors import UserError

# The library warns on stderr if a process that used its threads forks.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PAD, UNKNOWN, END = 0, 1, 2
_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[END]")
_WORD_START = "\u2581"
# Training time is quadratic in the word length: longer words are split.
_LONG_WORD = re.compile(r"\S{100}(?=\S)")
_CHUNK = 1024  # texts


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Trains a byte-pair encoding on texts, lower-cased and stripped of accents.

    Args:
        texts: training texts; the result does not depend on their order.
        vocabulary: maximum number of token ids; at most 1/4 are single characters.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=_SPECIAL_TOKENS[UNKNOWN]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    # Marking the start of a word keeps "ant" from being a subword of "elephant".
    mark_start = pre_tokenizers.Metaspace(
        replacement=_WORD_START, prepend_scheme="always"
    )
    split_words = pre_tokenizers.BertPreTokenizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split_words, mark_start])
    texts = sorted(_split_long_words(text) for text in texts)
    normalized = map(tokenizer.normalizer.normalize_str, texts)
    alphabet = _choose_alphabet(normalized, vocabulary)
    # The library is deterministic only if it need not choose the characters itself, and
    # never for WordPiece, which numbers them in the order of a hash table.
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _choose_alphabet(texts: Iterable[str], vocabulary: int) -> list[str]:
    """Returns the word-start mark and the `vocabulary // 4` commonest characters."""
    counts = collections.Counter(character for text in texts for character in text)
    by_frequency = sorted(counts, key=lambda character: (-counts[character], character))
    letters = [c for c in by_frequency if not c.isspace() and c != _WORD_START]
    return [_WORD_START, *letters[: vocabulary // 4]]


def load_tokenizer(path: pathlib.Path) -> Tokenizer:
    """Loads a stored tokenizer; raises UserError if it is missing or damaged."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower type
        raise UserError(
            f"{path}: tokenizer is missing or damaged ({error}); use a new --workdir"
        ) from None


def encode(
    tokenizer: Tokenizer, texts: Sequence[str | None], length: int
) -> np.ndarray:
    """Encodes texts as token ids, truncated to `length` including the end token.

    Args:
        tokenizer: from `train_tokenizer` or `load_tokenizer`.
        texts: N texts; a missing text (None) becomes the end token alone.
        length: T, tokens per row, at least 1.

    Returns:
        int32 [N, T], padded with 0.
    """
    tokens = np.full((len(texts), length), PAD, np.int32)
    # Otherwise a text that contains "[PAD]" would be encoded as padding.
    tokenizer.encode_special_tokens = True
    for start in range(0, len(texts), _CHUNK):
        chunk = [_split_long_words(t or "") for t in texts[start : start + _CHUNK]]
        for row, encoding in enumerate(tokenizer.encode_batch(chunk), start=start):
            ids = [*encoding.ids[: length - 1], END]
            tokens[row, : len(ids)] = ids
    return tokens


def _split_long_words(text: str) -> str:
    return _LONG_WORD.sub(r"\g<0> ", text)
