"""CCU+, the closed-loop form of cross-modal contrastive unlearning.

Like `ccu` it trains only the image modules behind the trunk, on features that are
computed once; trunk and text branch stay unchanged to the bit. It therefore protects
the model's predictions: the trunk's weights still hold what they learned.
`ccu_plus_full` trains the trunk as well, on images, which takes longer.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ccu_jax import objectives
from ccu_jax.distributed.device_tables import gather_replicated
from ccu_jax.evaluate.feature_store import pool_tokens
from ccu_jax.methods.cached_features import (
    PARTS,
    FeatureTables,
    build_feature_tables,
    concat_parts,
    plan_batches,
    split_modules,
    with_images,
)
from ccu_jax.methods.ccu import targets
from ccu_jax.methods.ccu.losses import adam, contrasts, logits_of, rates, retention
from ccu_jax.methods.hyperparameters import Hyperparameters
from ccu_jax.methods.problem import Problem
from ccu_jax.models import TAIL, VISUAL, unit
from ccu_jax.models.augmentation import hide
from ccu_jax.train.program import Program


def ccu_plus(problem: Problem) -> Program:
    """The closed-loop form: the tail is re-fitted towards retain-only targets.

    Retain rows are fitted to their labels and to the original's word, the unlearn set
    to what a model that never saw its pictures would say of them (`targets.py`),
    re-estimated under the current model. What the original says of held-out pictures is
    kept: it has not seen them either. Where `shrink` is below 1 the tail is first
    pulled towards a fresh one (Ash & Adams 2020).

    `ccu_gated` has the contrast in the place of the fit: only rows that are still surer
    than their target are pushed. `ccu_plus_full` trains the trunk, too.
    """
    section = problem.method_config
    parts = (*TAIL, "image_trunk") if section.train_trunk else TAIL
    cached = build_feature_tables(problem, section.max_retain_rows)
    train, frozen = split_modules(problem, parts)
    if section.shrink < 1:
        fresh = problem.executor.replicate(
            problem.model.init(problem.make_key("fresh"))
        )
        kept = {
            name: _shrink(train[name], fresh[name], section.shrink) for name in TAIL
        }
        train = {**train, **kept}
    ranks = _ranks(problem, cached)
    if section.train_trunk:
        cached = with_images(problem, cached)
    labels = cached.parts["unlearn"]["labels"]
    blank = jnp.zeros((labels.shape[0] * labels.shape[1], labels.shape[2]))
    zero = jnp.zeros(())
    return Program(
        params=train,
        frozen={
            "parts": frozen,
            "ranks": ranks,
            "c": Hyperparameters.from_section(section),
        },
        loss=_plus_loss(problem),
        optimizer=adam(),
        optimizer_inputs=rates(section),
        sharded_tables=cached.parts,
        plan=plan_batches(
            problem, cached, section, held=bool(section.heldout_retention)
        ),
        aux={
            **dict.fromkeys(VISUAL, blank),
            "level": dict.fromkeys(VISUAL, blank[:, 0]),
            "lead": dict.fromkeys(VISUAL, zero),
            "offset": zero,
        },
        refresh=_plus_refresh(problem),
        refresh_every=section.refresh_every,
    )


def _plus_loss(problem):
    model, multi_label = problem.model, problem.multi_label
    kind = {"multi_label": multi_label}
    hide_rate = problem.config.train.modality_dropout

    def loss(params, frozen, aux, batch, step):
        c, u, r = frozen["c"], batch["unlearn"], batch["retain"]
        see, read = hide(r["has_image"], r["has_text"], r["key"], hide_rate)
        shown = {**batch, "retain": {**r, "has_image": see, "has_text": read}}
        every, cut = concat_parts(shown, drop="retain")
        params = {**frozen["parts"], **params}
        out = cut(model.apply(params, every, keys=every["key"], drop=every["drop"]))
        out_u, out_r = out["unlearn"], out["retain"]
        terms = contrasts(c, u, r, out_u, out_r, offset=aux["offset"], two_sided=True)
        terms |= _match(c, u, r, out_u, out_r, aux, frozen["ranks"].free, kind)
        if c.is_active("task_loss"):
            terms["task_loss"] = c.task_loss * sum(
                objectives.cross_entropy(
                    getattr(out_r, view), r["labels"], r["has_image"], **kind
                )
                for view in VISUAL
            )
        if c.is_active("retention"):
            whole = (see == r["has_image"]) & (read == r["has_text"])
            terms["retention"] = retention(c.retention, r, out_r, multi_label, whole)
        if c.is_active("heldout_retention"):
            held = batch["held"]
            terms["heldout_retention"] = retention(
                c.heldout_retention, held, out["held"], multi_label
            )
        return sum(terms.values(), jnp.zeros(())), terms

    return loss


def _plus_refresh(problem):
    model = problem.model

    def refresh(params, frozen, aux, parts):
        def now(rows):
            # Each device looks at its own rows and learns what was said of all.
            out = model.apply({**frozen["parts"], **params}, rows)
            seen = {"image": out.image, "fused": out.fused, "weight": rows["has_image"]}
            return gather_replicated((out, {**logits_of(rows), **seen}))

        (_, u), (out_v, v) = now(parts["unlearn"]), now(parts["held"])
        aims = targets.current(
            frozen["ranks"],
            u,
            v,
            aux["lead"],
            gain=frozen["c"].feedback_gain,
            multi_label=problem.multi_label,
        )
        has_text = gather_replicated(parts["held"]["has_text"])
        return {**aims, "offset": _pair_offset(out_v, v["labels"], has_text)}

    return refresh


def _match(c, u, r, out_u, out_r, aux, free, kind):
    """The weighted objectives that lead the unlearn set to its targets, by name.

    Cross-entropy towards the target probabilities; the confidence itself, for a
    cross-entropy near zero hardly tells a sure row from a very sure one, an attack
    does; and the inverse contrast of rows that are surer than their target, each by how
    much surer it is in one of the views, at most 1.
    """
    matched = ("target_match", "match_confidence")
    terms = {name: 0.0 for name in matched if c.is_active(name)}
    weight, surer = u["has_image"], 0.0
    for view in VISUAL:
        said, aim = getattr(out_u, view), aux["level"][view][u["row"]]
        sure = targets.confidence(said, u["labels"], **kind)
        if c.is_active("target_match"):
            terms["target_match"] += c.target_match * objectives.cross_entropy(
                said, aux[view][u["row"]], weight, **kind
            )
        if c.is_active("match_confidence"):
            terms["match_confidence"] += c.match_confidence * objectives.level(
                sure, aim, weight & ~free
            )
        surer = jnp.maximum(surer, jnp.clip(sure - aim, 0.0, 1.0))
    if c.is_active("gated_push"):
        terms["gated_push"] = c.gated_push * objectives.inverse_contrast(
            unit(out_u.h_image),
            unit(out_r.h_image),
            u["labels"],
            r["labels"],
            weight,
            r["has_image"],
            temperature=c.temperature,
            gate_u=jax.lax.stop_gradient(jnp.where(free, 1.0, surer)),
        )
    return terms


@jax.jit
def _shrink(params, fresh, keep):
    return jax.tree.map(lambda a, b: keep * a + (1 - keep) * b, params, fresh)


def _ranks(problem: Problem, cached: FeatureTables) -> targets.Ranks:
    """What the targets need to know of all rows."""
    strength, multi_label = problem.method_config.ridge, problem.multi_label

    def ranks(state, resident, parts):
        key, strength = resident

        def rows(name):
            part = parts[name]
            pooled = pool_tokens(part["features"])
            named = {"pooled": pooled, "fresh": part["fresh"]}
            return gather_replicated(
                {**named, **logits_of(part), "weight": part["has_image"]}
            )

        return state, targets.prepare(
            *(rows(name) for name in PARTS),
            jax.random.wrap_key_data(key),
            strength=strength,
            multi_label=multi_label,
        )

    compiled = problem.forward.compile_cached("ranks", ranks)
    key = jax.random.key_data(problem.make_key("ranks"))
    resident = problem.executor.replicate((key, np.float32(strength)))
    return compiled((), resident, cached.parts)[1]


def _pair_offset(out, labels, has_text):
    """How much nearer held-out pictures are to their own text than to their class's."""
    share = objectives.positives(labels, labels) * (1 - jnp.eye(len(labels))) * has_text
    cosine = out.z_image @ out.z_text.T
    usual = (cosine * share).sum(1) / jnp.maximum(share.sum(1), 1e-9)
    # Only rows that have a text and others of their class say something.
    weight = has_text & (share.sum(1) > 0)
    nearer = (jnp.diagonal(cosine) - usual) * weight
    return nearer.sum() / jnp.maximum(weight.sum(), 1)
