"""The table of an audit: a line for each method, its verdict, and its numbers."""

from typing import Any

import numpy as np

from ccu_jax.audits.judging import share_rows
from ccu_jax.audits.offline import JUDGED
from ccu_jax.methods import REFERENCE
from ccu_jax.metrics.intervals import Interval, over_seeds
from ccu_jax.reports import findings as notes
from ccu_jax.reports import tables
from ccu_jax.reports.summary import DASH

HEADER = [
    "method",
    "verdict",
    *(f"AUC {view}, less the reference's" for view in JUDGED),
    "without text, less the reference's",
    "epsilon at least, image",
    "epsilon at least, pair",
    "average gap",
    "ToW",
    "JS to reference",
    "CKA to reference",
    "within classes",
    "scatter",
    "relearned in",
    "LiRA",
    "RMIA",
    "U-LiRA",
    "U-LiRA: found at 1 %",
    "U-LiRA: found at 0.1 %",
    "U-LiRA of its own model",
    "U-LiRA of retrain_visual",
    "U-LiRA of retrain_visual_2",
    "forgetting score",
    "forgetting score, control",
    "one-run epsilon",
    "one-run epsilon, control",
    "shadows",
    "this audit took",
]
LEGEND = (
    "Intervals are of 95 %, those of the differences of 99.2 %, as six are asked at "
    "once; of several seeds, of their mean. A difference that lies within ±.05 as a "
    "whole is forgotten. What two models that both never saw the pictures come to is "
    "in the line of the second reference, `retrain_visual_2`: compare with it. Average "
    "gap (points), ToW, JS and CKA are distances from the reference, `within classes` "
    "is the likeness to the original. Epsilon is what leaks at least, by one threshold "
    "on the loss: a small one is no proof that nothing does. Relearning: the range of "
    "three trainings for each seed; without text: the attack on the fused view of "
    "pictures whose text is hidden; scatter: within classes, over that between them, "
    "in the reference's line the value to compare with. LiRA, RMIA and U-LiRA: AUC of "
    "attacks with shadow models, U-LiRA with each shadow in turn as the target and all "
    "others as its shadows, and what share of pictures is found at 1 % and 0.1 % false "
    "alarms (this needs a thousand answers). The epsilon of one run is of one shadow "
    "that has unlearned (in the original's line, as it is), by the rows that it was "
    "shown; its control is of another one, by the same rows. Forgetting score, and "
    "KLOM in audit.json, need 12 shadows; a control is what models that never saw the "
    "pictures come to."
)


def table(found: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines, without the columns that nobody measured.

    Args:
        found: of `auditing.collected`.
    """
    lines = [_line(method) for method in found]
    kept = [
        place
        for place in range(len(HEADER))
        if place < 2 or any(line[place] != DASH for line in lines)
    ]
    return [HEADER[p] for p in kept], [[line[p] for p in kept] for line in lines]


def markdown(found: list[dict[str, Any]]) -> str:
    """The table, and the sentence of every verdict."""
    loud = dict.fromkeys(method["edition"] for method in found)
    told = [f"**{notes.LOUD[name]}**" for name in loud if name in notes.LOUD]
    told = ["# Audit", *told, "\n".join(tables.markdown(*table(found)))]
    told.append(LEGEND)
    told.append(_costs(found))
    told.append(
        "\n".join(
            f"- **{method['method']}**: {tables.escaped(method['verdict']['sentence'])}"
            for method in found
        )
    )
    return "\n\n".join(told) + "\n"


def _line(method):
    seeds = method["seeds"]

    shared = share_rows(seeds)

    def told(*path, form="{:.3f}", bounds=(0, 1)):
        values = [_at(record, path) for record in seeds]
        return _mean(values, form, {"shared": shared, "bounds": bounds})

    line = [method["method"], method["verdict"]["word"]]
    for view in JUDGED:
        line.append(_shown(method["verdict"]["differences"][view], "{:+.3f}"))
    line.append(told("neutral", "difference", form="{:+.3f}", bounds=(-1, 1)))
    line += [told("epsilon", view, form="{:.2f}") for view in ("image", "pair")]
    line.append(told("gaps", "average_gap", form="{:.1f}", bounds=(0, 100)))
    line.append(told("gaps", "tug_of_war"))
    line.append(told("distances", "unlearn", "image", "js_divergence"))
    line.append(told("cka", "reference", "image", bounds=(-1, 1)))
    line.append(told("within_class", "original", bounds=(-1, 1)))
    line.append(told("scatter", form="{:.2f}", bounds=(0, np.inf)))
    line.append(_relearned(seeds))
    pool = "pool", "image"
    line += [told(*pool, name, "auc") for name in ("lira", "rmia", "ulira")]
    line += [told(*pool, "ulira", rate) for rate in ("tpr_1", "tpr_01")]
    of = ("model", REFERENCE, f"{REFERENCE}_2")
    line += [told(*pool, "ulira_of", name, "auc") for name in of]
    line += [told(*pool, "forgetting_score", name) for name in ("score", "control")]
    for name in ("one_run", "one_run_control"):
        line.append(told(*pool, name, "epsilon", form="{:.2f}"))
    shadows = {_at(record, (*pool, "shadows")) for record in seeds} - {None}
    line.append(", ".join(map(str, sorted(shadows))) or DASH)
    line.append(_took(seeds))
    return line


def _mean(values, form, how):
    """The mean over seeds; with its interval where all have one."""
    every, values = len(values), [x for x in values if x is not None]
    if not values:
        return DASH
    some = "" if len(values) == every else f", {len(values)} of {every} seeds"
    if all(isinstance(x, list) for x in values):
        found = over_seeds([Interval(*x) for x in values], **how)
        return _shown(found, form) + some
    return form.format(float(np.mean(values))) + some


def _shown(interval, form):
    if interval is None:
        return DASH
    return f"{form} ({form} to {form})".format(*interval)


def _relearned(seeds):
    found = [_at(record, ("relearning",)) for record in seeds]
    found = [x for x in found if x is not None]
    if not found:
        return DASH

    def mean(name):
        steps = [x[name] for x in found]
        most = max(x["most"] for x in found)
        return f"more than {most}" if None in steps else f"{np.mean(steps):.0f}"

    if broken := [x["diverged"] for x in found if x["diverged"]]:
        return f"diverged ({broken[0]})"
    if mean("fewest") == mean("greatest"):
        return f"{mean('steps')} steps"
    return f"{mean('steps')} steps ({mean('fewest')} to {mean('greatest')})"


def _took(seeds):
    """Seconds, all seeds together, and of the shadows that serve all methods."""
    own = sum(sum(record["seconds"].values()) for record in seeds)
    pool = sum(record["costs_s"].get("shadow models", 0.0) for record in seeds)
    return f"{own:.1f} s" + (f" + {pool:.0f} s of the shadows" if pool else "")


def _costs(found):
    """What each audit took, of all methods and seeds together."""
    total: dict[str, float] = {}
    for method in found:
        for record in method["seeds"]:
            for name, seconds in record["costs_s"].items():
                total[name] = total.get(name, 0.0) + seconds
    each = ", ".join(f"{n.replace('_', ' ')} {s:.1f}" for n, s in total.items())
    of = {str(record.get("commit")) for method in found for record in method["seeds"]}
    made = f"Models of commit {', '.join(sorted(of))}." if of - {"None"} else ""
    return f"Seconds, of all methods and seeds together: {each}. {made}".strip()


def _at(record, path):
    for key in path:
        record = record.get(key) if isinstance(record, dict) else None
    return record
