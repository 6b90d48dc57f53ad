"""What the rows of results say in words: editions, comparisons, targets met or not.

Old or foreign rows may lack any key: what is missing is "not measured", never an error
and never a silent pass.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ccu_jax.models import VIEWS, VISUAL
from ccu_jax.summary import (
    DASH,
    REFERENCE,
    Estimate,
    Row,
    auc,
    best_baseline,
    by_method,
    differences,
    diverged,
    estimate,
    number,
    score,
    show_estimate,
    text_kept,
    time_percent,
    time_s,
)

# How far from the reference's an attack AUC may be. The AUC of fewer than a hundred
# rows has a standard error of .03 and more by itself.
TOLERANCE, TOLERANCE_OF_FEW, FEW = 0.03, 0.05, 100
MOST_TIME = 10  # of the reference's, in %
MEMORY = 0.65  # an original below this attack AUC has hardly anything to forget
LOUD = {
    "sample": "Sample edition: generated from clip art in the official format; "
    "not MM-IMDb's posters or plots.",
    "clipart": "Clip art: 1,408 public-domain drawings, not photographs.",
}


class Note(NamedTuple):
    """A sentence below the table; kind: "loud", "note", "yes" or "no"."""

    kind: str
    text: str


def notes(rows: Sequence[Row]) -> list[Note]:
    """Returns what is said below the table: edition, reference, comparisons, checks."""
    groups = by_method(rows)
    if not groups:
        return [Note("no", "No results.")]
    return [
        *editions(rows),
        *_reference(groups),
        *_diverged(groups),
        *_comparisons(groups),
        *_checks(groups),
        *_circumstances(rows, groups),
        *_cautions(groups),
        Note(
            "note",
            "The losses of ccu and ccu_plus are this project's reconstruction of CCU "
            "(arXiv 2509.23895): the paper's own are not public.",
        ),
    ]


def editions(rows: Sequence[Row]) -> list[Note]:
    """Returns one sentence per edition of the data, loud where it is a stand-in."""
    names = dict.fromkeys(str(row.get("edition") or "unknown") for row in rows)
    return [
        Note("loud", LOUD[name]) if name in LOUD else Note("note", f"Edition: {name}.")
        for name in names
    ]


def _reference(groups: dict) -> list[Note]:
    found = []
    if "original" in groups:
        times = [time_s(row) for row in groups["original"].values()]
        text = show_estimate(estimate(times))
        found.append(
            Note("note", f"original was trained in {text} s; it unlearns nothing.")
        )
    if REFERENCE not in groups:
        return [*found, Note("no", f"{REFERENCE}, the reference, is not in this run.")]
    values = []
    for view in (*VIEWS, "pair"):
        value = estimate([auc(row, view) for row in groups[REFERENCE].values()])
        values.append(f"{view} {show_estimate(value, 3)}")
    text = (
        f"The reference is {REFERENCE} (trained anew with the texts but without the "
        f"pictures to forget); its attack AUCs: {', '.join(values)}. An attack AUC is "
        f"good when it equals {REFERENCE}'s, not when it is lowest."
    )
    return [*found, Note("note", text)]


def _diverged(groups: dict) -> list[Note]:
    return [
        Note(
            "no",
            f"{name} diverged (seed {seed}): {reason}; left out of the best baseline.",
        )
        for name, group in groups.items()
        for seed, reason in diverged(group).items()
    ]


def _comparisons(groups: dict) -> list[Note]:
    best = best_baseline(groups)
    if best is None:
        found = [Note("no", "No sound baseline with a test score to compare with.")]
    else:
        value = [score(row, "test", "fused") for row in groups[best].values()]
        shown = show_estimate(estimate(value), 1)
        text = f"Baseline with the best test fused score: {best} ({shown} %)"
        found = [Note("note", f"{text}; {_against(groups, 'ccu_plus', best)}.")]
        if "ccu" in groups:
            found.append(
                Note("note", f"Against {best}, {_against(groups, 'ccu', best)}.")
            )
    if REFERENCE in groups:
        for name in [name for name in ("ccu_plus", "ccu") if name in groups]:
            text = _against(groups, name, REFERENCE)
            found.append(Note("note", f"Against {REFERENCE}, {text}."))
    return found


def _against(groups: dict, name: str, other: str) -> str:
    """Returns margin and time ratio of a method against another, in words."""
    if name not in groups:
        return f"{name}: not in this run"
    time = show_estimate(time_percent(groups[name], groups[other]))
    margin = differences(
        groups[name], groups[other], lambda row: score(row, "test", "fused")
    )
    return (
        f"{name}: test fused margin {_margin(estimate(margin))}, time ratio {time} %"
        + (" (diverged)" if diverged(groups[name]) else "")
    )


def _margin(value: Estimate) -> str:
    if not value.count:
        return "not measured on any common seed"
    if value.count == 1:
        return f"{value.mean:+.1f} points (one paired seed, so no interval)"
    low, high = value.mean - value.half, value.mean + value.half
    return (
        f"{value.mean:+.1f} points (95 % interval {low:+.1f} to {high:+.1f} over "
        f"{value.count} paired seeds)"
    )


def _checks(groups: dict) -> list[Note]:
    """Returns the targets, each met or not; what was not measured is not met."""
    found = [*_memory(groups.get("original", {}))]
    mine, reference = groups.get("ccu_plus", {}), groups.get(REFERENCE, {})
    # Only what was measured on the same seeds is compared.
    mine = {seed: row for seed, row in mine.items() if seed in reference}
    reference = {seed: row for seed, row in reference.items() if seed in mine}

    def means(value) -> tuple[float, float]:
        return _mean(mine, value), _mean(reference, value)

    few = any(number(row, "unlearn_set", "count") < FEW for row in mine.values())
    tolerance = TOLERANCE_OF_FEW if few else TOLERANCE
    for view in VISUAL:
        ours, theirs = means(lambda row, view=view: auc(row, view))
        gap = abs(ours - theirs)
        claim = f"ccu_plus's {view} attack AUC is within {tolerance} of {REFERENCE}'s"
        numbers = f"{ours:.3f} and {theirs:.3f}, {gap:.3f} apart"
        found.append(_check(claim, gap <= tolerance, numbers, gap))
    kept = [row.get("text_unchanged") is True for row in mine.values()]
    claim = "ccu_plus's text scores of the unlearn set are unchanged to the bit"
    measured = math.nan if text_kept(mine) == DASH else 0.0
    numbers = f"in {sum(kept)} of {len(kept)} seeds"
    found.append(_check(claim, all(kept), numbers, measured))
    ours, theirs = means(lambda row: score(row, "test", "fused"))
    claim = f"ccu_plus's test fused score is at least {REFERENCE}'s"
    numbers = f"{ours:.1f} % and {theirs:.1f} %"
    found.append(_check(claim, ours >= theirs, numbers, ours - theirs))
    percent = time_percent(mine, reference).mean
    claim = f"ccu_plus takes at most {MOST_TIME} % of {REFERENCE}'s time"
    found.append(_check(claim, percent <= MOST_TIME, f"{percent:.1f} %", percent))
    return found


def _memory(original: dict) -> Iterator[Note]:
    """Yields whether there is something to forget, and a model worth having."""
    remembers = _mean(original, lambda row: auc(row, "image"))
    yield _check(
        f"original remembers the pictures: image attack AUC of {MEMORY} or more",
        remembers >= MEMORY,
        f"{remembers:.3f}",
        remembers,
    )
    image, text, fused = (
        _mean(original, lambda row, view=view: score(row, "test", view))
        for view in VIEWS
    )
    yield _check(
        "original's test fused score is not below that of picture or text alone",
        fused >= max(image, text),
        f"{fused:.1f} % and {image:.1f} %, {text:.1f} %",
        fused - image - text,
    )


def _mean(group: dict, value) -> float:
    return estimate([value(row) for row in group.values()]).mean


def _check(claim: str, holds: bool, numbers: str, measured: float) -> Note:
    """Returns a verdict: "yes" only where it holds and `measured` is no NaN."""
    known = math.isfinite(measured)
    verdict = "yes" if known and holds else "no"
    numbers = numbers if known else "not measured"
    return Note(verdict, f"{claim}: {verdict} ({numbers}).")


def _cautions(groups: dict) -> Iterator[Note]:
    """Yields what some numbers of this run do not mean."""
    if "ccu" in groups or "ccu_plus" in groups:
        yield Note(
            "note",
            "ccu_plus reads its targets off the validation rows and ccu stops by them: "
            "their scores on these rows are not untouched ones.",
        )
    chosen = [
        row.get("unlearn_set") for group in groups.values() for row in group.values()
    ]
    rules = [str(x.get("rule")) for x in chosen if isinstance(x, dict)]
    if any(rule.startswith("ids:") for rule in rules):
        yield Note(
            "note",
            "The attack's control, unseen, was drawn at random. Where the listed rows "
            "were not, its AUCs also tell how the two differ by themselves: compare "
            f"with {REFERENCE}'s.",
        )


def _circumstances(rows: Sequence[Row], groups: dict) -> list[Note]:
    """Returns machine, versions, unlearn set and seeds, all values that occur."""

    def seen(*path: str) -> str:
        found = []
        for row in rows:
            value: Any = row
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            found.append(DASH if value is None else str(value))
        return ", ".join(dict.fromkeys(found))

    devices = f"{seen('device', 'count')} x {seen('device', 'kind')}"
    seeds = list(dict.fromkeys(seed for group in groups.values() for seed in group))
    fewer = [name for name, group in groups.items() if len(group) < len(seeds)]
    texts = [
        f"Machine: {devices}, {seen('device', 'processes')} process(es); "
        f"jax {seen('versions', 'jax')}; commit {seen('commit')}.",
        f"Unlearn set: {seen('unlearn_set', 'rule')} of {seen('config')}, "
        f"{seen('unlearn_set', 'count')} rows, {seen('unlearn_set', 'modality')}.",
        f"Seeds: {', '.join(seeds)}; ± is the half-width of the 95 % t-interval over "
        "seeds" + (f"; with fewer seeds: {', '.join(fewer)}." if fewer else "."),
    ]
    return [Note("note", text) for text in texts]
