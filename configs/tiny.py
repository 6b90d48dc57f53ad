"""Tiny: clip art and a model of a few thousand parameters, to see every stage run.

    python -m ccu_jax.launch --config tiny

It shows that the pipeline works, in less than a minute on 2 cores of an Intel Xeon
(2026-11-24). Such a small model learns next to nothing, so there is nothing to forget.
"""

from ccu_jax.config import (
    Ccu,
    CcuPlus,
    Config,
    Data,
    Finetune,
    Model,
    NegGradPlus,
    Scrub,
    Train,
)

config = Config(
    name="tiny",
    data=Data(dataset="pairs", image_size=16, text_length=8, vocabulary=200),
    model=Model(
        patch=4,
        image_width=16,
        image_depth=1,
        text_width=16,
        text_depth=1,
        heads=2,
        embed_dim=8,
    ),
    train=Train(epochs=4, batch=64, shift=1),
    finetune=Finetune(epochs=1, batch=64),
    neggrad_plus=NegGradPlus(epochs=1, batch=64),
    scrub=Scrub(epochs=2, ascent_epochs=1, batch=64),
    ccu=Ccu(steps=16),
    ccu_plus=CcuPlus(steps=16),
)
