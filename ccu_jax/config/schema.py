"""The configuration: one tree of frozen dataclasses.

Every field has a default and a type, which includes the range or the choices, so a
misspelled key or an invalid value is an error.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ccu_jax.config.method_defaults import (
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
from ccu_jax.config.validation import (
    Count,
    Fraction,
    FractionBelow1,
    NonNegative,
    NonNegativeInt,
    Positive,
    Range,
    field_type,
    validate,
)
from ccu_jax.errors import UserError


@dataclass(frozen=True)
class Data:
    """The data set and how it is prepared; see `ccu_jax/data`."""

    dataset: str = "pairs"  # a key of ccu_jax.data.DATASETS
    dir: str | None = None  # folder or archive; None: the sample or the clip art
    image_size: Annotated[int, Range(4)] = 48  # side of the stored square images, px
    crop_margins: bool = False  # crop a uniform margin around an image
    text_length: Annotated[int, Range(2)] = 24  # tokens, after cutting and padding
    vocabulary: Annotated[int, Range(100)] = 2000  # maximum number of subwords
    # Fractions of the rows, for data sets that come without such a split.
    validation_fraction: FractionBelow1 = 0.15
    test_fraction: FractionBelow1 = 0.2
    # Rows that are unlearned together: those of one group in the data; with "text" also
    # rows with the same text, with "image" also rows with near-duplicate images.
    group: Literal["own", "text", "image"] = "own"
    records: bool = False  # also store the original images, as TFDS records
    strict: bool = False  # raise an error for an unusable row instead of skipping it
    sample: Literal["clipart", "medical", "satellite"] = "clipart"  # for pairs, no dir
    sample_rows: Count = 3000  # rows of a generated sample edition
    sample_seed: NonNegativeInt = 0
    plot_policy: Literal["longest", "first"] = "longest"  # mmimdb: which plot is used
    task: Literal["category", "sub_category"] = "category"  # fashion200k: the labels
    mask_category_words: bool = False  # fashion200k: remove class names from titles
    tirg_dot_token: bool = False  # fashion200k: "." becomes "dotmark", as in TIRG


@dataclass(frozen=True)
class Corruptions:
    """Fractions of the training rows to corrupt; see `ccu_jax/data/corruptions.py`.

    The corrupted rows depend only on `seed` below, not on the seeds of the run.
    """

    missing_image: Fraction = 0.0  # rows without their image
    missing_text: Fraction = 0.0  # rows without their text
    incomplete: FractionBelow1 = 0.0  # rows without image, text or label (then dropped)
    noisy_labels: Fraction = 0.0  # rows with the different labels of another row
    noisy_text: Fraction = 0.0  # rows with the text of another row
    order: Literal["shuffled", "stored", "by_class"] = "shuffled"  # of training rows
    window: Count = 256  # rows shuffled at a time, if order is not "shuffled"
    seed: NonNegativeInt = 0


@dataclass(frozen=True)
class Unlearn:
    """How the unlearn set and the holdout are selected."""

    # random:FRACTION; class:NAME or group:NAME, all its rows; cluster:FRACTION, rows
    # similar to a random one; memorized:FRACTION, those that the original has memorized
    # most; ids:FILE. See `ccu_jax/unlearn_sets/rules.py`.
    rule: str = "random:0.1"
    duplicates: Literal["forget", "report"] = "forget"  # near-duplicate images
    # Training rows held out as the non-members of the membership attack.
    holdout_fraction: Annotated[
        float, Range(0, 1, exclude_low=True, exclude_high=True)
    ] = 0.18
    num_requests: Count = 1  # parts of the unlearn set, unlearned in sequence


@dataclass(frozen=True)
class Model:
    """Sizes of the image and text towers, which consist of CLIP blocks."""

    patch: Count = 8  # px
    image_width: Count = 128
    image_depth: Count = 2
    text_width: Count = 96
    text_depth: NonNegativeInt = 1
    heads: Count = 4
    embed_dim: Count = 64  # of the space shared by images and texts
    # Number of final image blocks that methods on cached features train. 0: only the
    # feed-forward layer of the last block, on features of two tokens per image.
    tail_blocks: NonNegativeInt = 0
    dropout: FractionBelow1 = 0.4  # of the features of both towers
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation
    remat: bool = False  # rematerialize activations in blocks, for large towers


@dataclass(frozen=True)
class Train:
    """Training of the original model and of the retrained references."""

    epochs: Count = 40
    batch: Count = 64
    learning_rate: Positive = 2e-3
    text_lr_scale: NonNegative = 1.0  # text learning rate / learning_rate
    warmup_fraction: FractionBelow1 = 0.1  # of all steps
    weight_decay: NonNegative = 0.05
    modality_dropout: Fraction = 0.3  # rows with a modality hidden in the fused head
    word_dropout: Fraction = 0.1
    shift: NonNegativeInt = 4  # maximum random shift, px
    flip: bool = True
    zoom: NonNegative = 0.15  # maximum |log| of the random stretch of an axis
    tint: NonNegative = 0.1  # maximum random change of a color channel
    label_smoothing: FractionBelow1 = 0.0
    contrastive_weight: NonNegative = 0.1  # of the image-text contrastive loss
    temperature: Positive = 0.1


@dataclass(frozen=True)
class Run:
    """Execution on devices; results depend on these settings only up to rounding."""

    executor: Literal["pmap", "shard_map", "vmap"] = "pmap"
    # "auto": on the devices if the images fit, otherwise on the host.
    image_placement: Literal["auto", "device", "host"] = "auto"
    # Features are read from the store of the original, or computed for each request.
    features: Literal["stored", "computed"] = "stored"
    steps_per_call: Count = 32  # optimizer steps in one compiled loop
    # Steps between checkpoints; methods on cached features run all steps in one call.
    checkpoint_steps: Count = 200
    evaluate_batch: Count = 256  # rows of one forward pass over all devices
    shadow_batch_size: NonNegativeInt = 0  # shadows at once; 0: 1 on CPU, else all
    allow_external_links: bool = False  # links in --workdir may point outside it


@dataclass(frozen=True)
class Config:
    """The configuration of a run, with one section per unlearning method."""

    name: str = ""
    data: Data = Data()
    corruptions: Corruptions = Corruptions()
    unlearn: Unlearn = Unlearn()
    model: Model = Model()
    train: Train = Train()
    finetune: Finetune = Finetune()
    l1_sparse: L1Sparse = L1Sparse()
    gradient_ascent: GradientAscent = GradientAscent()
    gradient_ascent_stop: GradientAscent = GradientAscent(stop=True)
    neggrad_plus: NegGradPlus = NegGradPlus()
    neggrad_plus_stop: NegGradPlus = NegGradPlus(stop=True)
    random_label: RandomLabel = RandomLabel()
    random_label_stop: RandomLabel = RandomLabel(stop=True)
    salun: RandomLabel = RandomLabel(saliency_fraction=0.5)
    salun_stop: RandomLabel = RandomLabel(saliency_fraction=0.5, stop=True)
    cf_head: LastLayers = LastLayers()
    cf_tail: LastLayers = LastLayers(layers="tail")
    eu_head: LastLayers = LastLayers(reinitialize=True)
    eu_tail: LastLayers = LastLayers(layers="tail", reinitialize=True)
    scrub: Scrub = Scrub()
    scrub_rewind: Scrub = Scrub(rewind=True)
    bad_teacher: BadTeacher = BadTeacher()
    bad_teacher_stop: BadTeacher = BadTeacher(stop=True)
    delete: Delete = Delete()
    multidelete: MultiDelete = MultiDelete()
    ssd: Ssd = Ssd()
    sfron: SfrOn = SfrOn()
    contrastive_unlearning: Contrastive = Contrastive()
    contrastive_unlearning_stop: Contrastive = Contrastive(stop=True)
    coun: CoUn = CoUn()
    ccu: Ccu = Ccu()
    ccu_no_stop: Ccu = Ccu(stop=False)
    ccu_gated: CcuPlus = CcuPlus(target_match=0.0, match_confidence=0.0, gated_push=2.0)
    ccu_plus: CcuPlus = CcuPlus()
    ccu_plus_full: CcuPlus = CcuPlus(train_trunk=True, learning_rate=1e-3)
    run: Run = Run()
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
    seeds: tuple[Annotated[int, Range(0, 2**31 - 1)], ...] = (0,)


def replace_value(config: Config, key: str, value: Any) -> Config:
    """Returns a copy with the field `key` (`train.epochs`) set to `value`.

    Raises:
        UserError: An unknown key, a wrong type, or a value out of its range.
    """
    field_type(Config, key)  # rejects unknown keys
    tree = node = to_json(config)
    *sections, name = key.split(".")
    for section in sections:
        node = node[section]
    node[name] = value
    return from_json(tree)


def to_json(config: Config) -> dict[str, Any]:
    """Converts a configuration to plain dicts, lists and scalars."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(config))


def from_json(tree: Mapping[str, Any]) -> Config:
    """Builds a configuration from the output of `to_json` and validates every value.

    Raises:
        UserError: An unknown key, a wrong type, or a value out of its range.
    """
    return validate(tree, Config, "")


def check_batches(config: Config, methods: Sequence[str], num_devices: int) -> None:
    """Raises UserError for a batch size that the number of devices does not divide.

    Methods without a section of their own use the section `train`.
    """
    for method in methods:
        name = method if hasattr(config, method) else "train"
        for field, value in vars(getattr(config, name)).items():
            if field.endswith("batch") and value % num_devices:
                key, rows_per_device = f"{name}.{field}", -(-value // num_devices)
                raise UserError(
                    f"{key}={value} cannot be divided among {num_devices} devices: "
                    f"give a multiple of {num_devices}, as with --set "
                    f"{key}={rows_per_device * num_devices}"
                )


def differing_keys(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Returns the dotted keys whose values differ between two `to_json` outputs."""
    keys, missing = [], object()
    for name in {**a, **b}:
        left, right = a.get(name, missing), b.get(name, missing)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            keys += [f"{name}.{key}" for key in differing_keys(left, right)]
        elif type(left) is not type(right) or left != right:
            keys.append(name)
    return keys
