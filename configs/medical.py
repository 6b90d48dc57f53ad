"""A worked example of one's own data: studies with several findings, by patient.

    python -m ccu_jax.launch --config medical

The pictures look like chest X-rays and the texts like reports, but all of them are
generated: no patient, no hospital and no real picture is behind them, and no number
made on them says anything about medicine. What is real is the form: `pairs.jsonl` with
`labels` (several, one or none), `group` (the patient: all studies of a patient are
forgotten together) and `split` (by patient).

Your own studies in that form: `--data-dir FOLDER`; README says how to lay it out. The
folder that this makes, to look at: `python -m ccu_jax.data.samples medical FOLDER`.

Expect of it, on 2 busy cores of an Intel Xeon (2026-11-24, one seed): seven minutes;
fused test micro F1 62 % for the original and 60 % after ccu_plus; image attack AUC .91
before, .48 after, .48 for the reference.
"""

from ccu_jax.config.loading import apply_tuned
from ccu_jax.config.schema import Config, Data, Train

# What `--tune` has found on the sample of MM-IMDb, for every method.
config = apply_tuned(
    Config(
        name="medical",
        data=Data(
            dataset="pairs",
            sample="medical",
            image_size=48,
            text_length=48,
            vocabulary=1000,
        ),
        train=Train(
            epochs=40,
            text_lr_scale=0.2,
            word_dropout=0.2,
            shift=0,
            flip=False,
            zoom=0.0,
            tint=0.0,
        ),
    ),
    "mmimdb",
)
