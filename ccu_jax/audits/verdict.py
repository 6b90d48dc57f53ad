"""Whether a method made a model forget, in words, from intervals.

Both questions are asked of the difference of two AUCs of an attack: the model's and
that of a reference which never saw the pictures. *Is it the same?* is a test of
equivalence (TOST, Schuirmann 1987): yes if the whole interval lies within +-tolerance.
*Is it another?* is a test of difference: yes if the whole interval lies on one side of
zero. With many rows both can be yes, of a difference that is there but too small to
matter: forgotten. With few rows neither: undecided. That no difference was found is
never enough for "forgotten".

The 95 % interval is used for both, which makes the test of equivalence a 2.5 % one.
With several views or attacks give each an interval of confidence 1 - .05 / number.

A model that has fallen apart says the same of unlearned rows and of unseen ones, so
that its AUC is that of the reference. So the difference of the scores on the unlearn
set may be given: who is surely worse there by more than the tolerance has over-
forgotten. And what that is more than on unseen rows: who is surely better at the
unlearn set by more than the tolerance still has it. That the scores are *the same* is
not asked for "forgotten": a model that is better at all pictures alike tells nothing of
who was unlearned.
"""

from collections.abc import Mapping
from typing import NamedTuple

from ccu_jax.metrics.intervals import Interval

FORGOTTEN = "forgotten"
OVER = "over-forgotten"
STILL = "still there"
UNDECIDED = "undecided at this sample size"
# The worst first: what is there can be read out of the model; what is conspicuously
# not there tells that it was.
WORST = (STILL, OVER, UNDECIDED, FORGOTTEN)


class Verdict(NamedTuple):
    """One of the four words, and the sentence that gives the numbers.

    `telling`: whether the original itself was found to remember, so that an attack that
    finds nothing in the model has shown something. None: not known. False: what is
    found nowhere shows nothing.
    """

    word: str
    sentence: str
    telling: bool | None = None


def verdict(
    difference: Interval | None,
    *,
    score_difference: Interval | None = None,
    score_excess: Interval | None = None,
    model: Interval | None = None,
    original_difference: Interval | None = None,
    control: Interval | None = None,
    tolerance: float = 0.05,
    what: str = "AUC",
) -> Verdict:
    """What one attack on one view says of a model.

    The word is `decide`'s of the difference. Two scores decide, too, where they lie
    wholly beyond the tolerance: over-forgotten is also who is worse at the unlearn set,
    still there who is better at it than at unseen rows; the worse of all words counts.

    Args:
        difference: the model's AUC minus the reference's on the same rows
            (`auc.auc_difference`), not the difference of two intervals.
        score_difference: the same of the scores on the unlearn set
            (`scores.score_difference`).
        score_excess: that less the same of unseen rows (`scores.score_excess`).
        model: the model's own AUC, for the sentence.
        original_difference: the original's AUC minus the reference's. Where it is not
            shown to be off zero "forgotten" is not telling; nor is anything where it
            surely is within +-tolerance, for there was nothing to be seen.
        control: a second reference's AUC minus the reference's, for the sentence: how
            far two models are apart that both never saw the pictures.
        tolerance: how far an AUC, or a score, may be from the reference's.
        what: what is measured if it is no AUC, such as "TPR at 1 % FPR".
    """
    words = [decide(difference, tolerance)]
    if score_difference is not None and score_difference.high < -tolerance:
        words.append(OVER)
    if score_excess is not None and score_excess.low > tolerance:
        words.append(STILL)
    word, off = min(words, key=WORST.index), original_difference
    telling = None if off is None else off.low > 0 or off.high < 0
    if telling is False and word == UNDECIDED and decide(off, tolerance) != FORGOTTEN:
        telling = None  # of neither model anything is known
    attacked = f"the attack's {what} is {_plain(model)}"
    if model is None:
        attacked = f"by the attack's {what} against a retrained model's"
    parts = [f"{word}: {attacked}"]
    parts.append(_compared(difference, tolerance))
    told = {
        "the score on the unlearn set is off by {}": _signed(score_difference),
        "and by {} more than on unseen rows": _signed(score_excess),
        "the original differs by {}": _signed(off),
        "a second retrained model differs by {}": _signed(control),
    }
    parts += [text.format(numbers) for text, numbers in told.items() if numbers]
    if telling is False:
        parts.append("but the original is not seen to remember either: no evidence")
    return Verdict(word, "; ".join(parts), telling)


def decide(difference: Interval | None, tolerance: float = 0.05) -> str:
    """The word for the interval of a difference.

    forgotten: it is within +-tolerance, whether or not it holds 0. still there: it is
    not, and lies above 0. over-forgotten: it is not, and lies below 0. undecided: all
    else, and where there is no interval.
    """
    if difference is None or not difference.low <= difference.high:
        return UNDECIDED
    if -tolerance <= difference.low and difference.high <= tolerance:
        return FORGOTTEN
    if difference.low > 0:
        return STILL
    return OVER if difference.high < 0 else UNDECIDED


def combined(views: Mapping[str, Verdict]) -> Verdict:
    """A method's verdict: the worst of its views'.

    A view that is not telling, and in which nothing is found, counts for nothing; where
    there are no others, the verdict is undecided. One that is undecided of the original
    as well counts: what is in it nobody knows.

    Args:
        views: the verdict of each view or attack, by its name.
    """
    counting = {
        name: view
        for name, view in views.items()
        if view.word in (STILL, OVER) or view.telling is not False
    }
    if not counting:
        why = "no view of the original is seen to remember" if views else "no view"
        return Verdict(UNDECIDED, f"{UNDECIDED}: {why}", False if views else None)
    name, worst = min(counting.items(), key=lambda item: WORST.index(item[1].word))
    same = [other for other, view in counting.items() if view.word == worst.word]
    more = f" (so are {', '.join(same[1:])})" if len(same) > 1 else ""
    return Verdict(worst.word, f"{name}{more}: {worst.sentence}", worst.telling)


def _compared(difference: Interval | None, tolerance: float) -> str:
    if difference is None:
        return "the difference could not be measured"
    told = f"the difference is {_signed(difference)}, tolerance ±{tolerance:.3g}"
    small = decide(difference, tolerance) == FORGOTTEN
    if small and not difference.low <= 0 <= difference.high:
        return f"{told}; it is there, but within the tolerance"
    return told


def _plain(interval: Interval | None, form: str = ".3f") -> str:
    if interval is None:
        return ""
    value, low, high = (format(x, form) for x in interval)
    return f"{value} ({low} to {high})"


def _signed(interval: Interval | None) -> str:
    return _plain(interval, "+.3f")
