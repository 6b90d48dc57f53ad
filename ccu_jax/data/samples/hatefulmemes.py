"""The sample edition of Hateful Memes: harmless memes of clip art and a sentence.

Label 1 stands for an abstract rule that, as in the official files, picture and sentence
only tell together: that they do not go together.
"""

import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ccu_jax.data.readers.base import Progress
from ccu_jax.data.samples import memes

# Official numbers of distinct memes and about the official shares with label 1. The two
# dev files have memes in common.
_PARTS = {
    "train": (8500, 0.36),
    "dev_both": (400, 0.40),
    "dev_seen": (100, 0.90),
    "dev_unseen": (140, 0.29),
    "test_seen": (1000, 0.49),
    "test_unseen": (2000, 0.375),
}
# Of the memes with label 1: those whose sentence alone tells. (Kiela et al. 2020)
_TEXT_TELLS = 0.2
# Of the memes with label 0: the picture of one with label 1 and another sentence; and
# its sentence and another picture.
_TEXT_TWINS, _PICTURE_TWINS = 0.4, 0.4
_SMALL_ID, _LARGE_ID, _END_ID = 1235, 10_000, 98_765


class _Meme(NamedTuple):
    picture: int  # which of the part's pictures
    shown: int  # the kind of thing in the picture
    said: int  # the kind of thing that the sentence is about; -1: of nothing
    text: str
    label: int


def write(root: pathlib.Path, rows: int, seed: int, progress: Progress) -> None:
    """Writes the layout of the official archive: `data/img/` and five lists."""
    data = root / "data"
    (data / "img").mkdir(parents=True)
    ids = _ids(np.random.default_rng([seed, 0]), rows)
    totals = [total for total, _ in _PARTS.values()]
    ends = np.cumsum(totals) * rows // sum(totals)
    entries: dict[str, list[dict[str, Any]]] = {}
    first = 0
    for part, (name, (_, share)) in enumerate(_PARTS.items()):
        rng = np.random.default_rng([seed, 1, part])
        made = _memes(rng, int(ends[part]) - first, share)
        names = ids[first : first + len(made)]
        for done in _draw(data, made, names, [seed, 2, part]):
            progress("writing the sample edition", first + done, rows)
        entries[name] = [
            {"id": i, "img": f"img/{i}.png", "label": meme.label, "text": meme.text}
            for i, meme in zip(names, made, strict=True)
        ]
        first += len(made)
    both = entries.pop("dev_both")
    rng = np.random.default_rng([seed, 3])
    for name in ("dev_seen", "dev_unseen"):
        joined = both + entries[name]
        entries[name] = [joined[place] for place in rng.permutation(len(joined))]
    for name, listed in entries.items():
        # Official files of both phases of the contest go about together.
        line = number_ids if name == "train" else json.dumps
        text = "".join(line(entry) + "\n" for entry in listed)
        (data / f"{name}.jsonl").write_text(text, "ascii", newline="\n")


def _ids(rng: np.random.Generator, rows: int) -> list[str]:
    """Different official-looking ids; every eleventh begins with a zero."""
    ids = _LARGE_ID + rng.choice(_END_ID - _LARGE_ID, rows, replace=False)
    small = len(ids[::11])
    ids[::11] = _SMALL_ID + rng.choice(_LARGE_ID - _SMALL_ID, small, replace=False)
    return [f"{number:05d}" for number in ids]


def _memes(rng: np.random.Generator, total: int, share: float) -> list[_Meme]:
    """Memes of a part, in random order, in the shares of the paper."""
    ones = round(total * share)
    telling = round(_TEXT_TELLS * ones)
    made = [_apart(rng, number) for number in range(ones - telling)]
    bases, zeros = len(made), total - ones
    pictures = iter(range(bases, total))
    for twin in range(round(_TEXT_TWINS * zeros) if bases else 0):
        base = made[twin % bases]
        text = memes.sentence(rng, base.shown)
        made.append(_Meme(base.picture, base.shown, base.shown, text, 0))
    for twin in range(round(_PICTURE_TWINS * zeros) if bases else 0):
        base = made[bases - 1 - twin % bases]
        made.append(_Meme(next(pictures), base.said, base.said, base.text, 0))
    for _ in range(telling):
        shown = int(rng.integers(len(memes.KINDS)))
        made.append(_Meme(next(pictures), shown, -1, memes.nonsense(rng), 1))
    while len(made) < total:
        kind = int(rng.integers(len(memes.KINDS)))
        text = memes.sentence(rng, kind)
        made.append(_Meme(next(pictures), kind, kind, text, 0))
    return [made[place] for place in rng.permutation(total)]


def _apart(rng: np.random.Generator, picture: int) -> _Meme:
    """A meme whose sentence and picture do not go together."""
    shown, said = rng.choice(len(memes.KINDS), 2, replace=False).tolist()
    return _Meme(picture, shown, said, memes.sentence(rng, said), 1)


def _draw(
    data: pathlib.Path, made: list[_Meme], names: list[str], seeds: list[int]
) -> Iterator[int]:
    """Writes the pictures of memes; those that have one picture get the same bytes."""
    drawn: dict[int, pathlib.Path] = {}
    for done, (name, meme) in enumerate(zip(names, made, strict=True)):
        yield done
        path = data / "img" / f"{name}.png"
        if meme.picture in drawn:
            shutil.copyfile(drawn[meme.picture], path)
        else:
            rng = np.random.default_rng([*seeds, meme.picture])
            path.write_bytes(memes.draw(rng, meme.shown))
            drawn[meme.picture] = path


def number_ids(entry: dict[str, Any]) -> str:
    """A row as the first release has it: the id is a number and loses its zeros."""
    if isinstance(entry.get("id"), str):
        entry = entry | {"id": int(entry["id"])}
    return json.dumps(entry, separators=(",", ":")).replace("/", "\\/")
