"""Statistics of results: means over seeds with intervals, and paired comparisons.

Rows of results.json may come from older versions and lack any key. A missing value is
NaN, which is formatted as a dash.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ccu_jax.methods import METHODS, OURS, REFERENCE, REFERENCES
from ccu_jax.metrics.intervals import mean_interval
from ccu_jax.models import VISUAL

DASH = "\N{EN DASH}"
# An attack AUC of fewer than 100 rows has a standard error of at least 0.03.
_TOLERANCE, _SMALL_SET_TOLERANCE, _SMALL_SET = 0.03, 0.05, 100
Row = dict[str, Any]


class Estimate(NamedTuple):
    """A mean over `count` seeds and the half-width of its 95 % t-interval, or NaN."""

    mean: float
    ci_half_width: float
    count: int


def estimate(values: Sequence[float]) -> Estimate:
    """Returns the mean of the finite values with its 95 % t-interval."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return Estimate(math.nan, math.nan, 0)
    interval = mean_interval(values)
    half_width = math.nan if interval is None else interval.high - interval.value
    return Estimate(math.fsum(values) / len(values), half_width, len(values))


def get_value(record: Any, *path: str) -> Any:
    """Returns the value at a path of nested keys, or None if it is missing."""
    for key in path:
        record = record.get(key) if isinstance(record, dict) else None
    return record


def get_number(row: Row, *path: str) -> float:
    """Returns the number at a path of nested keys, or NaN if it is missing."""
    value = get_value(row, *path)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else math.nan


def join_values(rows: Sequence[Row], *path: str) -> str:
    """Returns the distinct values at a path of nested keys, joined by commas."""
    values = [get_value(row, *path) for row in rows]
    texts = [DASH if value is None else str(value) for value in values]
    return ", ".join(dict.fromkeys(texts)) or DASH


def get_score(row: Row, split: str, view: str) -> float:
    """Returns the leading metric on a split and view, in percent."""
    metric = str(row.get("metric", "accuracy"))
    return 100 * get_number(row, "scores", split, view, metric)


def get_time_s(row: Row) -> float:
    """Returns the seconds of unlearning, or of training for a reference."""
    unlearn = get_number(row, "seconds", "unlearn")
    if math.isfinite(unlearn):
        return unlearn
    return get_number(row, "seconds", "start") + get_number(row, "seconds", "steps")


@dataclasses.dataclass(frozen=True)
class MethodResults:
    """The results of one method by seed, with means over seeds."""

    rows: dict[str, Row] = dataclasses.field(default_factory=dict)

    def mean(self, value: Callable[[Row], float]) -> Estimate:
        """Returns the mean of `value(row)` over seeds."""
        return estimate([value(row) for row in self.rows.values()])

    def mean_number(self, *path: str) -> Estimate:
        """Returns the mean over seeds of the number at a path of nested keys."""
        return self.mean(lambda row: get_number(row, *path))

    def mean_score(self, split: str, view: str) -> Estimate:
        """Returns the mean score in percent, see `get_score`."""
        return self.mean(lambda row: get_score(row, split, view))

    def mean_attack_auc(self, view: str) -> Estimate:
        """Returns the mean AUC of the membership attack on a view, in [0, 1]."""
        return self.mean_number("attack_auc", view)

    def mean_time_s(self) -> Estimate:
        """Returns the mean seconds of unlearning, or of training for a reference."""
        return self.mean(get_time_s)

    def mean_time_percent(self, reference: "MethodResults") -> Estimate:
        """Returns the mean time in percent of the time of a reference.

        Times are paired by seed. For seeds that the reference lacks, its mean time is
        used.
        """
        times = {seed: get_time_s(row) for seed, row in reference.rows.items()}
        mean_s = reference.mean_time_s().mean
        ratios = []
        for seed, row in self.rows.items():
            reference_s = times.get(seed, mean_s)
            is_valid = reference_s > 0
            ratios.append(100 * get_time_s(row) / reference_s if is_valid else math.nan)
        return estimate(ratios)

    def mean_difference(
        self, reference: "MethodResults", value: Callable[[Row], float]
    ) -> Estimate:
        """Returns the mean paired difference of `value(row)` to a reference."""
        common = self.with_seeds_of(reference).rows.items()
        return estimate([value(x) - value(reference.rows[s]) for s, x in common])

    def with_seeds_of(self, results: "MethodResults") -> "MethodResults":
        """Returns the results restricted to the seeds of other results."""
        return MethodResults({s: r for s, r in self.rows.items() if s in results.rows})

    def divergence_reasons(self) -> dict[str, str]:
        """Returns the reason of divergence for each seed that diverged."""
        reasons = {seed: row.get("diverged") for seed, row in self.rows.items()}
        return {seed: str(reason) for seed, reason in reasons.items() if reason}

    def format_text_unchanged(self) -> str:
        """Formats whether text logits are bitwise unchanged: "yes", "no" or a dash."""
        values = [row.get("text_unchanged") for row in self.rows.values()]
        values = [bool(value) for value in values if value is not None]
        if not values:
            return DASH
        if all(values):
            return "yes"
        return f"no ({sum(values)} of {len(values)})" if any(values) else "no"

    def split_by_request(self) -> list["MethodResults"]:
        """Returns the results after each sequential unlearning request, in order."""
        requests: list[MethodResults] = []
        for seed, row in self.rows.items():
            records = row.get("requests")
            if not isinstance(records, list):
                continue
            for index, record in enumerate(records):
                if isinstance(record, dict):
                    while len(requests) <= index:
                        requests.append(MethodResults())
                    metric = row.get("metric", "accuracy")
                    requests[index].rows[seed] = {**record, "metric": metric}
        return requests

    def auc_tolerance(self) -> float:
        """Returns the tolerated difference of an attack AUC from the reference's."""
        counts = [get_number(r, "unlearn_set", "count") for r in self.rows.values()]
        is_small = any(count < _SMALL_SET for count in counts)
        return _SMALL_SET_TOLERANCE if is_small else _TOLERANCE

    def has_forgotten(self, reference: "MethodResults") -> bool:
        """Returns whether the attack AUCs of all visual views match the reference."""

        def gap(view: str) -> float:
            path = "attack_auc", view
            return abs(
                self.mean_difference(reference, lambda x: get_number(x, *path)).mean
            )

        return all(gap(view) <= self.auc_tolerance() for view in VISUAL)


def group_by_method(rows: Sequence[Row]) -> dict[str, MethodResults]:
    """Groups rows by method and seed; methods are in the order of `METHODS`."""
    groups: dict[str, MethodResults] = {}
    for row in rows:
        group = groups.setdefault(str(row.get("method", "unknown")), MethodResults())
        group.rows[str(row.get("seed", 0))] = row
    order = {name: index for index, name in enumerate(METHODS)}
    return dict(sorted(groups.items(), key=lambda g: order.get(g[0], len(order))))


def find_best_baseline(
    groups: dict[str, MethodResults], must_forget: bool = False
) -> str | None:
    """Returns the name of the baseline with the highest fused test score, or None.

    Excludes baselines that diverged and, with `must_forget`, those whose attack AUCs
    do not match the reference.
    """
    best, best_score = None, -math.inf
    reference = groups.get(REFERENCE, MethodResults())
    for name, group in groups.items():
        if name in REFERENCES or name in OURS or group.divergence_reasons():
            continue
        if must_forget and not group.has_forgotten(reference):
            continue
        score = group.mean_score("test", "fused").mean
        if score > best_score:  # false for NaN
            best, best_score = name, score
    return best


def format_estimate(value: Estimate, decimals: int | None = None) -> str:
    """Formats an estimate as "71.2 ± 1.3", "71.2" without interval, or a dash if NaN.

    By default, `decimals` gives the mean three significant digits.
    """
    if not math.isfinite(value.mean):
        return DASH
    if decimals is None:
        exponent = math.floor(math.log10(abs(value.mean))) if value.mean else 0
        decimals = min(max(2 - exponent, 0), 6)
    has_interval = math.isfinite(value.ci_half_width)
    interval = f" ± {value.ci_half_width:.{decimals}f}" if has_interval else ""
    return f"{value.mean:.{decimals}f}{interval}"
