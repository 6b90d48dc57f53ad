"""A run that is killed on four devices and resumed on one, two or eight."""

import numpy as np

from ccu_jax.evaluate.predictions import load_predictions
from tests.faults.files import kill_at_file
from tests.faults.world import Case

_FLAGS = ("--methods", "ccu_plus")
_METADATA = "[0-9]*/meta/metadata"
_PLACES = {
    "in training": f"checkpoints/original-0/steps*/{_METADATA}",
    "in a method": f"checkpoints/ccu_plus-0/steps*/{_METADATA}",
    "before the evaluation": f"checkpoints/ccu_plus-0/params/{_METADATA}",
}
_NUM_DEVICES = (1, 2, 8)


def changed(case: Case) -> None:
    """Checkpoints of four devices are resumed on another number of devices."""
    place = list(_PLACES)[case.number // len(_NUM_DEVICES) % len(_PLACES)]
    num_devices = _NUM_DEVICES[case.number % len(_NUM_DEVICES)]
    on_four = (*_FLAGS, "--devices", "4")
    undisturbed = case.world.undisturbed(*on_four)
    case.copy_from(kill_at_file(case.world, on_four, _PLACES[place], name=place))
    run = case.start(*_FLAGS, "--devices", str(num_devices))
    assert run.wait() == 0, run.errors()[-1500:]
    case.faults.append(f"{place}, then {num_devices} devices")
    assert "unusable" not in run.text(), run.tail()
    # Logits, since rounding changes parameters that hardly affect them.
    for method in ("original", "ccu_plus"):
        one, other = (
            load_predictions(folder / "outputs" / f"{method}-0.npz")
            for folder in (undisturbed.workdir, case.workdir)
        )
        assert one.id.tolist() == other.id.tolist()
        assert one.split.tolist() == other.split.tolist()
        for view, logits in one.logits.items():
            np.testing.assert_allclose(other.logits[view], logits, rtol=0, atol=1e-4)
