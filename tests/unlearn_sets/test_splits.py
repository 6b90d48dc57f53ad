"""Which rows are forgotten: every rule, and every rule that cannot be followed."""

import numpy as np
import pytest

from ccu_jax.errors import UserError
from ccu_jax.unlearn_sets import rules as unlearn_rules
from ccu_jax.unlearn_sets import splits as unlearn_set
from ccu_jax.unlearn_sets.rules import Memorization
from tests import toy

RULES = (
    *("random:0.01", "random:0.05", "random:0.3", "class:green", "ids"),
    *("group:group9", "cluster:0.05", "cluster:0.3"),
    *("memorised:0.05", "memorised:0.3"),
)


@pytest.fixture(scope="module", params=[1, 4], ids=["lone rows", "groups of 4"])
def data(request):
    data = toy.make_dataset(700, per_group=request.param, multi_label=True)
    # In groups, half of the rows of every third group are green.
    rows = np.arange(700)
    rare = (rows // request.param % 3 == 0) & (rows % 4 < 2)
    return data._replace(labels=np.where(rare[:, None], 1, data.labels * [1, 0, 1]))


def draw(data, rule, seed=0, unseen=0.2):
    return unlearn_set.draw_sets(data, rule, seed, unseen, memory=some_memory(data))


def some_memory(data):
    """At random; of rows without a picture it says what nobody may use."""
    number = np.array([int(name.removeprefix("row")) for name in data.id.tolist()])
    known, ease = np.random.default_rng(5).random((2, 2000))[:, number]
    return Memorization(
        np.where(data.has_image, known, 9), np.where(data.has_image, ease, 9)
    )


def write_ids(folder, ids):
    path = folder / "ids.txt"
    path.write_text("# forget these\n\n" + "".join(f"{i}  \n" for i in ids))
    return f"ids:{path}"


def some_ids(data, count=7):
    return data.id[data.split == "train"][10 : 10 + 5 * count : 5]


@pytest.mark.parametrize("rule", RULES)
def test_no_row_is_in_two_sets_and_no_group_is_split(data, rule, tmp_path):
    if rule == "ids":
        rule = write_ids(tmp_path, some_ids(data))
    sets = draw(data, rule)
    rows = np.concatenate(sets)
    assert len(np.unique(rows)) == len(rows)
    groups = [set(data.group[part]) for part in sets]
    assert sum(map(len, groups)) == len(set().union(*groups))
    for name in ("retain", "unlearn", "unseen"):
        part = getattr(sets, name)
        assert len(part) and (np.sort(part) == part).all()
        assert (data.split[part] == "train").all()
    for split in ("validation", "test"):
        np.testing.assert_array_equal(
            getattr(sets, split), np.flatnonzero(data.split == split)
        )


@pytest.mark.parametrize("rule", ["random:0.05", "ids"])
def test_every_training_row_is_in_one_of_the_sets(data, rule, tmp_path):
    if rule == "ids":
        rule = write_ids(tmp_path, some_ids(data))
    sets = draw(data, rule)
    together = np.sort(np.concatenate([sets.retain, sets.unlearn, sets.unseen]))
    np.testing.assert_array_equal(together, np.flatnonzero(data.split == "train"))


def test_the_sets_have_the_sizes_that_were_asked_for(data):
    train = (data.split == "train").sum()
    sets = draw(data, "random:0.1", unseen=0.2)
    slack = 4  # no group is split
    assert 0 <= len(sets.unseen) - round(0.2 * train) < slack
    trained = len(sets.retain) + len(sets.unlearn)
    assert 0 <= len(sets.unlearn) - round(0.1 * trained) < slack


def test_one_percent_is_a_prefix_of_five_percent(data):
    def lines(rule, unseen=0.2):
        text = unlearn_set.format_unlearn_set(
            data, draw(data, rule, unseen=unseen), 0, rule
        )
        return [line for line in text.splitlines() if not line.startswith("#")]

    one, five = lines("random:0.01"), lines("random:0.05")
    assert 0 < len(one) < len(five)
    assert five[: len(one)] == one
    # However many rows are kept apart.
    assert lines("random:0.01", unseen=0.4) == five[: len(lines("random:0.01", 0.4))]
    np.testing.assert_array_equal(
        draw(data, "random:0.01").unseen, draw(data, "random:0.05").unseen
    )


def test_another_seed_forgets_other_rows_and_the_same_seed_the_same(data):
    first, again, other = (draw(data, "random:0.1", seed) for seed in (0, 0, 1))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert set(first.unlearn) != set(other.unlearn)
    assert set(first.unseen) != set(other.unseen)


def test_the_order_of_the_rows_in_the_data_does_not_matter(data):
    turned = data._replace(
        **{
            name: getattr(data, name)[::-1]
            for name in ("id", "group", "split", "labels")
        }
    )
    for name in ("retain", "unlearn", "unseen"):
        before = getattr(draw(data, "random:0.1"), name)
        after = getattr(draw(turned, "random:0.1"), name)
        assert set(data.id[before]) == set(turned.id[after])


def test_a_class_is_forgotten_as_a_whole_and_controlled_by_its_own(data):
    sets = draw(data, "class:green")
    column = data.classes.index("green")
    groups = {g for g in set(data.group) if data.labels[data.group == g, column].any()}
    assert set(data.group[sets.unlearn]) <= groups
    assert set(data.group[sets.unseen]) <= groups
    assert not data.labels[sets.retain, column].any()
    assert data.labels[sets.unlearn, column].any()


def test_every_listed_id_is_found_exactly_once(data, tmp_path):
    ids = some_ids(data)
    sets = draw(data, write_ids(tmp_path, ids))
    found = data.id[sets.unlearn]
    assert all((found == i).sum() == 1 for i in ids)
    # Nothing comes with them but the rest of their groups.
    where = np.isin(data.id, ids)
    assert set(data.group[sets.unlearn]) == set(data.group[where])


@pytest.mark.parametrize("rule", ["random:0.05", "class:green"])
def test_a_described_set_can_be_read_back(data, rule, tmp_path):
    sets = draw(data, rule, seed=3)
    path = tmp_path / "ids.txt"
    path.write_text(unlearn_set.format_unlearn_set(data, sets, 3, rule))
    again = draw(data, f"ids:{path}", seed=3)
    np.testing.assert_array_equal(again.unlearn, sets.unlearn)
    if rule.startswith("random"):
        for a, b in zip(again, sets, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "rule, named",
    [
        ("class:purple", "class:purple.*red, green, blue"),
        ("random:0", "random:0:"),
        ("random:1", "random:1:"),
        ("random:-0.2", "random:-0.2"),
        ("random:nan", "random:nan"),
        ("random:few", "random:few"),
        ("random:", "'random:'"),
        ("random", "'random'"),
        ("", "''"),
        ("all:0.1", "all:0.1"),
        ("memorized:0.1", "memorized:0.1.*memorised:SHARE"),
        ("cluster:all", "cluster:all: the share must lie"),
        ("cluster:1.5", "cluster:1.5: the share must lie"),
        ("memorised:0", "memorised:0: the share must lie"),
        ("group:", "'group:'"),
        ("group:", "group:NAME, cluster:SHARE, memorised:SHARE or ids:FILE"),
        ("ids:/nowhere/ids.txt", "/nowhere/ids.txt"),
    ],
)
def test_a_rule_that_means_nothing_is_refused_by_name(data, rule, named):
    with pytest.raises(UserError, match=named):
        draw(data, rule)


@pytest.mark.parametrize("unseen", [0.0, 1.0, -0.1, float("nan")])
def test_a_bad_share_of_unseen_rows_is_refused(data, unseen):
    with pytest.raises(UserError, match=f"unlearn.holdout_fraction={unseen}"):
        draw(data, "random:0.1", unseen=unseen)


def test_ids_that_cannot_be_forgotten_are_refused_by_name(data, tmp_path):
    train = data.id[data.split == "train"]
    test = data.id[data.split == "test"][0]
    for ids, named in (
        ([train[0], "nobody"], "'nobody'"),
        ([train[3], train[4], train[3]], f"'{train[3]}' more than once"),
        ([train[0], test], f"'{test}'.*test"),
        ([], "nothing to forget"),
        (train, "every training row"),
    ):
        with pytest.raises(UserError, match=named):
            draw(data, write_ids(tmp_path, ids))
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="bytes.txt"):
        draw(data, f"ids:{tmp_path / 'bytes.txt'}")


def test_long_lists_of_wrong_ids_are_cut_short(data, tmp_path):
    with pytest.raises(UserError, match="and 17 more"):
        draw(data, write_ids(tmp_path, [f"wrong{i}" for i in range(20)]))


def test_everything_and_nothing_are_refused(data):
    with pytest.raises(UserError, match="every training row"):
        draw(data, "random:0.99999")
    everywhere = data._replace(labels=np.ones_like(data.labels))
    with pytest.raises(UserError, match="class:red.*every training row"):
        draw(everywhere, "class:red")
    nowhere = data._replace(labels=data.labels * [0, 1, 1])
    with pytest.raises(UserError, match="class:red.*nothing to forget"):
        draw(nowhere, "class:red")


def test_rows_without_a_picture_are_nothing_to_forget(data):
    bare = data._replace(has_image=data.has_image & (data.split != "train"))
    with pytest.raises(UserError, match="rows without a picture only"):
        draw(bare, "random:0.1")


def test_sets_that_show_no_picture_are_refused_by_name(data):
    blind = data._replace(has_image=data.has_image & (data.split != "validation"))
    with pytest.raises(UserError, match="no row of the validation set has a picture"):
        draw(blind, "random:0.1")


@pytest.mark.parametrize("split", ["validation", "test"])
def test_data_without_an_evaluation_set_are_refused(data, split):
    left = data.split != split
    names = ("id", "group", "split", "labels", "has_image")
    data = data._replace(
        **{name: getattr(data, name)[left] for name in names},
        cluster=np.arange(left.sum()),
    )
    with pytest.raises(UserError, match=f"the {split} set is empty"):
        draw(data, "random:0.1")


def test_an_id_that_begins_with_a_hash_sign_is_an_id(tmp_path):
    data = toy.make_dataset()
    data = data._replace(id=np.array([f"#{i}" for i in data.id]))
    sets = unlearn_set.draw_sets(data, "random:0.2", 1, 0.2)
    path = tmp_path / "ids.txt"
    path.write_text(unlearn_set.format_unlearn_set(data, sets, 1, "random:0.2"))
    again = unlearn_set.draw_sets(data, f"ids:{path}", 1, 0.2)
    np.testing.assert_array_equal(again.unlearn, sets.unlearn)


# --- groups, clusters, what was memorised ---------------------------------------------


def test_a_group_is_forgotten_as_a_whole_and_nothing_else(data):
    sets = draw(data, "group:group9")
    of = np.flatnonzero(data.group == "group9")
    np.testing.assert_array_equal(sets.unlearn, of)
    # It would be a control otherwise, with this seed or another.
    for seed in range(20):
        assert len(draw(data, "group:group9", seed).unlearn) == len(sets.unlearn)


def test_a_wrong_group_is_one_line_that_names_close_ones(data):
    for rule, named in (
        ("group:grop15", "'group15'"),
        ("group:group5", "not trained on this group"),
        ("group:nothing like it at all", "there are [0-9]+, 'group"),
    ):
        with pytest.raises(UserError, match=named) as raised:
            draw(data, rule)
        message = str(raised.value)
        assert rule in message and len(message) < 250 and "\n" not in message
    few = data._replace(group=np.where(data.split == "train", "Ann", "Bob"))
    with pytest.raises(UserError, match="did you mean 'Ann'.*there are: Ann"):
        draw(few, "group:Anna")


@pytest.fixture(scope="module")
def two_looks():
    """Rows of two looks and two ways to write, in no relation to labels; a few bare."""
    data = toy.make_dataset(1400, per_group=2, seed=3)
    draw = np.random.default_rng(4)
    look = draw.integers(2, size=700)[np.arange(1400) // 2]
    pictures = draw.integers(0, 256, (2, 8, 8, 3))[look]
    image = (0.6 * pictures + 0.4 * draw.integers(0, 256, pictures.shape)).astype(
        np.uint8
    )
    image[~data.has_image] = 0
    text = 2 + 5 * look[:, None] + draw.integers(5, size=(1400, 5))
    text[~data.has_text] = [1, 0, 0, 0, 0]
    return data._replace(image=image, text=text.astype(np.int32)), look


def test_a_cluster_looks_like_its_centre_and_so_does_its_control(two_looks):
    data, look = two_looks
    for seed in range(3):
        sets = draw(data, "cluster:0.2", seed)
        centre = unlearn_set.forgetting_order(data, seed)[0]
        (kind,) = set(look[data.group == centre])
        assert np.isin(np.flatnonzero(data.group == centre), sets.unlearn).all()
        trained = len(sets.unlearn) + len(sets.retain)
        assert 0 <= len(sets.unlearn) - round(0.2 * trained) < 2
        # Also rows that have lost their picture, or their text.
        assert (look[sets.unlearn] == kind).mean() > 0.98
        assert (look[sets.unseen] == kind).all()
        apart = draw(data, "random:0.2", seed).unseen
        assert set(sets.unseen) <= set(apart)
        assert 0 <= len(sets.unseen) - round(0.2 * len(apart)) < 2


@pytest.mark.parametrize("lost", ["has_image", "has_text"])
def test_a_cluster_is_found_by_pictures_or_texts_alone(two_looks, lost):
    data, look = two_looks
    sets = draw(data, "cluster:0.2", 1)
    blind = data._replace(**{lost: data.has_text & False})
    if lost == "has_text":
        alone = draw(blind, "cluster:0.2", 1)
        assert (look[alone.unlearn] == look[sets.unlearn[0]]).mean() > 0.98
    else:
        with pytest.raises(UserError, match="rows without a picture only"):
            draw(blind, "cluster:0.2", 1)


def test_labels_and_the_order_of_rows_do_not_matter_to_a_cluster(two_looks):
    data, _ = two_looks
    sets = draw(data, "cluster:0.1")
    other = draw(data._replace(labels=1 - data.labels), "cluster:0.1")
    np.testing.assert_array_equal(sets.unlearn, other.unlearn)
    names = ("id", "group", "split", "labels", "image", "text", "has_image", "has_text")
    turned = data._replace(**{name: getattr(data, name)[::-1] for name in names})
    found = draw(turned, "cluster:0.1")
    assert set(turned.id[found.unlearn]) == set(data.id[sets.unlearn])
    assert set(turned.id[found.unseen]) == set(data.id[sets.unseen])


def test_the_control_of_a_small_cluster_is_enough_for_an_attack(two_looks):
    data, _ = two_looks
    small, large = draw(data, "cluster:0.01"), draw(data, "cluster:0.05")
    assert set(small.unlearn) < set(large.unlearn)
    assert (
        unlearn_rules.MIN_NONMEMBERS
        <= len(small.unseen)
        < unlearn_rules.MIN_NONMEMBERS + 2
    )


def test_what_is_memorised_is_forgotten_first(data):
    memory = some_memory(data)
    sets = draw(data, "memorised:0.2")

    def means(rows):
        shown = rows[data.has_image[rows]]
        groups = np.unique(data.group[shown])
        return [memory.score[shown[data.group[shown] == g]].mean() for g in groups]

    assert min(means(sets.unlearn)) >= max(means(sets.retain))
    assert np.isin(data.group[sets.unlearn], data.group[data.has_image]).all()
    trained = len(sets.unlearn) + len(sets.retain)
    assert 0 <= len(sets.unlearn) - round(0.2 * trained) < 4


def test_the_control_of_what_is_memorised_is_as_hard(data):
    # What is hard is what an original has to memorise.
    ease = some_memory(data).easiness
    noise = np.random.default_rng(6).normal(0, 0.1, len(ease))
    memory = Memorization((1 - ease + noise).astype(np.float32), ease)
    sets = unlearn_set.draw_sets(data, "memorised:0.3", 0, 0.4, memory=memory)
    apart = draw(data, "random:0.3", unseen=0.4).unseen

    def mean(rows):
        return ease[rows[data.has_image[rows]]].mean()

    gap = abs(mean(sets.unseen) - mean(sets.unlearn))
    assert gap < 0.25 * abs(mean(apart) - mean(sets.unlearn))
    assert set(sets.unseen) < set(apart)
    assert len(sets.unseen) >= unlearn_rules.MIN_NONMEMBERS


def test_before_the_original_is_trained_nothing_is_memorised(data):
    before = unlearn_set.draw_sets(data, "memorised:0.1", 0, 0.2)
    after = draw(data, "memorised:0.1")
    assert not len(before.unlearn) and len(after.unlearn)
    together = np.sort(np.concatenate([after.retain, after.unlearn]))
    np.testing.assert_array_equal(before.retain, together)
    assert set(after.unseen) <= set(before.unseen)
    np.testing.assert_array_equal(before.unseen, draw(data, "random:0.1").unseen)
    blind = data._replace(has_image=data.has_image & (data.split != "validation"))
    with pytest.raises(UserError, match="no row of the validation set has a picture"):
        unlearn_set.draw_sets(blind, "memorised:0.1", 0, 0.2)


def test_alike_takes_each_value_once_and_the_nearest():
    wanted, offered = np.array([0.1, 0.9]), np.array([0.9, 0.5, 0.1])
    assert unlearn_rules.match_distribution(wanted, offered, 2) == [2, 0]
    offered = np.linspace(0, 1, 101)
    places = unlearn_rules.match_distribution(np.array([0.2] * 50), offered, 11)
    assert len(set(places)) == 11 and np.abs(offered[places] - 0.2).max() < 0.061
    assert sorted(unlearn_rules.match_distribution(offered, offered, 101)) == list(
        range(101)
    )
    assert unlearn_rules.match_distribution(np.array([]), offered, 5) == []


# --- near-duplicates ------------------------------------------------------------------


@pytest.fixture
def twins(data):
    """Three training rows with one picture, and one with that of five test rows."""
    train, test = (np.flatnonzero(data.split == name) for name in ("train", "test"))
    three, alone, test = train[[0, 9, 200]], train[[60]], test[:5]
    cluster = np.arange(700)
    cluster[three] = three[0]
    cluster[test] = cluster[alone] = min(*test, *alone)
    everywhere = np.full(700, True)
    return data._replace(cluster=cluster, has_image=everywhere), three, alone, test


@pytest.mark.parametrize("rule", RULES)
def test_a_near_duplicate_is_forgotten_too_and_is_no_control(twins, rule, tmp_path):
    data, three, *_ = twins
    if rule == "ids":
        rule = write_ids(tmp_path, data.id[three[:1]])
    if rule.startswith("group"):
        rule = f"group:{data.group[three[1]]}"
    for seed in range(5):
        sets = draw(data, rule, seed)
        for part in (sets.retain, sets.unlearn, sets.unseen):
            assert np.isin(three, part).sum() in (0, 3)
        near = unlearn_set.near_duplicates(data, sets)
        assert not len(near["retain"]) and not len(near["unseen"])
        # What was brought in is told.
        brought = three if np.isin(three, sets.unlearn).all() else []
        assert set(near["unlearn"]) == set(brought)
        told = unlearn_set.format_near_duplicates(data, sets, near)
        assert told.count("unlearn\t") == max(len(brought) - 1, 0)


def test_near_duplicates_are_only_reported_when_that_is_asked_for(twins, tmp_path):
    data, three, alone, test = twins
    listed = np.concatenate([three[:1], alone])
    rule = write_ids(tmp_path, data.id[listed])
    sets = unlearn_set.draw_sets(data, rule, 0, 0.2, "report")
    group = np.isin(data.group, data.group[listed])
    np.testing.assert_array_equal(sets.unlearn, np.flatnonzero(group))
    near = unlearn_set.near_duplicates(data, sets)
    kept = np.concatenate([near["retain"], near["unseen"]])
    assert three[2] in kept and not np.isin(kept, sets.unlearn).any()
    np.testing.assert_array_equal(near["test"], test)
    told = unlearn_set.format_near_duplicates(data, sets, near).splitlines()
    assert f"test\t{data.id[test[0]]}\t{data.id[alone[0]]}" in told
    assert len(told) == 1 + sum(map(len, near.values()))
    assert not len(near["unlearn"])


def test_what_was_recorded_is_read_back_with_the_same_pictures(twins, tmp_path):
    data, _, alone, test = twins
    rule = write_ids(tmp_path, data.id[alone])
    sets = unlearn_set.draw_sets(data, rule, 0, 0.2, "report")
    text = unlearn_set.format_unlearn_set(data, sets, 0, rule, "report")
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "0.txt").write_text(text)
    listed = {str(i) for i in data.id[sets.unlearn]}
    assert unlearn_set.load_all_ids(data, tmp_path / "sets", "report") == listed
    both = unlearn_set.load_all_ids(data, tmp_path / "sets", "forget")
    assert both == listed | {str(i) for i in data.id[test]}
