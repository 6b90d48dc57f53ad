"""A folder in memory for hostile files, secrets beside it, and who opens what."""

import contextlib
import io
import os
import pathlib
import random
import resource
import shutil
import signal
import stat
import sys
import tarfile
import tempfile
from collections.abc import Iterator

from ccu_jax.data.readers.untrusted_files import is_within
from tests.fuzz import pictures as fuzz_pictures
from tests.fuzz.contents import SECRET, Folder, Hole, Link, Pipe, Tree
from tests.fuzz.data_sets import CASES

BUSY_S, WAITING_S = 5, 60  # of the processor, and by the clock
MEMORY = 500 << 20  # bytes that a case may take


class Failure(Exception):
    """Something happened that must not happen, whatever the files hold."""


class World:
    """A folder for the cases, one after the other, and secret files beside it."""

    def __init__(self, base: pathlib.Path):
        self.root, self.outside = base / "data", base / "outside"
        self.work = base / "work"
        for folder in (self.root, self.outside, self.work):
            folder.mkdir()
        names = (sys.prefix, sys.base_prefix, os.path.dirname(__file__) + "/../..")
        self._known = tuple(map(os.path.realpath, (self.root, self.work, *names)))
        self._secrets()

    def plant(self, tree: Tree) -> None:
        """Writes a case; what cannot be written is left out."""
        # Links first, for some take the place of folders.
        links = {p: node for p, node in tree.items() if isinstance(node, Link)}
        for path, node in (links | tree).items():
            path = os.path.join(self.root, path)
            with contextlib.suppress(OSError, ValueError):
                if links and not is_within(os.path.dirname(path), self.root):
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


_opened: list[tuple] | None = None


def _hook(event: str, args: tuple) -> None:
    if _opened is not None and event == "open":
        _opened.append(args)


_hooked = False


@contextlib.contextmanager
def watched(here: World) -> Iterator[None]:
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
