"""The sections of the unlearning methods in the configuration: a part of `config.py`.

Each method's section has its name, and several methods may share one kind of section:
`salun` is `random_label` with `saliency_fraction` below 1 below 1.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finetune:
    """Training on with the retain set."""

    epochs: float = 5.0
    batch: int = 64  # as in training: what was compiled for that serves here
    learning_rate: float = 5e-4


@dataclass(frozen=True)
class L1Sparse:
    """l1-sparse fine-tuning (Jia et al. 2023)."""

    epochs: float = 5.0
    batch: int = 64
    learning_rate: float = 5e-4
    l1_weight: float = 1e-5  # of the sum of all absolute weights, falling to 0


@dataclass(frozen=True)
class GradientAscent:
    """Gradient ascent on the unlearn set (Golatkar et al. 2020)."""

    epochs: float = 5.0  # of the unlearn set
    unlearn_batch: int = 32
    learning_rate: float = 1e-4
    loss_cap: float = 2.0  # the ascent ends here, in units of the loss of guessing
    stop: bool = False  # stop when the unlearn set scores like the validation set
    check_every: int = 2  # steps between looks at the stop rule


@dataclass(frozen=True)
class NegGradPlus:
    """NegGrad+ (Kurmanji et al. 2023)."""

    epochs: float = 4.0
    batch: int = 128
    unlearn_batch: int = 32
    learning_rate: float = 5e-4
    retain_weight: float = (
        0.9  # weight of the retain set's loss; the ascent has the rest
    )
    loss_cap: float = 2.0  # the ascent ends here, in units of the loss of guessing
    stop: bool = False
    check_every: int = 2


@dataclass(frozen=True)
class RandomLabel:
    """Random labels (Graves et al. 2021), or SalUn (Fan et al. 2024).

    It is SalUn where `saliency_fraction` is below 1.
    """

    epochs: float = 4.0
    batch: int = 64
    unlearn_batch: int = 16
    learning_rate: float = 3e-4
    unlearn_weight: float = 0.5  # of the unlearn set's loss
    saliency_fraction: float = 1.0  # share of all weights that move
    stop: bool = False
    check_every: int = 2


@dataclass(frozen=True)
class LastLayers:
    """CF-k and EU-k (Goel et al. 2022) on stored features."""

    layers: str = "head"  # heads and projection, or the whole "tail" behind the trunk
    reinitialize: bool = False  # trained anew (EU-k) instead of on (CF-k)
    epochs: float = 10.0
    batch: int = 64
    learning_rate: float = 2e-3
    max_retain_rows: int = 0  # most retain rows whose features are looked at; 0: all


@dataclass(frozen=True)
class Scrub:
    """SCRUB (Kurmanji et al. 2023)."""

    epochs: int = 4
    ascent_epochs: int = 2  # of which these also push away from the original
    batch: int = 64
    learning_rate: float = 5e-4
    temperature: float = 4.0
    distill_weight: float = 1.0  # weight of staying near the original on the retain set
    task_weight: float = 1.0  # weight of the task's loss on the retain set
    rewind: bool = False  # end with the look, of as many as epochs, nearest to held-out


@dataclass(frozen=True)
class BadTeacher:
    """Bad teacher (Chundawat et al. 2023)."""

    epochs: float = 2.0
    batch: int = 64
    unlearn_batch: int = 16
    learning_rate: float = 3e-4
    temperature: float = 1.0
    unlearn_weight: float = 1.0  # of what the ignorant teacher says of the unlearn set
    stop: bool = False
    check_every: int = 2


@dataclass(frozen=True)
class Delete:
    """DELETE (Zhou et al. 2025)."""

    epochs: float = 5.0  # of the unlearn set
    unlearn_batch: int = 32
    learning_rate: float = 1e-4


@dataclass(frozen=True)
class MultiDelete:
    """MultiDelete (Cheng & Amiri 2024)."""

    epochs: float = 3.0
    batch: int = 64
    unlearn_batch: int = 32
    learning_rate: float = 3e-4


@dataclass(frozen=True)
class Ssd:
    """Selective synaptic dampening (Foster et al. 2024)."""

    alpha: float = 10.0  # weights that matter so many times more to the unlearn set
    lambda_: float = 1.0
    max_rows: int = 4000  # most rows that stand for all training rows; 0: all


@dataclass(frozen=True)
class SfrOn:
    """SFR-on (Huang et al. 2024)."""

    epochs: float = 4.0  # of the unlearn set
    repair_steps: int = 5  # steps on the retain set after each on the unlearn set
    batch: int = 64
    learning_rate: float = 5e-4
    fisher_threshold: float = (
        1.0  # weights whose Fisher is so many times the retain set's
    )
    focal_exponent: float = 1.0  # how much more rows count that are still known
    slow_fraction: float = 0.5  # share of the way that the slow weights go
    max_rows: int = 4000  # most rows of the retain set for its Fisher; 0: all


@dataclass(frozen=True)
class Contrastive:
    """Contrastive Unlearning (Lee et al. 2024)."""

    epochs: float = 4.0  # of the unlearn set
    repeats: int = 4  # batches of the retain set for each of the unlearn set
    batch: int = 64
    unlearn_batch: int = 32
    learning_rate: float = 3e-4
    temperature: float = 0.2
    contrast_weight: float = 0.3  # weight of the contrast
    task_weight: float = 1.0
    stop: bool = False
    check_every: int = 2


@dataclass(frozen=True)
class CoUn:
    """CoUn (Khalil et al. 2025)."""

    epochs: float = 5.0
    batch: int = 64
    learning_rate: float = 5e-4
    contrast_weight: float = 0.5
    temperature: float = 0.1


@dataclass(frozen=True)
class Ccu:
    """The paper-like form; every objective can be switched off with a weight of 0."""

    steps: int = 120
    batch: int = 64  # retain rows
    unlearn_batch: int = 48
    learning_rate: float = 2e-3
    temperature: float = 0.2
    inverse_contrast: float = 1.0  # (a) inverse contrast
    pull: float = 0.0  # (a) pull towards other classes, as Lee et al.
    pair_dissociation: float = 3.0  # (a) dissociation of picture and own text
    retention: float = 1.0  # (b)
    separation: float = 1.0  # (c)
    max_retain_rows: int = 4000  # most retain rows whose features are computed; 0: all
    check_every: int = 5  # steps between looks at the stop rule
    stop: bool = True  # stop when the unlearn set scores like the validation set


@dataclass(frozen=True)
class CcuPlus:
    """The closed-loop form; every objective can be switched off with a weight of 0."""

    steps: int = 130
    batch: int = 64
    unlearn_batch: int = 48
    learning_rate: float = 6e-3
    temperature: float = 0.2
    shrink: float = 1.0  # share of the original's tail that is kept, the rest is fresh
    target_match: float = 1.0  # (a) towards the targets, image and fused
    match_confidence: float = 2.0  # (a) likewise, their confidence alone
    gated_push: float = (
        0.0  # (a) inverse contrast of rows that are surer than their target
    )
    task_loss: float = 1.0  # task loss on retain rows
    retention: float = 8.0  # (b)
    heldout_retention: float = (
        8.0  # (b) on held-out rows, whose labels it does not look at
    )
    heldout_batch: int = 32  # of these
    pair_dissociation: float = 10.0  # (a) dissociation of picture and own text
    separation: float = 0.3  # (c)
    max_retain_rows: int = 4000  # most retain rows whose features are computed; 0: all
    refresh_every: int = 8  # steps between new targets
    feedback_gain: float = 1.0  # how fast targets are corrected by what came of them
    ridge: float = 3.0  # strength of the ridge, relative to the mean eigenvalue
    train_trunk: bool = False  # train the trunk as well, on pictures
