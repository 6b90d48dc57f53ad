"""The sample edition of Fashion200k: invented clothes, drawn, with invented titles."""

import pathlib
from collections.abc import Iterator

import numpy as np

from ccu_jax.data.readers.base import Progress
from ccu_jax.data.readers.fashion200k_labels import FOLDERS, LABEL_FILES, SUB_CATEGORIES
from ccu_jax.data.samples import garment_views, garments

# Lines of the official label files, in thousands: test, train.
_LINES = {
    "dress": (6.1, 52.9),
    "jacket": (4.5, 22.6),
    "pants": (5.3, 26.3),
    "skirt": (5.7, 29.4),
    "top": (8.1, 40.7),
}
# Rows of the sub-categories in a thousand of the official release.
_SHARES = {
    "dress": (57, 53, 50, 48, 48, 39),
    "jacket": (33, 30, 17, 17, 16, 11, 10),
    "pants": (36, 28, 25, 21, 18, 18, 6, 4),
    "skirt": (55, 43, 43, 38),
    "top": (45, 44, 41, 37, 37, 34),
}
_VIEWS = (0.2, 0.25, 0.25, 0.2, 0.1)  # share of products with one picture, two, ...
_NOISE = 0.05  # products whose pictures show something of another category
_OWN = 0.8  # a word that leans to a category comes from the product's own
_EXTRAS = 20  # lines a category has in detection/ and image_urls.txt

# Name, share in a thousand, and the colour.
_COLOURS = (
    ("black", 300, (54, 52, 56)),
    ("multicolor", 220, None),
    ("blue", 200, (52, 84, 168)),
    ("white", 60, (236, 234, 228)),
    ("red", 50, (186, 40, 48)),
    ("gray", 45, (128, 128, 132)),
    ("green", 40, (60, 128, 76)),
    ("pink", 35, (226, 140, 168)),
    ("beige", 20, (206, 186, 152)),
    ("purple", 12, (112, 62, 140)),
    ("brown", 10, (112, 76, 50)),
    ("yellow", 8, (226, 200, 70)),
)
# What a pattern is called, and in how many of a hundred garments it is.
_PATTERNS = {
    "plain": (("plain",), 44),
    "striped": (("striped", "pinstriped"), 16),
    "checked": (("checked", "plaid"), 12),
    "dotted": (("polka-dot", "spotted"), 10),
    "floral": (("floral", "botanical"), 12),
    "blocked": (("colorblock", "two-tone"), 6),
}
_NOUNS = {  # the category's own, how often it stands there, and others
    "dress": ("dress", 0.98, ("frock",)),
    "jacket": ("jacket", 0.90, ("coat", "parka", "anorak")),
    "pants": ("pants", 0.78, ("trousers", "slacks", "chinos")),
    "skirt": ("skirt", 0.97, ("kilt",)),
    "top": ("top", 0.91, ("tunic", "pullover", "camisole")),
}
_COMMON = [
    "classic",
    "soft",
    "essential",
    "textured",
    "modern",
    "vintage",
    "relaxed",
    "fitted",
    "light",
    "everyday",
    "embroidered",
    "ruffled",
    "contrast",
    "signature",
    "fine",
    "linen",
    "silk",
    "cotton",
    "wool",
    "jersey",
    "satin",
    "crepe",
    "knit",
    "lace",
    "chiffon",
    "velvet",
    "woven",
    "washed",
    "layered",
    "draped",
]
# Words that lean to a category; the n-th pair of them to its n-th sub-category.
_LEANING = {
    "dress": (
        "evening beaded tulle sweetheart strapless flirty smock tea wrap halter bodice "
        "train"
    ),
    "jacket": (
        "zip hooded biker studded lined belted windproof down-filled lapel breasted "
        "trucker rugged shearling shaggy"
    ),
    "pants": (
        "stretch sporty flared slouch ankle rolled low-rise fitted-leg crease tailored "
        "high-rise pleat-front drawstring dropped utility ripstop"
    ),
    "skirt": "a-line pleated denim-look buttoned pencil tube tiered gathered",
    "top": (
        "ribbed turtleneck crew-neck boxy collared placket racerback scoop graphic "
        "heather tie-neck peplum"
    ),
}
_SYLLABLES = "ba do fen gri ha jo kel lu mar nim or pel ru sta tov ul ven wi yas zo"


def write(root: pathlib.Path, rows: int, seed: int, progress: Progress) -> None:
    """Writes the layout of the official folder `fashion-200k/`."""
    (root / "labels").mkdir()
    done = product = 0
    for (name, (category, _)), size in zip(
        LABEL_FILES.items(), _sizes(rows), strict=True
    ):
        # Written as it is made: of all that there is, no list is kept.
        with (root / "labels" / name).open("w", encoding="utf-8", newline="\n") as file:
            end = done + size
            while done < end:
                rng = np.random.default_rng([seed, product])
                views = min(end - done, 1 + int(rng.choice(5, p=_VIEWS)))
                number = _number(product, seed)
                for line in _product(root, rng, category, number, views):
                    progress("writing the sample edition", done, rows)
                    file.write(line)
                    done += 1
                product += 1
    _write_extras(root)


def _sizes(rows: int) -> list[int]:
    """Lines of each label file: the official shares, at least one."""
    shares = np.array([share for both in _LINES.values() for share in both])
    exact = 1 + (rows - len(shares)) * shares / shares.sum()
    sizes = exact.astype(int)
    sizes[np.argsort(sizes - exact, kind="stable")[: rows - sizes.sum()]] += 1
    return sizes.tolist()


def _number(product: int, seed: int) -> str:
    """The id of the n-th product: mostly 8 digits, no two the same, in no order."""
    if product % 2500 == 7:
        return str(1_000_000 + (product // 2500 + 7919 * seed) % 9_000_000)
    # The factor and the number of ids have no common divisor.
    return str(10_000_000 + (48_271_003 * (product + 1) + 7919 * seed) % 90_000_000)


def _product(
    root: pathlib.Path,
    rng: np.random.Generator,
    category: str,
    number: str,
    views: int,
) -> Iterator[str]:
    """Draws the pictures of a product; gives a line for each."""
    sub = _sub_category(rng, category)
    shown = sub
    if rng.random() < _NOISE:
        others = [name for name in SUB_CATEGORIES if name != category]
        shown = _sub_category(rng, others[rng.integers(len(others))])
    colour, colours = _colours(rng)
    patterns = list(_PATTERNS)[colour == "multicolor" :]  # that is never plain
    weights = np.array([_PATTERNS[pattern][1] for pattern in patterns], float)
    pattern = patterns[rng.choice(len(patterns), p=weights / weights.sum())]
    title = _title(rng, category, sub, colour, pattern)
    garment = garments.design(rng, shown, colours, pattern)
    plural = next(folder for folder, name in FOLDERS.items() if name == category)
    folder = f"women/{plural}/{sub}/{number}"
    (root / folder).mkdir(parents=True)
    # Numbers have gaps where a detector was not sure of the garment.
    kept = np.sort(rng.permutation(views + int(rng.integers(3)))[:views])
    for index in kept.tolist():
        path = f"{folder}/{number}_{index}.jpeg"
        (root / path).write_bytes(garment_views.view(rng, garment))
        yield f"{path}\t{-0.05 - rng.gamma(2, 0.8):.6f}\t{title}\n"


def _sub_category(rng: np.random.Generator, category: str) -> str:
    shares = np.array(_SHARES[category])
    return SUB_CATEGORIES[category][rng.choice(len(shares), p=shares / shares.sum())]


def _colours(rng: np.random.Generator) -> tuple[str, np.ndarray]:
    """A colour's name; float [2, 3]: what it looks like, and what goes with it."""
    shares = np.array([share for _, share, _ in _COLOURS])
    colour, _, look = _COLOURS[rng.choice(len(shares), p=shares / shares.sum())]
    colours = rng.uniform(20, 240, (2, 3))
    if look:
        colours[0] = look + rng.normal(0, 10, 3)
        if rng.random() < 0.5:  # lighter or darker of the same
            colours[1] = colours[0] + rng.uniform(40, 90) * (
                1 if colours[0].mean() < 128 else -1
            )
    return colour, colours.clip(0, 255)


def _title(
    rng: np.random.Generator, category: str, sub: str, colour: str, pattern: str
) -> str:
    """Such as "blue striped linen wrap dress"; lower case, at most 76 characters."""
    words = []
    if rng.random() < 0.3:
        words.append("".join(rng.choice(_SYLLABLES.split(), rng.integers(2, 4))))
    if rng.random() < 0.6 and pattern != "plain":
        names = _PATTERNS[pattern][0]
        words.append(names[rng.integers(len(names))])
    for _ in range(int(rng.choice(7, p=(0.1, 0.37, 0.32, 0.13, 0.05, 0.02, 0.01)))):
        words.append(_style(rng, category, sub))
    if rng.random() < 0.25:
        named = [w for w in sub.split("_")[:-1] if w != "and"] or [
            sub.split("_", maxsplit=1)[0]
        ]
        words.append(named[rng.integers(len(named))])
    if not words:
        words.append(_style(rng, category, sub))
    own, share, others = _NOUNS[category]
    noun = own if rng.random() < share else others[rng.integers(len(others))]
    words = list(dict.fromkeys([colour, *words, noun]))
    while len(" ".join(words)) > 76:
        words.pop(1)
    return " ".join(words)


def _style(rng: np.random.Generator, category: str, sub: str) -> str:
    """A word that says something of the category, or nothing."""
    if rng.random() < 0.3:
        return _COMMON[rng.integers(len(_COMMON))]
    if rng.random() > _OWN:
        category = list(_LEANING)[rng.integers(len(_LEANING))]
        sub = _sub_category(rng, category)
    words = _LEANING[category].split()
    if rng.random() < 0.5:
        first = 2 * SUB_CATEGORIES[category].index(sub)
        words = words[first : first + 2]
    return words[rng.integers(len(words))]


def _write_extras(root: pathlib.Path) -> None:
    """A few lines of the release's other files, which no loader needs."""
    (root / "detection").mkdir()
    with (root / "image_urls.txt").open("w", encoding="utf-8", newline="\n") as urls:
        for category in _LINES:
            lines = []
            with (root / "labels" / f"{category}_train_detect_all.txt").open() as file:
                for line, _ in zip(file, range(_EXTRAS), strict=False):
                    path, score, _ = line.split("\t")
                    found = f"{category}_{float(score):.2f}_0.23_0.74_0.20_0.86"
                    lines.append(f"{path}\t{found}\tshoe_-3.10_0.41_0.60_0.88_1.01\n")
                    urls.write(
                        f"{path}\thttp://example.org/{path.rpartition('/')[2]}\n"
                    )
            path = root / "detection" / f"women_{category}_detection.txt"
            path.write_text("".join(lines), "utf-8", newline="\n")
