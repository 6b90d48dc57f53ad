"""The methods: what a run can train or unlearn with.

A method is one function `Problem -> Program`. Training the original, the retrained
references and every unlearning method go through the same loop, so that a difference in
time is a difference in method.
"""

from ccu_jax.methods import baselines, ccu, reference
from ccu_jax.methods.problem import Problem

__all__ = ["METHODS", "REFERENCES", "Problem"]

METHODS = {
    "original": reference.original,
    "retrain": reference.retrain,
    "retrain_visual": reference.retrain_visual,
    "finetune": baselines.finetune,
    "neggrad_plus": baselines.neggrad_plus,
    "scrub": baselines.scrub,
    "ccu": ccu.ccu,
    "ccu_plus": ccu.ccu_plus,
}

# Trained from scratch: they need no original to start from.
REFERENCES = ("original", "retrain", "retrain_visual")
