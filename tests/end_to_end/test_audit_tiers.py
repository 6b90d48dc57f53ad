"""Audit tiers build on each other, are not repeated, and repair what is damaged."""

import pytest

from tests.end_to_end.conftest import METHODS, load_by_method, read_files
from tests.end_to_end.launching import fail_command, run_command


def load_audit(workdir):
    return load_by_method(workdir / "audit.json")


def load_pool(workdir):
    """Returns the audit of the images of ccu_plus by shadow models."""
    return load_audit(workdir)["ccu_plus"]["seeds"][0]["pool"]["image"]


@pytest.mark.smoke
@pytest.mark.slow
def test_tiers_build_on_each_other_and_repair_what_is_damaged(small, copy):
    argv = ("--config", small, "--workdir", copy, "--audit")
    rigorous = (*argv, "rigorous", "--shadows", "6")
    first = load_audit(copy)
    assert list(first) == list(METHODS)
    assert set(first["original"]["seeds"][0]["seconds"]) == {"smoke"}

    run_command(*argv, "standard")
    _assert_standard(load_audit(copy))
    before = read_files(copy, "audits", "checkpoints")
    out = run_command(*rigorous)
    assert "audit, rigorous: about" in out
    assert before.items() <= read_files(copy, "audits", "checkpoints").items()
    _assert_rigorous(load_audit(copy))

    _assert_shown_from_records(copy, argv)
    # Only damaged records and outputs are made again.
    pool = load_pool(copy)
    (copy / "audits" / "ccu_plus-0-rigorous.json").write_text("{}")
    damaged = min(copy.glob("shadows/0/ccu_plus-1-*.npz"))
    damaged.write_bytes(damaged.read_bytes()[:1000])
    shadows = read_files(copy, "shadows/0/0", "shadows/0/5")
    assert f"{damaged}: missing or damaged" in run_command(*rigorous)
    assert load_pool(copy) == pool
    run_command(*argv, "rigorous", "--shadows", "8")
    assert shadows == read_files(copy, "shadows/0/0", "shadows/0/5")
    assert load_pool(copy)["shadows"] == 8

    (copy / "outputs" / "ccu_plus-0.npz").write_bytes(b"PK")
    err = fail_command("--config", small, "--workdir", copy)
    assert "ccu_plus-0.npz: missing or damaged" in err and "ccu_plus-0.json" in err


def _assert_standard(audit):
    assert set(audit) == {*METHODS, "retrain_visual_2"}
    for method in audit.values():
        (record,) = method["seeds"]
        assert set(record["seconds"]) == {"smoke", "standard"}
        assert set(record["cka"]) == {"original", "reference"}
        assert record["attacks"]["image"]["loss"]["control"] is not None
        assert record["relearning"]["limit"] == 100
    original = audit["original"]["seeds"][0]
    assert original["relearning"]["steps"] == 0
    assert original["within_class"]["original"][0] > 0.999


def _assert_rigorous(audit):
    pools = {name: m["seeds"][0]["pool"]["image"] for name, m in audit.items()}
    for name, pool in pools.items():
        assert pool["shadows"] == 6 and 0 <= pool["lira"]["auc"][0] <= 1
        assert (pool["ulira"] is None) == (name != "ccu_plus")
    compared = pools["ccu_plus"]["ulira_of"]
    references = {"original", "retrain_visual", "retrain_visual_2"}
    assert set(compared) == {"model", *references}
    attacks = (pools["ccu_plus"]["ulira"], *compared.values())
    assert all(attack["auc"] is not None for attack in attacks)
    # The time of the shadow models counts once.
    costs = [m["seeds"][0]["costs_s"]["shadow models"] for m in audit.values()]
    assert costs[0] > 0 and not any(costs[1:])


def _assert_shown_from_records(workdir, argv):
    """Without an audit, its records are shown, whatever audit.json holds."""
    audit, page = load_audit(workdir), (workdir / "report.html").read_text("utf-8")
    path = workdir / "audit.json"
    text = path.read_text()
    path.write_text('[{"mathod": "original"}]')
    run_command(*argv, "none")
    assert (workdir / "report.html").read_text("utf-8") == page
    assert audit["original"]["verdict"]["word"] in page
    table = (workdir / "audit.md").read_text("utf-8")
    assert "Clip art" in table and all(f"**{name}**" in table for name in audit)
    path.write_text(text)
