"""Writes small sample editions in the official formats of the data sets.

    python -m ccu_jax.data.sample mmimdb DIR --rows 3000 --seed 0 --with-traps

All content is invented or clip art: good for trying everything out, and for showing
that a method works; a score on it says nothing about the real data set. With traps it
also has the defects of the real files, and `traps.json` lists them.
"""

import json
import pathlib
import shutil
import sys
import time

from ccu_jax.config.flags import Parser
from ccu_jax.data.readers.base import MARKER, Progress
from ccu_jax.data.samples import (
    Writer,
    fashion200k,
    hatefulmemes,
    medical,
    mmimdb,
    satellite,
)
from ccu_jax.errors import UserError, user_error_for

WRITERS: dict[str, Writer] = {
    "mmimdb": mmimdb.WRITER,
    "fashion200k": fashion200k.WRITER,
    "hatefulmemes": hatefulmemes.WRITER,
    "medical": medical.WRITER,
    "satellite": satellite.WRITER,
}
TRAPS = "traps.json"


def ensure(
    name: str,
    root: pathlib.Path,
    rows: int,
    seed: int,
    progress: Progress,
    *,
    traps: bool = False,
) -> None:
    """Writes a sample edition to `root` unless that very one is there already.

    Args:
        name: A row of WRITERS.
        root: The folder that the official archive would unpack to.
        rows: Number of rows.
        seed: The same number gives the same bytes.
        progress: Called with (what, done, total).
        traps: Whether to plant the defects of the real files, too.

    Raises:
        UserError: too few rows; something else is in the way.
    """
    writer = WRITERS[name]
    if rows < writer.least:
        raise UserError(
            f"data.sample_rows: {rows} {writer.what} are too few; take {writer.least} "
            "or more (--rows)"
        )
    marker = _marker(name, rows, seed, traps)
    try:
        if (root / MARKER).read_text("utf-8") == marker:
            return
    except OSError:
        pass
    if root.exists() and any(root.iterdir()) and not (root / MARKER).is_file():
        raise UserError(f"{root} is not empty; name a new folder for the sample")
    # Written beside its place and moved there at the end: whole or not at all.
    scratch = root.with_name(root.name + ".new")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    writer.write(scratch, rows, seed, progress)
    if traps:
        planted = writer.plant(scratch, seed) if writer.plant else []
        listed = json.dumps([trap._asdict() for trap in planted], indent=1)
        (scratch / TRAPS).write_text(listed + "\n", "utf-8")
    (scratch / MARKER).write_text(marker, "utf-8")
    progress("writing the sample edition", rows, rows)
    shutil.rmtree(root, ignore_errors=True)
    scratch.rename(root)


def _marker(name: str, rows: int, seed: int, traps: bool) -> str:
    with_traps = ", with traps" if traps else ""
    return (
        f"A synthetic sample in the format of {name}: invented texts and pictures.\n"
        f"Nothing in it is real. rows {rows}, seed {seed}, writer "
        f"{WRITERS[name].version}{with_traps}\n"
    )


class _Screen:
    """Tells the progress on stderr, now and then."""

    def __init__(self) -> None:
        self._told_s = self._began_s = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._told_s < 5 or not done:
            return
        self._told_s = now
        left_s = (now - self._began_s) * (total - done) / done
        print(f"{what}: {done:,}/{total:,}, {left_s:.0f} s left", file=sys.stderr)


def main(arguments: list[str]) -> int:
    """Writes the sample edition that the command line asks for."""
    try:
        return _main(arguments)
    except (UserError, OSError) as error:
        told = error if isinstance(error, UserError) else user_error_for(error) or error
        print(f"error: {' '.join(str(told).splitlines())}", file=sys.stderr)
        return 2


def _main(arguments: list[str]) -> int:
    parser = Parser(
        prog="python -m ccu_jax.data.sample", description=__doc__.split("\n")[0]
    )
    parser.add_argument("dataset", choices=sorted(WRITERS))
    parser.add_argument("dir", type=pathlib.Path, help="folder to write to")
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--with-traps", action="store_true", help=f"plant defects; {TRAPS} lists them"
    )
    args = parser.parse_args(arguments)
    if args.seed < 0:
        parser.error("--seed must not be negative")
    given = args.dataset, args.dir, args.rows, args.seed
    ensure(*given, _Screen(), traps=args.with_traps)
    print(f"wrote {args.rows} {WRITERS[args.dataset].what} to {args.dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
