import numpy as np
import polars as pl
import pytest
import torch

from cafe.data.dataset import Dataset, Sequences


def shop(users=120, items=60, intents=6, seed=0) -> Dataset:
    """A tiny shop with structure to learn: users stay in an intent and walk along its items."""
    rng = np.random.default_rng(seed)
    item_intent = np.sort(np.arange(items) % intents).astype(np.int32)
    per_intent = items // intents
    rows = []
    for _ in range(users):
        intent, place = rng.integers(intents), rng.integers(per_intent)
        row = []
        for _ in range(rng.integers(2, 12)):
            if rng.random() < 0.1:
                intent = rng.integers(intents)
            place = (place + 1) % per_intent
            row.append(intent * per_intent + place)
        rows.append(row)
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return Dataset(
        Sequences(indptr, np.concatenate(rows).astype(np.int32)),
        item_intent,
        pl.Series([f"u{i}" for i in range(users)]),
        pl.Series([f"i{i}" for i in range(items)]),
        pl.Series([f"c{i}" for i in range(intents)]),
    )


@pytest.fixture(scope="session")
def dataset() -> Dataset:
    return shop()


@pytest.fixture(scope="session")
def other_dataset() -> Dataset:
    return shop(seed=1)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)
