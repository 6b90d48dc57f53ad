"""Clip art: 1,408 real image-text pairs, part of the package; ten classes.

    python -m ccu_jax.launch --config clipart

For your own pairs: `--data-dir FOLDER`, with a `pairs.jsonl` and the images it lists.

Expected on 2 cores of an AMD EPYC (2026-11-25, five seeds): two minutes per seed; fused
test accuracy 75.0 % for the original and 75.2 % after ccu_plus; image attack AUC .75
before, .51 after, .53 for the retrained reference, in 1.5 % of its time.
"""

from ccu_jax.config import Config, Data, Train
from ccu_jax.config.loading import apply_tuned

# The settings that `--tune` chose for each method on the clip art.
config = apply_tuned(
    Config(
        name="clipart",
        data=Data(dataset="pairs", image_size=48, text_length=16, vocabulary=2000),
        train=Train(
            epochs=60,
            word_dropout=0.4,
            shift=2,
            zoom=0.1,
            tint=0.05,
        ),
    ),
    "clipart",
)
