"""Rows of results -> numbers: means with intervals, by method, and paired by seed.

Pure functions of the rows. Old or foreign rows may lack any key: what is missing is a
NaN, which is shown as a dash.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from ccu_jax.methods import METHODS, OURS, REFERENCE, REFERENCES
from ccu_jax.models import VISUAL

DASH = "–"
# How far from the reference's an attack AUC may be. The AUC of fewer than a hundred
# rows has a standard error of .03 and more by itself.
TOLERANCE, TOLERANCE_OF_FEW, FEW = 0.03, 0.05, 100
Row = dict[str, Any]


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
    known = {name: place for place, name in enumerate(METHODS)}
    return dict(sorted(groups.items(), key=lambda g: known.get(g[0], len(known))))


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


def requests(group: dict) -> list[dict[Any, Row]]:
    """Returns {seed: what is told of it} of the first request, the second, and so on.

    Each has its row's `metric` and `method`, so that it can be asked as a row is.
    """
    found: list[dict[Any, Row]] = []
    for seed, row in group.items():
        told = row.get("requests")
        for number, request in enumerate(told if isinstance(told, list) else []):
            if not isinstance(request, dict):
                continue
            if number >= len(found):
                found += [{} for _ in range(number + 1 - len(found))]
            found[number][seed] = {
                **request,
                "metric": row.get("metric", "accuracy"),
                "method": method_of(row),
            }
    return found


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


def best_baseline(groups: dict, forgets: bool = False) -> str | None:
    """Returns the sound baseline with the highest mean fused test score, if any.

    With `forgets` of those alone whose attack AUCs are the reference's, or nearly.
    """
    best, best_score = None, -math.inf
    for name, group in groups.items():
        if name in REFERENCES or name in OURS or diverged(group):
            continue
        if forgets and not forgotten(group, groups.get(REFERENCE, {})):
            continue
        mean = estimate([score(row, "test", "fused") for row in group.values()]).mean
        if mean > best_score:  # False for NaN
            best, best_score = name, mean
    return best


def tolerance(group: dict) -> float:
    """Returns how far from the reference's an attack AUC may be."""
    few = any(number(row, "unlearn_set", "count") < FEW for row in group.values())
    return TOLERANCE_OF_FEW if few else TOLERANCE


def forgotten(group: dict, reference: dict) -> bool:
    """Whether the attack AUCs of what sees the picture are nearly the reference's."""
    gaps = [
        estimate(
            differences(group, reference, lambda row, view=view: auc(row, view))
        ).mean
        for view in VISUAL
    ]
    return all(abs(gap) <= tolerance(group) for gap in gaps)


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
