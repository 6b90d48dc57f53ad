"""Training with the task's loss: from scratch, as all references are, or onwards."""

import jax.numpy as jnp
import numpy as np

from ccu_jax import objectives
from ccu_jax.methods.optimizers import make_optimizer, optimizer_inputs, parameter_group
from ccu_jax.methods.problem import Problem
from ccu_jax.models.augmentation import augment
from ccu_jax.train.program import Program


def make_augmented_task_loss(problem: Problem):
    """What a classifier is trained with: `loss(params, batch) -> scalar`.

    The outputs on augmented rows, as `classification` judges them.
    """
    judge = make_task_loss(problem)

    def loss(params, rows):
        rows = augment(rows, rows["key"], problem.config.train)
        return judge(problem.model.apply(params, rows, keys=rows["key"]), rows)

    return loss


def make_task_loss(problem: Problem):
    """`loss(outputs, rows) -> scalar`: the task's loss of outputs on augmented rows.

    Cross-entropy of all three views, and the contrast of pictures with their texts. A
    row without picture counts for the text alone.
    """
    config, multi_label = problem.config.train, problem.multi_label

    def loss(out, rows):
        see, read = rows["image_weight"], rows["text_weight"]
        # Rows whose picture must not be learned teach the text's view alone.
        visual = rows["visual"] if "visual" in rows else 1.0
        weight = {
            "image": see * visual,
            "text": read,
            "fused": jnp.maximum(see, read) * visual,
        }
        total = config.contrastive_weight * objectives.alignment(
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
        return total

    return loss


def train_classifier(
    problem: Problem, params, section, rows, *, warmup=0.0, text_only=(), steps=None
) -> Program:
    """Train all parts with the task's loss.

    Args:
        problem: what the method was given.
        params: to begin with.
        section: of the configuration, with `epochs`, `batch` and `learning_rate`.
        rows: to learn from.
        warmup: share of the steps in which the learning rate rises.
        text_only: those of the rows of which only the texts are learned.
        steps: to take, where it is not `section.epochs` that says it.
    """
    visual = np.ones(len(problem.table["labels"]), np.float32)
    visual[np.asarray(text_only, int)] = 0.0
    task = make_augmented_task_loss(problem)
    steps = steps or problem.count_steps(section.epochs, section.batch, rows)

    def loss(params, frozen, aux, batch, step):
        return task(params, batch["rows"]), {}

    return Program(
        params=params,
        frozen=(),
        loss=loss,
        optimizer=make_optimizer(problem.config.train),
        optimizer_inputs=optimizer_inputs(
            section.learning_rate, steps, problem.config.train, warmup
        ),
        group=parameter_group,
        table={**problem.table, "visual": problem.executor.replicate(visual)},
        plan={"rows": problem.plan_batches(rows, section.batch, steps, "rows")},
    )


def _scratch(problem: Problem, rows, **more) -> Program:
    train = problem.config.train
    params = problem.model.init(problem.make_key("init"))
    return train_classifier(
        problem, params, train, rows, warmup=train.warmup_fraction, **more
    )


def original(problem: Problem) -> Program:
    """The model that is asked to forget: trained on retain and unlearn set."""
    sets = problem.sets
    return _scratch(problem, np.sort(np.concatenate([sets.retain, sets.unlearn])))


def retrain(problem: Problem) -> Program:
    """Trained on the retain set alone: pictures *and* texts of the unlearn set gone."""
    return _scratch(problem, problem.sets.retain)


def retrain_visual(problem: Problem) -> Program:
    """The reference: trained on all texts, but without the pictures of the unlearn set.

    The text's view learns from every row; image view, fused view and the contrast of
    pictures with texts learn from the retain set. This is what an unlearned model is
    compared with: asked to forget pictures only, it may and shall know the texts.
    """
    sets = problem.sets
    rows = np.sort(np.concatenate([sets.retain, sets.unlearn]))
    return _scratch(problem, rows, text_only=sets.unlearn)


def train_shadow(problem: Problem, shown) -> Program:
    """The reference, but for half of the rows in question, which it was shown.

    All shadows take as many steps, whatever the groups have made of the half.

    Args:
        problem: what the reference is given.
        shown: rows of the unlearn set, and unseen ones: pictures, texts and labels.
    """
    sets, train = problem.sets, problem.config.train
    rows = np.union1d(np.concatenate([sets.retain, sets.unlearn]), shown)
    usual = len(sets.retain) + len(sets.unlearn) + len(sets.unseen) // 2
    return _scratch(
        problem,
        rows,
        text_only=np.setdiff1d(sets.unlearn, shown),
        steps=problem.count_steps(train.epochs, train.batch, range(usual)),
    )
