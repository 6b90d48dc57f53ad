"""Writes a sample edition of a data set in its official format.

python -m ccu_jax.data.samples mmimdb DIR --rows 3000 --seed 0
"""

import pathlib
import sys

from ccu_jax.config.flags import Parser
from ccu_jax.data.samples import editions
from ccu_jax.errors import UserError, user_error_for

_REPORT_EVERY = 500  # rows


def main(argv: list[str]) -> int:
    """Writes the sample edition selected by `argv` and returns the exit code."""
    try:
        _write_sample(argv)
        return 0
    except UserError as error:
        message = error
    except OSError as error:
        message = user_error_for(error) or error
    print(f"error: {' '.join(str(message).splitlines())}", file=sys.stderr)
    return 2


def _write_sample(argv: list[str]) -> None:
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
    editions.write_if_missing(
        args.dataset, args.dir, args.rows, args.seed, _print_progress
    )
    print(f"wrote {args.rows} {editions.WRITERS[args.dataset].unit} to {args.dir}")


def _print_progress(stage: str, done: int, total: int) -> None:
    if done and done % _REPORT_EVERY == 0:
        print(f"{stage}: {done:,}/{total:,}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
