"""Speed and memory of all metrics together."""

import resource
import sys
import time

import numpy as np
import pytest

from ccu_jax.metrics import (
    classification,
    distances,
    forgetting,
    lira,
    membership,
    privacy,
    roc,
)
from ccu_jax.metrics.intervals import jackknife_interval, mean_interval


@pytest.mark.slow
def test_all_metrics_of_15552_rows_take_less_than_a_cpu_minute_and_1_gib():
    rows, classes, width, models = 15_552, 23, 256, 16
    rng = np.random.default_rng(0)
    labels = (rng.random((rows, classes)) < 0.11).astype(np.float32)
    logits = rng.normal(size=(2, rows, classes)).astype(np.float32)
    x, y = rng.normal(size=(2, rows, width)).astype(np.float32)
    pool = rng.normal(size=(3, models, rows))
    single = np.eye(classes, dtype=np.float32)[rng.integers(classes, size=rows)]
    half = rng.random(rows) < 0.5
    memory_before = peak_memory()
    start = time.process_time()  # does not count other programs
    for multi_label, truth in ((True, labels), (False, single)):
        signals = [membership.membership_signals(z, truth, multi_label) for z in logits]
        for name in signals[0]:
            pair = [roc.Signals(s[name][half], s[name][~half]) for s in signals]
            assert roc.auc_interval(pair[0]) and roc.auc_difference(*pair)
            assert roc.auc_bootstrap(pair[0])
            assert roc.tpr_at_fpr(pair[0], 0.001) and roc.tpr_difference(*pair, 0.01)
            assert privacy.threshold_epsilon(pair[0]) is not None
            assert privacy.one_run_audit(signals[0][name], half)
        for distance in ("js_divergence", "agreement", "activation_distance"):
            values = getattr(distances, distance)(*logits, multi_label)
            assert mean_interval(values, bounds=(0, 5))
    for score in (classification.mean_average_precision, classification.macro_auroc):
        assert jackknife_interval(score, logits[0], labels)
    assert distances.cka_interval(x, y)
    assert jackknife_interval(distances.scatter_ratio, x, labels)
    assert distances.intra_class_similarity(x, y, labels)
    role = rng.integers(3, size=(models, rows))
    scores = lira.lira_leave_one_out(pool[0], role == 0, role == 1)
    assert lira.evaluate_pool(scores, role == 0).auc
    probability = membership.true_probability(logits[0], labels, True)
    references = rng.random((models, rows))
    scores = lira.rmia(probability, references, probability, references)
    assert lira.evaluate_attack(scores, half, threshold=None).auc
    assert forgetting.forgetting_score(*pool).models == models
    assert forgetting.klom(*pool).models == models
    assert time.process_time() - start < 60
    assert peak_memory() - memory_before < 2**30


def peak_memory() -> int:
    """Returns the peak memory of this process in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
