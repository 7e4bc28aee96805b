"""The adapter: pandas in, pandas out, as RecTools' models have it."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_matrix

from cafe import adapter
from cafe.adapter import CAFEModel, LastValidates
from cafe.recommend import Recommender
from cafe.train import Interrupted

TINY = {"dim": 16, "max_len": 8, "epochs": 3, "batch_size": 32, "lr": 0.01}


@pytest.fixture(scope="module")
def frames(dataset):
    """Interactions in no order, and the items' intents."""
    user = np.repeat(np.arange(dataset.num_users), dataset.sequences.lengths)
    days = pd.to_datetime("2024-01-01") + pd.to_timedelta(np.arange(len(user)), unit="D")
    interactions = pd.DataFrame(
        {
            "user_id": dataset.user_ids.gather(user).to_list(),
            "item_id": dataset.item_ids.gather(dataset.sequences.items).to_list(),
            "weight": 1.0,
            "datetime": days,
        }
    ).sample(frac=1, random_state=0)
    intents = dataset.intent_ids.gather(dataset.item_intent).to_list()
    return interactions, pd.DataFrame({"item_id": dataset.item_ids.to_list(), "intent": intents})


@pytest.fixture(scope="module")
def fitted(frames):
    return CAFEModel("cafe", "paper", **TINY).fit(*frames)


def histories(interactions):
    return interactions.sort_values("datetime").groupby("user_id")["item_id"].apply(list).to_dict()


def test_recommendations_are_the_recommenders(frames, fitted):
    interactions, features = frames
    of = histories(interactions)
    users = list(of)[:5][::-1]
    found = fitted.recommend(np.array(users), k=4)
    assert found.columns.tolist() == ["user_id", "item_id", "score", "rank"]
    assert found["score"].dtype == np.float32
    assert found["user_id"].tolist() == [user for user in users for _ in range(4)]
    assert found["rank"].tolist() == [1, 2, 3, 4] * 5
    want = Recommender(fitted.model, fitted.dataset).recommend([of[user] for user in users], k=4)
    assert found["item_id"].tolist() == [item for answer in want for item in answer.items]
    np.testing.assert_allclose(found["score"], [score for answer in want for score in answer.scores], rtol=1e-6)
    intent_of = dict(zip(features["item_id"], features["intent"], strict=True))
    assert [intent_of[item] for item in found["item_id"]] == [intent for answer in want for intent in answer.intents]
    assert "rank" not in fitted.recommend(users, k=4, add_rank_col=False)


def test_viewed_items_are_filtered_or_not(frames, fitted):
    of = histories(frames[0])
    for viewed in (True, False):
        found = (
            fitted.recommend(list(of), k=60, filter_viewed=viewed).groupby("user_id")["item_id"].apply(set).to_dict()
        )
        overlap = [len(found[user] & set(of[user])) for user in of]
        assert max(overlap) == 0 if viewed else overlap == [len(set(of[user])) for user in of]
    few = list(of)[:5]  # scored without the index
    want = fitted.recommend(few, k=60, filter_viewed=False)
    answers = Recommender(fitted.model, fitted.dataset).recommend([of[user] for user in few], 60, filter_viewed=False)
    assert want["item_id"].tolist() == [item for answer in answers for item in answer.items]
    assert len(want) == 5 * fitted.dataset.num_items


def test_unknown_users(frames, fitted):
    known = frames[0]["user_id"].iloc[0]
    with pytest.raises(ValueError, match="1 users have no interaction with a known item, the first is 'nobody'"):
        fitted.recommend([known, "nobody"], k=2)
    with pytest.warns(UserWarning, match="nobody"):
        found = fitted.recommend([known, "nobody"], k=2, on_unsupported_targets="warn")
    assert found["user_id"].tolist() == [known] * 2
    nothing = fitted.recommend(["nobody"], k=2, on_unsupported_targets="ignore")
    assert nothing.columns.tolist() == ["user_id", "item_id", "score", "rank"]
    assert len(nothing) == 0


def test_other_interactions_have_cold_items_and_new_users(fitted):
    days = pd.to_datetime(["2024-03-02", "2024-03-01", "2024-03-03"])
    new = pd.DataFrame({"user_id": ["new", "new", "cold"], "item_id": ["i7", "i3", "what"], "datetime": days})
    found = fitted.recommend(["new"], new, k=5)
    want = Recommender(fitted.model, fitted.dataset).recommend([["i3", "i7"]], k=5)[0]
    assert found["item_id"].tolist() == want.items
    with pytest.raises(ValueError, match="'cold'"):
        fitted.recommend(["cold"], new, k=5)


def test_all_but_the_last_item_is_trained_on(dataset):
    ours = LastValidates.of(dataset)
    valid = ours.holdout("valid")
    test = dataset.holdout("test")
    np.testing.assert_array_equal(valid.answers, test.answers)
    np.testing.assert_array_equal(valid.histories.items, test.histories.items)
    for user, row in zip(valid.users, valid.histories, strict=True):
        np.testing.assert_array_equal(ours.train()[user], row)
    with pytest.raises(ValueError, match="'test'"):
        ours.holdout("test")


def test_a_rectools_dataset_is_known_by_what_it_has(frames):
    interactions, features = frames
    values = sorted(features["intent"].unique())
    columns = [values.index(intent) for intent in features["intent"]]
    matrix = csr_matrix((np.ones(len(columns)), (np.arange(len(columns)), np.array(columns) + 1)), dtype=np.float32)
    sparse = SimpleNamespace(
        names=(("price", "__is_direct_feature"), *(("category", value) for value in values)), get_sparse=lambda: matrix
    )
    double = SimpleNamespace(
        get_raw_interactions=lambda: interactions,
        item_features=sparse,
        item_id_map=SimpleNamespace(external_ids=features["item_id"].to_numpy()),
    )
    from_double = CAFEModel("cafe", "paper", **TINY | {"epochs": 1}).fit(double)
    from_frames = CAFEModel("cafe", "paper", **TINY | {"epochs": 1}).fit(interactions, features)
    assert from_double.dataset.num_intents == 6
    users = interactions["user_id"].unique()[:4]
    pd.testing.assert_frame_equal(from_double.recommend(users, double, k=3), from_frames.recommend(users, k=3))
    with pytest.raises(ValueError, match=r"intent_feature='colour': expected one of .*\['category'\]"):
        CAFEModel(intent_feature="colour").fit(double)


def test_mistakes_are_named(frames, fitted):
    interactions, features = frames
    model, numbers = CAFEModel("sasrec", "paper", **TINY), interactions.assign(user_id=range(len(interactions)))
    with pytest.raises(
        ValueError, match="the interactions have no column 'datetime'; their columns are user_id, item_id"
    ):
        model.fit(interactions.drop(columns="datetime"))
    with pytest.raises(ValueError, match="item_features have no column 'intent'"):
        model.fit(interactions, features.rename(columns={"intent": "category"}))
    with pytest.raises(ValueError, match="must be a pandas DataFrame or a RecTools Dataset, got int"):
        fitted.recommend(["u1"], 10)
    for column, missing in (("item_id", None), ("datetime", pd.NaT), ("user_id", pd.NA)):
        gap = interactions.assign(**{column: [missing, *interactions[column][1:]]})
        for call in (model.fit, lambda gap: fitted.recommend(["u1"], gap)):
            with pytest.raises(
                ValueError, match=f"column '{column}' of the interactions has no value in 1 rows, the first at index"
            ):
                call(gap)
    gap = numbers.assign(user_id=pd.array([None, *range(1, len(numbers))], dtype="Int64"))
    for call in (model.fit, lambda gap: fitted.recommend(["u1"], gap)):
        with pytest.raises(ValueError, match="column 'user_id' of the interactions has no value in 1 rows"):
            call(gap)
    with pytest.raises(ValueError, match=r"'noon \(or so\)' is not a timestamp .*ISO 8601 dates"):
        model.fit(interactions.assign(datetime="noon (or so)"))
    with pytest.raises(ValueError, match="column 'user_id' of the interactions has values of several types"):
        model.fit(interactions.assign(user_id=pd.Series([1, *["a"] * (len(interactions) - 1)], dtype=object).to_list()))
    with pytest.raises(ValueError, match="user_id is of type Int64; the model was fitted on ids of type String"):
        fitted.recommend([1], numbers)
    with pytest.raises(ValueError, match="not fitted"):
        model.recommend(["u1"])
    with pytest.raises(ValueError, match="items_to_recommend is not supported"):
        fitted.recommend(["u1"], items_to_recommend=["i1"])
    with pytest.raises(ValueError, match="on_unsupported_targets='no': expected raise, warn, ignore"):
        fitted.recommend(["u1"], on_unsupported_targets="no")
    for k in (0, 2.5, "3", True):
        with pytest.raises(ValueError, match=f"k={k!r}: expected a whole number, at least 1"):
            fitted.recommend(["u1"], k=k)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(frames):
    with pytest.raises(ValueError, match="device 'cuda': no GPU is usable here"):
        CAFEModel("sasrec", "paper", device="cuda", **TINY).fit(*frames)


def test_an_interrupted_fit_names_no_folder(frames, monkeypatch):
    def interrupted(*_, **__):
        raise Interrupted("Go on with: cafe train --resume --out /tmp/x")

    monkeypatch.setattr(adapter, "fit", interrupted)
    with pytest.raises(Interrupted, match=r"^interrupted; nothing of this training is kept: call fit again$"):
        CAFEModel("sasrec", "paper", **TINY).fit(*frames)
