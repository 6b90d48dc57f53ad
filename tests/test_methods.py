"""Every method x every property that all of them must have."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

from ccu_jax import audit, evaluate, objectives, parallel
from ccu_jax.config import Conditions, Run, Train
from ccu_jax.data import conditions
from ccu_jax.data.pipeline import OnHost
from ccu_jax.loop import Loop
from ccu_jax.methods import METHODS, REFERENCES, cache, ccu, reference, targets
from ccu_jax.models import TAIL, TEXT, VISUAL
from ccu_jax.parallel import AXIS
from ccu_jax.step import Program, gather, make_steps, resident, start_state

# The tail methods; all others train every part.
TAIL_METHODS = ("ccu", "ccu_plus")
# The rest are built of the same losses: they are run with the slow tests.
QUICK = ("original", *TAIL_METHODS)
KINDS = (*QUICK, "neggrad_plus", "scrub")
EVERY = [
    pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
    for name in METHODS
]
LEARNERS = ("train", "finetune", "neggrad_plus", "scrub", "ccu", "ccu_plus")


class Quiet:
    """A stage that nobody watches."""

    def update(self, *args, **kwargs):
        pass


def no_complaints(text):
    raise AssertionError(text)


@functools.cache
def bench():
    """One problem and one loop for all tests: what is compiled is kept."""
    problem = problems.problem(parallel.vmap(2))
    return problem, Loop(problem.config.run, problem.executor, no_complaints)


TRACES = collections.Counter()


def counted(name, traces=TRACES):
    """A method of the table whose loss counts how often it is traced."""

    def method(problem):
        program = METHODS[name](problem)

        def loss(*args):
            traces[name] += 1
            return program.loss(*args)

        return program._replace(loss=loss)

    return method


def whole(part):
    """All rows of a table that is cut over the devices."""
    return {name: np.asarray(x).reshape(-1, *x.shape[2:]) for name, x in part.items()}


def run(name, *, seed=0, folder, changes=None, loop=None, **fields):
    """Run a method of the table from its start to its end."""
    problem, shared = bench()
    if changes:
        problem = problem._replace(config=problems.config(**changes))
    problem = problem._replace(seed=seed, **fields)
    method = METHODS[name] if loop else counted(name)
    outcome = (loop or shared).run(name, method, problem, folder / "none", Quiet())
    assert outcome.diverged is None
    return outcome, problem


def same(a, b):
    """Whether two trees are the same to the bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


@pytest.mark.parametrize("name", EVERY)
def test_a_run_changes_what_it_trains_and_nothing_else(name, tmp_path):
    original = jax.device_get(bench()[0].params)
    outcome, problem = run(name, folder=tmp_path)
    trained = set(TAIL) if name in TAIL_METHODS else set(original)
    assert set(outcome.params) == trained
    # The original is used again by the next method.
    assert same(problem.params, original)
    start = METHODS[name](problem).params
    for part in trained:
        assert not same(outcome.params[part], start[part]), part
        assert jax.tree.structure(outcome.params[part]) == jax.tree.structure(
            original[part]
        )
    if name in TAIL_METHODS:
        params = {**problem.params, **outcome.params}
        for part in (*TEXT, "image_trunk"):
            assert same(params[part], original[part]), part
        rows = problem.sets.unlearn
        before = problem.forward.outputs(problem.params, problem.table, rows)
        after = problem.forward.outputs(params, problem.table, rows)
        for out in ("text", "z_text", "h_text"):
            assert same(before[out], after[out]), out
        for out in ("image", "fused", "z_image"):
            assert not same(before[out], after[out]), out


@pytest.mark.parametrize("name", EVERY)
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(name, tmp_path):
    first, again, other = (
        run(name, seed=seed, folder=tmp_path)[0] for seed in (0, 0, 1)
    )
    assert same(first.params, again.params)
    for part in first.params:
        assert not same(first.params[part], other.params[part]), part


@pytest.mark.parametrize("name", EVERY)
def test_a_program_is_traced_once_for_all_its_calls_and_seeds(name, tmp_path):
    problem, _ = bench()
    program = METHODS[name](problem)
    if name in TAIL_METHODS:
        assert program.steps < problem.config.run.checkpoint_steps, "one call for all"
    else:
        # Two calls of the compiled steps at least, the last of them not always full.
        assert problem.config.run.steps_per_call < program.steps
    for seed in (0, 1, 2):
        run(name, seed=seed, folder=tmp_path)
    assert TRACES[name] == 1  # in all tests of this file together


@pytest.mark.slow
@pytest.mark.parametrize("name", ["original", "ccu_plus"])
def test_a_learning_rate_of_zero_changes_nothing(name, tmp_path):
    still = {section: {"learning_rate": 0.0} for section in LEARNERS}
    problem, _ = bench()
    loop = Loop(problem.config.run, problem.executor, no_complaints)
    outcome, problem = run(name, folder=tmp_path, changes=still, loop=loop)
    problem = problem._replace(method=name)
    if name in REFERENCES:
        expected = problem.model.init(problem.key("init"))
    else:
        expected = {part: problem.params[part] for part in outcome.params}
    if name == "ccu_plus":
        fresh = problem.model.init(problem.key("fresh"))
        expected = jax.tree.map(
            lambda old, new: np.float32(0.4) * old + (1 - np.float32(0.4)) * new,
            expected,
            {part: fresh[part] for part in expected},
        )
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, atol=1e-6),
            outcome.params,
            expected,
        )
        expected = METHODS[name](problem).params
    assert same(outcome.params, expected)


def test_the_rows_of_each_method_are_those_it_may_learn_from():
    problem, _ = bench()
    sets = problem.sets
    trained = {*sets.retain, *sets.unlearn}
    allowed = {
        "original": trained,
        "retrain": {*sets.retain},
        "retrain_visual": trained,
        "finetune": {*sets.retain},
        "scrub": trained,
    }
    for name, rows in allowed.items():
        (plan,) = METHODS[name](problem).plan.values()
        assert set(plan.ravel()) <= rows, name
        assert plan.shape[1] == 16 and plan.dtype == np.int32
    plan = METHODS["neggrad_plus"](problem).plan
    assert set(plan["retain"].ravel()) <= {*sets.retain}
    assert set(plan["unlearn"].ravel()) <= {*sets.unlearn}
    for name in TAIL_METHODS:
        program = METHODS[name](problem)
        # Only rows with a picture are looked at.
        has = np.asarray(problem.table["has_image"])
        unlearn, held, retain = (
            x[has[x]] for x in (sets.unlearn, sets.validation, sets.retain)
        )
        rows = {"unlearn": unlearn, "held": held, "retain": retain}
        assert set(program.plan) == set(rows) - ({"held"} if name == "ccu" else set())
        for part, plan in program.plan.items():
            assert set(plan.ravel()) <= set(range(len(rows[part])))
        assert set(program.parts) == set(rows)
        for part, of in rows.items():
            table = whole(program.parts[part])
            labels = np.asarray(problem.table["labels"])[of]
            np.testing.assert_array_equal(table["labels"][: len(of)], labels)
            np.testing.assert_array_equal(table["row"], np.arange(len(table["row"])))
            # What fills up a table is known by that it has no picture.
            assert table["has_image"].tolist() == [
                place < len(of) for place in range(len(table["row"]))
            ]
            for column, x in table.items():
                assert column == "row" or not x[len(of) :].any(), column


def test_the_visual_reference_never_learns_from_a_forgotten_picture():
    """Its loss and gradient stay when these pictures change, and its texts count."""
    problem, _ = bench()
    still = {"learning_rate": 1e-2, "word_dropout": 0.0}
    problem = problem._replace(config=problems.config(train=still))
    index = jnp.asarray(problem.sets.unlearn)
    program = METHODS["retrain_visual"](problem)
    keys = jax.random.split(jax.random.key(0), len(index))

    def gradient(table):
        batch = {"rows": gather(table, {"rows": index}) | {"key": keys}}

        def loss(params):
            return jax.lax.pmean(program.loss(params, (), (), batch, 0)[0], AXIS)

        return jax.lax.pmean(jax.grad(loss)(program.params), AXIS)

    gradient = jax.jit(
        jax.vmap(gradient, in_axes=None, out_axes=None, axis_name=AXIS, axis_size=1)
    )
    changed = {**program.table, "image": 255 - program.table["image"]}
    before, after = gradient(program.table), gradient(changed)
    assert same(before, after)
    for part in before:
        moved = any(np.any(x) for x in jax.tree.leaves(before[part]))
        assert moved == (part in ("text", "text_head")), part


# --- the stop rule of ccu -------------------------------------------------------------


def told_apart(known, unknown):
    """A problem whose original is right on the rows `known` and wrong on `unknown`."""
    problem, _ = bench()
    every = np.arange(len(problem.table["labels"]))
    out = problem.forward.outputs(problem.params, problem.table, every)
    best = np.asarray(out["image"]).argmax(1)
    best[unknown] = (best[unknown] + 1) % problems.CLASSES
    labels = np.eye(problems.CLASSES, dtype=np.float32)[best]
    has_image = np.ones(len(every), bool)
    table = {**problem.table, "labels": labels, "has_image": has_image}
    return problem.executor.place(table)


def image_accuracy(problem, params, rows):
    out = problem.forward.outputs({**problem.params, **params}, problem.table, rows)
    guess = np.asarray(out["image"]).argmax(1)
    return (guess == np.asarray(problem.table["labels"])[rows].argmax(1)).mean()


def test_ccu_stops_by_its_rule_and_only_when_it_is_asked_to(tmp_path):
    problem, _ = bench()
    sets = problem.sets
    loop = Loop(Run(checkpoint_steps=5), problem.executor, no_complaints)
    # One compiled program for all: 40 steps in calls of 5.
    stop = {"ccu": {"steps": 40, "stop": True, "learning_rate": 5e-2, "inverse": 5.0}}
    solve = functools.partial(run, "ccu", changes=stop, loop=loop)
    forgotten = told_apart(sets.validation, sets.unlearn)
    outcome, *_ = solve(table=forgotten, folder=tmp_path / "forgotten")
    assert outcome.steps == 0
    assert same(outcome.params, {part: problem.params[part] for part in TAIL})

    remembered = told_apart(sets.unlearn, sets.validation)
    outcome, changed = solve(table=remembered, folder=tmp_path / "remembered")
    accuracy = functools.partial(image_accuracy, changed)
    assert accuracy(problem.params, sets.unlearn) == 1
    assert accuracy(problem.params, sets.validation) == 0
    assert 0 < outcome.steps < 40, "it stopped because of what it saw, in mid-run"
    assert accuracy(outcome.params, sets.unlearn) <= accuracy(
        outcome.params, sets.validation
    )

    # The default of these tests is not to stop.
    outcome, *_ = run("ccu", folder=tmp_path, table=forgotten)
    assert outcome.steps == 3


# --- the objectives of the tail methods -----------------------------------------------

WEIGHTS = {
    "ccu": ("inverse", "pair", "retention", "separation"),
    "ccu_plus": (
        *("match", "level", "classify", "retention", "hold", "pair", "separation"),
    ),
}


def terms_of(name, **weights):
    """`(params) -> the weighted objectives by name` on the first batch, and params."""
    problem, _ = bench()
    problem = problem._replace(config=problems.config(**{name: weights}))
    program = METHODS[name](problem)
    # The targets' place is taken by the labels, for nothing was refreshed yet.
    aux = program.aux
    if name == "ccu_plus":
        labels = whole(program.parts["unlearn"])["labels"]
        aux = {**aux, "image": labels, "fused": labels}
    parts = {part: whole(x) for part, x in program.parts.items()}

    def terms(params):
        batch = {}
        for part, plan in program.plan.items():
            keys = jax.random.split(jax.random.key(0), plan.shape[1])
            batch[part] = gather(parts[part], {"rows": plan[0]}) | {"key": keys}
        loss, terms = program.loss(params, program.frozen, aux, batch, jnp.int32(0))
        return {**terms, "loss": loss}

    mapped = jax.vmap(terms, in_axes=None, out_axes=None, axis_name=AXIS, axis_size=1)
    # The original itself for both: right after the start the shrunken tail says little.
    return mapped, {part: problem.params[part] for part in TAIL}


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_objective_pulls_at_the_result_and_can_be_switched_off(name):
    terms, params = terms_of(name)
    # At a place near the original, where retention has something to hold on to.
    params = jax.tree.map(lambda x: 1.1 * x + 0.01, params)
    values, gradients = jax.jit(lambda p: (terms(p), jax.jacrev(terms)(p)))(params)
    assert set(values) == {*WEIGHTS[name], "loss"}
    total = sum(values[term] for term in WEIGHTS[name])
    assert float(values["loss"]) == pytest.approx(float(total), rel=1e-5)
    for term in WEIGHTS[name]:
        size = optax.tree.norm(gradients[term])
        assert np.isfinite(size) and size > 1e-4, term
        off, _ = terms_of(name, **{term: 0.0})
        assert set(jax.eval_shape(off, params)) == set(values) - {term}
    none, _ = terms_of(name, **dict.fromkeys(WEIGHTS[name], 0.0))
    values = jax.jit(none)(params)
    assert {key: float(x) for key, x in values.items()} == {"loss": 0.0}


def test_a_weight_of_an_objective_scales_it():
    plain, params = terms_of("ccu")
    params = jax.tree.map(lambda x: 1.1 * x + 0.01, params)
    scaled, _ = terms_of(
        "ccu", inverse=2.0, pair=6.0, retention=2.0, separation=2.0, pull=0.5
    )
    once, twice = jax.jit(lambda p: (plain(p), scaled(p)))(params)
    for term in ("pair", "retention", "separation"):
        assert float(twice[term]) == pytest.approx(2 * float(once[term]), rel=1e-4)
    assert abs(float(twice["inverse"]) - 2 * float(once["inverse"])) > 1e-3


# --- rows with several labels ---------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["neggrad_plus", "scrub", *TAIL_METHODS])
def test_rows_may_have_several_labels(name, tmp_path):
    data, executor = problems.dataset(multi_label=True), parallel.vmap(1)
    settings = problems.config(ccu={"stop": True})
    problem = problems.problem(executor, data, settings)
    # The original knows the unlearn set and no held-out row: else ccu stops at once.
    # Half of the rows have each label, else there is nothing to tell apart.
    every = np.arange(len(data.labels))
    said = problem.forward.outputs(problem.params, problem.table, every)["image"]
    head = problem.params["image_head"]
    head = {**head, "bias": head["bias"] - np.median(said, axis=0)}
    problem = problem._replace(params={**problem.params, "image_head": head})
    said = problem.forward.outputs(problem.params, problem.table, every)["image"] > 0
    labels = np.where(np.isin(every, problem.sets.validation)[:, None], ~said, said)
    labels = executor.place(labels.astype(np.float32))
    problem = problem._replace(table={**problem.table, "labels": labels})
    loop = Loop(settings.run, executor, no_complaints)
    outcome = loop.run(name, METHODS[name], problem, tmp_path / "none", Quiet())
    assert outcome.diverged is None and outcome.steps > 0
    start = METHODS[name](problem._replace(method=name)).params
    for part in outcome.params:
        assert not same(outcome.params[part], start[part]), part
    params = {**problem.params, **outcome.params}
    found = evaluate.results(problem.forward, params, problem.table, data, problem.sets)
    assert "micro_f1" in evaluate.scores(found)["test"]["fused"]


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_stop_rule_goes_by_accuracy_or_micro_f1(multi_label):
    data = problems.dataset(90, multi_label=multi_label)
    rng = np.random.default_rng(0)
    logits = data.labels + 0.7 * rng.normal(size=data.labels.shape)
    logits -= 0.5 * multi_label
    seen = data.has_image
    measure = (
        evaluate.multi_label_scores if multi_label else evaluate.single_label_scores
    )
    expected = measure(logits[seen], data.labels[seen])
    found = ccu._score(logits, data.labels, seen, multi_label)
    score = "micro_f1" if multi_label else "accuracy"
    assert float(found) == pytest.approx(expected[score])


# --- the loop -------------------------------------------------------------------------


NUMBERS = {"x": np.linspace(0, 1, 20, dtype=np.float32)}


def walk(problem, steps=7, fail_at=None, stop_after=None, table=NUMBERS, batch=4):
    """A method for the loop alone: a step of gradient descent costs nothing."""

    def loss(params, frozen, aux, batch, step):
        draw = jax.vmap(jax.random.uniform)(batch["rows"]["key"])
        away = batch["rows"]["x"] * params["w"] - draw
        total = jax.lax.pmean((away**2).mean(), AXIS)
        if fail_at is not None:
            total = jnp.where(step == fail_at, jnp.nan, total)
        return total, {}

    return Program(
        params={"w": jnp.float32(3)},
        frozen=(),
        loss=loss,
        optimiser=optax.adam(0.1),
        table=table,
        plan={"rows": problem.batches(np.arange(20), batch, steps, "rows")},
        aux=jnp.int32(-1),
        refresh=lambda params, frozen, aux, parts: aux + 1,
        stop=None if stop_after is None else lambda aux: aux >= stop_after,
    )


class Cut(Exception):
    pass


class CutOff(Quiet):
    """A stage that ends the run like a kill, once so many steps are reported."""

    def __init__(self, after):
        self.after = after

    def update(self, done, *args, **kwargs):
        if done >= self.after:
            raise Cut


@pytest.mark.parametrize("stop_after", [None, 3, 4])
@pytest.mark.parametrize("after", range(1, 8))
def test_a_run_that_was_cut_off_goes_on_and_ends_with_the_same_bits(
    tmp_path, after, stop_after
):
    problem, _ = bench()
    method = functools.partial(walk, stop_after=stop_after)
    loop = Loop(
        Run(steps_per_call=2, checkpoint_steps=2), problem.executor, no_complaints
    )
    whole = loop.run("walk", method, problem, tmp_path / "whole", Quiet())
    assert whole.steps == stop_after or whole.steps == 7
    folder = tmp_path / "cut"
    with pytest.raises(Cut):
        loop.run("walk", method, problem, folder, CutOff(min(after, whole.steps)))
    outcome = loop.run("walk", method, problem, folder, Quiet())
    assert same(outcome.params, whole.params)
    assert outcome.steps == whole.steps


def cut_walk(problem, **kwargs):
    """`walk` on a table that is cut over the devices."""
    program = walk(problem, **kwargs)
    return program._replace(
        table={}, parts={"rows": problem.executor.cut(program.table)}
    )


def test_steps_on_a_cut_table_end_as_those_on_a_whole_one_wherever_they_are_cut_off(
    tmp_path,
):
    problem, _ = bench()

    def solve(method, stage, folder, **run):
        loop = Loop(Run(**run), problem.executor, no_complaints)
        return loop.run("walk", method, problem, tmp_path / folder, stage)

    expected = solve(walk, Quiet(), "none", steps_per_call=2)
    calls = []
    for every in (2, 3, 100):
        stage = Quiet()
        stage.update = lambda done, *args, **kwargs: calls.append(done)
        run = {"checkpoint_steps": every, "steps_per_call": 1}
        calls.clear()
        outcome = solve(cut_walk, stage, f"whole-{every}", **run)
        assert same(outcome.params, expected.params) and outcome.steps == 7
        # One call between two checkpoints, however many steps the others make.
        ends = [0, *range(every, 7, every), 7]
        assert sorted(set(calls)) == ends
    for after in (2, 4, 6):
        run = {"checkpoint_steps": 2}
        with pytest.raises(Cut):
            solve(cut_walk, CutOff(after), f"cut-{after}", **run)
        assert (tmp_path / f"cut-{after}").exists() == (after > 2)
        outcome = solve(cut_walk, Quiet(), f"cut-{after}", **run)
        assert same(outcome.params, expected.params) and outcome.steps == 7


@pytest.mark.parametrize("fail_at", [0, 3, 6])
def test_a_run_that_diverges_says_when(tmp_path, fail_at):
    problem, _ = bench()
    loop = Loop(Run(steps_per_call=2), problem.executor, no_complaints)
    method = functools.partial(walk, fail_at=fail_at)
    outcome = loop.run("walk", method, problem, tmp_path / "none", Quiet())
    assert outcome.diverged == f"step {fail_at}: loss nan"
    assert fail_at < outcome.steps <= min(fail_at + 4, 7)


def test_methods_that_come_to_the_same_program_share_what_is_compiled(
    tmp_path, monkeypatch
):
    problem, _ = bench()
    loop = Loop(problem.config.run, problem.executor, no_complaints)
    compiled = []

    def counting(lowered):
        compiled.append(lowered)
        return compile_it(lowered)

    compile_it = jax.stages.Lowered.compile
    monkeypatch.setattr(jax.stages.Lowered, "compile", counting)
    steps = {}
    for name in ("original", "retrain", "retrain_visual", "finetune"):
        outcome, _ = run(name, folder=tmp_path, loop=loop)
        steps[name] = outcome.steps
    assert steps["retrain"] < steps["original"]  # another length, other rows
    assert len(compiled) == 1


def requests(problem):
    """Seeds, and sets of other sizes and with other rows that have no picture."""
    sets, bare = problem.sets, np.zeros(0, int)
    fewer = sets._replace(
        unlearn=sets.unlearn[:-2],
        retain=np.sort(np.concatenate([sets.retain[5:], sets.unlearn[-2:]])),
        validation=sets.validation[1:],
    )
    for seed, chosen, now_bare in (
        (0, sets, bare),
        (1, fewer, bare),
        (2, sets, sets.unlearn[:1]),
        (3, fewer, sets.retain[3:4]),
    ):
        has = np.array(problem.table["has_image"])
        has[now_bare] = False
        table = {**problem.table, "has_image": problem.executor.place(has)}
        yield {"seed": seed, "sets": chosen, "table": table}


@pytest.mark.parametrize("name", EVERY)
def test_seeds_and_requests_of_other_sizes_share_one_program(
    name, tmp_path, monkeypatch
):
    problem, _ = bench()
    loop = Loop(problem.config.run, problem.executor, no_complaints)
    forward = evaluate.Forward(problem.model, problem.executor, 32)
    traces, plans = collections.Counter(), []

    def prepare(*args, **kwargs):
        traces["targets"] += 1
        return prepare_it(*args, **kwargs)

    prepare_it = targets.prepare
    monkeypatch.setattr(targets, "prepare", prepare)
    for request in requests(problem):
        changed = problem._replace(forward=forward, method=name, **request)
        method = counted(name, traces)
        folder = tmp_path / f"none-{request['seed']}"
        outcome = loop.run(name, method, changed, folder, Quiet())
        assert outcome.diverged is None
        plans.append({len(set(plan.ravel())) for plan in method(changed).plan.values()})
    # The methods could tell the requests apart.
    assert plans[0] != plans[1]
    assert traces[name] == 1
    assert traces["targets"] == (name == "ccu_plus")


# --- rows that fill up a table --------------------------------------------------------


@pytest.mark.parametrize("devices", [1, 2, 3, 8, 64])
def test_tables_have_one_of_few_sizes_that_the_devices_divide(devices):
    counts = np.arange(1, 5000)
    sizes = np.array([cache.padded_size(int(count), devices) for count in counts])
    assert (sizes >= counts).all() and not (sizes % devices).any()
    assert (np.diff(sizes) >= 0).all() and len(set(sizes)) < 64
    # Few rows too many, but that every device has to get as many as the others.
    even = np.lcm(8, devices)
    assert (sizes - counts < np.maximum(even, counts * np.gcd(3, devices) / 4)).all()


def after_padding(name, monkeypatch, more, **of):
    """What a whole run of a method comes to with so many more rows in its tables."""
    settings = problems.config(
        ccu={"stop": True, "steps": 6}, ccu_plus={"steps": 6, "gain": 1.0}
    )
    problem = problems.problem(parallel.vmap(1), problems.dataset(**of), settings)
    if more is not None:
        monkeypatch.setattr(cache, "padded_size", lambda count, devices: count + more)
    program = METHODS[name](problem)
    sizes = {part: x["row"].size for part, x in program.parts.items()}
    monkeypatch.undo()
    state = start_state(program, jax.random.key(3))
    steps = problem.executor.run(make_steps(program))
    share = problems.share(problem.executor, program)
    state, metrics = jax.device_get(steps(state, resident(program), share))
    params = {**problem.params, **state.params}
    every = np.arange(len(problem.table["labels"]))
    out = problem.forward.outputs(params, problem.table, every)
    said = {view: out[view] for view in ("image", "text", "fused", "z_image")}
    return sizes, {**metrics, **said}


@pytest.mark.parametrize(
    "name, multi_label",
    [
        ("ccu_plus", False),
        pytest.param("ccu_plus", True, marks=pytest.mark.slow),
        pytest.param("ccu", False, marks=pytest.mark.slow),
        pytest.param("ccu", True, marks=pytest.mark.slow),
    ],
)
def test_rows_that_fill_up_the_tables_change_no_run(name, multi_label, monkeypatch):
    solve = functools.partial(
        after_padding, name, monkeypatch, rows=70, multi_label=multi_label
    )
    sizes, expected = solve(0)
    assert expected["ran"].any() or name == "ccu"
    for more in (None, 37):
        other, found = solve(more)
        assert other != sizes
        np.testing.assert_array_equal(found["ran"], expected["ran"])
        for key, x in expected.items():
            np.testing.assert_allclose(
                found[key], x, rtol=2e-4, atol=2e-5, err_msg=f"{key}, {more} more"
            )


# --- one pass for all parts of a batch ------------------------------------------------


def test_the_parts_of_a_batch_go_together_and_come_apart_again():
    batch = {
        "b": {"labels": jnp.ones((3, 2)), "x": jnp.arange(3), "own": jnp.zeros(3)},
        "a": {"labels": jnp.zeros((2, 2)), "x": jnp.arange(7, 9)},
    }
    every, cut = cache.together(batch, drop="a")
    assert set(every) == {"labels", "x", "drop"}
    assert len(every["labels"]) == 5
    apart = cut(every)
    for part, rows in batch.items():
        for column in ("labels", "x"):
            np.testing.assert_array_equal(apart[part][column], rows[column])
        assert (apart[part]["drop"] == (part == "a")).all()
    assert not cache.together(batch)[0]["drop"].any()


@pytest.mark.parametrize(
    "multi_label", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_one_pass_of_neggrad_plus_has_the_loss_and_gradient_of_two(multi_label):
    problem = problems.problem(
        parallel.vmap(1), problems.dataset(multi_label=multi_label)
    )
    config, model = problem.config.neggrad_plus, problem.model
    program = METHODS["neggrad_plus"](problem)
    task = reference.task_loss(problem)
    guess = 4 * np.log(2) if multi_label else np.log(problems.CLASSES)

    def two_passes(params, batch):
        keep = task(params, batch["retain"])
        rows = batch["unlearn"]
        out = model.apply(params, rows)
        forget = 0.0
        for view in VISUAL:
            each = objectives.cross_entropy_rows(
                getattr(out, view), rows["labels"], multi_label=multi_label
            )
            each = jnp.minimum(each, config.ceiling * guess)
            forget += objectives.mean(each, rows["has_image"])
        return config.keep * keep - (1 - config.keep) * forget

    batch = {}
    for number, (part, plan) in enumerate(sorted(program.plan.items())):
        keys = jax.random.split(jax.random.key(number), plan.shape[1])
        batch[part] = gather(problem.table, {"rows": plan[0]}) | {"key": keys}

    def solved(loss):
        def alone(params):
            mapped = jax.vmap(
                lambda _: loss(params), axis_name=AXIS, axis_size=1, in_axes=None
            )
            return mapped(0)[0]

        return jax.jit(jax.value_and_grad(alone))(params)

    # Twice as far out: some rows are beyond the ceiling.
    params = jax.tree.map(lambda x: 2 * x, problem.params)
    value, gradient = solved(
        lambda params: program.loss(params, (), (), batch, jnp.int32(0))[0]
    )
    expected, others = solved(lambda params: two_passes(params, batch))
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    for one, other in zip(
        jax.tree.leaves(gradient), jax.tree.leaves(others), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


# --- arithmetic in bfloat16 -----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["original", *TAIL_METHODS])
def test_methods_run_in_bfloat16_also_on_features_of_that_kind(name, tmp_path):
    settings = problems.config(model={"dtype": "bfloat16"}, ccu={"stop": True})
    problem = problems.problem(parallel.vmap(2), settings=settings)
    program = METHODS[name](problem._replace(method=name))
    if name in TAIL_METHODS:
        kinds = {part: x["features"].dtype for part, x in program.parts.items()}
        assert set(kinds.values()) == {jnp.dtype("bfloat16")}
    loop = Loop(settings.run, problem.executor, no_complaints)
    outcome = loop.run(name, METHODS[name], problem, tmp_path / "none", Quiet())
    assert outcome.diverged is None
    for part, tree in outcome.params.items():
        assert outcome.steps == 0 or not same(tree, program.params[part]), part
        for x in jax.tree.leaves(tree):
            assert x.dtype == jnp.float32 and np.isfinite(x).all()


@pytest.mark.slow
@pytest.mark.parametrize("multi_label", [False, True], ids=["single", "multi"])
def test_a_trained_model_says_nearly_the_same_in_bfloat16(multi_label, tmp_path):
    """Logits change by 2 % of their spread in the mean, and none by more than 15 %."""
    data = problems.dataset(280, whole=True, multi_label=multi_label)
    train = {"epochs": 20, "batch": 40, "learning_rate": 5e-3, "weight_decay": 0.0}
    sizes = {"image_width": 16, "text_width": 16}
    settings = problems.config(
        model=sizes, train=train | PLAIN, run={"steps_per_call": 100}
    )
    executor = parallel.vmap(1)
    problem = problems.problem(executor, data, settings)
    loop = Loop(settings.run, executor, no_complaints)
    method = METHODS["original"]
    params = loop.run("original", method, problem, tmp_path / "none", Quiet()).params
    half = problems.model(problems.config(model={**sizes, "dtype": "bfloat16"}))
    full, near = (
        evaluate.results(forward, params, problem.table, data, problem.sets)
        for forward in (problem.forward, evaluate.Forward(half, executor, 64))
    )
    for view, logits in full.logits.items():
        change = np.abs(near.logits[view] - logits)
        assert 0 < change.mean() < 0.02 * logits.std(), view
        assert change.max() < 0.15 * logits.std(), view
    score = "micro_f1" if multi_label else "accuracy"
    for name, views in evaluate.scores(full).items():
        for view, scores in views.items():
            found = evaluate.scores(near)[name][view]
            assert abs(found[score] - scores[score]) < 0.03, (name, view)
    assert evaluate.scores(full)["retain"]["fused"][score] > 0.9, "it has learned"
    one, other = audit.attack_auc(full), audit.attack_auc(near)
    assert all(abs(one[view] - other[view]) < 0.02 for view in one)


# --- what may not be copied -----------------------------------------------------------


@pytest.mark.parametrize("executor", parallel.EXECUTORS)
def test_nothing_is_copied_unasked_during_the_steps(executor, tmp_path):
    problem, _ = bench()
    problem = problem._replace(executor=parallel.EXECUTORS[executor]())
    stored = np.linspace(0, 1, 24, dtype=np.float32)
    cut = stored.reshape(problem.executor.devices, -1)

    def changed(**fields):
        def method(problem):
            program = walk(problem, table={"x": stored}, batch=8)
            return program._replace(**fields)

        loop = Loop(Run(steps_per_call=2), problem.executor, no_complaints)
        return loop.run("walk", method, problem, tmp_path / "none", Quiet())

    # Rows that are on the devices, that are sent for each call, that are cut.
    for fields in (
        {},
        {"table": {"x": OnHost(stored, np.ones(24, bool))}},
        {"table": {}, "parts": {"rows": problem.executor.cut({"x": stored})}},
    ):
        assert changed(**fields).steps == 7
    # A table that was left on the host would be copied for every call.
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device"):
        changed(table={}, parts={"rows": {"x": cut}})
    if executor != "vmap":
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed device-to-"):
            changed(table={}, parts={"rows": {"x": jnp.asarray(cut)}})


def test_what_has_stopped_is_looked_at_no_more():
    problem, _ = bench()
    looks = []

    def refresh(params, frozen, aux, parts):
        jax.debug.callback(looks.append, aux)
        return aux + 1

    program = walk(problem, steps=8, stop_after=3)._replace(refresh=refresh)
    executor = parallel.vmap(1)
    state = executor.place(start_state(program, jax.random.key(0)))
    steps = executor.run(make_steps(program))
    share = problems.share(executor, program)
    state, metrics = steps(state, resident(program), share)
    jax.effects_barrier()
    assert int(metrics["ran"].sum()) == 3 == int(state.step)
    assert len(looks) == 4  # from -1 to 2; the last answer stops it


@pytest.mark.parametrize("rising", [0, 3])
def test_the_learning_rate_rises_in_a_line_and_falls_along_a_cosine(rising):
    config = Train(weight_decay=0.0, text_rate=0.5)
    params = {reference.branch(part): jnp.ones(2) for part in ("image_head", "text")}
    assert {part for part in bench()[0].params if reference.branch(part) == "text"} == {
        *TEXT
    }
    optimise = reference.optimiser(0.1, 12, config, rising / 12)
    state = optimise.init(params)
    step = jax.jit(optimise.update)
    expected = optax.warmup_cosine_decay_schedule(
        0.0 if rising else 0.1, 0.1, rising, 12
    )
    for count in range(12):
        updates, state = step(params, state, params)
        # Adam's answer to a gradient that never changes is its sign.
        np.testing.assert_allclose(updates["rest"], -expected(count), atol=1e-6)
        np.testing.assert_allclose(updates["text"], -expected(count) / 2, atol=1e-6)


# --- many devices ---------------------------------------------------------------------


def with_devices(monkeypatch, make, devices):
    """An executor on the first devices only."""
    those = jax.devices()[:devices]
    for name in ("device_count", "local_device_count"):
        monkeypatch.setattr(jax, name, lambda: devices)
    for name in ("devices", "local_devices"):
        monkeypatch.setattr(jax, name, lambda *_: those)
    return make()


def after_all_steps(name, executor, lower_only=False):
    """What is said of all rows after a method's own steps, refreshes on the way.

    Not the parameters: that of the keys' bias has no effect and no gradient but
    rounding, which Adam makes steps of.
    """
    problem = problems.problem(executor)
    program = METHODS[name](problem)._replace(stop=None)
    state = executor.place(start_state(program, jax.random.key(3)))
    rest = executor.place(resident(program))
    share = problems.share(executor, program)
    for x in jax.tree.leaves(program.parts):
        assert len(x) == executor.devices
    steps = executor.run(make_steps(program), donate=True)
    if lower_only:
        return steps.lower(state, rest, share)
    state, metrics = jax.device_get(steps(state, rest, share))
    assert metrics["ran"].all() and np.isfinite(metrics["loss"]).all()
    params, table = {**problem.params, **state.params}, problem.table
    out = problem.forward.outputs(params, table, np.arange(len(table["labels"])))
    return {view: np.asarray(out[view]) for view in ("image", "text", "fused")}


@functools.cache
def oracle(name):
    return after_all_steps(name, parallel.vmap(1))


def agree(found, expected):
    for view, logits in expected.items():
        np.testing.assert_allclose(found[view], logits, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_eight_devices_give_what_one_device_gives(name):
    agree(after_all_steps(name, parallel.pmap()), oracle(name))


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["shard_map", "vmap"])
def test_every_executor_gives_what_one_device_gives(executor):
    found = after_all_steps("ccu_plus", parallel.EXECUTORS[executor]())
    agree(found, oracle("ccu_plus"))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_the_strict_executor_takes_every_method(name):
    """It refuses a step with an output that was never reduced while it is traced."""
    assert after_all_steps(name, parallel.shard_map(), lower_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("name", ["original", *TAIL_METHODS])
def test_the_number_of_devices_changes_nothing(name, devices, monkeypatch):
    executor = with_devices(monkeypatch, parallel.pmap, devices)
    assert executor.devices == devices
    agree(after_all_steps(name, executor), oracle(name))


# --- planted structure ----------------------------------------------------------------


def planted(rows=560):
    """Rows whose picture shows a class, often a wrong one, and a pattern of its own.

    Only who has seen a picture can know the label of one that shows a wrong class.
    """
    data = problems.dataset(rows, whole=True, seed=2)
    rng = np.random.default_rng(3)
    look = rng.random((problems.CLASSES, 1, 1, 3)) - 0.5
    classes = data.labels.argmax(1)
    shown = np.where(rng.random(rows) < 0.3, (classes + 1) % 3, classes)
    image = 0.5 + 0.3 * look[shown] + 0.3 * rng.normal(size=data.image.shape)
    # Texts that say nothing: else the fused view would hardly need the pictures.
    text = data.text.copy()
    text[:, 0] = 2 + rng.integers(problems.CLASSES, size=rows)
    return data._replace(image=(255 * image.clip(0, 1)).astype(np.uint8), text=text)


PLAIN = {"shift": 0, "zoom": 0.0, "tint": 0.0, "flip": False, "word_dropout": 0.0}
PLANTED = {
    "model": {"image_width": 32, "text_width": 16, "dropout": 0.0},
    "train": {"epochs": 60, "batch": 40, "learning_rate": 5e-3, "weight_decay": 0.0}
    | PLAIN,
    "ccu_plus": {"steps": 120, "batch": 64, "unlearn_batch": 32, "held_batch": 32},
    "run": {"steps_per_call": 40},
}


@pytest.mark.slow
def test_ccu_plus_takes_the_memory_of_pictures_away_and_leaves_the_texts(tmp_path):
    data, executor = planted(), parallel.vmap(1)
    settings = problems.config(**PLANTED)
    loop = Loop(settings.run, executor, no_complaints)
    names = ("original", "ccu_plus")
    attack = {name: [] for name in names}
    accuracy = {name: [] for name in names}
    for seed in range(3):
        problem = problems.problem(
            executor, data, settings, seed=seed, rule="random:0.25"
        )
        solved = {}
        for name in names:
            folder = tmp_path / f"{name}-{seed}"
            outcome = loop.run(name, METHODS[name], problem, folder, Quiet())
            params = {**problem.params, **outcome.params}
            problem = problem._replace(params=params)
            outputs = evaluate.results(
                problem.forward, params, problem.table, data, problem.sets
            )
            solved[name] = outputs
            attack[name].append(audit.attack_auc(outputs))
            scores = evaluate.scores(outputs)
            accuracy[name].append(
                {k: x["image"]["accuracy"] for k, x in scores.items()}
            )
        np.testing.assert_array_equal(
            solved["ccu_plus"].logits["text"], solved["original"].logits["text"]
        )

    def mean(told, name):
        return np.mean([of[name] for of in told])

    # Of several seeds: one of them may be far off, by luck or even by rounding.
    before, after = (attack[name] for name in names)
    for view in ("image", "fused", "pair"):
        assert mean(before, view) > 0.75, view
        assert 0.25 < mean(after, view) < mean(before, view) - 0.15, view
    assert abs(mean(after, "image") - 0.5) < 0.18
    before, after = (accuracy[name] for name in names)
    assert mean(before, "unlearn") > mean(before, "unseen") + 0.4
    assert mean(after, "unlearn") < mean(before, "unlearn") - 0.15
    new = [
        np.mean([mean(of, name) for name in ("unseen", "test")])
        for of in (before, after)
    ]
    assert new[1] > new[0] - 0.1
    assert mean(after, "retain") > 0.9


@pytest.mark.parametrize("order", ["stored", "by_class"])
def test_training_takes_rows_in_the_order_of_the_conditions(order):
    data = problems.dataset(300)
    settings = problems.config()
    settings = dataclasses.replace(
        settings, conditions=Conditions(order=order, window=5)
    )
    plain = problems.problem(parallel.vmap(1), data, settings)
    problem = plain._replace(arrival=conditions.arrival(data, order))
    rows = problem.sets.retain
    place = np.argsort(np.argsort(problem.arrival[rows]))
    stands = dict(zip(rows.tolist(), place.tolist(), strict=True))
    plan = reference.retrain(problem).plan["rows"].ravel()[: len(rows)]
    late = np.array([stands[row] for row in plan.tolist()]) - np.arange(len(rows))
    assert np.abs(late).max() < 5
    assert sorted(plan.tolist()) == rows.tolist()
    shuffled = reference.retrain(plain).plan["rows"].ravel()[: len(rows)]
    assert (
        np.abs(np.array([stands[r] for r in shuffled]) - np.arange(len(rows))).max()
        > 50
    )
    # Methods on cached features go by the rows that these stand for.
    cached = np.arange(len(rows))
    plan = problem.batches(cached, 8, 3, "x", of=rows)
    assert np.abs(place[plan.ravel()] - np.arange(24)).max() < 5
