"""The verdict on a method, from the records of `outputs.audit` of all its seeds."""

from typing import Any

from ccu_jax.audits import verdict
from ccu_jax.audits.offline import JUDGED, JUDGED_BY, LEVEL
from ccu_jax.metrics.intervals import Interval, over_seeds, plain
from ccu_jax.models import VIEWS

SINGLE = "single pictures"


def judged(
    records: list[dict[str, Any]], tolerance: float, is_reference: bool = False
) -> dict[str, Any]:
    """The verdict on a method from its records of all seeds: by view, and together.

    Args:
        records: of `audit`, one for each seed, with `diverged` of its row.
        tolerance: how far an AUC or a score may be from the reference's.
        is_reference: whether it is what all are compared with.
    """
    broken = [record["diverged"] for record in records if record.get("diverged")]
    if is_reference or broken:
        word = f"diverged: {broken[0]}" if broken else "the reference"
        none = dict.fromkeys(JUDGED)
        said = verdict.Verdict(word.partition(":")[0], word)
        return {"views": {}, "differences": none, **said._asdict()}
    if not all(record["compared"] for record in records):
        why = (
            "undecided: there is no retrain_visual to compare with, add it to --methods"
        )
        nothing = verdict.Verdict(verdict.UNDECIDED, why)._asdict()
        return {"views": {}, "differences": dict.fromkeys(JUDGED), **nothing}
    shared = share_rows(records)
    views, from_what = {}, {}
    for view in JUDGED:
        told = [record["attacks"][view][JUDGED_BY[view]] for record in records]

        def over(key, told=told):
            return _over([_interval(x[key]) for x in told], shared)

        scored = {}
        for name in ("score_difference", "score_excess") if view in VIEWS else ():
            each = [_interval(record[name][view]) for record in records]
            scored[name] = _over(each, shared)
        from_what[view] = over("difference")
        views[view] = verdict.verdict(
            from_what[view],
            **scored,
            model=over("auc"),
            original_difference=over("original"),
            control=over("control"),
            tolerance=tolerance,
        )
    told = [record["attacks"]["image"]["loss"] for record in records]
    views |= _single(told, tolerance, shared)
    return {
        "views": {view: found._asdict() for view, found in views.items()},
        "differences": {view: plain(found) for view, found in from_what.items()},
        **verdict.combined(views)._asdict(),
    }


def share_rows(records: list[dict[str, Any]]) -> bool:
    """Whether two seeds forget the same rows: their errors do not even out then."""
    return len({record["members"] for record in records}) < len(records)


def _over(intervals, shared: bool) -> Interval | None:
    """One interval of those of all seeds; of AUCs, rates, scores and differences."""
    return over_seeds(intervals, confidence=LEVEL, shared=shared, bounds=(-1, 1))


def _single(told, tolerance, shared):
    """The verdict by single rows, where there are enough unseen ones to tell."""

    def over(key):
        return _over([_interval(x[key]) for x in told], shared)

    if over("tpr_1_difference") is None:
        return {}
    return {
        SINGLE: verdict.verdict(
            over("tpr_1_difference"),
            model=over("tpr_1"),
            original_difference=over("tpr_1_original"),
            control=over("tpr_1_control"),
            tolerance=tolerance,
            what="TPR at 1 % FPR",
        )
    }


def _interval(told) -> Interval | None:
    return None if told is None else Interval(*told)
