"""A run that is cut off on four devices and goes on on one, two or eight."""

import numpy as np

from ccu_jax.evaluate import predictions
from tests.faults.files import cut_off
from tests.faults.world import Case

_SHORT = ("--methods", "ccu_plus")
_NEAR = 1e-4
# In the middle of a method, and where only its evaluation is missing.
_PLACES = {
    "in training": "checkpoints/original-0/steps*/[0-9]*/meta/metadata",
    "in a method": "checkpoints/ccu_plus-0/steps*/[0-9]*/meta/metadata",
    "with finished parameters": "checkpoints/ccu_plus-0/params/[0-9]*/meta/metadata",
}
_DEVICES = (1, 2, 8)


def moved(case: Case) -> None:
    """The checkpoints of four devices are gone on from on another number."""
    place = list(_PLACES)[case.number // len(_DEVICES) % len(_PLACES)]
    devices = _DEVICES[case.number % len(_DEVICES)]
    on_four = (*_SHORT, "--devices", "4")
    undisturbed = case.world.undisturbed(*on_four)
    case.copied_from(cut_off(case.world, on_four, _PLACES[place], name=place))
    run = case.start(*_SHORT, "--devices", str(devices))
    assert run.wait() == 0, run.errors()[-1500:]
    case.faults.append(f"{place}, then {devices} devices")
    assert "unusable" not in run.text(), run.tail()
    for method in ("original", "ccu_plus"):
        _near(undisturbed.workdir, case.workdir, method)


def _near(one, other, method):
    # What models say; some of their parameters, which change nothing, go by rounding.
    first, second = (
        predictions.load_predictions(folder / "outputs" / f"{method}-0.npz")
        for folder in (one, other)
    )
    assert first.id.tolist() == second.id.tolist()
    assert first.split.tolist() == second.split.tolist()
    for view, logits in first.logits.items():
        np.testing.assert_allclose(second.logits[view], logits, rtol=0, atol=_NEAR)
