"""MM-IMDb: film posters and plots, 23 genres, several for each film.

    python -m ccu_jax.launch --config mmimdb

Without `--data-dir` it makes and uses the sample edition, in the official format.
With the official files: `--data-dir FOLDER`, the one with `split.json` and `dataset/`.
"""

from ccu_jax.config import Config, Data, Model, Train

config = Config(
    name="mmimdb",
    data=Data(dataset="mmimdb", image_size=48, text_length=48, vocabulary=2000),
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
        epochs=30,
        batch=64,
        learning_rate=2e-3,
        modality_dropout=0.3,
        text_rate=0.1,
        word_dropout=0.3,
        shift=0,
        flip=False,
        zoom=0.0,
        tint=0.0,
    ),
)
