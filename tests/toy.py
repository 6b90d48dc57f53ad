"""Toy data sets, configurations and problems in memory, and helpers to run methods."""

import collections
import dataclasses
import functools

import jax
import numpy as np

from ccu_jax import models
from ccu_jax.config.schema import Ccu, Config, Model, Run, Train
from ccu_jax.data import Dataset
from ccu_jax.distributed import executors
from ccu_jax.evaluate.forward import Forward
from ccu_jax.methods import METHODS, REFERENCES, Problem
from ccu_jax.runs.context import RunContext
from ccu_jax.runs.progress import Reporter
from ccu_jax.train.loop import Loop
from ccu_jax.train.step import step_inputs
from ccu_jax.unlearn_sets import splits

IMAGE_SIZE, TEXT_LENGTH, VOCABULARY, CLASSES = 8, 5, 12, 3
# Training that changes no picture and no text.
NO_AUGMENTATION = {
    "shift": 0,
    "zoom": 0.0,
    "tint": 0.0,
    "flip": False,
    "word_dropout": 0.0,
}
TABLE_COLUMNS = ("image", "text", "labels", "has_image", "has_text")


def make_dataset(
    rows=56, *, multi_label=False, seed=0, per_group=1, whole=False
) -> Dataset:
    """Rows whose picture and text both tell a little of their labels.

    Args:
        rows: N; 5 of 7 are for training, 1 each for validation and test.
        multi_label: whether rows have several labels.
        seed: of everything random.
        per_group: rows that share a group; all of one split.
        whole: whether every row has both a picture and a text.
    """
    rng = np.random.default_rng(seed)
    if multi_label:
        labels = (rng.random((rows, CLASSES)) < 0.5).astype(np.float32)
        labels[np.arange(rows), rng.integers(CLASSES, size=rows)] = 1
    else:
        labels = np.eye(CLASSES, dtype=np.float32)[np.arange(rows) % CLASSES]
    look = rng.random((CLASSES, IMAGE_SIZE, IMAGE_SIZE, 3))
    shown = labels @ look.reshape(CLASSES, -1) / labels.sum(1, keepdims=True)
    image = 100 * shown.reshape(rows, IMAGE_SIZE, IMAGE_SIZE, 3) + 155 * rng.random(
        (rows, IMAGE_SIZE, IMAGE_SIZE, 3)
    )
    text = rng.integers(2, VOCABULARY, (rows, TEXT_LENGTH))
    text[:, 0] = 2 + labels.argmax(1)
    for row, end in enumerate(rng.integers(2, TEXT_LENGTH + 1, rows)):
        text[row, end:] = 0
    has_image = np.arange(rows) % 9 != 4
    has_text = np.arange(rows) % 11 != 5
    if whole:
        has_image[:] = has_text[:] = True
    image[~has_image] = 0
    text[~has_text] = [1, *[0] * (TEXT_LENGTH - 1)]
    group = np.arange(rows) // per_group
    split = np.array([*["train"] * 5, "validation", "test"])[group % 7]
    return Dataset(
        name="toy",
        edition="own",
        classes=("red", "green", "blue"),
        multi_label=multi_label,
        metric="micro_f1" if multi_label else "accuracy",
        image=image.astype(np.uint8),
        text=text.astype(np.int32),
        labels=labels,
        has_image=has_image,
        has_text=has_text,
        id=np.array([f"row{i}" for i in range(rows)]),
        group=np.array([f"group{g}" for g in group]),
        split=split,
        cluster=np.arange(rows),
        vocabulary=VOCABULARY,
        counts={"read": rows, "used": rows},
        fingerprint=f"toy{seed}",
    )


def make_memorizable_dataset(rows=560) -> Dataset:
    """Rows whose picture shows a class, often a wrong one, and a pattern of its own.

    Only who has seen a picture can know the label of one that shows a wrong class.
    """
    data = make_dataset(rows, whole=True, seed=2)
    rng = np.random.default_rng(3)
    look = rng.random((CLASSES, 1, 1, 3)) - 0.5
    classes = data.labels.argmax(1)
    shown = np.where(rng.random(rows) < 0.3, (classes + 1) % 3, classes)
    image = 0.5 + 0.3 * look[shown] + 0.3 * rng.normal(size=data.image.shape)
    # Texts that say nothing: else the fused view would hardly need the pictures.
    text = data.text.copy()
    text[:, 0] = 2 + rng.integers(CLASSES, size=rows)
    return data._replace(image=(255 * image.clip(0, 1)).astype(np.uint8), text=text)


def random_labels(rng, rows, multi_label):
    """Labels `[rows, K]`; of single ones each class about as often as the others."""
    if not multi_label:
        return np.eye(CLASSES)[rng.permutation(np.arange(rows) % CLASSES)]
    x = (rng.random((rows, CLASSES)) < 0.4) * 1.0
    x[np.arange(rows), rng.integers(CLASSES, size=rows)] = 1
    return x


def make_config(**sections) -> Config:
    """Everything small: `config(ccu={"steps": 9})` changes fields of a section."""
    batches = {"batch": 16, "learning_rate": 1e-2}
    tiny = {
        "model": Model(
            patch=4,
            image_width=8,
            image_depth=2,
            text_width=8,
            text_depth=1,
            heads=2,
            embed_dim=6,
        ),
        "train": Train(epochs=2, shift=1, **batches),
        "ccu": Ccu(steps=3, batch=16, unlearn_batch=8, check_every=1, stop=False),
        "run": Run(steps_per_call=2, evaluate_batch=32),
    }
    small = {
        "steps": 3,
        "epochs": 4,
        "ascent_epochs": 1,
        "repair_steps": 2,
        "repeats": 2,
        "unlearn_batch": 8,
        "heldout_batch": 8,
        "refresh_every": 2,
        "shrink": 0.4,
        "alpha": 1.0,
        "fisher_threshold": 1.0,
        **batches,
    }
    usual = Config()
    for name in METHODS:
        if name not in tiny and name not in REFERENCES:
            section = getattr(usual, name)
            fields = {key: type(x) for key, x in vars(section).items()}
            own = {key: fields[key](x) for key, x in small.items() if key in fields}
            if "ascent_epochs" in own:  # one plan size for some more rows
                own["epochs"] = 2
            tiny[name] = dataclasses.replace(section, **own)
    for section, fields in sections.items():
        tiny[section] = dataclasses.replace(tiny[section], **fields)
    return Config(name="toy", **tiny)


def build_model(config: Config) -> models.Model:
    """The classifier of these rows."""
    return models.build(
        config.model,
        num_classes=CLASSES,
        vocab_size=VOCABULARY,
        image_size=IMAGE_SIZE,
        text_length=TEXT_LENGTH,
    )


def make_problem(
    executor, data=None, settings=None, *, seed=0, rule="random:0.2"
) -> Problem:
    """A problem whose original is a model with random parameters."""
    data = make_dataset() if data is None else data
    settings = settings or make_config()
    made = build_model(settings)
    table = {name: np.asarray(getattr(data, name)) for name in TABLE_COLUMNS}
    return Problem(
        config=settings,
        model=made,
        forward=Forward(made, executor, settings.run.evaluate_batch),
        executor=executor,
        table=executor.replicate(table),
        sets=splits.draw_sets(data, rule, 0, 0.2),
        multi_label=data.multi_label,
        params=executor.replicate(made.init(jax.random.key(7))),
        seed=seed,
    )


def make_context(problem, data, workdir, loop=None, **unlearn) -> RunContext:
    """The context of a run without display; `unlearn` changes its configuration."""
    reporter = Reporter(workdir, active=False)
    reporter.warn = fail_on_warning
    section = dataclasses.replace(problem.config.unlearn, **unlearn)
    return RunContext(
        config=dataclasses.replace(problem.config, unlearn=section),
        workdir=workdir,
        reporter=reporter,
        executor=problem.executor,
        data=data,
        corruptions={},
        model=problem.model,
        forward=problem.forward,
        loop=loop or make_loop(problem),
        table=problem.table,
    )


def step_inputs_of(executor, program, steps=slice(None)):
    """The inputs of some steps of a program, by default of all."""
    start, stop, _ = steps.indices(program.steps)
    return step_inputs(program, executor, start, stop - start)


class NullStage:
    """A stage that nobody watches."""

    def report_progress(self, *args, **kwargs):
        pass

    def update(self, *args, **kwargs):
        pass


def fail_on_warning(text):
    raise AssertionError(text)


@functools.cache
def problem_and_loop():
    """One problem and one loop for all tests of a file: what is compiled is kept."""
    problem = with_fitted_labels(make_problem(executors.vmap(2)))
    return problem, make_loop(problem)


def with_fitted_labels(problem):
    """The problem with an original that is right on all rows but the held-out ones.

    Else a stop rule might end a run before its first step.
    """
    every = np.arange(len(problem.table["labels"]))

    def said():
        return problem.forward.outputs(problem.params, problem.table, every)["image"]

    # About as many rows of each class.
    head = problem.params["image_head"]
    head = {**head, "bias": head["bias"] - np.median(said(), axis=0)}
    problem = problem._replace(params={**problem.params, "image_head": head})
    held = np.isin(every, problem.sets.validation)
    if problem.multi_label:
        labels = np.where(held[:, None], said() <= 0, said() > 0)
    else:
        labels = np.eye(CLASSES)[(said().argmax(1) + held) % CLASSES]
    labels = problem.executor.replicate(labels.astype(np.float32))
    return problem._replace(table={**problem.table, "labels": labels})


def make_loop(problem, config=None):
    """A loop that has compiled nothing yet."""
    return Loop(config or problem.config.run, problem.executor, fail_on_warning)


TRACE_COUNTS = collections.Counter()


def count_traces(name, traces=TRACE_COUNTS):
    """A method of the table whose loss counts how often it is traced."""

    def method(problem):
        program = METHODS[name](problem)
        if program.loss is None:
            return program

        def loss(*args):
            traces[name] += 1
            return program.loss(*args)

        return program._replace(loss=loss)

    return method


def run_method(
    name, folder, *, seed=0, changes=None, loop=None, traces=TRACE_COUNTS, **fields
):
    """Run a method of the table from its start to its end; gives the problem, too."""
    problem, shared = problem_and_loop()
    if changes:
        problem = problem._replace(config=make_config(**changes))
    problem = problem._replace(seed=seed, **fields)
    method = METHODS[name] if loop else count_traces(name, traces)
    outcome = (loop or shared).run(name, method, problem, folder / "none", NullStage())
    assert outcome.diverged is None
    return outcome, problem._replace(method=name)


def scaled_hyperparameters(section):
    """Another one for each real number of a section; none becomes zero, or is it now.

    But for how long it takes, and for whether all weights may move.
    """
    numbers = {k: x for k, x in vars(section).items() if isinstance(x, float) and x}
    fixed = (
        "epochs",
        *(["saliency_fraction"] * (numbers.get("saliency_fraction") == 1)),
    )
    return {k: 0.75 * x for k, x in numbers.items() if k not in fixed}


def trees_equal(a, b):
    """Whether two trees are the same to the bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def merge_shards(part):
    """All rows of a table that is cut over the devices."""
    return {name: np.asarray(x).reshape(-1, *x.shape[2:]) for name, x in part.items()}


def on_one_device(fn):
    """A per-device function as one of its arguments, on a single device."""
    return jax.vmap(
        fn, in_axes=None, out_axes=None, axis_name=executors.AXIS, axis_size=1
    )
