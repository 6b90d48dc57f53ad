"""The registry of methods: the original, the retrained references, and unlearning.

A method is a function `Problem -> Program`. All programs run in the same loop, so that
their run times are comparable. Each method reads the configuration section with its
name; several names may share a function. To add a method, add its function here and its
section to `config/schema.py`.
"""

import functools
from collections.abc import Callable

from ccu_jax.methods import distillation, finetuning, reference, saliency
from ccu_jax.methods.ccu import closed_loop, paper
from ccu_jax.methods.problem import Problem
from ccu_jax.train.program import Program

Method = Callable[[Problem], Program]

_FUNCTIONS: dict[str, Method] = {
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
    "random_label": saliency.random_label,
    "random_label_stop": saliency.random_label,
    "salun": saliency.random_label,
    "salun_stop": saliency.random_label,
    "cf_head": finetuning.train_last_layers,
    "cf_tail": finetuning.train_last_layers,
    "eu_head": finetuning.train_last_layers,
    "eu_tail": finetuning.train_last_layers,
    "scrub": distillation.scrub,
    "scrub_rewind": distillation.scrub,
    "bad_teacher": distillation.bad_teacher,
    "bad_teacher_stop": distillation.bad_teacher,
    "delete": distillation.delete,
    "multidelete": distillation.multidelete,
    "ssd": saliency.ssd,
    "sfron": saliency.sfron,
    "contrastive_unlearning": finetuning.contrastive_unlearning,
    "contrastive_unlearning_stop": finetuning.contrastive_unlearning,
    "coun": finetuning.coun,
    "ccu": paper.ccu,
    "ccu_no_stop": paper.ccu,
    "ccu_gated": closed_loop.ccu_plus,
    "ccu_plus": closed_loop.ccu_plus,
    "ccu_plus_full": closed_loop.ccu_plus,
}


def _make_program_as(name: str, function: Method, problem: Problem) -> Program:
    """Makes the program of a method with the configuration section `name`."""
    return function(problem._replace(method=name))


METHODS: dict[str, Method] = {
    name: functools.partial(_make_program_as, name, function)
    for name, function in _FUNCTIONS.items()
}

# Methods that train from scratch, not from the original.
REFERENCES = ("original", "retrain", "retrain_visual", "retrain_visual_2")
# The model that unlearning should be indistinguishable from.
REFERENCE = "retrain_visual"
# The reference with another seed, to measure how far two references differ.
CONTROL = "retrain_visual_2"
# The variants of CCU; every other unlearning method is a baseline.
OURS = tuple(name for name in METHODS if name.startswith("ccu"))
