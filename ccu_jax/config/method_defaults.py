"""Hyperparameters of the unlearning methods, and their defaults.

A method reads the section of `schema.Config` with its own name. Several methods may
share a class: `salun` is `random_label` with `saliency_fraction` below 1. Fields named
`batch` or `*_batch` count rows over all devices. Real numbers (weights, temperatures)
are inputs of the compiled programs, all other fields are constants in them.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from ccu_jax.config.validation import (
    Count,
    Fraction,
    NonNegative,
    NonNegativeInt,
    Positive,
    Range,
)


@dataclass(frozen=True)
class Finetune:
    """Fine-tuning on the retain set."""

    epochs: Positive = 5.0  # over the retain set, unless a section says otherwise
    batch: Count = 64  # the default of training, so that both share an executable
    learning_rate: Positive = 5e-4


@dataclass(frozen=True)
class L1Sparse(Finetune):
    """l1-sparse fine-tuning (Jia et al. 2023)."""

    l1_weight: NonNegative = 1e-5  # of the sum of all |parameters|; decays to 0


@dataclass(frozen=True)
class CoUn(Finetune):
    """CoUn (Khalil et al. 2025)."""

    contrast_weight: NonNegative = 0.5
    temperature: Positive = 0.1


@dataclass(frozen=True)
class UnlearnSetTraining:
    """Fields of methods that train only on the unlearn set."""

    epochs: Positive = 5.0  # over the unlearn set
    unlearn_batch: Count = 32
    learning_rate: Positive = 1e-4


@dataclass(frozen=True)
class Delete(UnlearnSetTraining):
    """DELETE (Zhou et al. 2025)."""


@dataclass(frozen=True)
class BothSetsTraining:
    """Fields of methods that train on both the retain set and the unlearn set."""

    epochs: Positive = 4.0  # over the retain set, unless a section says otherwise
    batch: Count = 64
    unlearn_batch: Count = 32
    learning_rate: Positive = 3e-4


@dataclass(frozen=True)
class MultiDelete(BothSetsTraining):
    """MultiDelete (Cheng & Amiri 2024)."""

    epochs: Positive = 3.0


@dataclass(frozen=True)
class EarlyStop:
    """Early stopping, when the unlearn set scores like the validation set."""

    stop: bool = False  # whether to stop early
    check_every: Count = 2  # steps between checks


@dataclass(frozen=True)
class GradientAscent(EarlyStop, UnlearnSetTraining):
    """Gradient ascent on the unlearn set (Golatkar et al. 2020)."""

    loss_cap: NonNegative = 2.0  # upper bound of the loss, in units of the chance loss


@dataclass(frozen=True)
class NegGradPlus(EarlyStop, BothSetsTraining):
    """NegGrad+ (Kurmanji et al. 2023)."""

    batch: Count = 128
    learning_rate: Positive = 5e-4
    retain_weight: Fraction = 0.9  # of the retain loss; the ascent has the rest
    loss_cap: NonNegative = 2.0  # as in GradientAscent


@dataclass(frozen=True)
class RandomLabel(EarlyStop, BothSetsTraining):
    """Random labels (Graves et al. 2021) and SalUn (Fan et al. 2024)."""

    unlearn_batch: Count = 16
    unlearn_weight: NonNegative = 0.5  # of the unlearn set's loss
    # Parameters that are trained, those with the largest gradient; SalUn if below 1.
    saliency_fraction: Annotated[float, Range(0, 1, exclude_low=True)] = 1.0


@dataclass(frozen=True)
class BadTeacher(EarlyStop, BothSetsTraining):
    """Bad teacher (Chundawat et al. 2023)."""

    epochs: Positive = 2.0
    unlearn_batch: Count = 16
    temperature: Positive = 1.0
    unlearn_weight: NonNegative = 1.0  # of the untrained teacher's loss


@dataclass(frozen=True)
class Contrastive(EarlyStop, BothSetsTraining):
    """Contrastive Unlearning (Lee et al. 2024)."""

    # `epochs` counts passes over the unlearn set.
    repeats: Count = 4  # retain batches for each unlearn batch
    temperature: Positive = 0.2
    contrast_weight: NonNegative = 0.3
    task_weight: NonNegative = 1.0


@dataclass(frozen=True)
class Scrub:
    """SCRUB (Kurmanji et al. 2023)."""

    epochs: Count = 4
    ascent_epochs: NonNegativeInt = 2  # the first epochs also maximize the divergence
    batch: Count = 64
    learning_rate: Positive = 5e-4
    temperature: Positive = 4.0
    distill_weight: NonNegative = 1.0  # of the divergence from the original's outputs
    task_weight: NonNegative = 1.0  # of the task loss on the retain set
    # SCRUB+R: return the epoch whose image score on the unlearn set is nearest to the
    # final score on the validation set.
    rewind: bool = False


@dataclass(frozen=True)
class LastLayers:
    """CF-k and EU-k (Goel et al. 2022) on stored features."""

    layers: Literal["head", "tail"] = "head"  # "tail": everything after the trunk
    reinitialize: bool = False  # train from scratch (EU-k) instead of fine-tune (CF-k)
    epochs: Positive = 10.0
    batch: Count = 64
    learning_rate: Positive = 2e-3
    max_retain_rows: NonNegativeInt = 0  # retain rows with features; 0: all


@dataclass(frozen=True)
class Ssd:
    """Selective synaptic dampening (Foster et al. 2024)."""

    alpha: NonNegative = 10.0  # dampen where F_unlearn > alpha * F_all
    lambda_: NonNegative = 1.0  # dampening constant
    max_rows: NonNegativeInt = 4000  # training rows for the Fisher information; 0: all


@dataclass(frozen=True)
class SfrOn:
    """SFR-on (Huang et al. 2024)."""

    epochs: Positive = 4.0  # over the unlearn set
    repair_steps: Count = 5  # on the retain set, after each step on the unlearn set
    batch: Count = 64
    learning_rate: Positive = 5e-4
    fisher_threshold: NonNegative = 1.0  # minimum F_unlearn / F_retain for ascent
    focal_exponent: NonNegative = 1.0  # weights rows by loss^-focal_exponent
    slow_fraction: Fraction = 0.5  # step of the slow parameters towards the fast ones
    max_rows: NonNegativeInt = 4000  # retain rows for the Fisher information; 0: all


@dataclass(frozen=True)
class _CcuBase:
    """Fields of both variants of CCU; a weight of 0 disables its objective."""

    batch: Count = 64  # retain rows
    unlearn_batch: Count = 48
    temperature: Positive = 0.2
    max_retain_rows: NonNegativeInt = 4000  # retain rows with features; 0: all


@dataclass(frozen=True)
class Ccu(_CcuBase):
    """CCU as in the paper; each weight is named after its objective."""

    steps: Count = 120
    learning_rate: Positive = 2e-3
    inverse_contrast: NonNegative = 1.0  # (a)
    pull: NonNegative = 0.0  # (a) towards other classes, as Lee et al. (2024)
    pair_dissociation: NonNegative = 3.0  # (a)
    retention: NonNegative = 1.0  # (b)
    separation: NonNegative = 1.0  # (c)
    stop: bool = True  # stop when the unlearn set scores like the validation set
    check_every: Count = 5  # steps between checks


@dataclass(frozen=True)
class CcuPlus(_CcuBase):
    """Closed-loop CCU; each weight is named after its objective."""

    steps: Count = 130
    learning_rate: Positive = 6e-3
    # Weight of the original in the initial tail; a random initialization has the rest.
    shrink: Fraction = 1.0
    target_match: NonNegative = 1.0  # (a) cross-entropy with the target probabilities
    match_confidence: NonNegative = 2.0  # (a) distance from the target confidences
    gated_push: NonNegative = 0.0  # (a) inverse contrast of rows above their target
    task_loss: NonNegative = 1.0  # on retain rows
    retention: NonNegative = 8.0  # (b) on retain rows
    heldout_retention: NonNegative = 8.0  # (b) on validation rows (labels unused)
    heldout_batch: Count = 32  # validation rows
    pair_dissociation: NonNegative = 10.0  # (a)
    separation: NonNegative = 0.3  # (c)
    refresh_every: Count = 8  # steps between updates of the targets
    feedback_gain: NonNegative = 1.0  # step size of the correction of the targets
    ridge: Positive = 3.0  # ridge strength, relative to the mean eigenvalue
    train_trunk: bool = False  # also train the visual trunk, on images
