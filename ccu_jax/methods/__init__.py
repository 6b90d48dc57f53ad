"""The methods: what a run can train or unlearn with.

A method is one function `Problem -> Program`. Training the original, the retrained
references and every unlearning method go through the same loop, so that a difference in
time is a difference in method. Its settings are the section of the configuration that
has its name; a name may share a function with another, under other settings.
"""

import functools

from ccu_jax.methods import contrastive as contrast
from ccu_jax.methods import distillation, reference
from ccu_jax.methods import finetuning as baselines
from ccu_jax.methods import last_layers as layers
from ccu_jax.methods import saliency as curvature
from ccu_jax.methods.ccu import closed_loop as ccu
from ccu_jax.methods.problem import Problem

__all__ = ["METHODS", "OURS", "REFERENCE", "REFERENCES", "Problem"]

_FUNCTIONS = {
    "original": reference.original,
    "retrain": reference.retrain,
    "retrain_visual": reference.retrain_visual,
    "retrain_visual_2": reference.retrain_visual,
    "finetune": baselines.finetune,
    "l1_sparse": baselines.l1_sparse,
    "gradient_ascent": baselines.gradient_ascent,
    "gradient_ascent_stop": baselines.gradient_ascent,
    "neggrad_plus": baselines.neggrad_plus,
    "neggrad_plus_stop": baselines.neggrad_plus,
    "random_label": baselines.random_label,
    "random_label_stop": baselines.random_label,
    "salun": baselines.random_label,
    "salun_stop": baselines.random_label,
    "cf_head": layers.last_layers,
    "cf_tail": layers.last_layers,
    "eu_head": layers.last_layers,
    "eu_tail": layers.last_layers,
    "scrub": distillation.scrub,
    "scrub_rewind": distillation.scrub,
    "bad_teacher": distillation.bad_teacher,
    "bad_teacher_stop": distillation.bad_teacher,
    "delete": distillation.delete,
    "multidelete": distillation.multidelete,
    "ssd": curvature.ssd,
    "sfron": curvature.sfron,
    "contrastive_unlearning": contrast.contrastive_unlearning,
    "contrastive_unlearning_stop": contrast.contrastive_unlearning,
    "coun": contrast.coun,
    "ccu": ccu.ccu,
    "ccu_no_stop": ccu.ccu,
    "ccu_gated": ccu.ccu_plus,
    "ccu_plus": ccu.ccu_plus,
    "ccu_plus_full": ccu.ccu_plus,
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
# Forms of CCU: no baselines.
OURS = tuple(name for name in METHODS if name.startswith("ccu"))
