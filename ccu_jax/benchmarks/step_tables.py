"""What `bench step` shows and is judged by, from its numbers alone."""

import statistics
from typing import Any

from ccu_jax.benchmarks.step_ways import INDEXING, LOOP, SCAN, WHOLE

_EAGER, _COMPILE = "torch eager", "torch compile"
_TORCH = {
    "original": "training step",
    "neggrad_plus": "NegGrad+ step",
    "ccu_plus": "ccu_plus step",
}


def ratio(one, other) -> float | None:
    """Median of the ratios in the same windows; None where either is missing."""
    if one is None or other is None:
        return None
    if len(one["windows"]) != len(other["windows"]):
        return None  # one of them failed on the way
    pairs = zip(one["windows"], other["windows"], strict=True)
    return statistics.median(a / b for a, b in pairs)


def mfu(of: dict[str, Any], measured: dict[str, Any]) -> float | None:
    """FLOPs a second of the scan as a share of what a large product reaches here.

    Its best window of all: what the machine can do. Simulated devices share one
    processor; others have one each.
    """
    peak = best(measured)
    if measured["platform"] != "cpu":
        peak *= measured["devices"]
    return of["flops"] / of["ways"][SCAN]["median"] / peak


def best(measured: dict[str, Any]) -> float:
    """The most FLOPs a second that a large product came to on one device."""
    return max(of["peak"]["high"] for of in measured["methods"])


def datasheet(of: dict[str, Any], measured: dict[str, Any]) -> float | None:
    """The same, as a share of what the data sheet names for bfloat16."""
    sheet = measured["datasheet"]
    if not sheet:
        return None
    speed = of["flops"] / of["ways"][SCAN]["median"]
    return speed / (sheet * measured["devices"])


# --- what it is judged by -------------------------------------------------------------


def targets(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """The targets as arguments of `bench.judge`, computed from the numbers alone."""
    found = []
    for of in measured["methods"]:
        name, get = of["method"], of["ways"].get
        if of["tail"]:
            what = f"{name}, steps a second of one scan to those of a loop"
            same, indexing = (ratio(get(way), get(SCAN)) for way in (LOOP, INDEXING))
            found.append(_target(f"{what} over the same step", same, ">=", 1.5))
            found.append(_target(f"{what} that indexes", indexing, ">=", 5))
        outside = 100 * of["outside"]["median"]
        found.append(_target(f"{name}, time outside the step", outside, "<=", 5, "%"))
        found.append(_target(f"{name}, convolutions", of["convolutions"], "==", 0))
    by_name = {of["method"]: of for of in measured["methods"]}
    found += _against_torch(by_name)
    if measured["dtype"] == "float32":
        what = "logits, largest difference to PyTorch"
        found.append(_target(what, measured["logits_difference"], "<=", 1e-4))
    return found + _on_gpu(by_name.get("original"), measured)


def _against_torch(by_name):
    found = []
    if of := by_name.get("original"):
        get = of["ways"].get
        slower = ratio(get(SCAN), get(_EAGER))
        found.append(_target("training step to eager PyTorch", slower, "<=", 1.3))
    if of := by_name.get("ccu_plus"):
        get = of["ways"].get
        faster = ratio(get(_EAGER), get(SCAN))
        run = ratio(get(f"{_EAGER}, {WHOLE}"), get(WHOLE))
        what = "ccu_plus, eager PyTorch's time to this"
        found.append(_target(f"{what}, steps", faster, ">=", 3))
        found.append(_target(f"{what}, whole run", run, ">=", 1))
    return found


def _on_gpu(of, measured):
    if of is None:
        return []
    gpu = measured["platform"] == "gpu"
    share = datasheet(of, measured) or mfu(of, measured)
    found = [
        _target("GPU, training step, MFU", 100 * share if gpu else None, ">=", 45, "%")
    ]
    executors = of["executors"]
    for other in ("shard_map", "vmap"):
        apart = None
        if gpu and "pmap" in executors and other in executors:
            apart = 100 * (ratio(executors["pmap"], executors[other]) - 1)
        other = {"vmap": "plain jit"}.get(other, other)
        found.append(
            _target(
                f"GPU, training step, pmap slower than {other}", apart, "<=", 3, "%"
            )
        )
    return found


def _target(name, value, sign, bound, unit="") -> dict[str, Any]:
    return {"name": name, "value": value, "sign": sign, "bound": bound, "unit": unit}


# --- how it is shown ------------------------------------------------------------------


def tables(measured: dict[str, Any]) -> list[tuple]:
    """The arguments of `bench.Table`, for each part that was measured."""
    return [
        _ways(measured),
        _executors(measured),
        _use(measured),
        _torch(measured),
    ]


def _ways(measured):
    header = ("method", "rows", "steps", "one scan, ms", "range", "loop, ms")
    header += ("x scan", "indexing, ms", "x scan", "outside, %", "convolutions")
    lines = []
    for of in measured["methods"]:
        get = of["ways"].get
        lines.append(
            [
                of["method"],
                str(of["rows"]),
                str(of["steps"]),
                _ms(get(SCAN)),
                _range(get(SCAN)),
                _ms(get(LOOP)),
                _number(ratio(get(LOOP), get(SCAN))),
                _ms(get(INDEXING)),
                _number(ratio(get(INDEXING), get(SCAN))),
                f"{100 * of['outside']['median']:.2f}",
                str(of["convolutions"]),
            ]
        )
    settings = measured["settings"]
    windows = settings["windows"]
    notes = [
        f"medians of {windows} windows in turn; ratios of the same windows; the loops "
        "are over the same compiled step, handed numbers of rows, and over a step that "
        "gets the rows, indexed in Python on the device",
        "outside: share of the project's loop that is not spent in the compiled steps, "
        "both measured in one run; rows: of all parts of a step",
        *measured["notes"],
    ]
    title = f"milliseconds a step, {settings['preset']}, {measured['dtype']}"
    return title, header, lines, notes


def _executors(measured):
    lines = []
    for of in measured["methods"]:
        if len(of["executors"]) > 1:
            for name, took in of["executors"].items():
                plain = ratio(took, of["executors"].get("vmap"))
                line = [of["method"], name, _ms(took), _range(took), _number(plain, 3)]
                lines.append(line)
    header = ("method", "executor", "one scan, ms", "range", "x plain jit")
    notes = ["plain jit is the executor vmap: one program on one device"]
    return "executors, milliseconds a step", header, lines, notes if lines else ()


def _use(measured):
    lines = [
        [
            of["method"],
            f"{of['flops'] / 1e9:,.3g}",
            f"{of['flops_compiled'] / 1e9:,.3g}" if of["flops_compiled"] else "",
            f"{of['flops_by_hand'] / 1e9:,.3g}" if "flops_by_hand" in of else "",
            f"{of['flops'] / of['ways'][SCAN]['median'] / 1e9:,.1f}",
            _percent(mfu(of, measured)),
            _percent(datasheet(of, measured)),
        ]
        for of in measured["methods"]
    ]
    header = ("method", "GFLOP", "as compiled", "by hand", "GFLOP/s", "MFU, %")
    peak = best(measured) / 1e9
    notes = [
        f"MFU: share of {peak:,.0f} GFLOP/s, which a large product came to at best "
        f"between the windows, in {measured['dtype']}",
        "GFLOP of one step as XLA counts what it is given, refreshes shared out; as "
        "compiled: a step with a refresh, without what became calls of libraries; by "
        "hand: products of towers and heads alone",
    ]
    return "use of the device", (*header, "of data sheet, %"), lines, notes


def _torch(measured):
    lines, notes = [], []
    for of in measured["methods"]:
        get = of["ways"].get
        if get(_EAGER) or get(_COMPILE):
            kinds = {_TORCH[of["method"]]: (SCAN, "")}
            if of["tail"]:
                kinds["ccu_plus, whole run"] = (WHOLE, f", {WHOLE}")
            for what, (mine, suffix) in kinds.items():
                ours, eager = get(mine), get(_EAGER + suffix)
                made = get(_COMPILE + suffix)
                line = [what, _ms(ours), _range(ours), _ms(eager), _range(eager)]
                line += [_number(ratio(eager, ours)), _ms(made), _range(made)]
                lines.append([*line, _number(ratio(made, ours))])
        notes += [f"failed, {what}: {why}" for what, why in of["failed"].items()]
    header = ("", "JAX, ms", "range", "eager, ms", "range", "x JAX")
    header += ("torch.compile, ms", "range", "x JAX")
    if lines:
        apart = measured["logits_difference"]
        notes.insert(0, f"logits and embeddings differ by {apart:.1e} at most")
        notes.append(
            "of one thread and one for each core the faster in each window; compiled "
            "for the number that was faster at first"
        )
    return "PyTorch, the same model, rows and batch", header, lines, notes


def _ms(took):
    return "" if took is None else f"{1e3 * took['median']:,.4g}"


def _range(took):
    if took is None:
        return ""
    return f"{1e3 * took['low']:,.3g} to {1e3 * took['high']:,.3g}"


def _number(value, digits=2):
    return "" if value is None else f"{value:,.{digits}f}"


def _percent(share):
    return "" if share is None else f"{100 * share:.1f}"
