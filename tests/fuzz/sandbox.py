"""A folder for hostile files next to secret files, and a monitor of opened files."""

import contextlib
import io
import os
import pathlib
import resource
import shutil
import signal
import stat
import sys
import tarfile
import tempfile
from collections.abc import Iterator

from ccu_jax.data.readers.fashion200k import LABEL_FILES
from ccu_jax.data.readers.untrusted_files import is_within
from tests.fuzz.contents import SECRET, SMALL, Link, Tree

MAX_CPU_S, MAX_WALL_S = 5, 60
MAX_BYTES = 500 << 20  # of memory that a case may take


class Failure(Exception):
    """Raised if a property that must hold for all files is violated."""


class Hang(BaseException):
    """Raised if a case takes too long; a BaseException, so no reader catches it."""


class Sandbox:
    """A folder that cases use in turn, next to a folder of secret files."""

    def __init__(self, base: pathlib.Path):
        self.root, self.outside = base / "data", base / "outside"
        self.work = base / "work"
        for folder in (self.root, self.outside, self.work):
            folder.mkdir()
        checkout = os.path.dirname(__file__) + "/../.."
        paths = (self.root, self.work, sys.prefix, sys.base_prefix, checkout)
        self._allowed = tuple(os.path.realpath(path) for path in paths)
        self._write_secrets()

    def write(self, tree: Tree) -> None:
        """Writes the files of a case, except those the file system rejects."""
        # Links first, as some replace folders.
        links = {p: node for p, node in tree.items() if isinstance(node, Link)}
        for path, node in (links | tree).items():
            path = os.path.join(self.root, path)
            with contextlib.suppress(OSError, ValueError):
                if links and not is_within(os.path.dirname(path), self.root):
                    continue  # never write through a link
                os.makedirs(os.path.dirname(path), exist_ok=True)
                if isinstance(node, Link):
                    names = {"root": self.root, "outside": self.outside}
                    name = os.path.basename(path)
                    os.symlink(node.target.format(name=name, **names), path)
                elif callable(node):
                    node(path)
                else:
                    with open(path, "xb") as file:
                        write = file.truncate if isinstance(node, int) else file.write
                        write(node)

    def clear(self) -> None:
        """Removes the files of a case."""
        for path in (*self.root.iterdir(), *self.work.iterdir()):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def check_opened(self, opened: list[tuple]) -> None:
        """Raises Failure if files other than those of the case were opened."""
        # Reopening a descriptor is reported with a number instead of a path.
        for path, flags in {(p, flags) for p, _, flags in opened if type(p) is not int}:
            real = os.path.realpath(os.fsdecode(path))
            if not real.startswith(self._allowed):
                raise Failure(f"opened {path!r}, which is {real!r}")
            if not flags & os.O_NONBLOCK:
                with contextlib.suppress(OSError):
                    if stat.S_ISFIFO(os.stat(real).st_mode):
                        raise Failure(f"opened a pipe: {path!r}")

    def _write_secrets(self) -> None:
        """Writes valid files outside the data folder, marked with SECRET."""
        secret, png = SECRET.encode(), SMALL[0] + SECRET.encode()
        movie = b'{"plot": ["%b"], "genres": ["Drama"]}' % secret
        row = b'{"id": "%b%b", "text": "%b", "label": "x"}\n'
        path = f"women/dresses/gowns/1/{SECRET}.jpeg"
        label = f"{path}\t0\t{SECRET}\n".encode()
        meme = b'{"img": "img/00001.png", "label": 0, "text": "%b"}\n' % secret
        jsonl = b"".join(row % (secret, name, secret) for name in (b"a", b"b"))
        images = ("secret.png", "a.png", "images/0.png", "images/1.png")
        images += ("mmimdb/dataset/0000001.jpeg", f"fashion/{path}")
        files = dict.fromkeys((*images, "memes/img/00001.png"), png) | {
            "secret.txt": secret,
            "secret.json": movie,
            "pairs.jsonl": jsonl,
            "pairs/pairs.jsonl": jsonl,
            "pairs.csv": b"id,text,label\n%b,%b,x\nb,b,y\n" % (secret, secret),
            "labels.txt": label,
            "mmimdb/split.json": b'{"train": ["0000001"], "dev": [], "test": []}',
            "mmimdb/dataset/0000001.json": movie,
        }
        files |= {f"fashion/labels/{name}": label for name in LABEL_FILES}
        files |= {f"memes/{name}.jsonl": meme for name in ("train", "dev", "test")}
        with tarfile.open(self.outside / "secret.tar.gz", "w:gz") as archive:
            for name, data in files.items():
                (self.outside / name).parent.mkdir(parents=True, exist_ok=True)
                (self.outside / name).write_bytes(data)
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


@contextlib.contextmanager
def make_sandbox() -> Iterator[Sandbox]:
    """Yields a sandbox, in memory if possible; a case that takes long raises Hang."""

    def raise_hang(number, frame):
        raise Hang(f"over {MAX_CPU_S} s of work or {MAX_WALL_S} s of waiting")

    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    signals = (signal.SIGPROF, signal.SIGALRM)
    old = {number: signal.signal(number, raise_hang) for number in signals}
    try:
        with tempfile.TemporaryDirectory(prefix="fuzz", dir=memory) as base:
            yield Sandbox(pathlib.Path(base))
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


_records: list[list[tuple]] = []  # files opened in a block of `watch`


def _record_opened(event: str, args: tuple) -> None:
    if _records and event == "open":
        _records[-1].append(args)


sys.addaudithook(_record_opened)  # cannot be removed


def _get_peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def watch(sandbox: Sandbox) -> Iterator[None]:
    """Checks the time, the memory and the opened files of the block."""
    before, opened = _get_peak_bytes(), []
    _records.append(opened)
    signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)
    signal.setitimer(signal.ITIMER_REAL, MAX_WALL_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _records.clear()
    sandbox.check_opened(opened)
    if (grown := _get_peak_bytes() - before) > MAX_BYTES:
        raise Failure(f"took {grown >> 20} MiB")
