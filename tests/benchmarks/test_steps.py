"""The ways of running steps come to the same; PyTorch computes what JAX does."""

import contextlib
import copy
import dataclasses
import importlib.util
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ccu_jax import models
from ccu_jax.benchmarks import __main__ as bench
from ccu_jax.benchmarks import costs as bench_cost
from ccu_jax.benchmarks import problems as bench_problem
from ccu_jax.benchmarks import step_count as bench_step_count
from ccu_jax.benchmarks import step_indexing as bench_step_indexing
from ccu_jax.benchmarks import step_ways as bench_step_ways
from ccu_jax.benchmarks import steps as bench_step
from ccu_jax.benchmarks import torch_baseline as bench_torch
from ccu_jax.distributed import executors as parallel
from ccu_jax.methods import METHODS
from ccu_jax.methods.cached_features import build_feature_tables
from ccu_jax.methods.ccu.masked_statistics import uniform_per_row
from ccu_jax.models import augmentation as augment

STILL = dict(shift=0, zoom=0.0, tint=0.0, flip=False, word_dropout=0.0)
STILL["modality_dropout"] = 0.0


@pytest.fixture
def one_device(monkeypatch):
    """The executor vmap on a single make-believe device."""
    monkeypatch.setitem(parallel.EXECUTORS, "vmap", lambda: parallel.vmap(1))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The JSON and the printed text of a benchmark on a machine without PyTorch."""
    file = tmp_path_factory.mktemp("step") / "json"
    flags = "step --preset tiny --methods original,ccu_plus --windows 2"
    flags += " --executors vmap,pmap"
    printed = io.StringIO()
    found = importlib.util.find_spec
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setitem(bench.COMMANDS, "step", bench_step)
        patch.setitem(parallel.EXECUTORS, "vmap", lambda: parallel.vmap(1))
        # Another one; eight devices have more to compile and nothing more to tell.
        patch.setitem(parallel.EXECUTORS, "pmap", lambda: parallel.vmap(2))
        patch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *of: None if name == "torch" else found(name, *of),
        )
        patch.setattr(bench_cost, "peaks", _peaks)
        patch.setattr(bench_step_ways.Steps, "_fitting", _few)
        assert bench.main([*flags.split(), "--json", str(file)]) == 0
    return json.loads(file.read_text()), printed.getvalue()


def _few(steps, seconds):
    """In place of so many steps of training as a second holds."""
    return steps.program.steps if steps.tail else 3


def _peaks(dtype):
    return {"flops": 1e12, "bytes": 1e11, "datasheet": None, "kind": None}


def test_all_that_was_measured_is_in_the_json(ran):
    told, _ = ran
    measured = told["measured"]
    assert [of["method"] for of in measured["methods"]] == ["original", "ccu_plus"]
    for of in measured["methods"]:
        names = {bench_step_ways.SCAN, bench_step_ways.LOOP, bench_step_ways.INDEXING}
        if of["tail"]:
            names.add(bench_step_ways.WHOLE)
        assert set(of["ways"]) == names
        assert set(of["executors"]) == {"vmap", "pmap"}
        for took in [*of["ways"].values(), *of["executors"].values()]:
            assert len(took["windows"]) == 2
            assert 0 < took["low"] <= took["median"] <= took["high"]
        assert 0 <= of["outside"]["median"] < 1
        assert of["flops"] > 0 and of["convolutions"] == 0 and not of["failed"]


def test_without_pytorch_the_table_says_so_and_its_targets_are_not_measured(ran):
    told, printed = ran
    assert "PyTorch: torch is not installed" in printed
    reached = {of["name"]: of["reached"] for of in told["targets"]}
    assert reached["training step to eager PyTorch"] is None
    assert reached["ccu_plus, eager PyTorch's time to this, whole run"] is None
    assert reached["GPU, training step, MFU"] is None


def test_targets_are_judged_by_the_numbers(ran):
    measured = copy.deepcopy(ran[0]["measured"])
    training, plus = measured["methods"]

    def took(seconds):
        return {"median": seconds, "low": seconds, "high": seconds} | {
            "windows": [seconds, seconds]
        }

    for of in (training, plus):
        of["ways"] = {"one scan": took(0.1), "torch eager": took(0.31)}
        of["ways"]["Python loop, same step"] = took(0.16)
        of["ways"]["Python loop that indexes"] = took(0.51)
        of["outside"] = took(0.04)
    plus["ways"] |= {"whole run": took(1), "torch eager, whole run": took(2)}
    measured["logits_difference"] = 9e-5
    good = _judged(measured)
    assert all(reached for name, reached in good.items() if "GPU" not in name)
    training["ways"]["torch eager"] = took(0.07)
    plus["ways"]["torch eager"] = took(0.29)
    plus["ways"]["torch eager, whole run"] = took(0.9)
    plus["ways"]["Python loop, same step"] = took(0.14)
    plus["ways"]["Python loop that indexes"] = took(0.49)
    for of in (training, plus):
        of["outside"], of["convolutions"] = took(0.06), 1
    measured["logits_difference"] = 2e-4
    bad = _judged(measured)
    assert not any(bad.values())
    measured |= {"platform": "gpu"}
    training["executors"] = {"pmap": took(1.04), "shard_map": took(1), "vmap": took(2)}
    training["flops"] = 0.44 * 0.1 * 1e12 * measured["devices"]
    training["peak"], plus["peak"] = took(1e12), took(9e11)
    judged = _judged(measured)
    assert judged["GPU, training step, MFU"] is False
    assert judged["GPU, training step, pmap slower than shard_map"] is False
    assert judged["GPU, training step, pmap slower than plain jit"] is True


def _judged(measured):
    judged = [bench.judge(**target) for target in bench_step.targets(measured)]
    return {target["name"]: target["reached"] for target in judged}


@pytest.mark.parametrize("name", ["original", "ccu", "ccu_plus"])
def test_every_way_of_running_steps_comes_to_the_same(one_device, name):
    problem = bench_problem.make(bench_problem.PRESETS["tiny"], "vmap")
    steps = bench_step_ways.Steps(problem, name, 9)
    _, scanned = steps.scanned()
    _, looped = steps.looped()
    _, indexed = bench_step_indexing.Indexing(steps).run()
    assert scanned.step == looped.step == indexed.step == 9
    both = scanned.params, steps.first.params
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), *both)
    assert max(jax.tree.leaves(moved)) > 1e-4
    for other in (looped, indexed):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4),
            other.params,
            scanned.params,
        )


def test_convolutions_are_found_where_there_are_any():
    def text(fn, *given):
        return jax.jit(fn).lower(*given).compile().as_text()

    image, kernel = jnp.ones((2, 9, 9, 3)), jnp.ones((3, 3, 3, 4))
    dims = ("NHWC", "HWIO", "NHWC")

    def convolved(x, k):
        return jax.lax.conv_general_dilated(
            x, k, (1, 1), "VALID", dimension_numbers=dims
        )

    assert bench_step_count.convolutions(text(convolved, image, kernel)) == 1
    assert not bench_step_count.convolutions(text(jnp.matmul, image, kernel[0, 0]))
    library = ' = f32[2] custom-call(%a), custom_call_target="__cudnn$convForward"'
    assert bench_step_count.convolutions(library) == 1


def test_the_count_by_hand_is_near_the_compilers():
    sizes = bench_problem.Sizes("tiny", image_size=32, text_length=16, vocabulary=50)
    model = dict(image_width=128, image_depth=3, text_width=128, text_depth=2)
    config = bench_problem.settings(sizes._replace(model=tuple(model.items())))
    built = models.build(
        config.model, classes=10, vocabulary=50, image_size=32, text_length=16
    )
    rows = 4
    example = {
        "image": jnp.zeros((rows, 32, 32, 3)),
        "text": jnp.ones((rows, 16), int),
        "has_image": jnp.ones(rows, bool),
        "has_text": jnp.ones(rows, bool),
    }

    def loss(params):
        out = built.apply(params, example)
        return sum(x.sum() for x in out)

    params = jax.eval_shape(built.init, jax.random.key(0))
    counted = jax.jit(jax.grad(loss)).lower(params).cost_analysis()["flops"]
    by_hand = bench_step_count.training_flops(config, sizes, rows)
    assert 0.9 < by_hand / counted < 1.0


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--preset large", "large"),
        ("--methods original,ccu_minus", "'ccu_minus' is none of original"),
        ("--executors pmap,pmap", "at most once"),
        ("--executors xmap", "'xmap' is none of pmap"),
        ("--windows 0", "--windows"),
        ("--batch 0", "--batch"),
        ("--batch 12 --no-torch --preset tiny --windows 1", "multiples of 8"),
        ("--methods ssd --no-torch --preset tiny --windows 1", "ssd makes no steps"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(flags, word, capsys, monkeypatch):
    monkeypatch.setitem(bench.COMMANDS, "step", bench_step)
    monkeypatch.setattr(bench_cost, "peaks", _peaks)
    assert bench.main(["step", *flags.split()]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: ") and word in told


# --- PyTorch --------------------------------------------------------------------------


def _world(tmp_path, kind, multi_label=False, **model):
    """A problem without random changes; what PyTorch reads of it; its parameters."""
    pytest.importorskip("torch", reason="torch is not installed (pip install torch)")
    from ccu_jax.benchmarks import torch_child as bench_torch_child

    sizes = bench_problem.PRESETS["tiny"]._replace(
        multi_label=multi_label,
        model=tuple({"dropout": 0.0, **model}.items()),
        train=tuple(STILL.items()),
    )
    problem = bench_step._problem(sizes, "vmap", None)._replace(method=kind)
    program, rows = METHODS[kind](problem), None
    if kind == "original":  # which starts anew
        problem = problem._replace(params=program.params)
    if kind == "ccu_plus":
        rows = build_feature_tables(
            problem, problem.config.ccu_plus.max_retain_rows
        ).rows
    shape = dict(classes=sizes.classes, vocabulary=sizes.vocabulary)
    shape |= dict(image_size=sizes.image_size, text_length=sizes.text_length)
    bench_torch.write(tmp_path, problem, shape, {kind: (program, rows)})
    return problem, *bench_torch_child.read(tmp_path)


@pytest.mark.parametrize("tail_blocks", [0, 1])
def test_pytorch_says_what_jax_says(one_device, tmp_path, tail_blocks):
    shape = dict(image_depth=2, text_depth=2, tail_blocks=tail_blocks)
    problem, world, model = _world(tmp_path, "original", **shape)
    from ccu_jax.benchmarks import torch_child as bench_torch_child

    world.table["text"][3] = 0  # nothing but padding
    world.table["has_image"][5] = False
    table = {name: np.array(x) for name, x in problem.table.items()}
    table["text"][3], table["has_image"][5] = 0, False
    theirs = bench_torch_child.logits(world, model, 64)
    table = problem.executor.replicate(table)
    mine = problem.forward.outputs(problem.params, table, np.arange(64))
    for name, said in theirs.items():
        np.testing.assert_allclose(said, mine[name], atol=1e-5, err_msg=name)


def test_pytorch_changes_pictures_as_jax_does():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from ccu_jax.benchmarks import torch_train as bench_torch_train

    config = bench_problem.settings(bench_problem.PRESETS["clipart"]).train
    config = dataclasses.replace(config, shift=3, zoom=0.2, tint=0.1)
    rng = np.random.default_rng(0)
    image, draw = rng.random((20, 12, 12, 3)), rng.random((20, 8))
    image, draw = image.astype(np.float32), draw.astype(np.float32)
    mine = jax.vmap(lambda x, d: augment._picture(x, d, config))(image, draw)
    given = torch.from_numpy(image).permute(0, 3, 1, 2), torch.from_numpy(draw)
    theirs = bench_torch_train.pictures(*given, config).permute(0, 2, 3, 1)
    np.testing.assert_allclose(theirs, mine, atol=1e-4)


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("kind", ["original", "neggrad_plus"])
def test_pytorch_trains_as_jax_does(one_device, tmp_path, kind, multi_label):
    problem, world, model = _world(tmp_path, kind, multi_label)
    from ccu_jax.benchmarks.torch_train import Training

    config, sets = problem.config, problem.sets
    section = config.train if kind == "original" else config.neggrad_plus
    rows = sets.retain
    if kind == "original":
        rows = np.concatenate([sets.retain, sets.unlearn])
    total = problem.steps(section.epochs, section.batch, rows)
    _, state = bench_step_ways.Steps(problem, kind, total).scanned()
    before = copy.deepcopy(model.state_dict())
    Training(world, model, kind, world.plans[kind], total, False).run(total)
    _same(before, model, state.params)


@pytest.mark.parametrize("multi_label", [False, True])
def test_pytorch_unlearns_as_jax_does(one_device, tmp_path, multi_label):
    problem, world, model = _world(tmp_path, "ccu_plus", multi_label)
    import torch

    from ccu_jax.benchmarks.torch_plus import Plus

    steps = bench_step_ways.Steps(problem, "ccu_plus")
    _, state = steps.scanned()
    count = len(world.rows["unlearn"])
    keys = jax.random.split(problem.key("ranks"))
    drawn = np.stack([uniform_per_row(key, count) for key in keys])
    plus = Plus(world, model, world.plans["ccu_plus"], False)
    plus.start(torch.from_numpy(drawn))
    ranks = steps.program.frozen["ranks"]
    mine = (ranks.base_UxK, ranks.text_UxK, ranks.image_U, ranks.fused_U)
    theirs = plus._ranks
    theirs = (theirs.base, theirs.text, theirs.image, theirs.fused)
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(a[:count], b, atol=1e-3)
    before = copy.deepcopy(plus._model.state_dict())
    plus.run(steps.steps)
    for view in models.VISUAL:
        np.testing.assert_allclose(
            state.aux["level"][view][:count], plus._aux["level"][view], atol=2e-2
        )
    _same(before, plus._model, {**problem.params, **state.params})
    again = model.state_dict()
    assert all(torch.equal(x, again[name]) for name, x in before.items())


def _same(before, model, params):
    """What was trained is the same but for rounding, and moved."""
    from ccu_jax.benchmarks import torch_model as bench_torch_model

    mine = copy.deepcopy(model)
    bench_torch_model.load(mine, bench_torch.flat(params))
    apart = moved = 0.0
    for name, x in model.state_dict().items():
        wanted = mine.state_dict()[name]
        apart += float((x - wanted).square().sum())
        moved += float((wanted - before[name]).square().sum())
    assert moved > 1e-4
    assert apart < 1e-4 * moved  # a hundredth of the way


@pytest.mark.slow
def test_the_process_of_pytorch_measures_and_tells_what_fails(one_device, tmp_path):
    _world(tmp_path, "ccu_plus")
    process = bench_torch.Torch(tmp_path)
    try:
        assert set(process.logits(8)) >= {"image", "text", "fused"}
        told = process.window("ccu_plus", "eager", 4, 16)
        assert told["start"] > 0 and told["steps"] > 0
        assert "KeyError" in process.window("original", "eager", 4, 16)["failed"]
    finally:
        process.close()
