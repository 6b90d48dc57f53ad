"""Where the clip art that travels with the package lies."""

import pathlib

CLIPART = pathlib.Path(__file__).parent / "clipart"
INDEX = "pairs.jsonl"
