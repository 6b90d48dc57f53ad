"""CCU+, the closed-loop form of cross-modal contrastive unlearning.

Instead of pushing unlearn images away until a stop rule applies, it moves the model's
predictions on them to those of a model that never saw them, estimated in `targets.py`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ccu_jax import objectives
from ccu_jax.distributed.device_tables import gather_replicated
from ccu_jax.evaluate.forward import pool_tokens
from ccu_jax.methods import cached_features, programs
from ccu_jax.methods.ccu import paper
from ccu_jax.methods.ccu.statistics import confidence
from ccu_jax.methods.ccu.targets import Prior, Targets, fit_prior, update_targets
from ccu_jax.methods.problem import Problem
from ccu_jax.models import TAIL, VIEWS, VISUAL
from ccu_jax.models.augmentation import drop_modalities
from ccu_jax.train.program import Program


def ccu_plus(problem: Problem) -> Program:
    """Closed-loop CCU: fits predictions on unlearn rows to targets (`targets.py`).

        (a) target match + confidence match + gated push + pair dissociation
        (b) + task loss + retention on retain rows + retention on held-out rows
        (c) + separation

    each with a weight. The targets are updated every `refresh_every` steps. Predictions
    on held-out (validation) rows are retained, because the original never saw them;
    their labels are used only for the targets. With `shrink` below 1, training starts
    between the original and random parameters (Ash & Adams 2020).

    It trains the image modules after the trunk. `ccu_plus_full` also trains the trunk,
    on images. `ccu_gated` replaces both matches by the gated push.
    """
    config = problem.method_config
    cached = cached_features.build_feature_tables(problem, config.max_retain_rows)
    prior = _fit_prior(problem, cached)
    if config.train_trunk:
        cached = cached_features.replace_features_by_images(problem, cached)
    heldout_batch = config.heldout_batch if config.heldout_retention else 0
    program = programs.make_program(
        problem,
        _make_loss(problem),
        cached_features.plan_feature_batches(problem, cached, heldout_batch),
        modules=(*TAIL, "image_trunk") if config.train_trunk else TAIL,
        frozen={"prior": prior},
        sharded_tables=cached.tables,
        optimizer=paper.make_adam(),
    )
    params, zeros_UxK = program.params, jnp.zeros(prior.base.shape)
    if config.shrink < 1:
        fresh = problem.init_params("fresh")
        params |= {n: _interpolate(params[n], fresh[n], config.shrink) for n in TAIL}
    # Placeholders, because the first refresh runs before the first step.
    targets = Targets(
        probability=dict.fromkeys(VISUAL, zeros_UxK),
        confidence=dict.fromkeys(VISUAL, zeros_UxK[:, 0]),
        bias=dict.fromkeys(VISUAL, jnp.zeros(())),
    )
    return program._replace(
        params=params,
        aux={"targets": targets, "offset": jnp.zeros(())},
        refresh=_make_refresh(problem),
        refresh_every=config.refresh_every,
    )


@jax.jit
def _interpolate(params, fresh, weight):
    return jax.tree.map(lambda a, b: weight * a + (1 - weight) * b, params, fresh)


def _make_loss(problem: Problem) -> Callable:
    """Returns the loss of `ccu_plus` in the form of `Program.loss`."""
    model, multi_label = problem.model, problem.multi_label
    dropout_rate = problem.config.train.modality_dropout

    def loss(params, frozen, aux, batch, step):
        hp, u, r = frozen["hp"], batch["unlearn"], batch["retain"]
        dropped = drop_modalities(r, dropout_rate)
        params = {**frozen["modules"], **params}
        parts = {**batch, "retain": dropped}
        outputs = programs.forward_parts(model, params, parts, ("retain",))
        out_u, out_r = outputs["unlearn"], outputs["retain"]
        terms = paper.contrastive_terms(
            hp, u, r, out_u, out_r, offset=aux["offset"], two_sided=True
        )
        terms |= _target_terms(
            hp, u, r, out_u, out_r, aux["targets"], frozen["prior"], multi_label
        )
        if hp.is_active("task_loss"):
            losses = programs.visual_losses(out_r, r["labels"], multi_label)
            task_loss = sum(objectives.mean(x, r["has_image"]) for x in losses)
            terms["task_loss"] = hp.task_loss * task_loss
        if hp.is_active("retention"):
            terms["retention"] = paper.retention_term(
                hp.retention,
                r,
                out_r,
                multi_label=multi_label,
                has_all_modalities=(dropped["has_image"] == r["has_image"])
                & (dropped["has_text"] == r["has_text"]),
            )
        if hp.is_active("heldout_retention"):
            held, out_held = batch["held"], outputs["held"]
            terms["heldout_retention"] = paper.retention_term(
                hp.heldout_retention, held, out_held, multi_label=multi_label
            )
        return sum(terms.values(), jnp.zeros(())), terms

    return loss


def _target_terms(hp, u, r, out_u, out_r, targets, prior, multi_label):
    """Returns the weighted objectives that move unlearn rows to their targets.

    The gated push is the inverse contrast of rows above their target confidence. Each
    row is weighted by the larger of its excesses in the two views, at most 1.
    """
    terms, target_g, g = {}, {}, {}
    for view in VISUAL:
        target_g[view] = targets.confidence[view][u["row"]]
        g[view] = confidence(getattr(out_u, view), u["labels"], multi_label)
    if hp.is_active("target_match"):
        terms["target_match"] = sum(
            hp.target_match
            * objectives.cross_entropy(
                getattr(out_u, view),
                targets.probability[view][u["row"]],
                u["has_image"],
                multi_label=multi_label,
            )
            for view in VISUAL
        )
    if hp.is_active("match_confidence"):
        weight = u["has_image"] & ~prior.is_shifted
        terms["match_confidence"] = sum(
            hp.match_confidence
            * objectives.confidence_loss(g[view], target_g[view], weight)
            for view in VISUAL
        )
    if hp.is_active("gated_push"):
        excess = [jnp.clip(g[view] - target_g[view], 0.0, 1.0) for view in VISUAL]
        gate = jnp.where(prior.is_shifted, 1.0, jnp.maximum(*excess))
        terms["gated_push"] = hp.gated_push * objectives.inverse_contrast(
            paper.image_features(u, out_u),
            paper.image_features(r, out_r),
            temperature=hp.temperature,
            gate_u=jax.lax.stop_gradient(gate),
        )
    return terms


def _make_refresh(problem: Problem) -> Callable:
    """Returns the `refresh` function, which updates the targets and the offset."""

    def refresh(params, frozen, aux, sharded_tables):
        def predict(rows):
            outputs = problem.model.apply({**frozen["modules"], **params}, rows)
            logits = {
                "text": rows["original_text"],
                "image": outputs.image,
                "fused": outputs.fused,
            }
            rows = {**logits, "labels": rows["labels"], "valid": rows["has_image"]}
            return gather_replicated((outputs, rows))

        _, u = predict(sharded_tables["unlearn"])
        out_v, v = predict(sharded_tables["held"])
        targets = update_targets(
            frozen["prior"],
            u,
            v,
            aux["targets"].bias,
            gain=frozen["hp"].feedback_gain,
            multi_label=problem.multi_label,
        )
        has_text = gather_replicated(sharded_tables["held"]["has_text"])
        offset = _estimate_offset(out_v, v["labels"], has_text)
        return {"targets": targets, "offset": offset}

    return refresh


def _estimate_offset(out_v, labels, has_text):
    """Returns the offset of the pair dissociation, estimated on held-out rows.

    It is the mean excess of an image's cosine with its own text over the mean cosine
    with the texts of other rows that share labels.
    """
    num_rows = len(labels)
    share = objectives.label_similarity(labels, labels) * (1 - jnp.eye(num_rows))
    share = share * has_text
    cosine = out_v.z_image @ out_v.z_text.T
    class_mean = (cosine * share).sum(1) / jnp.maximum(share.sum(1), 1e-9)
    weight = has_text & (share.sum(1) > 0)
    excess = (jnp.diagonal(cosine) - class_mean) * weight
    return excess.sum() / jnp.maximum(weight.sum(), 1)


def _fit_prior(problem: Problem, cached: cached_features.FeatureTables) -> Prior:
    """Runs `targets.fit_prior` on all devices."""
    # The executable outlives the problem, so it must not capture the problem.
    multi_label = problem.multi_label

    def fit(state, static_inputs, tables):
        key_data, strength = static_inputs

        def gather(part):
            table = tables[part]
            return gather_replicated(
                {
                    "pooled": pool_tokens(table["features"]),
                    "fresh": table["fresh"],
                    "labels": table["labels"],
                    "valid": table["has_image"],
                    **{view: table[f"original_{view}"] for view in VIEWS},
                }
            )

        return state, fit_prior(
            gather("unlearn"),
            gather("held"),
            gather("retain"),
            jax.random.wrap_key_data(key_data),
            strength=strength,
            multi_label=multi_label,
        )

    compiled = problem.forward.compile_cached("ranks", fit)
    key_data = jax.random.key_data(problem.make_key("ranks"))
    strength = np.float32(problem.method_config.ridge)
    static_inputs = problem.executor.replicate((key_data, strength))
    return compiled((), static_inputs, cached.tables)[1]
