"""Evaluation and recommendation through the index of top-k give what scoring the whole catalog gives."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cafe.config import Config
from cafe.evaluate import evaluate
from cafe.models import build
from cafe.recommend import INDEX_AFTER, Recommender, _best

CHOICES = [
    ("sasrec", {}),
    ("cafe", {}),
    ("cafe", {"join": "sum"}),
    ("cafe", {"join": "log_softmax", "compose_items": True}),
    ("cafe", {"join": "log_softmax", "compose_items": True, "cosine": 8.0, "calibrate": True}),
    ("sasrec", {"cosine": 8.0}),
    ("sasrec", {"compose_items": True, "shrinkage": 2.0}),
]


def model_of(dataset, model, choice):
    torch.manual_seed(0)
    net = build(Config.make(model, dim=16, heads=2, max_len=8, init_std=0.5, **choice), dataset).eval()
    net.intent_weight[0] = 0.7
    net.prior_weight.fill_(0.3)
    return net


@pytest.mark.parametrize(("model", "choice"), CHOICES)
def test_full_evaluation_counts_what_the_scores_say(dataset, model, choice):
    net = model_of(dataset, model, choice)
    weights = [] if model == "sasrec" else [(0.3, 0.1), (2.0, 0.0)]
    by_scores = SimpleNamespace(
        config=net.config, score=net.score, join=net.join
    )  # evaluate cannot know that it may use an index
    want = evaluate(by_scores, dataset, protocol="full", tried=weights)
    got = evaluate(net, dataset, protocol="full", tried=weights)
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


def equal_items(dataset, scale=1.0):
    """A model for which many items, some within and some beyond the k best, score the same in the last bit."""
    net = model_of(dataset, "sasrec", {})
    with torch.no_grad():
        net.item_embedding.copy_(net.item_embedding[torch.arange(len(net.item_embedding)) % 7] * scale)
    return net


def test_equal_scores_are_in_order_of_item_however_many_were_served(dataset):
    recommender = Recommender(equal_items(dataset), dataset)
    histories = [[item] for item in dataset.item_ids[:30].to_list()]
    few = [recommender.recommend([history], k=12)[0] for history in histories]
    assert "_index" not in vars(recommender)
    many = recommender.recommend(histories * 3, k=12)[:30]
    assert "_index" in vars(recommender)
    number = {item: i for i, item in enumerate(dataset.item_ids.to_list())}
    for a, b, history in zip(few, many, histories, strict=True):
        assert a.items == b.items
        places = [number[item] for item in a.items]
        same = [i for i in range(dataset.num_items) if i % 7 == places[0] % 7 and i != number[history[0]]]
        assert places[: len(same)] == same


@pytest.mark.parametrize("k", [1, 5, 40, 50])
def test_best_is_a_stable_sort(k):
    g = torch.Generator().manual_seed(0)
    scores = torch.randint(-2, 3, (20, 50), generator=g).float()
    scores[0], scores[1, 3:] = -torch.inf, -torch.inf
    want = scores.sort(dim=1, descending=True, stable=True)
    best, places = _best(scores, k)
    assert torch.equal(best, want.values[:, :k])
    assert torch.equal(places, want.indices[:, :k])


def test_popular_items_of_equal_count_are_in_order(dataset):
    counts = np.bincount(dataset.sequences.items, minlength=dataset.num_items)
    want = [dataset.item_ids[int(i)] for i in np.argsort(-counts, kind="stable")]
    net = build(Config.make("poprec", "paper"), dataset)
    recommender = Recommender(net, dataset)
    assert len(np.unique(counts)) < len(counts)
    assert recommender.recommend([[]], k=60)[0].items == want
    before = net.counts.clone()
    assert want[0] not in recommender.recommend([want[:1]], k=3)[0].items
    assert torch.equal(net.counts, before)  # what one user has had is not taken from the next
    order = [dataset.item_ids[int(i)] for i in np.argsort(-before.numpy(), kind="stable")]
    assert recommender.recommend([order[:1]], k=59)[0].items == order[1:]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("users", [1, INDEX_AFTER])
def test_scores_that_are_not_finite_are_refused(dataset, users, bad):
    net = model_of(dataset, "cafe", {"join": "sum"})
    with torch.no_grad():
        net.item_embedding[5] = bad
    with pytest.raises(ValueError, match=r"not finite.*cannot rank by"):
        Recommender(net, dataset).recommend([["i1"]] * users, k=3)


@pytest.mark.parametrize("change", ["in place", "replaced", "another model"])
def test_a_model_that_changed_is_indexed_again(dataset, change):
    net, other = (model_of(dataset, "sasrec", {}) for _ in range(2))
    with torch.no_grad():
        other.item_embedding.copy_(other.item_embedding.flip(0))
    histories = [["i1", "i2"], ["i7"]] * (INDEX_AFTER // 2)
    recommender = Recommender(net, dataset)
    before = recommender.recommend(histories, k=5)
    if change == "in place":
        net.load_state_dict(other.state_dict())
    elif change == "replaced":
        net.item_embedding = other.item_embedding
    else:
        recommender.model = other
    want = Recommender(other, dataset).recommend(histories, k=5)
    assert [x.items for x in recommender.recommend(histories, k=5)] == [x.items for x in want]
    assert [x.items for x in before] != [x.items for x in want]


@pytest.mark.parametrize("users", [1, INDEX_AFTER])
def test_all_that_was_had_is_left_out_though_the_model_reads_the_newest(dataset, users):
    net = model_of(dataset, "cafe", {})
    history = dataset.item_ids[:40].to_list()
    assert net.config.max_len < 40
    answer = Recommender(net, dataset).recommend([history] * users, k=60)[-1]
    assert sorted(answer.items) == sorted(dataset.item_ids[40:].to_list())
