"""MM-IMDb: film posters and plots, 23 genres, several for each film.

    python -m ccu_jax.launch --config mmimdb

Without `--data-dir` it makes and uses the sample edition, in the official format.
With the official files: `--data-dir FOLDER`, the one with `split.json` and `dataset/`.
"""

from ccu_jax.config import Config, Data

config = Config(
    name="mmimdb",
    data=Data(dataset="mmimdb"),
    methods=("original", "retrain", "ccu"),
)
