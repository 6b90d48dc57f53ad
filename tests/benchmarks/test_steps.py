"""Costs of a step; scan and single calls agree; PyTorch computes what JAX computes."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ccu_jax import models
from ccu_jax.benchmarks import costs, problems, torch_baseline
from ccu_jax.benchmarks.steps import Steps
from ccu_jax.distributed import executors
from ccu_jax.models import augmentation as augment

# No random change of a row, which PyTorch would draw from other numbers.
STILL = {
    "shift": 0,
    "zoom": 0.0,
    "tint": 0.0,
    "flip": False,
    "word_dropout": 0.0,
    "modality_dropout": 0.0,
}
TINY = problems.PRESETS["tiny"]


@pytest.fixture
def one_device(monkeypatch):
    """Makes the executor vmap simulate a single device."""
    monkeypatch.setitem(executors.EXECUTORS, "vmap", lambda: executors.vmap(1))


@pytest.mark.parametrize("name", ["original", "ccu", "ccu_plus"])
def test_single_calls_and_scan_end_with_the_same_parameters(one_device, name):
    steps = Steps(problems.make_step_problem(TINY, "vmap"), name, 9)
    _, scanned = steps.run_scan()
    _, called = steps.run_calls()
    assert scanned.step == called.step == 9
    change = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()), scanned.params, steps.state.params
    )
    assert max(jax.tree.leaves(change)) > 1e-4
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4),
        called.params,
        scanned.params,
    )


def test_convolutions_are_counted():
    def compiled_text(fn, *args):
        return jax.jit(fn).lower(*args).compile().as_text()

    image, kernel = jnp.ones((2, 9, 9, 3)), jnp.ones((3, 3, 3, 4))

    def convolve(x, k):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, k, (1, 1), "VALID", dimension_numbers=layout
        )

    assert costs.count_convolutions(compiled_text(convolve, image, kernel)) == 1
    assert not costs.count_convolutions(compiled_text(jnp.matmul, image, kernel[0, 0]))
    library = ' = f32[2] custom-call(%a), custom_call_target="__cudnn$convForward"'
    assert costs.count_convolutions(library) == 1


def test_a_refresh_counts_by_its_frequency(one_device):
    problem = problems.make_step_problem(TINY, "vmap")._replace(method="ccu_plus")
    program = problems.build_stepping_program("ccu_plus", problem)
    with_refresh = costs.count_flops(program, problem.executor)
    plain = program._replace(refresh=None)
    without = costs.count_flops(plain, problem.executor)
    every = program._replace(refresh_every=2 * program.refresh_every)
    half = costs.count_flops(every, problem.executor)
    assert half - without == pytest.approx((with_refresh - without) / 2)


def test_utilization_is_bounded_by_arithmetic_intensity():
    peaks = costs.Peaks(flops=100.0, bytes=10.0, datasheet=None)
    assert costs.utilization(50, 10, 1, peaks) == {"mfu": 0.5, "roofline": 1.0}
    on_gpu = costs.utilization(50, None, 1, peaks._replace(datasheet=200.0))
    assert on_gpu == {"mfu": 0.25, "roofline": None}


def test_random_sets_are_disjoint_and_have_the_configured_fractions():
    config = problems.make_config(TINY)
    sets = problems.random_sets(config, TINY, np.random.default_rng(0))
    rows = np.concatenate(sets)
    assert sorted(rows) == list(range(TINY.rows))
    assert len(sets.test) == round(config.data.test_fraction * TINY.rows)


def test_a_method_without_steps_is_refused():
    problem = problems.make_problem(TINY, executors.vmap(1))
    with pytest.raises(problems.UserError, match="ssd makes no optimizer steps"):
        problems.build_stepping_program("ssd", problem)


# --- PyTorch --------------------------------------------------------------------------


def _inputs(tmp_path, name, multi_label=False, **model):
    """Returns a problem without random changes, and what PyTorch reads of it."""
    pytest.importorskip("torch", reason="torch is not installed (pip install torch)")
    from ccu_jax.benchmarks import torch_training

    sizes = TINY._replace(
        multi_label=multi_label,
        model=tuple({"dropout": 0.0, **model}.items()),
        train=tuple(STILL.items()),
    )
    problem = problems.make_step_problem(sizes, "vmap")._replace(method=name)
    if name == "original":  # its program starts from new parameters
        params = problems.build_program(name, problem).params
        problem = problem._replace(params=params)
    torch_baseline.write_inputs(tmp_path, problem, sizes, [name])
    return problem, *torch_training.read_inputs(tmp_path)


@pytest.mark.parametrize("tail_blocks", [0, 1])
def test_pytorch_computes_the_same_logits(one_device, tmp_path, tail_blocks):
    depths = {"image_depth": 2, "text_depth": 2, "tail_blocks": tail_blocks}
    problem, inputs, model = _inputs(tmp_path, "original", **depths)
    from ccu_jax.benchmarks import torch_training

    inputs.table["text"][3] = 0  # padding only
    inputs.table["has_image"][5] = False
    table = {name: np.array(x) for name, x in problem.table.items()}
    table["text"][3], table["has_image"][5] = 0, False
    table = problem.executor.replicate(table)
    ours = problem.forward.outputs(problem.params, table, np.arange(64))
    for name, x in torch_training.compute_logits(inputs, model, 64).items():
        np.testing.assert_allclose(x, ours[name], atol=1e-5, err_msg=name)


def test_pytorch_augments_images_the_same_way():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from ccu_jax.benchmarks import torch_training

    sizes = problems.PRESETS["clipart"]._replace(
        train=tuple({"shift": 3, "zoom": 0.2, "tint": 0.1}.items())
    )
    train, rng = problems.make_config(sizes).train, np.random.default_rng(0)
    image = rng.random((20, 12, 12, 3)).astype(np.float32)
    draw = rng.random((20, 8)).astype(np.float32)
    ours = jax.vmap(lambda x, d: augment.augment_image(x, d, train))(image, draw)
    theirs = torch_training.augment_images(
        torch.from_numpy(image).permute(0, 3, 1, 2), torch.from_numpy(draw), train
    )
    np.testing.assert_allclose(theirs.permute(0, 2, 3, 1), ours, atol=1e-4)


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("name", ["original", "neggrad_plus"])
def test_pytorch_trains_to_the_same_parameters(one_device, tmp_path, name, multi_label):
    problem, inputs, model = _inputs(tmp_path, name, multi_label)
    from ccu_jax.benchmarks import torch_model, torch_training

    num_steps = min(
        inputs.total_steps[name], len(next(iter(inputs.plans[name].values())))
    )
    _, state = Steps(problem, name, num_steps).run_scan()
    before = copy.deepcopy(model.state_dict())
    torch_training.Training(inputs, model, name, False).run(num_steps)
    ours = copy.deepcopy(model)
    torch_model.load_params(ours, torch_baseline.flatten_params(state.params))
    difference = change = 0.0
    for key, x in model.state_dict().items():
        target = ours.state_dict()[key]
        difference += float((x - target).square().sum())
        change += float((target - before[key]).square().sum())
    assert change > 1e-4
    assert difference < 1e-4 * change  # a hundredth of the way


@pytest.mark.slow
def test_the_torch_process_answers_and_reports_failures(one_device, tmp_path):
    _inputs(tmp_path, "original")
    process = torch_baseline.TorchProcess(tmp_path)
    try:
        assert set(process.logits(8)) >= set(models.VIEWS)
        assert process.try_window("original", "eager", 4) is None
        assert process.window("original", "eager", 4) > 0
        assert "KeyError" in process.try_window("neggrad_plus", "eager", 4)
    finally:
        process.close()
