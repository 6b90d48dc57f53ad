"""Where `tune` looks for the settings of each method: ranges around published ones.

One entry for each kind of section (`config_methods.py`), so that methods of one kind
are looked for in the same places. What is not named stays as it is.
"""

from typing import NamedTuple

from ccu_jax.config import methods as sections


class Range(NamedTuple):
    """From `low` to `high`, evenly in the value or in its logarithm."""

    low: float
    high: float
    log: bool = True

    def at(self, share: float) -> float:
        """The value at a share (0 to 1) of the way."""
        if self.log:
            return self.low * (self.high / self.low) ** share
        return self.low + share * (self.high - self.low)


_RATE = Range(1e-4, 2e-3)
_EPOCHS = Range(1.5, 8)

SPACES: dict[type, dict[str, Range]] = {
    sections.Finetune: {"epochs": _EPOCHS, "learning_rate": _RATE},
    sections.L1Sparse: {
        "epochs": _EPOCHS,
        "learning_rate": _RATE,
        "l1_weight": Range(1e-6, 3e-4),
    },
    sections.GradientAscent: {
        "epochs": Range(1, 12),
        "learning_rate": Range(1e-5, 1e-3),
        "loss_cap": Range(1, 3),
    },
    sections.NegGradPlus: {
        "epochs": _EPOCHS,
        "learning_rate": _RATE,
        "retain_weight": Range(0.5, 0.98, log=False),
    },
    sections.RandomLabel: {
        "epochs": _EPOCHS,
        "learning_rate": _RATE,
        "unlearn_weight": Range(0.05, 2),
    },
    sections.LastLayers: {"epochs": Range(3, 40), "learning_rate": Range(5e-4, 1e-2)},
    sections.Scrub: {
        "epochs": Range(2, 6),
        "ascent_epochs": Range(1, 4),
        "learning_rate": Range(2e-4, 3e-3),
        "distill_weight": Range(0.1, 3),
        "task_weight": Range(0.3, 3),
    },
    sections.BadTeacher: {
        "epochs": Range(1, 5),
        "learning_rate": _RATE,
        "unlearn_weight": Range(0.05, 3),
    },
    sections.Delete: {"epochs": Range(1, 20), "learning_rate": Range(1e-5, 1e-3)},
    sections.MultiDelete: {"epochs": Range(1, 6), "learning_rate": _RATE},
    sections.Ssd: {"alpha": Range(1, 100), "lambda_": Range(0.1, 1)},
    sections.SfrOn: {
        "epochs": Range(1, 8),
        "repair_steps": Range(2, 8),
        "learning_rate": _RATE,
        "fisher_threshold": Range(0.3, 10),
        "slow_fraction": Range(0.3, 1),
    },
    sections.Contrastive: {
        "epochs": Range(1, 8),
        "repeats": Range(2, 6),
        "learning_rate": _RATE,
        "temperature": Range(0.07, 0.5),
        "contrast_weight": Range(0.03, 1),
    },
    sections.CoUn: {
        "epochs": _EPOCHS,
        "learning_rate": _RATE,
        "contrast_weight": Range(0.1, 1),
        "temperature": Range(0.07, 0.5),
    },
    sections.Ccu: {
        "steps": Range(40, 200),
        "learning_rate": Range(5e-4, 6e-3),
        "inverse_contrast": Range(0.3, 3),
        "pair_dissociation": Range(1, 20),
        "retention": Range(0.3, 8),
    },
    sections.CcuPlus: {
        "steps": Range(80, 200),
        "learning_rate": Range(1e-3, 1e-2),
        "shrink": Range(0.5, 1, log=False),
        "retention": Range(1, 16),
        "heldout_retention": Range(1, 16),
        "pair_dissociation": Range(3, 30),
    },
}
# Settings that decide how much a method of this name forgets, beside those of its kind.
ALSO: dict[str, dict[str, Range]] = {
    "salun": {"saliency_fraction": Range(0.1, 0.9, log=False)},
    "salun_stop": {"saliency_fraction": Range(0.1, 0.9, log=False)},
    "ccu_gated": {"gated_push": Range(0.3, 6)},
}


def space(method: str, section: object) -> dict[str, Range]:
    """What is looked through for a method, by the name of the setting."""
    return SPACES[type(section)] | ALSO.get(method, {})
