"""The ranges in which `--tune` searches the settings of each method.

Ranges are centered on published values. There is one entry for each section of the
configuration, so methods of one kind are searched alike. Other settings stay as
configured.
"""

from typing import NamedTuple

from ccu_jax.config import method_defaults as sections


class Range(NamedTuple):
    """A range that is searched evenly, in the value or in its logarithm."""

    low: float
    high: float
    log: bool = True

    def at(self, fraction: float) -> float:
        """Returns the value at a fraction of the range, 0 to 1."""
        if self.log:
            return self.low * (self.high / self.low) ** fraction
        return self.low + fraction * (self.high - self.low)


_LEARNING_RATE = Range(1e-4, 2e-3)
_TEMPERATURE = Range(0.07, 0.5)
_TRAINING = {"epochs": Range(1.5, 8), "learning_rate": _LEARNING_RATE}

SPACES: dict[type, dict[str, Range]] = {
    sections.Finetune: _TRAINING,
    sections.L1Sparse: _TRAINING | {"l1_weight": Range(1e-6, 3e-4)},
    sections.GradientAscent: {
        "epochs": Range(1, 12),
        "learning_rate": Range(1e-5, 1e-3),
        "loss_cap": Range(1, 3),
    },
    sections.NegGradPlus: _TRAINING | {"retain_weight": Range(0.5, 0.98, log=False)},
    sections.RandomLabel: _TRAINING | {"unlearn_weight": Range(0.05, 2)},
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
        "learning_rate": _LEARNING_RATE,
        "unlearn_weight": Range(0.05, 3),
    },
    sections.Delete: {"epochs": Range(1, 20), "learning_rate": Range(1e-5, 1e-3)},
    sections.MultiDelete: {"epochs": Range(1, 6), "learning_rate": _LEARNING_RATE},
    sections.Ssd: {"alpha": Range(1, 100), "lambda_": Range(0.1, 1)},
    sections.SfrOn: {
        "epochs": Range(1, 8),
        "repair_steps": Range(2, 8),
        "learning_rate": _LEARNING_RATE,
        "fisher_threshold": Range(0.3, 10),
        "slow_fraction": Range(0.3, 1),
    },
    sections.Contrastive: {
        "epochs": Range(1, 8),
        "repeats": Range(2, 6),
        "learning_rate": _LEARNING_RATE,
        "temperature": _TEMPERATURE,
        "contrast_weight": Range(0.03, 1),
    },
    sections.CoUn: _TRAINING
    | {"contrast_weight": Range(0.1, 1), "temperature": _TEMPERATURE},
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
# Further settings of a single method.
METHOD_SPACES: dict[str, dict[str, Range]] = {
    "salun": {"saliency_fraction": Range(0.1, 0.9, log=False)},
    "salun_stop": {"saliency_fraction": Range(0.1, 0.9, log=False)},
    "ccu_gated": {"gated_push": Range(0.3, 6)},
}


def search_space(method: str, section: object) -> dict[str, Range]:
    """Returns the range of each setting to search."""
    return SPACES[type(section)] | METHOD_SPACES.get(method, {})
