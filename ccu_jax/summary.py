"""Rows of results -> what they say: means with intervals, comparisons, sentences.

Pure functions of the rows. Old or foreign rows may lack any key: what is missing is
"not measured", never an error and never a silent pass.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

ORDER = tuple(
    "original retrain retrain_visual finetune neggrad_plus scrub ccu ccu_plus".split()
)
REFERENCE = "retrain_visual"
VIEWS = ("image", "text", "fused")
SETS = ("retain", "unlearn", "unseen", "validation", "test")
# How far from the reference's an attack AUC may be. The AUC of fewer than a hundred
# rows has a standard error of .03 and more by itself.
TOLERANCE, TOLERANCE_OF_FEW, FEW = 0.03, 0.05, 100
DASH = "–"
LOUD = {
    "sample": "Sample edition: generated from clip art in the official format; "
    "not MM-IMDb's posters or plots.",
    "clipart": "Clip art: 1,408 public-domain drawings, not photographs.",
}
Row = dict[str, Any]


class Note(NamedTuple):
    """A sentence below the table; kind: "loud", "note", "yes" or "no"."""

    kind: str
    text: str


class Estimate(NamedTuple):
    """A mean over seeds and the half-width of its 95 % t-interval (NaN: none)."""

    mean: float
    half: float
    count: int


def estimate(values: Sequence[float]) -> Estimate:
    """Returns mean and half-width of the 95 % t-interval of the finite values."""
    values = [value for value in values if math.isfinite(value)]
    count = len(values)
    if not count:
        return Estimate(math.nan, math.nan, 0)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, math.nan, 1)
    from scipy.stats import t  # slow to import, and only a report needs it

    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    half = float(t.ppf(0.975, count - 1)) * math.sqrt(variance / count)
    return Estimate(mean, half, count)


def number(row: Row, *path: str) -> float:
    """Returns the number at `path`, NaN where it is missing or no number."""
    value: Any = row
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value)


def score(row: Row, where: str, view: str) -> float:
    """Returns the headline score of a set and view in percent."""
    metric = str(row.get("metric", "accuracy"))
    return 100 * number(row, "scores", where, view, metric)


def auc(row: Row, view: str) -> float:
    """Returns the attack's AUC, 0 to 1."""
    return number(row, "attack_auc", view)


def time_s(row: Row) -> float:
    """Returns the seconds of start and steps: unlearning, or a reference's training."""
    unlearn = number(row, "seconds", "unlearn")
    if math.isfinite(unlearn):
        return unlearn
    return number(row, "seconds", "start") + number(row, "seconds", "steps")


def method_of(row: Row) -> str:
    """Returns the method's name, whatever the row holds."""
    return str(row.get("method", "unknown"))


def by_method(rows: Sequence[Row]) -> dict[str, dict[Any, Row]]:
    """Groups rows as {method: {seed: row}} in the order of the table."""
    groups: dict[str, dict[Any, Row]] = {}
    for row in rows:
        groups.setdefault(method_of(row), {})[str(row.get("seed", 0))] = row
    known = {name: place for place, name in enumerate(ORDER)}
    return dict(sorted(groups.items(), key=lambda g: known.get(g[0], len(ORDER))))


def differences(mine: dict, other: dict, value) -> list[float]:
    """Returns value(mine) - value(other), one per seed that both have."""
    return [value(mine[seed]) - value(other[seed]) for seed in mine if seed in other]


def time_percent(mine: dict, other: dict) -> Estimate:
    """Returns the time of `mine` as % of `other`'s: per seed, else of its mean."""
    mean_s = estimate([time_s(row) for row in other.values()]).mean
    ratios = []
    for seed, row in mine.items():
        other_s = time_s(other[seed]) if seed in other else mean_s
        ratios.append(100 * time_s(row) / other_s if other_s > 0 else math.nan)
    return estimate(ratios)


def text_kept(group: dict) -> str:
    """Returns whether the text scores stayed equal to the bit, over all seeds."""
    told = [row["text_unchanged"] for row in group.values() if "text_unchanged" in row]
    told = [bool(value) for value in told if value is not None]
    if not told:
        return DASH
    if all(told):
        return "yes"
    return f"no ({sum(told)} of {len(told)})" if any(told) else "no"


def diverged(group: dict) -> dict[Any, str]:
    """Returns {seed: reason} of the seeds that diverged."""
    return {s: str(row["diverged"]) for s, row in group.items() if row.get("diverged")}


def best_baseline(groups: dict) -> str | None:
    """Returns the sound baseline with the highest mean fused test score, if any."""
    best, best_score = None, -math.inf
    for name, group in groups.items():
        if name in ORDER[:3] or name.startswith("ccu") or diverged(group):
            continue
        mean = estimate([score(row, "test", "fused") for row in group.values()]).mean
        if mean > best_score:  # False for NaN
            best, best_score = name, mean
    return best


def show_estimate(value: Estimate, decimals: int | None = None) -> str:
    """Formats as "71.2 ± 1.3", or without an interval, or as a dash.

    Without `decimals` the mean gets three significant digits.
    """
    if not math.isfinite(value.mean):
        return DASH
    if decimals is None:
        size = math.floor(math.log10(abs(value.mean))) if value.mean else 0
        decimals = min(max(2 - size, 0), 6)
    half = f" ± {value.half:.{decimals}f}" if math.isfinite(value.half) else ""
    return f"{value.mean:.{decimals}f}{half}"


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
    """Returns the targets of ccu_plus, each met or not; not measured is not met."""
    mine, reference = groups.get("ccu_plus", {}), groups.get(REFERENCE, {})

    def means(value) -> tuple[float, float]:
        return tuple(
            estimate([value(row) for row in group.values()]).mean
            for group in (mine, reference)
        )

    found = []
    few = any(number(row, "unlearn_set", "count") < FEW for row in mine.values())
    tolerance = TOLERANCE_OF_FEW if few else TOLERANCE
    for view in ("image", "fused"):
        ours, theirs = means(lambda row, view=view: auc(row, view))
        gap = abs(ours - theirs)
        claim = f"{view} attack AUC is within {tolerance} of {REFERENCE}'s"
        numbers = f"{ours:.3f} and {theirs:.3f}, {gap:.3f} apart"
        found.append(_check(claim, gap <= tolerance, numbers, gap))
    kept = [row.get("text_unchanged") is True for row in mine.values()]
    claim = "text scores of the unlearn set are unchanged to the bit"
    measured = math.nan if text_kept(mine) == DASH else 0.0
    numbers = f"in {sum(kept)} of {len(kept)} seeds"
    found.append(_check(claim, all(kept), numbers, measured))
    ours, theirs = means(lambda row: score(row, "test", "fused"))
    claim = f"test fused score is at least {REFERENCE}'s"
    numbers = f"{ours:.1f} % and {theirs:.1f} %"
    return [*found, _check(claim, ours >= theirs, numbers, ours - theirs)]


def _check(claim: str, holds: bool, numbers: str, measured: float) -> Note:
    """Returns a verdict: "yes" only where it holds and `measured` is no NaN."""
    known = math.isfinite(measured)
    verdict = "yes" if known and holds else "no"
    numbers = numbers if known else "not measured"
    return Note(verdict, f"ccu_plus's {claim}: {verdict} ({numbers}).")


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
