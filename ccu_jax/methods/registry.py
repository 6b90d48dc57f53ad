"""The registry of methods: the original, the retrained references, and unlearning.

A method is a function `Problem -> Program`. All programs run in the same loop, so that
their run times are comparable. Each method reads the configuration section with its
name; several names may share a function. To add a method, add its function here and its
section to `config/method_defaults.py` and `config/schema.py`.
"""

import functools
from collections.abc import Callable

from ccu_jax.methods import distillation, finetuning, reference, saliency
from ccu_jax.methods.ccu import closed_loop, paper
from ccu_jax.methods.problem import Problem
from ccu_jax.train.program import Program

Method = Callable[[Problem], Program]

_NAMES: dict[Method, tuple[str, ...]] = {
    reference.original: ("original",),
    reference.retrain: ("retrain",),
    reference.retrain_visual: ("retrain_visual", "retrain_visual_2"),
    finetuning.finetune: ("finetune",),
    finetuning.l1_sparse: ("l1_sparse",),
    finetuning.gradient_ascent: ("gradient_ascent", "gradient_ascent_stop"),
    finetuning.neggrad_plus: ("neggrad_plus", "neggrad_plus_stop"),
    saliency.random_label: ("random_label", "random_label_stop", "salun", "salun_stop"),
    finetuning.train_last_layers: ("cf_head", "cf_tail", "eu_head", "eu_tail"),
    distillation.scrub: ("scrub", "scrub_rewind"),
    distillation.bad_teacher: ("bad_teacher", "bad_teacher_stop"),
    distillation.delete: ("delete",),
    distillation.multidelete: ("multidelete",),
    saliency.ssd: ("ssd",),
    saliency.sfron: ("sfron",),
    finetuning.contrastive_unlearning: (
        "contrastive_unlearning",
        "contrastive_unlearning_stop",
    ),
    finetuning.coun: ("coun",),
    paper.ccu: ("ccu", "ccu_no_stop"),
    closed_loop.ccu_plus: ("ccu_gated", "ccu_plus", "ccu_plus_full"),
}


def _make_program_as(name: str, function: Method, problem: Problem) -> Program:
    """Builds the program of a method from the configuration section `name`."""
    return function(problem._replace(method=name))


METHODS: dict[str, Method] = {
    name: functools.partial(_make_program_as, name, function)
    for function, names in _NAMES.items()
    for name in names
}

# Methods that train from scratch, not from the original.
REFERENCES = ("original", "retrain", "retrain_visual", "retrain_visual_2")
# The model from which an unlearned model should be indistinguishable.
REFERENCE = "retrain_visual"
# The reference with another seed, to measure how far two references differ.
CONTROL = "retrain_visual_2"
# The variants of CCU; every other unlearning method is a baseline.
OURS = tuple(name for name in METHODS if name.startswith("ccu"))
