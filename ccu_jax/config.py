"""The configuration: one tree of frozen dataclasses, checked by type.

Every field is typed and has a default, so a misspelt key or a value of the wrong type
is refused instead of being ignored.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ccu_jax.typed import conform, field_kind


@dataclass(frozen=True)
class Data:
    """Which rows there are and how they are stored; see `ccu_jax/data`."""

    dataset: str = "pairs"  # a row of ccu_jax.data.DATASETS
    dir: str | None = None  # folder or archive; None: a sample, or the clip art
    image_size: int = 48  # side of the stored square pictures, pixels
    trim: bool = False  # cut off an even margin around a picture
    text_length: int = 24  # tokens a text is cut or padded to
    vocabulary: int = 2000  # largest number of subwords
    validation: float = 0.15  # share of rows, where the data has no split of its own
    test: float = 0.2  # likewise
    group: str = "own"  # rows forgotten together: "own", same "text", near "picture"
    records: bool = False  # also keep the pictures as they came, as TFDS records
    strict: bool = False  # True: a row that cannot be used is an error, not a skip
    sample: str = "clipart"  # pairs without dir: "clipart", "medical", "satellite"
    sample_rows: int = 3000  # rows of the sample edition
    sample_seed: int = 0
    plot_policy: str = "longest"  # mmimdb: "longest" or "first"
    task: str = "category"  # fashion200k: "category" or "sub_category"
    mask_category_words: bool = False  # fashion200k: titles do not name the class
    tirg_words: bool = False  # fashion200k: "." becomes "dotmark", as TIRG has it


@dataclass(frozen=True)
class Conditions:
    """Ways in which real data are worse; shares of the rows that could be trained on.

    They are drawn once, whatever the run's seeds; see `ccu_jax/data/conditions.py`.
    """

    missing_image: float = 0.0  # lose their picture
    missing_text: float = 0.0  # lose their text
    incomplete: float = 0.0  # lose picture, text or label; one without label drops out
    noisy_labels: float = 0.0  # get the labels of a row that has others
    noisy_text: float = 0.0  # get the text of another row
    order: str = "shuffled"  # training order: "shuffled", "stored" or "by_class"
    window: int = 256  # rows that an order other than "shuffled" still mixes
    seed: int = 0


@dataclass(frozen=True)
class Unlearn:
    """Which pictures are forgotten, and which rows were never trained on."""

    # random:SHARE; class:NAME or group:NAME, all of it; cluster:SHARE, rows like one;
    # memorised:SHARE, what the original knows by heart; ids:FILE. `unlearn_rules.py`
    rule: str = "random:0.1"
    duplicates: str = "forget"  # near-duplicate pictures: "forget" too, or "report"
    unseen: float = 0.18  # share of training rows kept apart as the attack's control
    requests: int = 1  # parts of the set that are forgotten one after another


@dataclass(frozen=True)
class Model:
    """Sizes of the towers; blocks are shaped like CLIP's."""

    patch: int = 8  # pixels
    image_width: int = 128
    image_depth: int = 2
    text_width: int = 96
    text_depth: int = 1
    heads: int = 4
    embed: int = 64  # the space that pictures and texts share
    # The last visual blocks that methods on cached features train; with 0 it is the
    # last block's feed-forward layer, and the features are two tokens for each picture.
    tail_blocks: int = 0
    dropout: float = 0.4  # of the features behind both towers
    dtype: str = "float32"  # of the arithmetic: float32 or bfloat16
    remat: bool = False  # keep no activations inside of blocks: big towers then fit


@dataclass(frozen=True)
class Train:
    """How the original and both retrained references are trained."""

    epochs: int = 40
    batch: int = 64
    learning_rate: float = 2e-3
    text_rate: float = 1.0  # the text branch's learning rate, relative
    warmup: float = 0.1  # share of all steps
    weight_decay: float = 0.05
    modality_dropout: float = 0.3  # rows whose picture (or text) is hidden in fusion
    word_dropout: float = 0.1
    shift: int = 4  # largest random shift, pixels
    flip: bool = True
    zoom: float = 0.15  # largest random stretch along each axis, as a logarithm
    tint: float = 0.1  # largest random change of a colour channel
    label_smoothing: float = 0.0
    align: float = 0.1  # weight of the image-text contrast
    temperature: float = 0.1


@dataclass(frozen=True)
class Finetune:
    """Training on with the retain set."""

    epochs: float = 5.0
    batch: int = 64  # as in training: what was compiled for that serves here
    learning_rate: float = 5e-4


@dataclass(frozen=True)
class NegGradPlus:
    """NegGrad+ (Kurmanji et al. 2023)."""

    epochs: float = 4.0
    batch: int = 128
    unlearn_batch: int = 32
    learning_rate: float = 5e-4
    keep: float = 0.9  # weight of the retain set's loss; the ascent has the rest
    ceiling: float = 2.0  # the ascent ends here, in units of the loss of guessing


@dataclass(frozen=True)
class Scrub:
    """SCRUB (Kurmanji et al. 2023)."""

    epochs: int = 4
    max_epochs: int = 2  # of which these also push away from the original
    batch: int = 64
    learning_rate: float = 5e-4
    temperature: float = 4.0
    distil: float = 1.0  # weight of staying near the original on the retain set
    classify: float = 1.0  # weight of the task's loss on the retain set


@dataclass(frozen=True)
class Ccu:
    """The paper-like form; every objective can be switched off with a weight of 0."""

    steps: int = 120
    batch: int = 64  # retain rows
    unlearn_batch: int = 48
    learning_rate: float = 2e-3
    temperature: float = 0.2
    inverse: float = 1.0  # (a) inverse contrast
    pull: float = 0.0  # (a) pull towards other classes, as Lee et al.
    pair: float = 3.0  # (a) dissociation of picture and own text
    retention: float = 1.0  # (b)
    separation: float = 1.0  # (c)
    retain_rows: int = 4000  # most retain rows whose features are computed; 0: all
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
    match: float = 1.0  # (a) towards the targets, image and fused
    level: float = 2.0  # (a) likewise, their confidence alone
    classify: float = 1.0  # task loss on retain rows
    retention: float = 8.0  # (b)
    hold: float = 8.0  # (b) on held-out rows, whose labels it does not look at
    held_batch: int = 32  # of these
    pair: float = 10.0  # (a) dissociation of picture and own text
    separation: float = 0.3  # (c)
    retain_rows: int = 4000  # most retain rows whose features are computed; 0: all
    refresh_every: int = 8  # steps between new targets
    gain: float = 1.0  # how fast targets are corrected by what came of them
    ridge: float = 3.0  # strength of the ridge, relative to the mean eigenvalue


@dataclass(frozen=True)
class Run:
    """How the work is laid out on the devices; it changes rounding and nothing else."""

    executor: str = "pmap"  # a row of ccu_jax.parallel.EXECUTORS
    pictures: str = "auto"  # kept on the "device", or on the "host" if they do not fit
    features: str = "stored"  # with the original, or "computed" at each request
    steps_per_call: int = 32  # optimiser steps in one compiled scan
    # Steps between checkpoints; methods that work on features make them in one call.
    checkpoint_steps: int = 200
    evaluate_batch: int = 256  # rows of one forward pass over all devices


@dataclass(frozen=True)
class Config:
    """A whole run."""

    name: str = ""
    data: Data = field(default_factory=Data)
    conditions: Conditions = field(default_factory=Conditions)
    unlearn: Unlearn = field(default_factory=Unlearn)
    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)
    finetune: Finetune = field(default_factory=Finetune)
    neggrad_plus: NegGradPlus = field(default_factory=NegGradPlus)
    scrub: Scrub = field(default_factory=Scrub)
    ccu: Ccu = field(default_factory=Ccu)
    ccu_plus: CcuPlus = field(default_factory=CcuPlus)
    run: Run = field(default_factory=Run)
    methods: tuple[str, ...] = (
        "original",
        "retrain",
        "retrain_visual",
        "finetune",
        "neggrad_plus",
        "scrub",
        "ccu",
        "ccu_plus",
    )
    seeds: tuple[int, ...] = (0,)


def replace(config: Config, key: str, value: Any) -> Config:
    """Returns `config` with the field `key` (`train.epochs`) set to `value`.

    Raises:
        UserError: an unknown key or a value of the wrong type.
    """
    field_kind(Config, key)  # refuses a key that leads nowhere
    tree = to_json(config)
    *sections, last = key.split(".")
    node = tree
    for section in sections:
        node = node[section]
    node[last] = value
    return from_json(tree)


def to_json(config: Config) -> dict[str, Any]:
    """Returns the configuration as plain dicts, lists and scalars."""

    def plain(value):
        if dataclasses.is_dataclass(value):
            return {
                f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)
            }
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return value

    return plain(config)


def from_json(tree: Mapping[str, Any]) -> Config:
    """Returns the configuration that `to_json` made `tree` of; checks every type.

    Raises:
        UserError: an unknown key or a value of the wrong type.
    """
    return conform(tree, Config, "")


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Returns the dotted keys in which two results of `to_json` differ."""
    keys = []
    for name in [*a, *(name for name in b if name not in a)]:
        left, right = a.get(name, _MISSING), b.get(name, _MISSING)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            keys += [f"{name}.{key}" for key in difference(left, right)]
        elif type(left) is not type(right) or left != right:
            keys.append(name)
    return keys


_MISSING = object()
