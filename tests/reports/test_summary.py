"""Means over seeds, paired comparisons and the best baseline."""

import math

import pytest

from ccu_jax.reports.summary import (
    MethodResults,
    estimate,
    find_best_baseline,
    get_score,
    group_by_method,
)
from tests.reports.conftest import make_row


def test_estimate_has_the_t_interval_of_the_finite_values():
    # 1, 2, 3: standard deviation 1, t(0.975, 2) = 4.302653, over sqrt(3).
    value = estimate([1.0, 2.0, 3.0])
    assert value.mean == 2.0 and value.count == 3
    assert value.ci_half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert math.isnan(estimate([5.0]).ci_half_width)
    assert estimate([5.0, math.nan, math.inf])[::2] == (5.0, 1)
    assert estimate([]).count == 0


def test_time_is_paired_by_seed_or_compared_with_the_mean():
    rows = {"0": make_row("ccu", unlearn_s=5.0), "9": make_row("ccu", unlearn_s=6.0)}
    times = {"0": 50.0, "1": 100.0}
    reference = {seed: make_row("r", unlearn_s=time) for seed, time in times.items()}
    percent = MethodResults(rows).mean_time_percent(MethodResults(reference))
    assert percent.mean == pytest.approx((10.0 + 8.0) / 2)  # 5/50 and 6/75


def test_differences_use_common_seeds_only():
    one = MethodResults({"0": make_row("a", fused=0.7), "1": make_row("a", fused=0.1)})
    other = MethodResults({"0": make_row("b", fused=0.5), "2": make_row("b")})
    difference = one.mean_difference(other, lambda row: get_score(row, "test", "fused"))
    assert difference.mean == pytest.approx(20.0) and difference.count == 1
    assert list(one.with_seeds_of(other).rows) == ["0"]


def test_best_baseline_may_have_to_match_the_reference(good_rows):
    weak = [make_row("salun", s, fused=0.5, auc=0.51, unlearn_s=4.0) for s in (0, 1)]
    rows = [*good_rows, *weak]
    # The attack AUC of scrub is 0.04 off.
    assert find_best_baseline(group_by_method(rows)) == "scrub"
    assert find_best_baseline(group_by_method(rows), must_forget=True) == "salun"
    for row in weak:  # the AUC of one view alone does not suffice
        row["attack_auc"] = {**row["attack_auc"], "fused": 0.4}
    assert find_best_baseline(group_by_method(rows), must_forget=True) is None
    # Forms of CCU are no baselines; coun only shares their first letter.
    rows += [make_row("coun", fused=0.9), make_row("ccu_gated", fused=0.95)]
    assert find_best_baseline(group_by_method(rows)) == "coun"
