"""Costs of a step; scan and single calls agree; PyTorch computes what JAX computes."""

import importlib

import jax
import numpy as np
import pytest

from ccu_jax.benchmarks import costs, problems, steps
from ccu_jax.benchmarks.steps import Steps, flatten_params, make_torch_inputs
from ccu_jax.distributed import executors
from ccu_jax.errors import UserError
from ccu_jax.models import augmentation

# JAX and PyTorch draw different random numbers.
UNAUGMENTED = {
    **{"shift": 0, "zoom": 0.0, "tint": 0.0, "flip": False},
    **{"word_dropout": 0.0, "modality_dropout": 0.0},
}
TINY = problems.PRESETS["tiny"]


@pytest.fixture
def problem():
    """A problem with stored features on one simulated device."""
    return problems.make_problem(TINY, executors.vmap(1))


@pytest.mark.parametrize("name", ["original", "ccu", "ccu_plus"])
def test_single_calls_and_scan_end_with_the_same_parameters(problem, name):
    compiled = Steps(problem, name, 9)
    states = (compiled.state, compiled.run_scan()[1], compiled.run_calls()[1])
    assert [state.step for state in states] == [0, 9, 9]
    start, scan, calls = (flatten_params(state.params) for state in states)
    assert max(np.abs(scan[key] - x).max() for key, x in start.items()) > 1e-4
    for key, x in scan.items():
        np.testing.assert_allclose(calls[key], x, atol=2e-4)


def test_a_refresh_counts_by_its_frequency(problem):
    program = problems.build_program("ccu_plus", problem)
    with_refresh = costs.count_flops(program, problem.executor)
    without = costs.count_flops(program._replace(refresh=None), problem.executor)
    rarer = program._replace(refresh_every=2 * program.refresh_every)
    half = costs.count_flops(rarer, problem.executor)
    assert half - without == pytest.approx((with_refresh - without) / 2)


def test_flops_are_those_of_the_executable_where_lowered_programs_have_no_analysis(
    problem, monkeypatch
):
    monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", lambda self: None)
    program = problems.build_program("original", problem)
    assert costs.count_flops(program, problem.executor) > 0


def test_utilization_is_bounded_by_arithmetic_intensity():
    peaks = costs.Peaks(flops=100.0, bytes=10.0, datasheet=None)
    assert costs.compute_utilization(50, 10, 1, peaks) == {"mfu": 0.5, "roofline": 1.0}
    on_gpu = costs.compute_utilization(50, None, 1, peaks._replace(datasheet=200.0))
    assert on_gpu == {"mfu": 0.25, "roofline": None}


def test_random_sets_are_disjoint_and_have_the_configured_fractions():
    sets = problems.split_as_configured(TINY)
    rows = np.concatenate(sets)
    assert sorted(rows) == list(range(TINY.num_rows))
    assert len(sets.test) == round(TINY.config.data.test_fraction * TINY.num_rows)


def test_method_without_steps_is_rejected(problem):
    with pytest.raises(UserError, match="ssd has no optimizer steps"):
        Steps(problem, "ssd")


@pytest.fixture
def torch_training():
    """The module that PyTorch runs, or a skip."""
    pytest.importorskip("torch", reason="torch is not installed (pip install torch)")
    return importlib.import_module("ccu_jax.benchmarks.torch_training")


def _make_unaugmented_problem(name, multi_label=False, **model):
    """Returns a problem without random changes of rows, and the method's parameters."""
    spec = TINY._replace(multi_label=multi_label)
    spec = problems.replace_section(spec, "model", dropout=0.0, **model)
    spec = problems.replace_section(spec, "train", **UNAUGMENTED)
    problem = problems.make_problem(spec, executors.vmap(1))
    if name != "original":
        return problem
    # Its program starts from new parameters.
    return problem._replace(params=problems.build_program(name, problem).params)


def test_pytorch_computes_the_same_logits(torch_training):
    problem = _make_unaugmented_problem("original", image_depth=2, text_depth=2)
    table = {name: np.array(x) for name, x in problem.table.items()}
    table["text"][3] = 0  # padding only
    table["has_image"][5] = False
    problem = problem._replace(table=problem.executor.replicate(table))
    inputs = torch_training.load_inputs(make_torch_inputs(problem, ["original"]))
    rows = {name: x[:64] for name, x in inputs.table.items()}
    rows["image"] = rows["image"] / 255.0
    outputs = torch_training.apply(inputs.params, rows, inputs.config.model)
    ours = problem.forward.compute_outputs(
        problem.original, dict(problem.table), np.arange(64)
    )
    for name, x in outputs.items():
        np.testing.assert_allclose(x, ours[name], atol=1e-5, err_msg=name)


def test_pytorch_augments_images_the_same_way(torch_training):
    spec = problems.replace_section(TINY, "train", shift=3, zoom=0.2, tint=0.1)
    train, rng = spec.config.train, np.random.default_rng(0)
    image = rng.random((20, 12, 12, 3)).astype(np.float32)
    draw = rng.random((20, 8)).astype(np.float32)
    ours = jax.vmap(lambda x, d: augmentation.augment_image(x, d, train))(image, draw)
    from_numpy = torch_training.torch.from_numpy
    theirs = torch_training.augment_images(
        from_numpy(image).permute(0, 3, 1, 2), from_numpy(draw), train
    )
    np.testing.assert_allclose(theirs.permute(0, 2, 3, 1), ours, atol=1e-4)


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("name", ["original", "neggrad_plus"])
def test_pytorch_trains_to_the_same_parameters(torch_training, name, multi_label):
    problem = _make_unaugmented_problem(name, multi_label)
    inputs = torch_training.load_inputs(make_torch_inputs(problem, [name]))
    plan = next(iter(inputs.plans[name].values()))
    num_steps = min(inputs.num_steps[name], len(plan))
    _, state = Steps(problem, name, num_steps).run_scan()
    training = torch_training.Training(inputs, name, is_compiled=False)
    training.run(num_steps)
    difference = change = 0.0
    for key, x in flatten_params(state.params).items():
        ours = x.T if key.endswith("/kernel") else x
        theirs = training.params[key].detach().numpy()
        difference += np.square(theirs - ours).sum()
        change += np.square(ours - inputs.params[key].numpy()).sum()
    assert change > 1e-4
    assert difference < 1e-4 * change  # 1 % of the way


@pytest.mark.slow
def test_torch_process_measures_and_reports_failures(torch_training):
    problem = _make_unaugmented_problem("original")
    with steps.start_torch(problem, ["original"]) as call:
        assert call("measure_step", "original", "eager", 4, 1) > 0
        with pytest.raises(RuntimeError, match="KeyError"):
            call("measure_step", "neggrad_plus", "eager", 4, 1)
