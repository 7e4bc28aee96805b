"""Evaluation and recommendation through the index of top-k give what scoring the whole catalog gives."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cafe.config import Config
from cafe.evaluate import evaluate
from cafe.models import build
from cafe.recommend import INDEX_AFTER, Recommender

CHOICES = [
    ("sasrec", {}),
    ("cafe", {}),
    ("cafe", {"join": "sum"}),
    ("cafe", {"join": "log_softmax", "compose_items": True}),
]


def model_of(dataset, model, choice):
    torch.manual_seed(0)
    net = build(Config.make(model, dim=16, heads=2, max_len=8, init_std=0.5, **choice), dataset).eval()
    net.intent_weight[0] = 0.7
    return net


@pytest.mark.parametrize(("model", "choice"), CHOICES)
def test_full_evaluation_counts_what_the_scores_say(dataset, model, choice):
    net = model_of(dataset, model, choice)
    weights = [] if model == "sasrec" else [0.3, 2.0]
    by_scores = SimpleNamespace(
        config=net.config, score=net.score, join=net.join
    )  # evaluate cannot know that it may use an index
    want = evaluate(by_scores, dataset, protocol="full", intent_weights=weights)
    got = evaluate(net, dataset, protocol="full", intent_weights=weights)
    assert want.greater.keys() == got.greater.keys()
    assert len(want.greater) == 1 if model == "sasrec" else 4
    for name in want.greater:
        assert want.greater[name].max() > 5
        np.testing.assert_array_equal(want.greater[name], got.greater[name])
        np.testing.assert_array_equal(want.equal[name], got.equal[name])


@pytest.mark.parametrize(("model", "choice"), CHOICES)
def test_recommendations_for_many_are_those_for_few(dataset, model, choice):
    net = model_of(dataset, model, choice)
    histories = [dataset.item_ids[dataset.sequences[u].astype(np.int64)].to_list() for u in range(INDEX_AFTER)]
    histories[3] = []
    indexed, k = Recommender(net, dataset), dataset.num_items
    by_index = indexed.recommend(histories, k=k)
    assert "_index" in vars(indexed)
    few = Recommender(net, dataset)
    for start in range(0, INDEX_AFTER - 4, 30):
        want = few.recommend(histories[start : start + 30], k=k)
        assert "_index" not in vars(few)
        for a, b in zip(want, by_index[start : start + 30], strict=True):
            assert a.items == b.items
            assert a.intents == b.intents
            assert a.top_intents == b.top_intents
            assert a.popular == b.popular
            np.testing.assert_allclose(a.scores, b.scores, rtol=1e-5, atol=2e-5)
