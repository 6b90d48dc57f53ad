"""The table of an audit: a line for each method, its verdict, and its numbers."""

from typing import Any

import numpy as np

from ccu_jax import notes, tables
from ccu_jax.audits.outputs import JUDGED
from ccu_jax.summary import DASH

HEADER = [
    "method",
    "verdict",
    *(f"AUC {view}, less the reference's" for view in JUDGED),
    "without text",
    "epsilon at least, image",
    "pair",
    "ToW",
    "JS to reference",
    "within classes",
    "relearned in",
    "U-LiRA",
    "TPR at 1 %",
    "one-run epsilon",
    "shadows",
]
LEGEND = (
    "Intervals are of 95 %, those of the differences of 99.2 %, as six are asked at "
    "once. A difference that lies within ±.05 as a whole is forgotten; means are over "
    "seeds. Epsilon is what leaks at least, by one threshold on the loss: a small one "
    "is no proof that nothing does."
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
    told.append(
        "\n".join(
            f"- **{method['method']}**: {tables.escaped(method['verdict']['sentence'])}"
            for method in found
        )
    )
    return "\n\n".join(told) + "\n"


def _line(method):
    seeds = method["seeds"]

    def mean(*path, form="{:.3f}"):
        values = [_at(record, path) for record in seeds]
        values = [x[0] if isinstance(x, list) else x for x in values]
        values = [x for x in values if isinstance(x, int | float)]
        return form.format(float(np.mean(values))) if values else DASH

    line = [method["method"], method["verdict"]["word"]]
    for view in JUDGED:
        line.append(_difference(method["verdict"]["differences"][view]))
    line.append(mean("neutral", "difference", form="{:+.3f}"))
    line += [mean("epsilon", view, form="{:.2f}") for view in ("image", "pair")]
    line.append(mean("gaps", "tug_of_war"))
    line.append(mean("distances", "unlearn", "image", "js_divergence"))
    line.append(mean("within_class", "original"))
    line.append(_relearned(seeds))
    line.append(mean("pool", "image", "ulira", "auc"))
    line.append(mean("pool", "image", "ulira", "tpr_1"))
    line.append(mean("pool", "image", "one_run", "epsilon", form="{:.2f}"))
    line.append(mean("pool", "image", "shadows", form="{:.0f}"))
    return line


def _difference(interval):
    """What the verdict is made of."""
    if interval is None:
        return DASH
    return "{:+.3f} ({:+.3f} to {:+.3f})".format(*interval)


def _relearned(seeds):
    found = [_at(record, ("relearning",)) for record in seeds]
    found = [x for x in found if x is not None]
    if not found:
        return DASH
    if any(x["steps"] is None for x in found):
        return f"more than {found[0]['most']} steps"
    return f"{np.mean([x['steps'] for x in found]):.0f} steps"


def _at(record, path):
    for key in path:
        record = record.get(key) if isinstance(record, dict) else None
    return record
