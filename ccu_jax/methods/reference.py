"""Training from scratch: the original and two models that never saw the pictures."""

import jax.numpy as jnp
import numpy as np
import optax

from ccu_jax import objectives
from ccu_jax.augment import augment
from ccu_jax.config import Train
from ccu_jax.methods.problem import Problem
from ccu_jax.models import TEXT
from ccu_jax.step import Program


def optimiser(learning_rate: float, steps: int, config: Train, warmup: float = 0.0):
    """AdamW with a cosine to zero; the text branch may learn at a rate of its own."""

    def adamw(rate):
        schedule = optax.warmup_cosine_decay_schedule(
            0.0 if warmup else rate, rate, min(round(warmup * steps), steps - 1), steps
        )
        # One long vector instead of many arrays: far quicker to compile.
        return optax.flatten(
            optax.adamw(schedule, b2=0.98, weight_decay=config.weight_decay)
        )

    def branch(params):
        return {name: "text" if name in TEXT else "rest" for name in params}

    rates = {"rest": learning_rate, "text": learning_rate * config.text_rate}
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition({name: adamw(rate) for name, rate in rates.items()}, branch),
    )


def task_loss(problem: Problem):
    """What a classifier is trained with: `loss(params, batch) -> (scalar, outputs)`.

    Cross-entropy of all three views, and the contrast of pictures with their texts. A
    row without picture counts for the text alone.
    """
    model, config = problem.model, problem.config.train
    multi_label = problem.multi_label

    def loss(params, rows):
        rows = augment(rows, rows["key"], config)
        out = model.apply(params, rows, keys=rows["key"])
        see, read = rows["image_weight"], rows["text_weight"]
        # Rows whose picture must not be learned teach the text's view alone.
        visual = rows["visual"] if "visual" in rows else 1.0
        weight = {
            "image": see * visual,
            "text": read,
            "fused": jnp.maximum(see, read) * visual,
        }
        total = config.align * objectives.alignment(
            out.z_image, out.z_text, see * read * visual, temperature=config.temperature
        )
        target = rows["labels"]
        if config.label_smoothing:
            even = 0.5 if multi_label else 1 / target.shape[1]
            target = target + config.label_smoothing * (even - target)
        for view, w in weight.items():
            total += objectives.cross_entropy(
                getattr(out, view), target, w, multi_label=multi_label
            )
        return total, out

    return loss


def _train(problem: Problem, rows, table) -> Program:
    config = problem.config.train
    task = task_loss(problem)
    steps = problem.steps(config.epochs, config.batch, rows)

    def loss(params, frozen, aux, batch, step):
        return task(params, batch["rows"])[0], {}

    return Program(
        params=problem.model.init(problem.key("init")),
        frozen=(),
        loss=loss,
        optimiser=optimiser(config.learning_rate, steps, config, config.warmup),
        table=table,
        plan={"rows": problem.batches(rows, config.batch, steps, "rows")},
    )


def original(problem: Problem) -> Program:
    """The model that is asked to forget: trained on retain and unlearn set."""
    sets = problem.sets
    rows = np.sort(np.concatenate([sets.retain, sets.unlearn]))
    return _train(problem, rows, problem.table)


def retrain(problem: Problem) -> Program:
    """Trained on the retain set alone: pictures *and* texts of the unlearn set gone."""
    return _train(problem, problem.sets.retain, problem.table)


def retrain_visual(problem: Problem) -> Program:
    """The reference: trained on all texts, but without the pictures of the unlearn set.

    The text's view learns from every row; image view, fused view and the contrast of
    pictures with texts learn from the retain set. This is what an unlearned model is
    compared with: asked to forget pictures only, it may and shall know the texts.
    """
    sets = problem.sets
    rows = np.sort(np.concatenate([sets.retain, sets.unlearn]))
    visual = np.ones(len(problem.table["labels"]), np.float32)
    visual[sets.unlearn] = 0.0
    table = {**problem.table, "visual": problem.executor.place(visual)}
    return _train(problem, rows, table)
