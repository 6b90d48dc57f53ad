"""Fashion200k: images of clothes and their titles; five categories.

    python -m ccu_jax.launch --config fashion200k

Without `--data-dir` it generates a sample edition in the official format: drawn clothes
with made-up titles. For the official files: `--data-dir FOLDER`, which has `labels/`
and `women/` (or `women.tar.gz`). It has not been run on the official files yet.

Nine titles of ten contain the noun of the category ("black wrap dress"), which would
classify a forgotten image correctly, so these nouns are removed. For the 31
sub-categories: `--set data.task=sub_category`. All images of a product share one title
and one split, and are forgotten together.

Expected on the sample edition, on 2 cores of an AMD EPYC (2026-11-25, five seeds): five
minutes per seed; fused test accuracy 68.4 % for the original and 67.3 % after ccu_plus;
fused attack AUC .76 before, .72 after, .71 for the retrained reference, in 1 % of its
time.
"""

from ccu_jax.config import Config, Data, Train
from ccu_jax.config.loading import apply_tuned

# The settings that `--tune` chose for each method on the clip art.
config = apply_tuned(
    Config(
        name="fashion200k",
        data=Data(
            dataset="fashion200k",
            image_size=48,
            text_length=12,
            vocabulary=2000,
            mask_category_words=True,
            records=True,
            validation_fraction=0.1,
        ),
        train=Train(
            epochs=40,
            text_lr_scale=0.1,
            word_dropout=0.3,
            shift=2,
            zoom=0.1,
            tint=0.05,
        ),
    ),
    "clipart",
)
