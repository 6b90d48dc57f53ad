"""Clip art: the 1,408 real pairs that come with the package, ten classes.

    python -m ccu_jax.launch --config clipart

Your own pairs: `--data-dir FOLDER`, with a `pairs.jsonl` and the pictures it names.

Expect of the clip art, on 2 cores of an AMD EPYC (2026-11-25, five seeds): two minutes
for a seed; fused test accuracy 75.0 % for the original, 75.2 % after ccu_plus; image
attack AUC .75 before, .51 after, .53 for the reference, in 1.5 % of its time.
"""

from ccu_jax.config.loading import apply_tuned
from ccu_jax.config.schema import Config, Data, Train

# What `--tune` has found on clip art, for every method.
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
