"""Words for the generated X-rays: invented reports, with no patient behind them."""

import numpy as np

# What a finding is called; the first is what it is mostly called where there is none.
_NAMES = {
    "cardiomegaly": ("cardiac enlargement", "enlarged heart", "wide heart shadow"),
    "consolidation": ("consolidation", "airspace opacity", "patchy infiltrate"),
    "device": ("pacing device", "generator pack with lead", "implanted pacer"),
    "effusion": ("pleural effusion", "pleural fluid", "blunted costophrenic angle"),
    "fracture": ("rib fracture", "displaced rib", "cortical break of a rib"),
    "nodule": ("pulmonary nodule", "rounded density", "coin lesion"),
    "pneumothorax": ("pneumothorax", "apical air rim", "collapsed lung margin"),
    "scoliosis": ("scoliosis", "curvature of the spine", "tilted thoracic spine"),
}
_PRESENT = (
    "There is a {size} {name}.",
    "{Size} {name} {place}.",
    "{Name} is seen {place}.",
    "{Name}, {size}.",
    "Findings include {name}.",
)
_HEDGED = (
    "Possible {name}.",
    "{Name} cannot be excluded.",
    "Questionable {name} {place}.",
    "{Name} is suspected; correlate with symptoms.",
)
_ABSENT = (
    "No {name}.",
    "No evidence of {name}.",
    "{Name} is not seen.",
    "Negative for {name}.",
)
_STANDARD = (
    "Bones and soft tissues are unremarkable.",
    "The mediastinal contours are within normal limits.",
    "Lung volumes are adequate.",
    "Technique is limited by rotation.",
    "Trachea is midline.",
    "Follow-up as clinically indicated.",
    "The upper abdomen is not well seen.",
)
_REASONS = ("cough", "chest pain", "shortness of breath", "fever", "a fall", "check-up")
_PLACES = ("on the right", "on the left", "at the base", "in the upper zone")
_SIZES = ("small", "moderate", "large", "subtle", "mild")
_TOLD, _AS_POSSIBLE = 0.62, 0.18  # of the findings; the rest is left out
_SUSPECTED = 0.02  # of what is not there
_DENIED = 0.22  # likewise, where it is said that it is not


def report(rng: np.random.Generator, findings: set[str], earlier: bool) -> str:
    """The report of one study.

    Args:
        rng: Where the choices come from.
        findings: What the reader has found; some of it is hedged or left out.
        earlier: Whether the patient has had a study before.
    """
    told = []
    for finding in _NAMES:
        chance = rng.random()
        if finding in findings:
            limits = ((_TOLD, _PRESENT), (_TOLD + _AS_POSSIBLE, _HEDGED))
        else:
            limits = ((_SUSPECTED, _HEDGED), (_SUSPECTED + _DENIED, _ABSENT))
        forms = next((forms for limit, forms in limits if chance < limit), None)
        if forms:
            told.append(_sentence(rng, finding, forms))
    told += rng.choice(_STANDARD, rng.integers(0, 3), replace=False).tolist()
    rng.shuffle(told)
    reason = f"Indication: {rng.choice(_REASONS)}."
    compared = "Compared with the previous study." if earlier else "No prior study."
    if not findings and rng.random() < 0.4:
        told.append("Normal chest radiograph.")
    return " ".join([reason, compared, *told])


def _sentence(rng: np.random.Generator, finding: str, forms: tuple[str, ...]) -> str:
    names = _NAMES[finding]
    first = 0.7 if forms is _ABSENT else 0.4
    name = names[0 if rng.random() < first else rng.integers(1, len(names))]
    size = str(rng.choice(_SIZES))
    return forms[rng.integers(len(forms))].format(
        name=name,
        Name=name.capitalize(),
        size=size,
        Size=size.capitalize(),
        place=rng.choice(_PLACES),
    )
