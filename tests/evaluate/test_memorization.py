"""What an original has memorised: a proxy that finds what was planted."""

import numpy as np
import pytest

from ccu_jax.errors import UserError
from ccu_jax.evaluate import memorization as memory
from ccu_jax.evaluate.feature_store import FeatureStore
from ccu_jax.unlearn_sets import splits as unlearn_set
from tests import toy

ROWS = 1400


@pytest.fixture(scope="module", params=[False, True], ids=["single", "several labels"])
def data(request):
    return toy.make_dataset(ROWS, multi_label=request.param)


def planted(data, known):
    """A store whose features tell of most labels; the original knows some others, too.

    Returns the store, and which rows have a label that the features do not tell.
    """
    draw = np.random.default_rng(0)
    odd = draw.random(ROWS) < 0.3
    other = data.labels[draw.permutation(ROWS)]
    told = np.where(odd[:, None], other, data.labels)
    fresh = np.concatenate([told, draw.normal(size=(ROWS, 6))], axis=1) + 1.0
    sure = np.where(odd & ~known, 0.0, 4.0)[:, None]
    columns = {
        "fresh": fresh.astype(np.float32),
        "original_image": (sure * (2 * data.labels - 1)).astype(np.float32),
    }
    odd &= (told != data.labels).any(axis=1)
    return FeatureStore(columns, np.ones(ROWS, bool)), odd & data.has_image


def look(data, store, seed=0):
    sets = unlearn_set.draw_sets(data, "memorised:0.1", 0, 0.3)
    return memory.estimate_memorization(
        data, store, sets.retain, sets.unseen, seed
    ), sets


def test_what_is_known_and_could_not_be_guessed_is_memorised(data):
    known = np.arange(ROWS) % 2 == 0
    store, odd = planted(data, known)
    found, sets = look(data, store)
    trained = np.isin(np.arange(ROWS), sets.retain)
    by_heart, unknown = odd & known & trained, odd & ~known & trained
    plain = ~odd & trained & data.has_image
    assert found.score[by_heart].mean() > found.score[plain].mean() + 0.2
    assert found.score[by_heart].mean() > found.score[unknown].mean() + 0.2
    after = unlearn_set.draw_sets(data, "memorised:0.05", 0, 0.3, memorization=found)
    assert by_heart[after.unlearn].mean() > 0.95
    # Who has not seen them finds them hard, and the control as well.
    apart = data.has_image & np.isin(np.arange(ROWS), sets.unseen)
    hard = found.easiness[after.unlearn[data.has_image[after.unlearn]]].mean()
    control = found.easiness[after.unseen[data.has_image[after.unseen]]].mean()
    assert abs(control - hard) < 0.5 * (found.easiness[apart].mean() - hard)
    assert "non-members" in memory.describe(data, found, after)


def test_a_row_does_not_help_to_guess_itself(data):
    """As many features as rows: whoever has seen a row knows its label."""
    draw = np.random.default_rng(1)
    store, _ = planted(data, np.ones(ROWS, bool))
    wide = draw.normal(size=(ROWS, 900)).astype(np.float32)
    store.columns["fresh"] = wide
    found, sets = look(data, store)
    shown = [rows[data.has_image[rows]] for rows in (sets.retain, sets.unseen)]
    trained, apart = (found.easiness[rows].mean() for rows in shown)
    assert abs(trained - apart) < 0.03


def test_rows_that_count_nowhere_have_zeros_and_numbers_are_probabilities(data):
    store, _ = planted(data, np.ones(ROWS, bool))
    found, sets = look(data, store)
    away = ~np.isin(np.arange(ROWS), np.concatenate([sets.retain, sets.unseen]))
    away |= ~data.has_image
    assert not found.score[away].any() and not found.easiness[away].any()
    assert not found.score[sets.unseen].any()
    assert found.easiness.min() >= 0 and found.easiness.max() <= 1
    assert np.abs(found.score).max() <= 1


def test_of_many_rows_a_part_is_fitted(data, monkeypatch):
    store, odd = planted(data, np.ones(ROWS, bool))
    whole, sets = look(data, store)
    monkeypatch.setattr(memory, "MAX_ROWS", 400)
    monkeypatch.setattr(memory, "CHUNK_ROWS", 64)
    part, _ = look(data, store)
    shown = sets.retain[data.has_image[sets.retain]]
    pair = part.score[shown], whole.score[shown]
    assert np.corrcoef(*pair)[0, 1] > 0.98
    again, _ = look(data, store)
    np.testing.assert_array_equal(again.score, part.score)


def test_an_original_that_says_no_numbers_is_named(data):
    store, _ = planted(data, np.ones(ROWS, bool))
    store.columns["original_image"][:] = np.nan
    with pytest.raises(UserError, match="original: logits are not finite"):
        look(data, store)
