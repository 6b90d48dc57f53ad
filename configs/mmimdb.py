"""MM-IMDb: film posters and plots; 23 genres, several per film.

    python -m ccu_jax.launch --config mmimdb

Without `--data-dir` it generates a sample edition in the official format. For the
official files: `--data-dir FOLDER`, which has `split.json` and `dataset/`, or the
archive `mmimdb.tar.gz`.

Expected on the sample edition, on 2 cores of an AMD EPYC (2026-11-25, five seeds): four
minutes per seed; fused test micro F1 52.0 % for the original and 51.2 % after ccu_plus;
image attack AUC .79 before, .48 after, .50 for the retrained reference, in 1.5 % of its
time. It has not been run on the official files yet.
"""

from ccu_jax.config import Config, Data, Train
from ccu_jax.config.loading import apply_tuned

# The settings that `--tune` chose for each method on the MM-IMDb sample.
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
