"""Writes a sample edition of a data set in its official format.

python -m ccu_jax.data.samples mmimdb DIR --rows 3000 --seed 0
"""

import pathlib
import sys
import time

from ccu_jax.config.flags import Parser
from ccu_jax.data.samples import editions
from ccu_jax.errors import UserError, user_error_for

_REPORT_EVERY_S = 5


class _StderrProgress:
    """Prints the progress to stderr every few seconds."""

    def __init__(self) -> None:
        self._start_s = self._last_report_s = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now_s = time.monotonic()
        if done and now_s - self._last_report_s >= _REPORT_EVERY_S:
            self._last_report_s = now_s
            left_s = (now_s - self._start_s) * (total - done) / done
            print(f"{stage}: {done:,}/{total:,}, {left_s:.0f} s left", file=sys.stderr)


def main(argv: list[str]) -> int:
    """Writes the sample edition that the command line asks for.

    Returns:
        The exit code: 0, or 2 after an error that the user can correct.
    """
    try:
        _write(argv)
    except (UserError, OSError) as error:
        message = (
            error if isinstance(error, UserError) else user_error_for(error) or error
        )
        print(f"error: {' '.join(str(message).splitlines())}", file=sys.stderr)
        return 2
    return 0


def _write(argv: list[str]) -> None:
    parser = Parser(
        prog="python -m ccu_jax.data.samples", description=__doc__.splitlines()[0]
    )
    parser.add_argument("dataset", choices=sorted(editions.WRITERS))
    parser.add_argument("dir", type=pathlib.Path, help="folder to write to")
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.seed < 0:
        parser.error("--seed must not be negative")
    editions.ensure(args.dataset, args.dir, args.rows, args.seed, _StderrProgress())
    print(f"wrote {args.rows} {editions.WRITERS[args.dataset].unit} to {args.dir}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
