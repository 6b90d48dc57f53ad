"""The methods: what a run can train or unlearn with.

A method is one function `Problem -> Program`. Training the original, the retrained
references and every unlearning method go through the same loop, so that a difference in
time is a difference in method. Its settings are the section of the configuration that
has its name; a name may share a function with another, under other settings.
"""

import functools

from ccu_jax.methods import (
    contrastive,
    distillation,
    finetuning,
    last_layers,
    reference,
    saliency,
)
from ccu_jax.methods.ccu import closed_loop, paper
from ccu_jax.methods.problem import Problem

__all__ = ["CONTROL", "METHODS", "OURS", "REFERENCE", "REFERENCES", "Problem"]

_FUNCTIONS = {
    "original": reference.original,
    "retrain": reference.retrain,
    "retrain_visual": reference.retrain_visual,
    "retrain_visual_2": reference.retrain_visual,
    "finetune": finetuning.finetune,
    "l1_sparse": finetuning.l1_sparse,
    "gradient_ascent": finetuning.gradient_ascent,
    "gradient_ascent_stop": finetuning.gradient_ascent,
    "neggrad_plus": finetuning.neggrad_plus,
    "neggrad_plus_stop": finetuning.neggrad_plus,
    "random_label": finetuning.random_label,
    "random_label_stop": finetuning.random_label,
    "salun": finetuning.random_label,
    "salun_stop": finetuning.random_label,
    "cf_head": last_layers.train_last_layers,
    "cf_tail": last_layers.train_last_layers,
    "eu_head": last_layers.train_last_layers,
    "eu_tail": last_layers.train_last_layers,
    "scrub": distillation.scrub,
    "scrub_rewind": distillation.scrub,
    "bad_teacher": distillation.bad_teacher,
    "bad_teacher_stop": distillation.bad_teacher,
    "delete": distillation.delete,
    "multidelete": distillation.multidelete,
    "ssd": saliency.ssd,
    "sfron": saliency.sfron,
    "contrastive_unlearning": contrastive.contrastive_unlearning,
    "contrastive_unlearning_stop": contrastive.contrastive_unlearning,
    "coun": contrastive.coun,
    "ccu": paper.ccu,
    "ccu_no_stop": paper.ccu,
    "ccu_gated": closed_loop.ccu_plus,
    "ccu_plus": closed_loop.ccu_plus,
    "ccu_plus_full": closed_loop.ccu_plus,
}


def _as(name, function, problem: Problem):
    return function(problem._replace(method=name))


METHODS = {
    name: functools.partial(_as, name, function)
    for name, function in _FUNCTIONS.items()
}

# Trained from scratch: they need no original to start from.
REFERENCES = ("original", "retrain", "retrain_visual", "retrain_visual_2")
# The model that unlearning should be indistinguishable from.
REFERENCE = "retrain_visual"
# The same with another seed: how far two models are apart that never saw the images.
CONTROL = "retrain_visual_2"
# The forms of CCU; every other unlearning method is a baseline.
OURS = tuple(name for name in METHODS if name.startswith("ccu"))
