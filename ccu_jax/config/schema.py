"""The configuration: one tree of frozen dataclasses, checked by type.

Every field is typed and has a default, so a misspelt key or a value of the wrong type
is refused instead of being ignored.
"""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ccu_jax.config.methods import (
    BadTeacher,
    Ccu,
    CcuPlus,
    Contrastive,
    CoUn,
    Delete,
    Finetune,
    GradientAscent,
    L1Sparse,
    LastLayers,
    MultiDelete,
    NegGradPlus,
    RandomLabel,
    Scrub,
    SfrOn,
    Ssd,
)
from ccu_jax.config.validation import conform, field_kind


@dataclass(frozen=True)
class Data:
    """Which rows there are and how they are stored; see `ccu_jax/data`."""

    dataset: str = "pairs"  # a row of ccu_jax.data.DATASETS
    dir: str | None = None  # folder or archive; None: a sample, or the clip art
    image_size: int = 48  # side of the stored square pictures, pixels
    crop_margins: bool = False  # cut off an even margin around a picture
    text_length: int = 24  # tokens a text is cut or padded to
    vocabulary: int = 2000  # largest number of subwords
    validation_fraction: float = (
        0.15  # share of rows, where the data has no split of its own
    )
    test_fraction: float = 0.2  # likewise
    group: str = "own"  # rows forgotten together: "own", same "text", similar "image"
    records: bool = False  # also keep the pictures as they came, as TFDS records
    strict: bool = False  # True: a row that cannot be used is an error, not a skip
    sample: str = "clipart"  # pairs without dir: "clipart", "medical", "satellite"
    sample_rows: int = 3000  # rows of the sample edition
    sample_seed: int = 0
    plot_policy: str = "longest"  # mmimdb: "longest" or "first"
    task: str = "category"  # fashion200k: "category" or "sub_category"
    mask_category_words: bool = False  # fashion200k: titles do not name the class
    tirg_dot_token: bool = False  # fashion200k: "." becomes "dotmark", as TIRG has it


@dataclass(frozen=True)
class Corruptions:
    """Ways in which real data are worse; shares of the rows that could be trained on.

    They are drawn once, whatever the run's seeds; see `ccu_jax/data/corruptions.py`.
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
    holdout_fraction: float = (
        0.18  # share of training rows kept apart as the attack's control
    )
    num_requests: int = 1  # parts of the set that are forgotten one after another


@dataclass(frozen=True)
class Model:
    """Sizes of the towers; blocks are shaped like CLIP's."""

    patch: int = 8  # pixels
    image_width: int = 128
    image_depth: int = 2
    text_width: int = 96
    text_depth: int = 1
    heads: int = 4
    embed_dim: int = 64  # the space that pictures and texts share
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
    text_lr_scale: float = 1.0  # the text branch's learning rate, relative
    warmup_fraction: float = 0.1  # share of all steps
    weight_decay: float = 0.05
    modality_dropout: float = 0.3  # rows whose picture (or text) is hidden in fusion
    word_dropout: float = 0.1
    shift: int = 4  # largest random shift, pixels
    flip: bool = True
    zoom: float = 0.15  # largest random stretch along each axis, as a logarithm
    tint: float = 0.1  # largest random change of a colour channel
    label_smoothing: float = 0.0
    contrastive_weight: float = 0.1  # weight of the image-text contrast
    temperature: float = 0.1


@dataclass(frozen=True)
class Run:
    """How the work is laid out on the devices; it changes rounding and nothing else."""

    executor: str = "pmap"  # a row of ccu_jax.parallel.EXECUTORS
    image_placement: str = (
        "auto"  # kept on the "device", or on the "host" if they do not fit
    )
    features: str = "stored"  # with the original, or "computed" at each request
    steps_per_call: int = 32  # optimizer steps in one compiled scan
    # Steps between checkpoints; methods that work on features make them in one call.
    checkpoint_steps: int = 200
    evaluate_batch: int = 256  # rows of one forward pass over all devices
    # Shadow models trained in one program; 0: one on CPUs, which gain nothing by more,
    # else all.
    shadow_batch_size: int = 0
    # Seconds after which a run of several processes, none of which does anything, ends.
    hang_timeout_s: float = 900.0
    allow_external_links: bool = (
        False  # whether --workdir may hold links that lead out of it
    )


def _section(kind: type, **fields: Any) -> Any:
    """A section with other defaults: some methods are others under other settings."""
    return field(default_factory=functools.partial(kind, **fields))


@dataclass(frozen=True)
class Config:
    """A whole run; the settings of each method stand under its name."""

    name: str = ""
    data: Data = field(default_factory=Data)
    corruptions: Corruptions = field(default_factory=Corruptions)
    unlearn: Unlearn = field(default_factory=Unlearn)
    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)
    finetune: Finetune = field(default_factory=Finetune)
    l1_sparse: L1Sparse = field(default_factory=L1Sparse)
    gradient_ascent: GradientAscent = field(default_factory=GradientAscent)
    gradient_ascent_stop: GradientAscent = _section(GradientAscent, stop=True)
    neggrad_plus: NegGradPlus = field(default_factory=NegGradPlus)
    neggrad_plus_stop: NegGradPlus = _section(NegGradPlus, stop=True)
    random_label: RandomLabel = field(default_factory=RandomLabel)
    random_label_stop: RandomLabel = _section(RandomLabel, stop=True)
    salun: RandomLabel = _section(RandomLabel, saliency_fraction=0.5)
    salun_stop: RandomLabel = _section(RandomLabel, saliency_fraction=0.5, stop=True)
    cf_head: LastLayers = field(default_factory=LastLayers)
    cf_tail: LastLayers = _section(LastLayers, layers="tail")
    eu_head: LastLayers = _section(LastLayers, reinitialize=True)
    eu_tail: LastLayers = _section(LastLayers, layers="tail", reinitialize=True)
    scrub: Scrub = field(default_factory=Scrub)
    scrub_rewind: Scrub = _section(Scrub, rewind=True)
    bad_teacher: BadTeacher = field(default_factory=BadTeacher)
    bad_teacher_stop: BadTeacher = _section(BadTeacher, stop=True)
    delete: Delete = field(default_factory=Delete)
    multidelete: MultiDelete = field(default_factory=MultiDelete)
    ssd: Ssd = field(default_factory=Ssd)
    sfron: SfrOn = field(default_factory=SfrOn)
    contrastive_unlearning: Contrastive = field(default_factory=Contrastive)
    contrastive_unlearning_stop: Contrastive = _section(Contrastive, stop=True)
    coun: CoUn = field(default_factory=CoUn)
    ccu: Ccu = field(default_factory=Ccu)
    ccu_no_stop: Ccu = _section(Ccu, stop=False)
    ccu_gated: CcuPlus = _section(
        CcuPlus, target_match=0.0, match_confidence=0.0, gated_push=2.0
    )
    ccu_plus: CcuPlus = field(default_factory=CcuPlus)
    ccu_plus_full: CcuPlus = _section(CcuPlus, train_trunk=True, learning_rate=1e-3)
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
