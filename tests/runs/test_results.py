"""Result files are read back in order, and damaged or misplaced ones are rejected."""

import json

import pytest

from ccu_jax.errors import UserError
from ccu_jax.runs import results
from ccu_jax.storage.records import add_checksum

RESULT = {"method": "ccu_plus", "seed": 0, "fingerprint": "f", "score": 0.1524}


def write(workdir, name, **result):
    path = workdir / "stages" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    results.write_result(path, result)
    return path


def test_results_are_sorted_by_seed_and_method(tmp_path):
    for method, seed in (("ccu_plus", 1), ("ccu", 0), ("original", 0), ("other", 0)):
        write(tmp_path, f"{method}-{seed}", method=method, seed=seed, fingerprint="f")
    loaded = [(r["seed"], r["method"]) for r in results.load_all_results(tmp_path)]
    assert loaded == [(0, "original"), (0, "ccu"), (0, "other"), (1, "ccu_plus")]


def test_result_of_another_stage_is_rejected(tmp_path):
    for method, seed in (("../../elsewhere", 0), ("ccu_plus", 1), ("original", 0)):
        path = write(tmp_path, "ccu_plus-0", method=method, seed=seed, fingerprint="f")
        with pytest.raises(UserError, match=f"{path}: contains the result of another"):
            results.load_all_results(tmp_path)


def test_file_without_a_result_is_damaged(tmp_path):
    path = write(tmp_path, "ccu_plus-0")
    without_result = [{}, [], 3, "x", RESULT, add_checksum({})]
    without_result.append(add_checksum({**RESULT, "seed": "0"}))
    for content in (*map(json.dumps, without_result), "[" * 200_000):
        path.write_text(content)
        with pytest.raises(UserError, match=f"{path}: damaged; remove it"):
            results.load_all_results(tmp_path)


def test_flipped_bits_never_change_a_result(tmp_path):
    path = write(tmp_path, "ccu_plus-0", **RESULT)
    content = path.read_bytes()
    num_rejected = 0
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            result = results.load_result(path)
        except UserError:
            num_rejected += 1
        else:
            assert result == RESULT  # the bit was one of a space
    assert num_rejected > 7 * len(content)
