"""A sample in the pairs format: drawings that resemble chest X-rays, and reports.

All images and reports are synthetic: they come from no patient or hospital and contain
no medical knowledge. The edition shows how such data can be stored: several findings
per study, several studies per patient, a split by patient.
"""

import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.random import Generator, default_rng

from ccu_jax.data.readers.base import Progress
from ccu_jax.data.samples.drawing import (
    CONTENT,
    choose,
    encode_jpeg,
    make_grid,
    make_mask,
    rotate_axes,
    sample_field,
    write_pairs,
)


class _Shadow(NamedTuple):
    """An ellipse in one lung, in units of half an image."""

    x: float
    y: float
    width: float
    height: float
    brightness: float


class _Finding(NamedTuple):
    """A finding and how it is drawn."""

    prevalence: float  # among patients at their first study
    shadow: _Shadow | None = None  # None: drawn by changing the anatomy
    is_chronic: bool = False


_FINDINGS = {
    "cardiomegaly": _Finding(0.24, is_chronic=True),
    "consolidation": _Finding(0.22, _Shadow(0.45, 0.0, 0.3, 0.3, 0.5)),
    "device": _Finding(0.20, _Shadow(0.5, -0.55, 0.18, 0.14, 0.8), is_chronic=True),
    "effusion": _Finding(0.22, _Shadow(0.5, 0.45, 0.35, 0.25, 0.5)),
    "fracture": _Finding(0.18, _Shadow(0.45, 0.2, 0.28, 0.08, -0.6)),
    "nodule": _Finding(0.22, _Shadow(0.45, -0.2, 0.16, 0.16, 0.6)),
    "pneumothorax": _Finding(0.18, _Shadow(0.55, -0.4, 0.2, 0.35, -0.5)),
    "scoliosis": _Finding(0.18, is_chronic=True),
}
_PERSISTS, _CHRONIC_PERSISTS = 0.6, 0.95  # probabilities until the next study
_NEW = 0.4  # times the prevalence: probability of a new finding at a later study
_VISIBLE = 0.8  # fraction of findings that are visible in the image
_LABEL_NOISE = 0.02  # probability that a finding's label is flipped
_NUM_STUDIES_SHARES = (0.45, 0.35, 0.20)  # of patients with 1, 2, 3 studies

_CONTENT = CONTENT["medical"]
_REPORTED, _REPORTED_HEDGED = 0.62, 0.18  # of present findings; others are omitted
_SUSPECTED, _DENIED = 0.02, 0.22  # of absent findings; others are not mentioned


class _Body(NamedTuple):
    """The anatomy of one patient, lengths in units of half an image."""

    lung_height: float
    lung_width: float
    num_ribs: float
    rib_curvature: float
    tissue: float  # brightness around the lungs


def write(root: pathlib.Path, rows: int, seed: int, progress: Progress) -> None:
    """Writes the edition's `pairs.jsonl` and `images/`."""
    rng = default_rng([seed, 0])
    sizes = rng.choice([1, 2, 3], rows, p=_NUM_STUDIES_SHARES)
    write_pairs(root, rows, sizes, seed, _draw_patient, "p", progress)


def _draw_patient(seed: int, patient: int, num_studies: int) -> Iterator[dict]:
    """Yields the rows of one patient's studies; see `write_pairs`."""
    rng = default_rng([seed, 2, patient])
    ranges = ((0.58, 0.76), (0.30, 0.38), (4.5, 7.0), (0.2, 0.9), (0.52, 0.70))
    body = _Body(*(float(rng.uniform(*range_)) for range_ in ranges))
    findings = [n for n, f in _FINDINGS.items() if rng.random() < f.prevalence]
    for study in range(num_studies):
        if study:
            findings = [n for n in _FINDINGS if _sample_recurrence(rng, n, findings)]
        visible = [name for name in findings if rng.random() < _VISIBLE]
        flipped = [name for name in _FINDINGS if rng.random() < _LABEL_NOISE]
        labels = [n for n in _FINDINGS if (n in findings) != (n in flipped)]
        image = _draw_study(rng, body, visible)
        text = _invent_report(rng, findings, has_prior=study > 0)
        yield {"image": image, "text": text, "labels": labels}


def _sample_recurrence(rng: Generator, name: str, findings: list[str]) -> bool:
    """Samples whether a finding is present in the next study."""
    finding = _FINDINGS[name]
    if name not in findings:
        return rng.random() < _NEW * finding.prevalence
    return rng.random() < (_CHRONIC_PERSISTS if finding.is_chronic else _PERSISTS)


def _invent_report(rng: Generator, findings: list[str], has_prior: bool) -> str:
    sentences = []
    for name in _FINDINGS:
        chance = rng.random()
        if name in findings:
            forms = ((_REPORTED, "present"), (_REPORTED + _REPORTED_HEDGED, "hedged"))
        else:
            forms = ((_SUSPECTED, "hedged"), (_SUSPECTED + _DENIED, "absent"))
        form = next((form for limit, form in forms if chance < limit), None)
        if form:
            sentences.append(_invent_sentence(rng, name, form))
    count = rng.integers(0, 3)
    sentences += rng.choice(_CONTENT["standard"], count, replace=False).tolist()
    rng.shuffle(sentences)
    reason = f"Indication: {rng.choice(_CONTENT['reasons'])}."
    prior = "Compared with the previous study." if has_prior else "No prior study."
    if not findings and rng.random() < 0.4:
        sentences.append("Normal chest radiograph.")
    return " ".join([reason, prior, *sentences])


def _invent_sentence(rng: Generator, finding: str, form: str) -> str:
    names = _CONTENT["names"][finding]
    first_share = 0.7 if form == "absent" else 0.4
    name = names[0 if rng.random() < first_share else rng.integers(1, len(names))]
    size = str(rng.choice(_CONTENT["sizes"]))
    return choose(rng, _CONTENT[form]).format(
        name=name,
        Name=name.capitalize(),
        size=size,
        Size=size.capitalize(),
        place=rng.choice(_CONTENT["places"]),
    )


def _draw_study(rng: Generator, body: _Body, visible: list[str]) -> bytes:
    """Draws the image of a study with its visible findings as a JPEG."""
    size = int(rng.integers(72, 97))
    # Every study is posed differently.
    x, y = rotate_axes(*make_grid(size), rng.normal(0, 0.08))
    zoom = rng.uniform(0.88, 1.12)
    x = (x - rng.normal(0, 0.09)) * zoom * rng.uniform(0.94, 1.06)
    y = (y - rng.normal(0, 0.09)) * zoom
    if "scoliosis" in visible:
        curve = rng.choice([-1, 1]) * rng.uniform(0.16, 0.26)
        x = x + curve * np.sin(2.6 * y + rng.uniform(-0.5, 0.5))
    image = body.tissue * make_mask(np.abs(x) - 0.98 + 0.25 * (y < -0.6), 0.1)
    image += 0.09 * sample_field(rng, size, 4) + 0.04 * sample_field(rng, size, 9)
    lung = _compute_ellipse_distance(
        np.abs(x) - 0.45, y, body.lung_width, body.lung_height
    )
    image -= (0.36 + rng.normal(0, 0.04)) * make_mask(lung, 0.12)
    arcs = body.num_ribs * np.pi * (y + body.rib_curvature * x * x)
    image += 0.13 * np.maximum(np.sin(arcs), 0) * make_mask(lung, 0.06)
    image += 0.26 * make_mask(np.abs(x) - 0.10, 0.08)  # spine
    heart_width = rng.uniform(0.26, 0.36) + 0.22 * ("cardiomegaly" in visible)
    image += 0.30 * make_mask(
        _compute_ellipse_distance(x - 0.14, y - 0.32, heart_width, 0.34), 0.08
    )
    diaphragm = body.lung_height - 0.1 - y + 0.25 * (np.abs(x) - 0.45) ** 2
    image += 0.34 * make_mask(diaphragm, 0.06)
    for shadow in (_FINDINGS[name].shadow for name in visible):
        if shadow is not None:
            side, (dx, dy) = rng.choice([-1, 1]), rng.normal(0, 0.06, 2)
            distance = _compute_ellipse_distance(
                x * side - shadow.x - dx, y - shadow.y - dy, shadow.width, shadow.height
            )
            image += shadow.brightness * make_mask(distance, 0.06)
    return _expose_plate(rng, image, size)


def _compute_ellipse_distance(
    x: np.ndarray, y: np.ndarray, width: float, height: float
) -> np.ndarray:
    """Returns each pixel's approximate distance from a centered ellipse, < 0 inside."""
    distance = np.sqrt((x / width) ** 2 + (y / height) ** 2)
    return (distance - 1) * min(width, height)


def _expose_plate(rng: Generator, image: np.ndarray, size: int) -> bytes:
    """Adds exposure, noise, plate borders and a side marker; returns a JPEG."""
    x, y = make_grid(size)
    fade = rng.normal(0, 0.05) * x + rng.normal(0, 0.05) * y
    image = (image + fade) * rng.uniform(0.85, 1.15) + rng.normal(0, 0.04)
    image = image + rng.normal(0, rng.uniform(0.01, 0.03), image.shape)
    left, right, top, bottom = rng.integers(0, size // 9, 4) * (rng.random(4) < 0.4)
    plate = np.full((size, size), 0.02)
    inner = slice(top, size - bottom), slice(left, size - right)
    plate[inner] = image[inner]
    if rng.random() < 0.5:
        row, column = rng.integers(2, 9), rng.choice([3, size - 9])
        plate[row : row + 6, column : column + 4] = 0.95
    return encode_jpeg(plate, int(rng.integers(78, 93)))
