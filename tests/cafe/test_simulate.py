"""Simulated shops: the same bytes for a seed, exact counts, and the structure that the help promises."""

import numpy as np
import pytest

from cafe.data.simulate import NEAR, PRESETS, REACH, STAY, Shop, draw, simulate

SHOPS = [
    PRESETS["demo"],
    PRESETS["sparse"],
    Shop(53_702, 19_102, 14, 1_312),
    Shop(100_000, 900, 300, 310),
    Shop(30, 10, 10, 10),
]


@pytest.mark.parametrize("shop", SHOPS)
def test_counts_are_exact(shop):
    user, item, item_intent = draw(shop, seed=3)
    assert len(user) == len(item) == shop.interactions
    assert len(item_intent) == shop.items
    assert np.array_equal(np.unique(user), np.arange(shop.users))
    assert np.array_equal(np.unique(item), np.arange(shop.items))
    assert np.array_equal(np.unique(item_intent[item]), np.arange(shop.intents))
    assert np.bincount(user).min() >= 3


def test_structure_is_there():
    user, item, item_intent = draw(PRESETS["tmall"].__class__(200_000, 4_000, 80, 3_000), seed=0)
    same_user = user[1:] == user[:-1]
    intent = item_intent[item]
    stayed = (intent[1:] == intent[:-1])[same_user]
    assert STAY < stayed.mean() < STAY + 0.1
    step = np.diff(item)[same_user][stayed]
    near = ((step >= 1) & (step <= REACH)).mean()
    assert NEAR - 0.15 < near < NEAR + 0.1
    counts = np.sort(np.bincount(item))[::-1]
    assert counts[: len(counts) // 100].sum() > 0.05 * counts.sum()  # equal popularity would give 0.013


def test_bytes_follow_the_seed(tmp_path):
    files = {name: simulate("demo", tmp_path / name, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))}
    for kind in ("interactions", "items"):
        assert files["a"][kind].read_bytes() == files["b"][kind].read_bytes()
    assert files["a"]["interactions"].read_bytes() != files["c"]["interactions"].read_bytes()


def test_unknown_preset(tmp_path):
    with pytest.raises(ValueError, match="expected one of demo, sparse, amazon, tmall"):
        simulate("huge", tmp_path)


@pytest.mark.parametrize(
    ("preset", "table"),
    [("amazon", (5_370_171, 1_910_226, 1_392, 131_248)), ("tmall", (14_460_516, 1_788_758, 9_999, 131_086))],
)
def test_the_large_presets_have_the_counts_of_table_1(preset, table):
    shop = PRESETS[preset]
    assert (shop.interactions, shop.items, shop.intents, shop.users) == table
    assert shop.parquet
