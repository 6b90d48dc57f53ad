"""Retain, unlearn and holdout sets: disjoint, reproducible, with near-duplicates."""

import numpy as np
import pytest

from ccu_jax.errors import UserError
from ccu_jax.unlearn_sets import splits
from tests.toy import trees_equal
from tests.unlearn_sets.conftest import draw, write_ids

RULES = (
    *("random:0.01", "random:0.05", "random:0.3", "class:green", "ids"),
    *("group:group9", "cluster:0.05", "cluster:0.3"),
    *("memorized:0.05", "memorized:0.3"),
)
TRAINING_SETS = ("retain", "unlearn", "unseen")


def count_trained(sets):
    return len(sets.retain) + len(sets.unlearn)


@pytest.mark.parametrize("rule", RULES)
def test_sets_are_disjoint_and_no_group_is_split(data, rule, tmp_path):
    if rule == "ids":
        rule = write_ids(tmp_path, data.id[data.split == "train"][10:45:5])
    sets = draw(data, rule)
    rows = np.concatenate(sets)
    assert len(np.unique(rows)) == len(rows)
    groups = [set(data.group[part]) for part in sets]
    assert sum(map(len, groups)) == len(set().union(*groups))
    for name, part in sets._asdict().items():
        split = "train" if name in TRAINING_SETS else name
        assert len(part) and (np.sort(part) == part).all()
        assert (data.split[part] == split).all()
        assert split == "train" or len(part) == (data.split == split).sum()
    if rule.startswith(("random", "ids")):  # all held-out rows are non-members
        num_train = (data.split == "train").sum()
        assert count_trained(sets) + len(sets.unseen) == num_train


def test_sets_have_the_requested_sizes(data):
    sets = draw(data, "random:0.1", holdout=0.2)
    max_excess = 4  # no group is split
    num_train = (data.split == "train").sum()
    assert 0 <= len(sets.unseen) - round(0.2 * num_train) < max_excess
    assert 0 <= len(sets.unlearn) - round(0.1 * count_trained(sets)) < max_excess


def test_smaller_fraction_is_a_prefix_of_a_larger_one(data):
    def ids(rule, holdout=0.2):
        sets = draw(data, rule, holdout=holdout)
        text = splits.format_unlearn_set(data, sets, 0, rule)
        return [line for line in text.splitlines() if not line.startswith("#")]

    one, five = ids("random:0.01"), ids("random:0.05")
    assert 0 < len(one) < len(five) and five[: len(one)] == one
    other_holdout = ids("random:0.01", holdout=0.4)
    assert other_holdout == five[: len(other_holdout)]
    small, large = draw(data, "random:0.01"), draw(data, "random:0.05")
    np.testing.assert_array_equal(small.unseen, large.unseen)


def test_seed_determines_the_sets(data):
    first, again, other = (draw(data, "random:0.1", seed) for seed in (0, 0, 1))
    assert trees_equal(first, again)
    assert set(first.unlearn) != set(other.unlearn)
    assert set(first.unseen) != set(other.unseen)


@pytest.mark.parametrize("rule", ["random:0.1", "cluster:0.1"])
def test_order_of_rows_does_not_matter(data, rule):
    names = ("id", "group", "split", "labels", "image", "text", "has_image", "has_text")
    reversed_ = data._replace(**{name: getattr(data, name)[::-1] for name in names})
    before, after = draw(data, rule), draw(reversed_, rule)
    for name in TRAINING_SETS:
        ids = set(data.id[getattr(before, name)])
        assert ids == set(reversed_.id[getattr(after, name)])


def test_holdout_fraction_out_of_range_is_rejected(data):
    for holdout in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(UserError, match=f"unlearn.holdout_fraction={holdout}"):
            draw(data, "random:0.1", holdout=holdout)


def set_labels(data, labels):
    return data._replace(labels=np.ones_like(data.labels) * labels)


def remove_images(data, split):
    return data._replace(has_image=data.has_image & (data.split != split))


def remove_rows(data, split):
    return data._replace(split=np.where(data.split == split, "unused", data.split))


@pytest.mark.parametrize(
    "rule, change, argument, message",
    [
        ("random:0.99999", set_labels, 1, "every training row"),
        ("class:red", set_labels, 1, "every training row"),
        ("class:red", set_labels, [0, 1, 1], "selects no training row"),
        ("random:0.1", remove_images, "train", "only rows without an image"),
        ("random:0.1", remove_images, "validation", "no row of the validation set has"),
        ("memorized:0.1", remove_images, "validation", "no row of the validation set"),
        ("random:0.1", remove_rows, "validation", "the validation set is empty"),
        ("random:0.1", remove_rows, "test", "the test set is empty"),
    ],
)
def test_unusable_set_is_rejected(data, rule, change, argument, message):
    with pytest.raises(UserError, match=f"{rule}: .*{message}"):
        splits.draw_sets(change(data, argument), rule, 0, 0.2)


@pytest.mark.parametrize("rule", ["random:0.05", "class:green"])
def test_file_of_an_unlearn_set_is_a_rule_for_the_same_set(data, rule, tmp_path):
    # An id that starts with a hash is no comment.
    data = data._replace(id=np.array([f"#{id_}" for id_ in data.id]))
    sets = draw(data, rule, seed=3)
    path = tmp_path / "ids.txt"
    path.write_text(splits.format_unlearn_set(data, sets, 3, rule))
    again = draw(data, f"ids:{path}", seed=3)
    np.testing.assert_array_equal(again.unlearn, sets.unlearn)
    assert trees_equal(again, sets) or not rule.startswith("random")


@pytest.fixture
def duplicates(data):
    """Three training rows with one image, and one with that of five test rows."""
    train, test = (np.flatnonzero(data.split == name) for name in ("train", "test"))
    three, single, test = train[[0, 9, 200]], train[[60]], test[:5]
    cluster = np.arange(700)
    cluster[three] = three[0]
    cluster[test] = cluster[single] = min(*test, *single)
    data = data._replace(cluster=cluster, has_image=np.full(700, True))
    return data, three, single, test


@pytest.mark.parametrize("rule", RULES)
def test_near_duplicates_are_unlearned_together(duplicates, rule, tmp_path):
    data, three, *_ = duplicates
    if rule == "ids":
        rule = write_ids(tmp_path, data.id[three[:1]])
    if rule.startswith("group"):
        rule = f"group:{data.group[three[1]]}"
    for seed in range(5):
        sets = draw(data, rule, seed)
        for name in TRAINING_SETS:
            assert np.isin(three, getattr(sets, name)).sum() in (0, 3)
        near = splits.find_near_duplicates(data, sets)
        assert not len(near["retain"]) and not len(near["unseen"])
        unlearned = three if np.isin(three, sets.unlearn).all() else []
        assert set(near["unlearn"]) == set(unlearned)
        text = splits.format_near_duplicates(data, sets, near)
        assert text.count("unlearn\t") == max(len(unlearned) - 1, 0)


def test_near_duplicates_are_only_reported_on_request(duplicates, tmp_path):
    data, three, single, test = duplicates
    listed = np.concatenate([three[:1], single])
    rule = write_ids(tmp_path, data.id[listed])
    sets = splits.draw_sets(data, rule, 0, 0.2, "report")
    in_groups = np.isin(data.group, data.group[listed])
    np.testing.assert_array_equal(sets.unlearn, np.flatnonzero(in_groups))
    near = splits.find_near_duplicates(data, sets)
    not_unlearned = np.concatenate([near["retain"], near["unseen"]])
    assert three[2] in not_unlearned
    assert not np.isin(not_unlearned, sets.unlearn).any()
    np.testing.assert_array_equal(near["test"], test)
    lines = splits.format_near_duplicates(data, sets, near).splitlines()
    assert f"test\t{data.id[test[0]]}\t{data.id[single[0]]}" in lines
    assert len(lines) == 1 + sum(map(len, near.values()))
    assert not len(near["unlearn"])


def test_ids_of_a_folder_include_near_duplicates(duplicates, tmp_path):
    data, _, single, test = duplicates
    rule = write_ids(tmp_path, data.id[single])
    sets = splits.draw_sets(data, rule, 0, 0.2, "report")
    text = splits.format_unlearn_set(data, sets, 0, rule, "report")
    folder = tmp_path / "sets"
    folder.mkdir()
    (folder / "0.txt").write_text(text)
    listed = {str(i) for i in data.id[sets.unlearn]}
    assert splits.load_all_ids(data, folder, "report") == listed
    with_duplicates = listed | {str(i) for i in data.id[test]}
    assert splits.load_all_ids(data, folder, "forget") == with_duplicates
