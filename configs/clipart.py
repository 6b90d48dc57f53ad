"""Clip art: the 1,408 real pairs that come with the package, ten classes.

    python -m ccu_jax.launch --config clipart

Your own pairs: `--data-dir FOLDER`, with a `pairs.jsonl` and the pictures it names.

Expect of the clip art, on 2 cores of an Intel Xeon (2026-11-24, five seeds): two to
three minutes for a seed; fused test accuracy 77 % for the original and after ccu_plus;
image attack AUC .71 before, .53 after, .52 for the reference. ccu_plus took 9 % of the
reference's time; since features are stored with the original it is 2 %.
"""

from ccu_jax.config import Config, Data, Train
from ccu_jax.config_file import tuned

# What `--tune` has found on clip art, for every method.
config = tuned(
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
