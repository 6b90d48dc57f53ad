"""Rules by class, group, ids, similarity and memorization, and invalid rules."""

import numpy as np
import pytest

from ccu_jax.errors import UserError
from ccu_jax.unlearn_sets import rules, splits
from ccu_jax.unlearn_sets.rules import MIN_NONMEMBERS, Memorization
from tests import toy
from tests.unlearn_sets.conftest import draw, make_memorization, write_ids


@pytest.mark.parametrize(
    "rule, message",
    [
        ("class:purple", "class:purple.*red, green, blue"),
        ("random:0", "random:0: expected a fraction"),
        ("random:1", "random:1: expected a fraction"),
        ("random:nan", "random:nan: expected a fraction"),
        ("random:few", "random:few: expected a fraction"),
        ("cluster:1.5", "cluster:1.5: expected a fraction"),
        ("memorized:0", "memorized:0: expected a fraction"),
        ("random:", "'random:'"),
        ("random", "'random'"),
        ("all:0.1", "all:0.1"),
        ("group:", "group:NAME, cluster:FRACTION, memorized:FRACTION or ids:FILE"),
        ("ids:/nowhere/ids.txt", "/nowhere/ids.txt"),
    ],
)
def test_invalid_rule_is_rejected(data, rule, message):
    with pytest.raises(UserError, match=message):
        draw(data, rule)


def test_class_is_unlearned_as_a_whole_with_nonmembers_of_the_class(data):
    sets = draw(data, "class:green")
    column = data.classes.index("green")
    groups = {g for g in set(data.group) if data.labels[data.group == g, column].any()}
    assert set(data.group[sets.unlearn]) <= groups
    assert set(data.group[sets.unseen]) <= groups
    assert not data.labels[sets.retain, column].any()
    assert data.labels[sets.unlearn, column].any()


def test_group_is_unlearned_as_a_whole_and_never_held_out(data):
    rows = np.flatnonzero(data.group == "group9")
    for seed in range(20):
        np.testing.assert_array_equal(draw(data, "group:group9", seed).unlearn, rows)


@pytest.mark.parametrize(
    "rule, message",
    [
        ("group:grop15", "'group15'"),
        ("group:group5", "has validation or test rows only"),
        ("group:nothing like it at all", "there are [0-9]+ groups, such as 'group"),
        ("group:Anna", "did you mean 'Ann'.*choose from: Ann"),
    ],
)
def test_unknown_group_is_rejected_with_similar_names_or_all(data, rule, message):
    if rule == "group:Anna":
        data = data._replace(group=np.where(data.split == "train", "Ann", "Bob"))
    with pytest.raises(UserError, match=f"^unlearn rule {rule}: .*{message}") as error:
        draw(data, rule)
    assert len(str(error.value)) < 250 and "\n" not in str(error.value)


def test_listed_ids_are_unlearned_with_their_groups_alone(data, tmp_path):
    ids = data.id[data.split == "train"][10:45:5]
    sets = draw(data, write_ids(tmp_path, ids))
    unlearned = data.id[sets.unlearn]
    assert all((unlearned == i).sum() == 1 for i in ids)
    groups = data.group[np.isin(data.id, ids)]
    assert set(data.group[sets.unlearn]) == set(groups)


def test_ids_that_cannot_be_unlearned_are_rejected(data, tmp_path):
    train, test = (data.id[data.split == split] for split in ("train", "test"))
    for ids, message in (
        ([train[0], "nobody"], "'nobody'"),
        ([train[3], train[4], train[3]], f"'{train[3]}' more than once"),
        ([train[0], test[0]], f"'{test[0]}'.*test"),
        ([], "selects no training row"),
        (train, "every training row"),
        ([f"wrong{i}" for i in range(20)], "and 17 more"),
    ):
        with pytest.raises(UserError, match=message):
            draw(data, write_ids(tmp_path, ids))
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="bytes.txt"):
        draw(data, f"ids:{tmp_path / 'bytes.txt'}")


@pytest.fixture(scope="module")
def two_styles():
    """Rows of two image styles and vocabularies, unrelated to their labels."""
    data = toy.make_dataset(1400, per_group=2, seed=3)
    rng = np.random.default_rng(4)
    style = rng.integers(2, size=700)[np.arange(1400) // 2]
    pattern = rng.integers(0, 256, (2, 8, 8, 3))[style]
    noise = rng.integers(0, 256, pattern.shape)
    image = (0.6 * pattern + 0.4 * noise).astype(np.uint8)
    image[~data.has_image] = 0
    text = 2 + 5 * style[:, None] + rng.integers(5, size=(1400, 5))
    text[~data.has_text] = [1, 0, 0, 0, 0]
    return data._replace(image=image, text=text.astype(np.int32)), style


def test_cluster_and_its_nonmembers_are_similar_to_its_center_also_without_texts(
    two_styles,
):
    data, style = two_styles
    absent = np.zeros(len(style), bool)
    for seed in range(3):
        sets = draw(data, "cluster:0.2", seed)
        center = splits.unlearning_order(data, seed)[0]
        (center_style,) = set(style[data.group == center])
        assert np.isin(np.flatnonzero(data.group == center), sets.unlearn).all()
        num_trained = len(sets.unlearn) + len(sets.retain)
        assert 0 <= len(sets.unlearn) - round(0.2 * num_trained) < 2
        # Rows without an image or without a text included.
        assert (style[sets.unlearn] == center_style).mean() > 0.98
        assert (style[sets.unseen] == center_style).all()
        holdout = draw(data, "random:0.2", seed).unseen
        assert set(sets.unseen) <= set(holdout)
        assert 0 <= len(sets.unseen) - round(0.2 * len(holdout)) < 2
        without_texts = draw(data._replace(has_text=absent), "cluster:0.2", seed)
        assert (style[without_texts.unlearn] == center_style).mean() > 0.98
    with pytest.raises(UserError, match="only rows without an image"):
        draw(data._replace(has_image=absent), "cluster:0.2", 1)


def test_small_cluster_has_the_minimum_of_nonmembers_whatever_the_labels(two_styles):
    data, _ = two_styles
    small, large = draw(data, "cluster:0.01"), draw(data, "cluster:0.05")
    relabeled = draw(data._replace(labels=1 - data.labels), "cluster:0.05")
    np.testing.assert_array_equal(large.unlearn, relabeled.unlearn)
    assert set(small.unlearn) < set(large.unlearn)
    assert MIN_NONMEMBERS <= len(small.unseen) < MIN_NONMEMBERS + 2


def test_most_memorized_groups_are_unlearned(data):
    memorization = make_memorization(data)
    sets = draw(data, "memorized:0.2")

    def group_means(rows):
        rows = rows[data.has_image[rows]]
        groups = data.group[rows]
        scores = memorization.score[rows]
        return [scores[groups == group].mean() for group in np.unique(groups)]

    assert min(group_means(sets.unlearn)) >= max(group_means(sets.retain))
    assert np.isin(data.group[sets.unlearn], data.group[data.has_image]).all()
    num_trained = len(sets.unlearn) + len(sets.retain)
    assert 0 <= len(sets.unlearn) - round(0.2 * num_trained) < 4


def test_nonmembers_of_memorized_groups_are_as_hard(data):
    easiness = make_memorization(data).easiness
    noise = np.random.default_rng(6).normal(0, 0.1, len(easiness))
    memorization = Memorization((1 - easiness + noise).astype(np.float32), easiness)
    sets = splits.draw_sets(data, "memorized:0.3", 0, 0.4, memorization=memorization)
    holdout = draw(data, "random:0.3", holdout=0.4).unseen

    def mean(rows):
        return easiness[rows[data.has_image[rows]]].mean()

    difference = abs(mean(sets.unseen) - mean(sets.unlearn))
    assert difference < 0.25 * abs(mean(holdout) - mean(sets.unlearn))
    assert set(sets.unseen) < set(holdout)
    assert len(sets.unseen) >= MIN_NONMEMBERS


def test_unlearn_set_is_empty_until_memorization_is_estimated(data):
    before = splits.draw_sets(data, "memorized:0.1", 0, 0.2)
    after = draw(data, "memorized:0.1")
    assert not len(before.unlearn) and len(after.unlearn)
    trained = np.sort(np.concatenate([after.retain, after.unlearn]))
    np.testing.assert_array_equal(before.retain, trained)
    assert set(after.unseen) <= set(before.unseen)
    np.testing.assert_array_equal(before.unseen, draw(data, "random:0.1").unseen)


def test_match_distribution_takes_the_nearest_value_once():
    target, available = np.array([0.1, 0.9]), np.array([0.9, 0.5, 0.1])
    assert rules.match_distribution(target, available, 2) == [2, 0]
    available = np.linspace(0, 1, 101)
    chosen = rules.match_distribution(np.full(50, 0.2), available, 11)
    assert len(set(chosen)) == 11 and np.abs(available[chosen] - 0.2).max() < 0.061
    all_ = rules.match_distribution(available, available, 101)
    assert sorted(all_) == list(range(101))
    assert rules.match_distribution(np.array([]), available, 5) == []
