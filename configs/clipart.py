"""Clip art: the 1,408 real pairs that come with the package, ten classes.

    python -m ccu_jax.launch --config clipart

Your own pairs: `--data-dir FOLDER`, with a `pairs.jsonl` and the pictures it names.
"""

from ccu_jax.config import Config, Data, Model, Train

config = Config(
    name="clipart",
    data=Data(dataset="pairs", image_size=48, text_length=16, vocabulary=2000),
    model=Model(
        patch=8,
        image_width=128,
        image_depth=2,
        tail_blocks=1,
        text_width=96,
        text_depth=1,
        heads=4,
        embed=64,
        dropout=0.4,
    ),
    train=Train(
        epochs=60,
        batch=64,
        learning_rate=2e-3,
        modality_dropout=0.3,
        word_dropout=0.4,
        shift=2,
        zoom=0.1,
        tint=0.05,
    ),
)
