"""CCU, cross-modal contrastive unlearning: paper-like and closed-loop form.

Both train the picture's way behind the trunk on features that are computed once; trunk
and text branch stay as they are, to the bit. So they guard what the model *says*: who
reads the weights finds the trunk as it was.

The losses of the paper (Xu et al. 2025, arXiv 2509.23895) are not public: these forms
are this project's reconstruction.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ccu_jax import objectives
from ccu_jax.augment import hide
from ccu_jax.methods import targets
from ccu_jax.methods.problem import Problem
from ccu_jax.models import TAIL, unit
from ccu_jax.step import Program

TABLE_VIEWS = ("image", "text", "fused")


class Cache(NamedTuple):
    """The rows a tail method works on, with all that the trunk and the text branch say.

    `table`: unlearn rows first, then held-out (validation) rows, then retain rows;
    `u`, `v`, `r`: where they stand in it.
    """

    table: dict
    u: slice
    v: slice
    r: slice


def cache(problem: Problem, retain_rows: int) -> Cache:
    """One pass of the original over the unlearn set, held-out rows and retain rows."""
    sets, forward = problem.sets, problem.forward
    retain = sets.retain
    if retain_rows and len(retain) > retain_rows:
        retain = problem.batches(retain, retain_rows, 1, stream=9)[0]
    rows = np.concatenate([sets.unlearn, sets.validation, retain])
    table = {
        "features": forward.features(problem.params, problem.table, rows),
        **_take(problem.table, rows, ("text", "labels", "has_image", "has_text")),
    }
    said = forward.outputs(problem.params, table, np.arange(len(rows)))
    del table["text"]
    table["h_text"] = said["h_text"]
    table |= {f"original_{view}": said[view] for view in TABLE_VIEWS}
    table["row"] = problem.executor.place(np.arange(len(rows), dtype=np.int32))
    a, b = len(sets.unlearn), len(sets.unlearn) + len(sets.validation)
    return Cache(table, slice(0, a), slice(a, b), slice(b, len(rows)))


@jax.jit
def _gather(table, rows):
    return jax.tree.map(lambda x: x[rows], table)


def _take(table, rows, names):
    return _gather({name: table[name] for name in names}, rows)


def _slice(table, where: slice):
    return jax.tree.map(lambda x: x[where], table)


def _split(problem: Problem):
    """What a tail method trains, and what it leaves alone."""
    train = {name: problem.params[name] for name in TAIL}
    frozen = {name: x for name, x in problem.params.items() if name not in TAIL}
    return train, frozen


def _plan(problem: Problem, cached: Cache, config):
    rows = np.arange(cached.r.stop)
    return {
        "retain": problem.batches(rows[cached.r], config.batch, config.steps),
        "unlearn": problem.batches(
            rows[cached.u], config.unlearn_batch, config.steps, stream=1
        ),
    }


def _held_plan(problem: Problem, cached: Cache, config):
    rows = np.arange(cached.v.start, cached.v.stop)
    return problem.batches(rows, config.held_batch, config.steps, stream=2)


def _adam(config):
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    # Retention has no gradient where the model still is the original: with Adam's usual
    # epsilon the rounding noise there, which differs between devices, becomes a step.
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, eps=1e-5))


def _contrasts(config, u, r, out_u, out_r, *, offset=0.0, two_sided=False):
    """The weighted contrastive objectives that both forms share, by name."""
    weight_u, weight_r = u["has_image"], r["has_image"]
    terms = {}
    if config.pair:
        terms["pair"] = config.pair * objectives.pair_dissociation(
            out_u.z_image,
            out_u.z_text,
            out_r.z_text,
            u["labels"],
            r["labels"],
            weight_u & u["has_text"],
            weight_r & r["has_text"],
            offset=offset,
            two_sided=two_sided,
        )
    if config.separation:
        terms["separation"] = config.separation * objectives.separation(
            unit(out_r.h_image),
            unit(out_u.h_image),
            r["labels"],
            weight_r,
            weight_u,
            temperature=config.temperature,
        )
    return terms


def _retention(weight, r, out_r, multi_label):
    teacher = {view: r[f"original_{view}"] for view in ("image", "fused")}
    student = {"image": out_r.image, "fused": out_r.fused}
    return weight * objectives.retention(
        teacher, student, r["has_image"], multi_label=multi_label
    )


def ccu(problem: Problem) -> Program:
    """The paper-like form.

    (a) inverse contrast and pair dissociation on the unlearn set, (b) retention of the
    original's predictions on the retain set, (c) dual-set separation; stops when the
    pictures of the unlearn set are recognised no better than held-out ones.
    """
    config, model = problem.config.ccu, problem.model
    multi_label = problem.multi_label
    cached = cache(problem, config.retain_rows)
    train, frozen = _split(problem)

    def loss(params, frozen, aux, batch, step):
        u, r = batch["unlearn"], batch["retain"]
        out_u = model.apply({**frozen["parts"], **params}, u)
        out_r = model.apply({**frozen["parts"], **params}, r)
        terms = _contrasts(config, u, r, out_u, out_r)
        if config.inverse:
            terms["inverse"] = config.inverse * objectives.inverse_contrast(
                unit(out_u.h_image),
                unit(out_r.h_image),
                u["labels"],
                r["labels"],
                u["has_image"],
                r["has_image"],
                temperature=config.temperature,
                pull=config.pull,
            )
        if config.retention:
            terms["retention"] = _retention(config.retention, r, out_r, multi_label)
        return sum(terms.values(), jnp.zeros(())), terms

    def look(params, frozen, aux, table):
        def score(where):
            rows = _slice(table, where)
            out = model.apply({**frozen["parts"], **params}, rows)
            return _score(out.image, rows["labels"], rows["has_image"], multi_label)

        return {"stopped": score(cached.u) <= score(cached.v)}

    return Program(
        params=train,
        frozen={"parts": frozen},
        loss=loss,
        optimiser=_adam(config),
        table=cached.table,
        plan=_plan(problem, cached, config),
        aux={"stopped": jnp.zeros((), bool)} if config.stop else (),
        refresh=look if config.stop else None,
        refresh_every=config.check_every,
        stop=(lambda aux: aux["stopped"]) if config.stop else None,
    )


def _score(logits, labels, weight, multi_label):
    """Accuracy, or micro F1, of the rows that have a weight."""
    weight = weight[:, None]
    if not multi_label:
        best = jax.nn.one_hot(logits.argmax(1), labels.shape[1])
        return (best * labels * weight).sum() / jnp.maximum(weight.sum(), 1)
    guess = (logits > 0) * weight
    labels = labels * weight
    return 2 * (guess * labels).sum() / jnp.maximum((guess + labels).sum(), 1)


def ccu_plus(problem: Problem) -> Program:
    """The closed-loop form: shrink, then re-fit towards retain-only targets.

    The tail is pulled towards a fresh one (Ash & Adams 2020) and re-fitted on the
    retain set, while the unlearn set is fitted to what a model that never saw its
    pictures would say of them (`targets.py`), re-estimated under the current model.
    What the original says of held-out pictures is kept: it has not seen them either.
    """
    config, model = problem.config.ccu_plus, problem.model
    multi_label = problem.multi_label
    cached = cache(problem, config.retain_rows)
    train, frozen = _split(problem)
    fresh = problem.model.init(problem.key("fresh"))
    train = _shrink(train, {name: fresh[name] for name in TAIL}, config.shrink)
    ranks = _prepare(
        *(_named(cached, part) for part in ("u", "v", "r")),
        problem.key("ranks"),
        strength=config.ridge,
        multi_label=multi_label,
    )
    held = {"held": _held_plan(problem, cached, config)} if config.hold else {}
    hide_rate = problem.config.train.modality_dropout

    def loss(params, frozen, aux, batch, step):
        u, r = batch["unlearn"], batch["retain"]
        see, read = hide(r["has_image"], r["has_text"], r["key"], hide_rate)
        out_u = model.apply({**frozen["parts"], **params}, u)
        out_r = model.apply(
            {**frozen["parts"], **params}, {**r, "has_image": see, "has_text": read}
        )
        terms = _contrasts(
            config, u, r, out_u, out_r, offset=aux["offset"], two_sided=True
        )
        kind = {"multi_label": multi_label}
        if config.match:
            terms["match"] = config.match * sum(
                objectives.cross_entropy(
                    getattr(out_u, view), aux[view][u["row"]], u["has_image"], **kind
                )
                for view in ("image", "fused")
            )
        if config.classify:
            terms["classify"] = config.classify * sum(
                objectives.cross_entropy(
                    getattr(out_r, view), r["labels"], r["has_image"], **kind
                )
                for view in ("image", "fused")
            )
        if config.retention:
            terms["retention"] = _retention(config.retention, r, out_r, multi_label)
        if config.hold:
            v = batch["held"]
            out_v = model.apply({**frozen["parts"], **params}, v)
            terms["hold"] = _retention(config.hold, v, out_v, multi_label)
        return sum(terms.values(), jnp.zeros(())), terms

    def refresh(params, frozen, aux, table):
        v = _slice(table, cached.v)
        out = model.apply({**frozen["parts"], **params}, v)
        now = {"image": out.image, "fused": out.fused}
        aims = targets.current(
            frozen["ranks"],
            _logits(_slice(table, cached.u)),
            _logits(v),
            now,
            multi_label=multi_label,
        )
        return {**aims, "offset": _pair_offset(out, v["labels"])}

    classes = cached.table["labels"].shape[1]
    blank = jnp.zeros((cached.u.stop, classes))
    return Program(
        params=train,
        frozen={"parts": frozen, "ranks": ranks},
        loss=loss,
        optimiser=_adam(config),
        table=cached.table,
        plan=_plan(problem, cached, config) | held,
        aux={"image": blank, "fused": blank, "offset": jnp.zeros(())},
        refresh=refresh,
        refresh_every=config.refresh_every,
    )


_prepare = jax.jit(targets.prepare, static_argnames=("strength", "multi_label"))


@jax.jit
def _shrink(params, fresh, keep):
    return jax.tree.map(lambda a, b: keep * a + (1 - keep) * b, params, fresh)


def _logits(rows):
    names = {view: rows[f"original_{view}"] for view in TABLE_VIEWS}
    return {**names, "labels": rows["labels"]}


def _named(cached, part):
    """Rows as `targets.prepare` takes them."""
    rows = _slice(cached.table, getattr(cached, part))
    return {**_logits(rows), "pooled": _pool(rows["features"])}


@jax.jit
def _pool(features):
    """Trunk features `[N, P, W]` to `[N, 2 W]`: class token and mean of the patches."""
    return jnp.concatenate([features[:, 0], features[:, 1:].mean(axis=1)], axis=1)


def _pair_offset(out, labels):
    """How much nearer held-out pictures are to their own text than to their class's."""
    share = objectives.positives(labels, labels) * (1 - jnp.eye(len(labels)))
    cosine = out.z_image @ out.z_text.T
    usual = (cosine * share).sum(1) / jnp.maximum(share.sum(1), 1e-9)
    return (jnp.diagonal(cosine) - usual).mean()
