"""A worked example: generated pictures that look like chest X-rays, invented reports.

No patient, no hospital and no real picture is behind it: everything is drawn and
written by this file and its neighbours. It shows the form in which such data may be
kept (several findings a study, several studies a patient, a split by patient); nothing
can be learnt from it about medicine.
"""

import functools
import pathlib
from collections.abc import Iterator

import numpy as np

from ccu_jax.data.readers.base import Progress
from ccu_jax.data.samples import pairs_edition, radiographs
from ccu_jax.data.samples.reports import report

# The share of patients who have a finding at first.
_SHARES = {
    "cardiomegaly": 0.24,
    "consolidation": 0.22,
    "device": 0.20,
    "effusion": 0.22,
    "fracture": 0.18,
    "nodule": 0.22,
    "pneumothorax": 0.18,
    "scoliosis": 0.18,
}
_LASTING = {"cardiomegaly", "device", "scoliosis"}  # these hardly go
_STAYS, _LASTS, _NEW = 0.6, 0.95, 0.4  # until the next study; new ones, of the share
_SHOWN = 0.8  # a finding can be seen in the picture
_MISTAKEN = 0.02  # a label is wrong, be it one too many or one too few
_STUDIES = (0.45, 0.35, 0.20)  # patients with one, two, three studies


def write(root: pathlib.Path, rows: int, seed: int, progress: Progress) -> None:
    """Writes `pairs.jsonl` and `images/`."""
    studies = np.random.default_rng([seed, 0]).choice([1, 2, 3], rows, p=_STUDIES)
    sizes = pairs_edition.cut(studies, rows)
    pairs_edition.write(
        root, sizes, seed, functools.partial(_patient, seed), "p", progress
    )


def _patient(seed: int, patient: int, studies: int) -> Iterator[dict]:
    """The rows of one patient, each with its picture's bytes."""
    rng = np.random.default_rng([seed, 2, patient])
    body = radiographs.body(rng)
    findings = {name for name, share in _SHARES.items() if rng.random() < share}
    for number in range(studies):
        if number:
            findings = _later(rng, findings)
        # In the order of _SHARES: the order of a set of strings varies by process.
        ordered = [name for name in _SHARES if name in findings]
        shown = {name for name in ordered if rng.random() < _SHOWN}
        labels = [n for n in _SHARES if (n in findings) != (rng.random() < _MISTAKEN)]
        yield {
            "picture": radiographs.draw(rng, body, shown),
            "text": report(rng, findings, earlier=number > 0),
            "labels": labels,
        }


def _later(rng: np.random.Generator, findings: set[str]) -> set[str]:
    """What a patient has at the next study."""
    later = set()
    for name, share in _SHARES.items():
        stays = _LASTS if name in _LASTING else _STAYS
        if rng.random() < (stays if name in findings else _NEW * share):
            later.add(name)
    return later
