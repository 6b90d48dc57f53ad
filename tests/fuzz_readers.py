"""Fuzzes the readers of data sets: hostile files may cause clear errors, nothing else.

    python tests/fuzz_readers.py --cases 100000 --seed 0 mmimdb csv pictures

A case is what an enemy wrote. It is planted in a folder in memory, found, opened and
read as training does. Allowed are a row, a row that is left out for a reason, and an
error of one line. A number repeats a case: `--only 1234`.
"""

import argparse
import collections
import contextlib
import dataclasses
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator

import fuzz_archives
import fuzz_pictures
import numpy as np
from fuzz_contents import SECRET, Folder, Hole, Link, Pipe, Tree
from fuzz_data_sets import CASES, Case

from ccu_jax import unlearn_set
from ccu_jax.config import Data
from ccu_jax.data import (
    DATASETS,
    Dataset,
    archive,
    arrays,
    files,
    parts,
    pictures,
    prepare,
)
from ccu_jax.data.files import within
from ccu_jax.data.source import SPLITS, Counts, Example, Source, Unusable, digest
from ccu_jax.errors import UserError

BUSY_S, WAITING_S = 5, 60  # of the processor, and by the clock
MEMORY = 500 << 20  # bytes that a case may take
WHOLE = 0.01  # share of the cases that are also stored
STRICT = 0.1  # share of the cases in which a row that cannot be used is an error
_LONGEST = 1500  # characters of a message
_FORBIDDEN = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_UNFIT = re.compile("[\0\ud800-\udfff]")  # for a text, which may have lines
_SIZES = {"image_size": 8, "text_length": 4, "vocabulary": 100}


class Failure(Exception):
    """Something happened that must not happen, whatever the files hold."""


class World:
    """A folder for the cases, one after the other, and secret files beside it."""

    def __init__(self, base: pathlib.Path):  # noqa: D107
        self.root, self.outside = base / "data", base / "outside"
        self.work = base / "work"
        for folder in (self.root, self.outside, self.work):
            folder.mkdir()
        names = (sys.prefix, sys.base_prefix, os.path.dirname(__file__) + "/..")
        self._known = tuple(map(os.path.realpath, (self.root, self.work, *names)))
        self._secrets()

    def plant(self, tree: Tree) -> None:
        """Writes a case; what cannot be written is left out."""
        # Links first, for some take the place of folders.
        links = {p: node for p, node in tree.items() if isinstance(node, Link)}
        for path, node in (links | tree).items():
            path = os.path.join(self.root, path)
            with contextlib.suppress(OSError, ValueError):
                if links and not within(os.path.dirname(path), self.root):
                    continue  # nothing is written where a link leads to
                os.makedirs(os.path.dirname(path), exist_ok=True)
                if isinstance(node, bytes):
                    with open(path, "xb") as file:
                        file.write(node)
                elif isinstance(node, Link):
                    target = node.target.format(
                        name=os.path.basename(path), **vars(self)
                    )
                    os.symlink(target, path)
                elif isinstance(node, Pipe):
                    os.mkfifo(path)
                elif isinstance(node, Folder):
                    os.mkdir(path)
                elif isinstance(node, Hole):
                    with open(path, "xb") as file:
                        file.truncate(node.size)

    def clear(self) -> None:
        """Removes what the case has left."""
        for folder in (self.root, self.work):
            _empty(str(folder))

    def check(self, opened: list[tuple]) -> None:
        """Refuses files that were opened and are none of the case's."""
        # One that is open already has a number for a name.
        named = {(path, flags) for path, _, flags in opened if type(path) is not int}
        for path, flags in named:
            real = os.path.realpath(os.fsdecode(path))
            if not real.startswith(self._known):
                raise Failure(f"opened {path!r}, which is {real!r}")
            if not flags & os.O_NONBLOCK:
                with contextlib.suppress(OSError):
                    if stat.S_ISFIFO(os.stat(real).st_mode):
                        raise Failure(f"opened a pipe: {path!r}")

    def _secrets(self) -> None:
        """Files that would be read with pleasure if they lay in the right place."""
        import io
        import tarfile

        secret, png = SECRET.encode(), fuzz_pictures.SMALL[0] + SECRET.encode()
        movie = b'{"plot": ["%b"], "genres": ["Drama"]}' % secret
        row = b'{"id": "%b", "text": "%b", "label": "%b"}\n'
        path = f"women/dresses/gowns/1/{SECRET}.jpeg"
        files = {
            "secret.txt": secret,
            "secret.json": movie,
            "secret.png": png,
            "a.png": png,
            "images/0.png": png,
            "images/1.png": png,
            "pairs.jsonl": b"".join(
                row % (secret + b"ab"[n : n + 1], secret, b"xy"[n : n + 1])
                for n in (0, 1)
            ),
            "pairs.csv": b"id,text,label\n%b,%b,x\nb,b,y\n" % (secret, secret),
            "labels.txt": f"{path}\t0\t{SECRET}\n".encode(),
            "mmimdb/split.json": b'{"train": ["0000001"], "dev": [], "test": []}',
            "mmimdb/dataset/0000001.json": movie,
            "mmimdb/dataset/0000001.jpeg": png,
            f"fashion/{path}": png,
            "memes/img/00001.png": png,
        }
        files |= {f"pairs/{name}": files[name] for name in ("pairs.jsonl", "pairs.csv")}
        del files["pairs/pairs.csv"]
        for name in CASES["fashion200k"](random.Random(0)).tree:
            if "labels/" in name:
                files[f"fashion/labels/{name.rpartition('/')[2]}"] = b""
        files["fashion/labels/dress_train_detect_all.txt"] = files["labels.txt"]
        for name in ("train", "dev", "test"):
            text = '{"id": 1, "img": "img/00001.png", "label": 0, "text": "%s"}\n'
            files[f"memes/{name}.jsonl"] = (text % SECRET).encode()
        for name, data in files.items():
            (self.outside / name).parent.mkdir(parents=True, exist_ok=True)
            (self.outside / name).write_bytes(data)
        with tarfile.open(self.outside / "secret.tar.gz", "w:gz") as file:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))


def _empty(folder: str) -> None:
    with os.scandir(folder) as found:
        entries = list(found)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


@contextlib.contextmanager
def world() -> Iterator[World]:
    """A world in memory where the system has a folder for that."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fuzz", dir=memory) as base:
        yield World(pathlib.Path(base))


# --- what must hold -------------------------------------------------------------------

_opened: list[tuple] | None = None


def _hook(event: str, args: tuple) -> None:
    if _opened is not None and event == "open":
        _opened.append(args)


_hooked = False


@contextlib.contextmanager
def _watched(here: World) -> Iterator[None]:
    """Checks time, memory and opened files of what is done in it."""
    global _opened, _hooked
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked = True
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _opened = opened = []
    signal.setitimer(signal.ITIMER_PROF, BUSY_S)
    signal.setitimer(signal.ITIMER_REAL, WAITING_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _opened = None
    here.check(opened)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    grown <<= 0 if sys.platform == "darwin" else 10  # which counts in bytes
    if grown > MEMORY:
        raise Failure(f"took {grown >> 20} MiB")


class Hang(BaseException):
    """It takes too long. No plain exception, so that nobody takes it for damage."""


@contextlib.contextmanager
def alarms() -> Iterator[None]:
    """While this lasts, a case that takes too long is a failure."""

    def ring(number, frame):
        raise Hang(f"over {BUSY_S} s of work or {WAITING_S} s of waiting")

    old = {name: signal.signal(name, ring) for name in (signal.SIGPROF, signal.SIGALRM)}
    try:
        yield
    finally:
        for name, handler in old.items():
            signal.signal(name, handler)


def _clear_message(error: UserError) -> str:
    message = str(error)
    if SECRET in message:
        raise Failure(f"an error tells the secret: {message!r}")
    if (
        not message
        or len(message) > _LONGEST
        or _FORBIDDEN.search(
            re.sub(
                "[\udc80-\udcff]", "", message
            )  # bytes of a name, escaped when printed
        )
    ):
        raise Failure(f"is no clear message: {message[:3000]!r}")
    return message


def _told(names) -> None:
    """What is counted goes into reports: nothing in it may come from the files."""
    for name in names:
        if (
            SECRET in name
            or len(name) > 90
            or not (name.isascii() and name.isprintable())
        ):
            raise Failure(f"a count is called {name!r}")


def _checked(example: Example, source: Source) -> None:
    """Refuses an example that something later would stumble over."""
    words = (example.id, example.group, *example.labels)
    for word in words:
        if not word or word != word.strip() or _FORBIDDEN.search(word):
            raise Failure(f"a name that does not survive a file: {word!r}")
        if str(np.array([word])[0]) != word or SECRET in word:
            raise Failure(f"a name that does not survive an array: {word!r}")
    if f"{example.id} ".startswith("# "):
        raise Failure(f"an id that a list of ids takes for a comment: {example.id!r}")
    if example.text is not None and (
        not example.text.strip() or _UNFIT.search(example.text)
    ):
        raise Failure(f"a text that does not survive a file: {example.text!r}")
    if SECRET in (example.text or "") or SECRET.encode() in (example.image or b""):
        raise Failure("the secret is out")
    if example.image is None and example.text is None:
        raise Failure("a row with nothing to see or read")
    if example.split not in SPLITS or not set(example.labels) <= set(source.classes):
        raise Failure(f"split or label unknown: {example.split!r} {example.labels!r}")
    if len(set(example.labels)) != (len(example.labels) if source.multi_label else 1):
        raise Failure(f"not one label: {example.labels!r}")
    _told(example.notes)


def _quiet(*told) -> None:
    pass


# --- one case of each kind ------------------------------------------------------------


def read(here: World, case: Case, *, strict: bool = False, whole: bool = False):
    """Reads a data set; gives what happened, raises Failure.

    Args:
        here: where it is planted.
        case: the data set.
        strict: whether a row that cannot be used is an error.
        whole: whether it is also stored.
    """
    here.plant(case.tree)
    config = Data(
        dataset=case.dataset,
        dir=str(here.root),
        **{"strict": strict, **_SIZES, **case.settings},
    )
    try:
        with _watched(here):
            counts = _read(here, config)
            if whole:
                counts |= {"stored": 1, **_store(here, config)}
    except UserError as error:
        message = _clear_message(error).replace(str(here.root), "ROOT")
        return {"error: " + message.replace(str(here.work), "WORK"): 1}
    _told(counts)
    return counts


def _opened_source(here: World, config: Data, counts: Counts) -> Source:
    reader = DATASETS[config.dataset]

    def unpack(path: pathlib.Path) -> pathlib.Path:
        folder = here.work / "unpacked" / digest(str(path))
        return archive.unpack(path, folder, counts, _quiet)

    place = reader.locate(config, here.work, _quiet)
    if reader.signature(config, place) != reader.signature(config, place):
        raise Failure("two marks of the same files")
    return reader.open(config, place, counts, unpack)


def _read(here: World, config: Data) -> dict[str, int]:
    counts = Counts(str(here.root), config.strict)
    source = _opened_source(here, config, counts)
    ids: set[str] = set()
    for key in source.keys:
        try:
            example = source.read(key)
        except Unusable as reason:
            counts.skip(str(reason), source.name(key))
            continue
        _checked(example, source)
        if example.id in ids:
            raise Failure(f"an id twice: {example.id!r}")
        ids.add(example.id)
        for note in example.notes:
            counts.add(note)
    left_out = sum(
        number
        for name, number in counts.numbers.items()
        if name.startswith("skipped: ") and "archive member" not in name
    )
    if counts.numbers.get("read", 0) != len(ids) + left_out:
        raise Failure(f"{len(ids)} rows are used, {counts.numbers}")
    return counts.numbers | {"used": len(ids)} if ids else counts.numbers


def _store(here: World, config: Data) -> dict[str, int]:
    """Everything up to what training reads, and the lists that are made of it."""
    scratch = prepare.folders(here.work).new
    scratch.mkdir()
    counts = Counts(str(here.root), config.strict)
    source = _opened_source(here, config, counts)
    parts.collect(source, scratch, config, counts, _quiet, None)
    meta = arrays.finish(scratch, source, config, counts, _quiet)
    columns = arrays.load(scratch)
    data = Dataset(
        name=config.dataset,
        edition="own",
        **columns,
        **{key: meta[key] for key in Dataset._fields if key in meta},
    )
    if len(set(data.id.tolist())) != len(data.id):
        raise Failure("an id twice once they are stored")
    train = np.flatnonzero(data.split == "train")
    sets = unlearn_set.Sets(*[train] * 2, *[np.flatnonzero(data.split == "test")] * 3)
    (here.work / "lists").mkdir()
    text = unlearn_set.describe(data, sets, 0, "random:0.1")
    (here.work / "lists" / "0.txt").write_bytes(text.encode("utf-8"))
    unlearn_set.describe_near(data, sets, {"train": train}).encode("utf-8")
    found = unlearn_set.recorded(data, here.work / "lists", "report")
    if found != set(data.id[train].tolist()):
        raise Failure(f"a list of ids loses some: {found} {data.id[train].tolist()}")
    return counts.numbers


def unpack(here: World, data: bytes, strict: bool = False) -> dict[str, int]:
    """Unpacks an archive; gives what happened, raises Failure."""
    path, folder = here.root / "a", here.work / "below" / "new"
    path.write_bytes(data)
    counts = Counts("here", strict)
    try:
        with _watched(here):
            archive.unpack(path, folder, counts, _quiet)
    except UserError as error:
        if os.listdir(folder.parent) if folder.parent.exists() else ():
            raise Failure(f"left {os.listdir(folder.parent)}") from None
        message = _clear_message(error).replace(str(here.root), "ROOT")
        return {"error: " + re.sub(r"damaged \(.*\)", "damaged", message): 1}
    _told(counts.numbers)
    if sorted(os.listdir(folder.parent)) != ["new", "new.json"]:
        raise Failure(f"wrote {os.listdir(folder.parent)}")
    count = 0
    for above, folders, names in os.walk(folder):
        for name in (*folders, *names):
            mode = os.lstat(os.path.join(above, name)).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or mode & 0o7022:
                raise Failure(f"unpacked {name!r} with mode {mode:o}")
        count += len(names)
    if here.root.stat().st_nlink != 2 or os.listdir(here.root) != ["a"]:
        raise Failure(f"wrote {os.listdir(here.root)}")
    return counts.numbers | ({"unpacked a file": count} if count else {"nothing": 1})


def decode(here: World, data: bytes, size: int, trim: bool) -> dict[str, int]:
    """Decodes a picture; gives what happened, raises Failure."""
    with _watched(here):
        try:
            square, notes = pictures.decode(data, size, trim)
        except Unusable as reason:
            _told([str(reason)])
            return {f"skipped: {reason}": 1}
    if square.shape != (size, size, 3) or square.dtype != np.uint8:
        raise Failure(f"a square {square.shape} of {square.dtype}")
    _told(notes)
    return {"decoded": 1, **dict.fromkeys(notes, 1)}


# --- many cases -----------------------------------------------------------------------

Target = Callable[[World, random.Random], dict[str, int]]


def _archives(here: World, rng: random.Random) -> dict[str, int]:
    return unpack(here, fuzz_archives.archive(rng), rng.random() < STRICT)


def _pictures(here: World, rng: random.Random) -> dict[str, int]:
    data = fuzz_pictures.hostile_picture(rng)
    return decode(here, data, rng.choice((4, 8, 48)), rng.random() < 0.3)


def _data_set(name: str) -> Target:
    def run(here: World, rng: random.Random) -> dict[str, int]:
        strict, whole = rng.random() < STRICT, rng.random() < WHOLE
        return read(here, CASES[name](rng), strict=strict, whole=whole)

    return run


TARGETS: dict[str, Target] = {name: _data_set(name) for name in CASES}
TARGETS |= {"archives": _archives, "pictures": _pictures}


@dataclasses.dataclass
class Campaign:
    """What came of the cases of a target."""

    cases: int = 0
    outcomes: collections.Counter = dataclasses.field(
        default_factory=collections.Counter
    )
    failures: dict[str, list[int]] = dataclasses.field(default_factory=dict)


def campaign(
    target: str, numbers: range, seed: int, tell: Callable[[str], None] = _quiet
) -> Campaign:
    """Runs cases of a target by their numbers.

    Args:
        target: a key of TARGETS.
        numbers: of the cases.
        seed: of all of them.
        tell: called with a line to print now and then, and at each new failure.
    """
    found, begun, told = Campaign(), time.monotonic(), time.monotonic()
    with world() as here, alarms(), _small_limits():
        for number in numbers:
            try:
                outcome = TARGETS[target](
                    here, random.Random(f"{seed}/{target}/{number}")
                )
            except (Exception, Hang) as error:
                at = _place(error)
                kind = f"{type(error).__name__} at {at}"
                if kind not in found.failures:
                    tell(f"FAILURE in case {number}\n" + traceback.format_exc()[-3000:])
                found.failures.setdefault(kind, []).append(number)
                outcome = {"failure": 1}
            here.clear()
            found.cases += 1
            found.outcomes.update(_kinds(outcome))
            if time.monotonic() - told > 20:
                told = time.monotonic()
                rate = found.cases / (told - begun)
                tell(f"{target}: {found.cases:,} cases, {rate:,.0f} a second")
    tell(f"{target}: {found.cases:,} cases in {time.monotonic() - begun:.0f} s")
    return found


def _place(error: BaseException) -> str:
    """Where it happened: the last line of the project's own, and what it said."""
    told = "" if isinstance(error, Hang) else f": {str(error)[:24]!a}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if "ccu_jax" in frame.filename or isinstance(error, Failure):
            return f"{pathlib.Path(frame.filename).name}:{frame.lineno}{told}"
    return told


def _kinds(outcome: dict[str, int]) -> set[str]:
    """The kinds of things that happened in a case, without names and numbers."""
    kinds = set()
    for name in outcome:
        if " (data.strict is on" in name:
            name = "strict: " + name.partition(" (data.strict")[0].rpartition(": ")[2]
        elif name.startswith("error: "):
            name = re.sub(
                r"(?<=ROOT)\S*|(?<=WORK)\S*|'[^']*'|\"[^\"]*\"|\(.*\)", "", name
            )
            name = re.sub("[0-9][0-9,]*", "N", name)[:70]
        kinds.add(name)
    return kinds


@contextlib.contextmanager
def _small_limits() -> Iterator[None]:
    """Archives and lines are too large at a small size: the same code, much faster."""
    before = archive.ALWAYS, files.MAX_LINE
    archive.ALWAYS, files.MAX_LINE = 1 << 20, 3000
    try:
        yield
    finally:
        archive.ALWAYS, files.MAX_LINE = before


def main() -> int:
    """The command; gives its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", default=list(TARGETS), metavar="TARGET")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", type=int, help="number of a case to repeat")
    flags = parser.parse_args()
    first = flags.first if flags.only is None else flags.only
    numbers = range(first, first + (flags.cases if flags.only is None else 1))
    failed = 0
    for target in flags.targets:
        found = campaign(
            target, numbers, flags.seed, lambda line: print(line, flush=True)
        )
        for name, count in found.outcomes.most_common():
            print(f"{count:9,}  {ascii(name)[1:-1]}")
        for kind, where in found.failures.items():
            print(f"FAILURES {kind}: {len(where):,} cases, such as {where[:5]}")
        failed += len(found.failures)
    print(f"{failed} kinds of failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
