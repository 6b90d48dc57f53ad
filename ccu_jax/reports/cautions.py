"""What some numbers of a run do not mean: sentences for below its table."""

import math
from collections.abc import Iterator

from ccu_jax.methods import REFERENCE
from ccu_jax.reports.note import Note
from ccu_jax.reports.summary import estimate, number, requests, show_estimate

TOO_ROUGH = 0.08  # standard error of an attack AUC: hardly anything can be told then


def cautions(groups: dict) -> Iterator[Note]:
    """Yields what some numbers of a run do not mean.

    Args:
        groups: rows of results as `{method: {seed: row}}`.
    """
    yield from _sizes(groups)
    looking = ("ccu", "ccu_gated", "ccu_plus", "ccu_plus_full", "scrub_rewind")
    told = [name for name in groups if name in looking or name.endswith("_stop")]
    if told:
        yield Note(
            "note",
            f"Validation rows are looked at, for targets or to stop, by "
            f"{', '.join(told)}: their scores on these rows are not untouched ones.",
        )
    yield from _features(groups)
    chosen = [
        row.get("unlearn_set") for group in groups.values() for row in group.values()
    ]
    rules = [str(x.get("rule")) for x in chosen if isinstance(x, dict)]
    if any(rule.startswith(("ids:", "group:")) for rule in rules):
        yield Note(
            "note",
            "The attack's control, unseen, was drawn at random. Where the listed rows "
            "were not, its AUCs also tell how the two differ by themselves: compare "
            f"with {REFERENCE}'s.",
        )
    if any(rule.startswith("memorised:") for rule in rules):
        yield Note(
            "note",
            "The forgotten rows were chosen by what the original says of them, their "
            f"control by how hard it is: compare the AUCs with {REFERENCE}'s.",
        )
    if any(requests(group) for group in groups.values()):
        yield Note(
            "note",
            "Requests came one after another, each on what the one before had left; "
            "a method's row is what it came to after the last one, its time that of "
            f"all. {REFERENCE} was trained once, without all of them.",
        )


def _sizes(groups: dict) -> Iterator[Note]:
    """Yields how far off an attack's AUC may be, for the number of rows alone."""
    rows = [row for group in groups.values() for row in group.values()]
    forgotten = estimate([number(row, "unlearn_set", "pictures") for row in rows]).mean
    control = estimate([number(row, "counts", "unseen") for row in rows]).mean
    if not (forgotten >= 1 and control >= 1):
        return
    # Of an attack that tells nothing (Mann & Whitney 1947).
    error = math.sqrt((forgotten + control + 1) / (12 * forgotten * control))
    few = " Too few to tell forgotten from remembered." if error > TOO_ROUGH else ""
    yield Note(
        "loud" if few else "note",
        f"An attack AUC of {forgotten:,.0f} pictures against {control:,.0f} unseen "
        f"rows has, in one seed, a standard error of about {error:.3f} by itself.{few}",
    )


def _features(groups: dict) -> Iterator[Note]:
    """Yields whether the time of the tail methods holds a pass over the pictures."""
    names = [name for name in groups if name.startswith(("ccu", "cf_", "eu_"))]
    rows = [row for name in names for row in groups[name].values()]
    if any(row.get("features") == "stored" for row in rows):
        originals = groups.get("original", {}).values()
        took = estimate([number(row, "seconds", "features") for row in originals])
        seconds = f", in {show_estimate(took)} s" if took.count else ""
        yield Note(
            "note",
            f"Methods on features ({', '.join(names)}) begin with what the original "
            f"says of each picture, stored when it was trained{seconds}: that pass is "
            "not in their time (run.features=computed makes it at each request, on the "
            "clock).",
        )
