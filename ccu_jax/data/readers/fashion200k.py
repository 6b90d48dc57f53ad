r"""Fashion200k (Han et al., 2017) in its official layout: clothes and their titles.

    labels/<category>_<train or test>_detect_all.txt    path \t score \t title
    women/<category>s/<sub-category>/<product>/<product>_<n>.jpeg     or women.tar.gz

Get it from https://github.com/xthan/fashion-200k ; nothing is ever downloaded here.
"""

import hashlib
import os
import pathlib
from collections.abc import Iterator

from ccu_jax.config.schema import Data
from ccu_jax.data.readers import fashion200k_titles as fashion_titles
from ccu_jax.data.readers.base import (
    MARKER,
    Counts,
    Example,
    Location,
    Reader,
    SkipExample,
    Source,
    Unpack,
    digest,
    hash_fraction,
)
from ccu_jax.data.readers.fashion200k_labels import (
    CATEGORIES,
    LABEL_FILES,
    SUB_CATEGORIES,
    Key,
    Keys,
    parsed,
)
from ccu_jax.data.readers.untrusted_files import (
    Folder,
    iter_lines_with_offsets,
    reject_external_links,
)
from ccu_jax.errors import UserError

PAGE = "https://github.com/xthan/fashion-200k"
ARCHIVE = "women.tar.gz"
_ROOTS = ("fashion-200k", "fashion200k")


def locate(config: Data, workdir: pathlib.Path) -> Location:
    """Returns the user's folder, or the sample edition below the working folder.

    A folder that the user names is never replaced by the sample edition.

    Raises:
        UserError: nothing there that could be read; what is missing.
    """
    if config.task not in ("category", "sub_category"):
        raise UserError(
            f"data.task: {config.task!r} is neither 'category' nor 'sub_category'"
        )
    if config.dir is None:
        return Location(workdir / "sample" / "fashion200k", "sample")
    given = pathlib.Path(os.path.expanduser(config.dir))
    try:
        root = _root(given)
        labels = (root / "labels" / name for name in LABEL_FILES)
        places = dict.fromkeys((*labels, _pictures(root)), root)
        above = given.absolute().parent
        reject_external_links(places | {root: above if root == above else given})
        marked = (root / MARKER).is_file()
    except OSError as error:
        raise UserError(f"data.dir: {given} cannot be read: {error}") from None
    return Location(root, "sample" if marked else "official")


def signature(config: Data, place: Location) -> str:
    """Hash of the label files, and of when folders down to sub-categories changed."""
    marks = []
    for name in LABEL_FILES:
        with (place.root / "labels" / name).open("rb") as file:
            marks.append(hashlib.file_digest(file, "blake2b").hexdigest())
    if place.edition == "sample" and config.dir is None:
        return digest(*marks, (place.root / MARKER).read_bytes())
    women = _pictures(place.root)
    if women.name == ARCHIVE:
        marks.append(str(women.stat().st_size))
    # The folders of products are left out: there are some 70,000.
    for path in [women, *sorted(women.glob("*")), *sorted(women.glob("*/*"))]:
        # As ASCII: a name on a disk need not be Unicode.
        marks.append(f"{path.name!a} {path.lstat().st_mtime_ns}")
    return digest(*marks)


def open_fashion200k(
    config: Data, place: Location, counts: Counts, unpack: Unpack
) -> Source:
    """Reads the label files and looks which pictures there are.

    Raises:
        UserError: not one of the listed pictures is there.
    """
    pictures = _pictures(place.root)
    if pictures.name == ARCHIVE:
        counts.add(f"noted: images in {ARCHIVE}")
        pictures = unpack(pictures)
        women = pictures / "women"
        pictures = women if women.is_dir() else pictures
    rows = _Rows(config, place.root / "labels", pictures)
    keys, listed = _listed(config, rows, counts)
    there, unlisted = _walked(pictures, listed)
    if listed and not there:
        raise UserError(
            f"data.dir: {place.root} has none of the pictures that labels/ lists: "
            f"unpack {ARCHIVE} there, see {PAGE}"
        )
    counts.add("ignored: image that no label file lists", unlisted)
    classes = CATEGORIES
    if config.task == "sub_category":
        classes = tuple(name for names in SUB_CATEGORIES.values() for name in names)
    return Source(classes, False, "accuracy", keys, rows.read, rows.name)


class _Rows:
    """The rows of the label files, read again at each look: texts take no memory."""

    def __init__(self, config: Data, labels: pathlib.Path, pictures: pathlib.Path):
        self._config = config
        self._files = [(labels / name, *told) for name, told in LABEL_FILES.items()]
        self._pictures = Folder(pictures)
        names = list(CATEGORIES)
        if config.task == "sub_category":
            names += [name for subs in SUB_CATEGORIES.values() for name in subs]
        masked = config.mask_category_words
        self._masked = fashion_titles.naming(names) if masked else None

    def all(self) -> Iterator[tuple[Key, str, str, bytes | None]]:
        """Key, category, split and content of each line that is not blank."""
        for file, (path, category, split) in enumerate(self._files):
            try:
                for line, offset, length, raw in iter_lines_with_offsets(path):
                    if raw is None or raw.strip():
                        yield Key(file, line, offset, length), category, split, raw
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error}") from error

    def name(self, key: Key) -> str:
        """What messages call a row."""
        return f"{self._files[key.file][0].name} line {key.line}"

    def read(self, key: Key) -> Example:
        """The row with its picture; see `Source.read`."""
        path, category, split = self._files[key.file]
        try:
            # Opened each time: nothing is shared, so threads need not wait.
            with path.open("rb") as file:
                file.seek(key.offset)
                row = parsed(file.read(key.length), category)
        except (OSError, SkipExample):
            raise SkipExample("label file has changed") from None
        image = self._pictures.read(row.path.removeprefix("women/"), "image")
        title, notes = fashion_titles.cleaned(
            row.title, self._masked, self._config.tirg_dot_token
        )
        if (
            split == "train"
            and hash_fraction("validation", row.product)
            < self._config.validation_fraction
        ):
            split = "validation"
        label = category if self._config.task == "category" else row.sub_category
        name = row.path.removesuffix(".jpeg")
        return Example(name, row.product, image, title, (label,), split, notes)


def _listed(config: Data, rows: _Rows, counts: Counts) -> tuple[Keys, set[int]]:
    """The keys of all rows, and hashes of the paths that are listed."""
    keys, listed = Keys(), set()
    products: dict[str, set[int]] = {"train": set(), "test": set()}
    for key, category, split, raw in rows.all():
        counts.add("read")
        try:
            row = parsed(raw, category)
            path = _hash(row.path)
            if path in listed:
                raise SkipExample("path listed twice")
            listed.add(path)
            known = row.sub_category in SUB_CATEGORIES[category]
            if config.task == "sub_category" and not known:
                raise SkipExample("sub-category unknown")
        except SkipExample as reason:
            counts.skip(str(reason), rows.name(key))
            continue
        products[split].add(_hash(row.product))
        keys.append(key)
    in_both = products["train"] & products["test"]
    counts.add("noted: product in two splits", len(in_both))
    return keys, listed


def _hash(text: str | bytes) -> int:
    return int(digest(text)[:16], 16)


def _walked(pictures: pathlib.Path, listed: set[int]) -> tuple[bool, int]:
    """Whether any listed picture is there, and how many others are."""
    there, others = False, 0
    folders = [("women", str(pictures))]
    while folders:
        below, folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = f"{below}/{entry.name}"
                    if entry.is_dir(follow_symlinks=False):
                        folders.append((name, entry.path))
                    elif name.endswith(".jpeg"):
                        known = _hash(os.fsencode(name)) in listed
                        there, others = there or known, others + (not known)
        except OSError:
            continue  # what is listed in it is counted when it cannot be read
    return there, others


def _pictures(root: pathlib.Path) -> pathlib.Path:
    """The folder or archive with the pictures; an empty folder is the last choice."""
    women, archive = root / "women", root / ARCHIVE
    if archive.is_file() and not (women.is_dir() and any(women.iterdir())):
        return archive
    return women


def _root(given: pathlib.Path) -> pathlib.Path:
    """The folder with labels/ and women/: the given one, one below, or one above."""
    if not given.is_dir():
        raise UserError(f"data.dir: no folder {given}; get Fashion200k from {PAGE}")
    candidates = [given, *(given / name for name in _ROOTS)]
    if given.name in ("labels", "women", "detection"):
        candidates.append(given.absolute().parent)
    # Most complete first; of equals the given one.
    root = max(candidates, key=lambda folder: sum(map(bool, _parts(folder))))
    labels, pictures = _parts(root)
    if not labels and not pictures:
        raise UserError(
            f"data.dir: neither {given} nor {given / _ROOTS[0]} holds labels/ and "
            f"women/: put the files of the release there, see {PAGE}"
        )
    if not labels or not pictures:
        has, lacks = ("labels/", f"women/ or {ARCHIVE}")[:: 1 if labels else -1]
        raise UserError(f"data.dir: {root} holds {has} but no {lacks}; see {PAGE}")
    if gone := [name for name in LABEL_FILES if not (root / "labels" / name).is_file()]:
        raise UserError(f"data.dir: {root}/labels lacks {', '.join(gone)}; see {PAGE}")
    return root


def _parts(root: pathlib.Path) -> tuple[bool, bool]:
    """Whether a folder has label files, and whether it has pictures."""
    women = _pictures(root)
    return (root / "labels").is_dir(), women.is_dir() or women.is_file()


READER = Reader(locate, signature, open_fashion200k)
