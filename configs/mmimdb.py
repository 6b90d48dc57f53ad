"""MM-IMDb: film posters and plots, 23 genres, several for each film.

    python -m ccu_jax.launch --config mmimdb

Without `--data-dir` it makes and uses the sample edition, in the official format.
With the official files: `--data-dir FOLDER`, the one with `split.json` and `dataset/`,
or the archive `mmimdb.tar.gz`.

Expect of the sample edition, on 2 cores of an AMD EPYC (2026-11-25, five seeds): four
minutes for a seed; fused test micro F1 52.0 % for the original, 51.2 % after ccu_plus;
image attack AUC .79 before, .48 after, .50 for the reference, in 1.5 % of its time. The
official files have not been tried.
"""

from ccu_jax.config.loading import apply_tuned
from ccu_jax.config.schema import Config, Data, Train

# What `--tune` has found on the sample of MM-IMDb, for every method.
config = apply_tuned(
    Config(
        name="mmimdb",
        data=Data(
            dataset="mmimdb",
            image_size=48,
            text_length=48,
            vocabulary=2000,
            records=True,
        ),
        train=Train(
            epochs=30,
            text_lr_scale=0.1,
            word_dropout=0.3,
            shift=0,
            flip=False,
            zoom=0.0,
            tint=0.0,
        ),
    ),
    "mmimdb",
)
