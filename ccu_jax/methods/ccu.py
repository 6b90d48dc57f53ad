"""CCU, cross-modal contrastive unlearning: paper-like and closed-loop form.

Both train the picture's way behind the trunk on features that are computed once; trunk
and text branch stay as they are, to the bit. So they guard what the model *says*: who
reads the weights finds the trunk as it was.

The losses of the paper (Xu et al. 2025, arXiv 2509.23895) are not public: these forms
are this project's reconstruction.
"""

import jax
import jax.numpy as jnp
import optax

from ccu_jax import objectives
from ccu_jax.augment import hide
from ccu_jax.features import pool
from ccu_jax.methods import targets
from ccu_jax.methods.cache import PARTS, Cache, cache, plan, split, together
from ccu_jax.methods.problem import Problem
from ccu_jax.models import TAIL, VIEWS, VISUAL, unit
from ccu_jax.step import Program, everywhere


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
            u["z_text"],
            r["z_text"],
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


def _retention(weight, r, out_r, multi_label, whole=True):
    """Weighted retention; `whole`: rows whose fused view sees all that it has."""
    teacher = {view: r[f"original_{view}"] for view in VISUAL}
    student = {view: getattr(out_r, view) for view in VISUAL}
    counts = {"image": r["has_image"], "fused": r["has_image"] & whole}
    return weight * objectives.retention(
        teacher, student, counts, multi_label=multi_label
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
    train, frozen = split(problem)

    def loss(params, frozen, aux, batch, step):
        u, r = batch["unlearn"], batch["retain"]
        every, cut = together(batch)
        out = cut(model.apply({**frozen["parts"], **params}, every))
        out_u, out_r = out["unlearn"], out["retain"]
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

    def look(params, frozen, aux, parts):
        def score(rows):
            out = model.apply({**frozen["parts"], **params}, rows)
            seen = everywhere((out.image, rows["labels"], rows["has_image"]))
            return _score(*seen, multi_label)

        return {"stopped": score(parts["unlearn"]) <= score(parts["held"])}

    return Program(
        params=train,
        frozen={"parts": frozen},
        loss=loss,
        optimiser=_adam(config),
        parts=cached.parts,
        plan=plan(problem, cached, config),
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
    """The closed-loop form: the tail is re-fitted towards retain-only targets.

    Retain rows are fitted to their labels and to the original's word, the unlearn set
    to what a model that never saw its pictures would say of them (`targets.py`),
    re-estimated under the current model. What the original says of held-out pictures is
    kept: it has not seen them either. Where `shrink` is below 1 the tail is first
    pulled towards a fresh one (Ash & Adams 2020).
    """
    config = problem.config.ccu_plus
    cached = cache(problem, config.retain_rows)
    train, frozen = split(problem)
    if config.shrink < 1:
        fresh = problem.executor.place(problem.model.init(problem.key("fresh")))
        train = _shrink(train, {name: fresh[name] for name in TAIL}, config.shrink)
    ranks = _ranks(problem, cached)
    labels = cached.parts["unlearn"]["labels"]
    blank = jnp.zeros((labels.shape[0] * labels.shape[1], labels.shape[2]))
    zero = jnp.zeros(())
    return Program(
        params=train,
        frozen={"parts": frozen, "ranks": ranks},
        loss=_plus_loss(problem),
        optimiser=_adam(config),
        parts=cached.parts,
        plan=plan(problem, cached, config, held=bool(config.hold)),
        aux={
            **{view: blank for view in VISUAL},
            "level": {view: blank[:, 0] for view in VISUAL},
            "lead": {view: zero for view in VISUAL},
            "offset": zero,
        },
        refresh=_plus_refresh(problem),
        refresh_every=config.refresh_every,
    )


def _plus_loss(problem):
    config, model = problem.config.ccu_plus, problem.model
    multi_label = problem.multi_label
    kind = {"multi_label": multi_label}
    hide_rate = problem.config.train.modality_dropout

    def loss(params, frozen, aux, batch, step):
        u, r = batch["unlearn"], batch["retain"]
        see, read = hide(r["has_image"], r["has_text"], r["key"], hide_rate)
        shown = {**batch, "retain": {**r, "has_image": see, "has_text": read}}
        every, cut = together(shown, drop="retain")
        params = {**frozen["parts"], **params}
        out = cut(model.apply(params, every, keys=every["key"], drop=every["drop"]))
        out_u, out_r = out["unlearn"], out["retain"]
        terms = _contrasts(
            config, u, r, out_u, out_r, offset=aux["offset"], two_sided=True
        )
        terms |= _match(config, u, out_u, aux, frozen["ranks"].free, kind)
        if config.classify:
            terms["classify"] = config.classify * sum(
                objectives.cross_entropy(
                    getattr(out_r, view), r["labels"], r["has_image"], **kind
                )
                for view in VISUAL
            )
        if config.retention:
            whole = (see == r["has_image"]) & (read == r["has_text"])
            terms["retention"] = _retention(
                config.retention, r, out_r, multi_label, whole
            )
        if config.hold:
            terms["hold"] = _retention(
                config.hold, batch["held"], out["held"], multi_label
            )
        return sum(terms.values(), jnp.zeros(())), terms

    return loss


def _plus_refresh(problem):
    config, model = problem.config.ccu_plus, problem.model

    def refresh(params, frozen, aux, parts):
        def now(rows):
            # Each device looks at its own rows and learns what was said of all.
            out = model.apply({**frozen["parts"], **params}, rows)
            seen = {"image": out.image, "fused": out.fused, "weight": rows["has_image"]}
            return everywhere((out, {**_logits(rows), **seen}))

        (_, u), (out_v, v) = now(parts["unlearn"]), now(parts["held"])
        aims = targets.current(
            frozen["ranks"],
            u,
            v,
            aux["lead"],
            gain=config.gain,
            multi_label=problem.multi_label,
        )
        has_text = everywhere(parts["held"]["has_text"])
        return {**aims, "offset": _pair_offset(out_v, v["labels"], has_text)}

    return refresh


def _match(config, u, out_u, aux, free, kind):
    """The weighted objectives that lead the unlearn set to its targets, by name.

    Cross-entropy towards the target probabilities; and the confidence itself, for a
    cross-entropy near zero hardly tells a sure row from a very sure one, an attack
    does.
    """
    terms = {"match": 0.0, "level": 0.0}
    for view in VISUAL:
        said, weight = getattr(out_u, view), u["has_image"]
        if config.match:
            aim = aux[view][u["row"]]
            terms["match"] += config.match * objectives.cross_entropy(
                said, aim, weight, **kind
            )
        if config.level:
            sure = targets.confidence(said, u["labels"], **kind)
            terms["level"] += config.level * objectives.level(
                sure, aux["level"][view][u["row"]], weight & ~free
            )
    return {name: term for name, term in terms.items() if getattr(config, name)}


@jax.jit
def _shrink(params, fresh, keep):
    return jax.tree.map(lambda a, b: keep * a + (1 - keep) * b, params, fresh)


def _logits(rows):
    """The original's logits of all views, with the labels."""
    names = {view: rows[f"original_{view}"] for view in VIEWS}
    return {**names, "labels": rows["labels"]}


def _ranks(problem: Problem, cached: Cache) -> targets.Ranks:
    """What the targets need to know of all rows."""
    strength, multi_label = problem.config.ccu_plus.ridge, problem.multi_label

    def ranks(state, key, parts):
        def rows(name):
            part = parts[name]
            pooled = pool(part["features"])
            named = {"pooled": pooled, "fresh": part["fresh"]}
            return everywhere({**named, **_logits(part), "weight": part["has_image"]})

        return state, targets.prepare(
            *(rows(name) for name in PARTS),
            jax.random.wrap_key_data(key),
            strength=strength,
            multi_label=multi_label,
        )

    compiled = problem.forward.once(f"ranks {strength}", ranks)
    key = problem.executor.place(jax.random.key_data(problem.key("ranks")))
    return compiled((), key, cached.parts)[1]


def _pair_offset(out, labels, has_text):
    """How much nearer held-out pictures are to their own text than to their class's."""
    share = objectives.positives(labels, labels) * (1 - jnp.eye(len(labels))) * has_text
    cosine = out.z_image @ out.z_text.T
    usual = (cosine * share).sum(1) / jnp.maximum(share.sum(1), 1e-9)
    # Only rows that have a text and others of their class say something.
    weight = has_text & (share.sum(1) > 0)
    nearer = (jnp.diagonal(cosine) - usual) * weight
    return nearer.sum() / jnp.maximum(weight.sum(), 1)
