"""What the options of batches, validation and evaluation do, each against a plain account of it."""

import json
import threading
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from scipy import stats

from cafe.batches import Batches, prefetch
from cafe.checkpoint import load_checkpoint
from cafe.config import Config
from cafe.data.dataset import Dataset, Sequences
from cafe.evaluate import evaluate, joint_name
from cafe.models import build
from cafe.train import fit
from cafe.validate import JOINT_WEIGHTS, validate

P_VALUE = 1e-3  # a right sampler fails one seed in a thousand; the seeds are fixed, so what passes once always passes
TINY = {"dim": 16, "max_len": 8, "batch_size": 32}


def of_rows(rows, items, intents=2):
    """A dataset of these histories; item i has intent i % intents."""
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    ids = [pl.Series([f"{kind}{i}" for i in range(n)]) for kind, n in (("u", len(rows)), ("i", items), ("c", intents))]
    return Dataset(
        Sequences(indptr, np.concatenate(rows).astype(np.int32)), (np.arange(items) % intents).astype(np.int32), *ids
    )


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shared", ["batch", "token"])
def test_negatives_follow_popularity_to_the_power_alpha(shared, alpha):
    """Chi-square over 8 items that nobody to be trained on this batch has had, but for two that they have all had."""
    others = [[0, 1, *[item] * 2 ** (item % 4), 0, 1] for item in range(2, 10)]
    data = of_rows([[0, 1, 0, 1, 0], *others], 10)
    batches = Batches(Config.make("sasrec", negatives=8000, negatives_shared=shared, negatives_alpha=alpha), data)
    drawn = np.bincount(batches(np.array([0]), step=1).negatives.flatten(), minlength=10)
    popularity = data.train_counts() ** alpha
    if shared == "token":
        assert drawn[:2].sum() == 0
        popularity[:2] = 0
    observed, weights = drawn[popularity > 0], popularity[popularity > 0]
    assert stats.chisquare(observed, weights / weights.sum() * observed.sum()).pvalue > P_VALUE
    for other in {0.0, 0.5, 1.0} - {alpha}:
        weights = data.train_counts()[popularity > 0] ** other
        assert stats.chisquare(observed, weights / weights.sum() * observed.sum()).pvalue < 1e-9


def test_a_user_who_had_all_there_is_still_gets_negatives():
    """User 0 has had every item of `train`, and every intent; user 1 has not. Item 5 is only ever held out."""
    data = of_rows([[0, 1, 2, 3, 4, 0, 1], [0, 2, 0, 5, 5]], 6)
    options = {"negatives": 200, "negatives_alpha": 1.0}
    batch = Batches(Config.make("cafe", **options), data)(np.array([0, 1]), step=0)
    first = batch.sequence == 0
    assert set(batch.negatives[first].flatten().tolist()) == {0, 1, 2, 3, 4}
    assert set(batch.negatives[~first].flatten().tolist()) == {1, 3, 4}
    assert set(batch.intent_negatives[first].flatten().tolist()) <= {0, 1}
    assert set(batch.intent_negatives[~first].flatten().tolist()) == {1}


def test_prefetch_keeps_the_order_and_works_ahead_in_a_thread():
    threads, ahead, made = set(), threading.Event(), []

    def make(number):
        threads.add(threading.current_thread())
        made.append(number)
        if number == 13:
            ahead.set()
        return number * number

    numbers = range(10, 30)
    source = prefetch(make, numbers, depth=4)
    assert next(source) == 100
    assert ahead.wait(10), "nothing was made ahead of what was taken"
    assert len(made) <= 1 + 4 + 1  # taken, in the queue, waiting to enter it
    assert list(source) == [number**2 for number in numbers[1:]]
    assert made == list(numbers)
    (worker,) = threads
    assert worker is not threading.current_thread()
    assert not worker.is_alive()


def test_prefetch_passes_on_an_error_after_what_was_made_before_it():
    def make(number):
        if number == 2:
            raise LookupError("no such row")
        return number

    taken, errors = [], []

    def read():
        try:
            for value in prefetch(make, range(5)):
                taken.append(value)
        except LookupError as error:
            errors.append(str(error))

    reader = threading.Thread(target=read, daemon=True)  # without the error it would wait for ever
    reader.start()
    reader.join(5)
    assert taken == [0, 1]
    assert errors == ["no such row"]
    assert "cafe-batches" not in {thread.name for thread in threading.enumerate()}


def test_prefetch_stops_with_who_reads_it():
    source = prefetch(lambda number: number, range(10**9))
    next(source)
    source.close()
    assert "cafe-batches" not in {thread.name for thread in threading.enumerate()}


@pytest.fixture(scope="module")
def model(dataset):
    torch.manual_seed(0)
    return build(Config.make("cafe", **TINY, init_std=0.5), dataset).eval()


@pytest.mark.parametrize("protocol", ["aligned", "full"])
@pytest.mark.parametrize("split", ["valid", "test"])
def test_max_users_is_a_sample_with_the_candidates_of_the_whole(dataset, model, split, protocol):
    options = {"split": split, "protocol": protocol, "num_negatives": 20, "seed": 3}
    whole, some = (evaluate(model, dataset, **options, max_users=users) for users in (None, 30))
    assert np.array_equal(whole.users, dataset.holdout(split).users)
    assert len(some.users) == 30
    assert some.users.max() > 60  # not the first 30
    place = np.searchsorted(whole.users, some.users)
    for score in ("item", "joint"):
        assert np.array_equal(whole.greater[score][place], some.greater[score])
    fewer = evaluate(model, dataset, **options, max_users=10)
    assert set(fewer.users) < set(some.users)
    assert evaluate(model, dataset, **options, max_users=10**6).candidates == whole.candidates


def test_split_and_seed_choose_users_and_candidates(dataset, model):
    results = {
        (split, seed): evaluate(model, dataset, split, num_negatives=20, seed=seed, max_users=30)
        for split in ("valid", "test")
        for seed in (0, 1)
    }
    assert len({result.candidates for result in results.values()}) == 4
    assert len({tuple(result.users) for result in results.values()}) == 4
    for (split, seed), result in results.items():
        assert (result.split, result.seed) == (split, seed)
        assert evaluate(model, dataset, split, num_negatives=20, seed=seed, max_users=30).values("mrr").tolist() == (
            result.values("mrr").tolist()
        )
        lengths = dataset.sequences.lengths[result.users] - (2 if split == "valid" else 1)
        assert np.array_equal(result.history_length, lengths)


@pytest.mark.parametrize("protocol", ["aligned", "full"])
def test_calibration_keeps_the_weight_that_validates_best(dataset, model, protocol):
    """Each weight set by hand, evaluated as usual; the best are stored for their ranking and the other's stay."""
    net = build(Config.make("cafe", **TINY, calibrate=True, join="log_softmax", valid_users=70), dataset)
    net.load_state_dict(model.state_dict())
    place = ("full", "aligned").index(protocol)

    def by_hand(weights):
        net.intent_weight[place] = weights[0]
        net.prior_weight.fill_(weights[1])
        return evaluate(net, dataset, "valid", protocol, max_users=70).mean("ndcg@10", "joint")

    best = (0.0, 0.0)
    for axis in (0, 1, 0) if protocol == "full" else (0,):
        tried = [(x, best[1]) if axis == 0 else (best[0], x) for x in JOINT_WEIGHTS[axis]]
        scores = [by_hand(weights) for weights in tried]
        assert len(set(scores)) > 3
        best = tried[int(np.argmax(scores))]
    assert best[0] != 1.0
    net.intent_weight[:], at_7 = 7.0, net.prior_weight.fill_(7.0).item()
    found = validate(net, dataset, protocol)
    assert (found["intent_weight"], found["prior_weight"]) == best
    assert found["ndcg@10"] == pytest.approx(max(scores), abs=1e-9)
    assert net.intent_weight[place] == pytest.approx(best[0])
    assert net.intent_weight[1 - place] == 7.0
    assert net.prior_weight == pytest.approx(best[1] if protocol == "full" else at_7)
    assert evaluate(net, dataset, "valid", protocol, max_users=70).mean("ndcg@10", "joint") == max(scores)
    plain = build(Config.make("cafe", **TINY, join="log_softmax", valid_users=70), dataset)
    plain.load_state_dict(model.state_dict())
    assert validate(plain, dataset, protocol)["ndcg@10"] == pytest.approx(by_hand((1.0, 0.0)), abs=1e-9)
    assert plain.intent_weight.tolist() == [1.0, 1.0]


def test_calibration_goes_by_ndcg(dataset, monkeypatch):
    """Of a model whose best weight is 0.3 by NDCG@10 and 0.8 by another metric."""
    best = {"ndcg@10": 0.3, "hr@10": 0.8}
    names = {joint_name((weight, 0.0)): weight for weight in JOINT_WEIGHTS[0]}
    ranked = SimpleNamespace(mean=lambda metric, score: -abs(names[score] - best[metric]))
    monkeypatch.setattr("cafe.validate.evaluate", lambda *_, **__: ranked)
    found = validate(build(Config.make("cafe", **TINY, calibrate=True), dataset), dataset, "aligned")
    assert found["intent_weight"] == 0.3


@pytest.mark.filterwarnings("ignore:authors is an artefact")
@pytest.mark.parametrize("join", ["item", "log_sigmoid"])
def test_without_joint_inference_nothing_is_added_to_the_item_score(dataset, model, join):
    net = build(Config.make("cafe", **TINY, join=join), dataset)
    net.load_state_dict(model.state_dict())
    for protocol in ("aligned", "full", "authors"):
        found = evaluate(net, dataset, protocol=protocol)
        same = np.array_equal(found.greater["joint"], found.greater["item"])
        assert same == (join == "item"), protocol


def test_prior_by_hand(dataset):
    """In the whole catalog the joint score has b log P(v | c), of training's counts plus 0.1; among drawn candidates it has not."""
    net = build(Config.make("cafe", **TINY, calibrate=True, join="log_softmax"), dataset)
    counts = np.bincount(dataset.train().items, minlength=dataset.num_items) + 0.1
    of_intent = np.bincount(dataset.item_intent, counts)
    prior = np.log(counts / of_intent[dataset.item_intent])
    item, intent = torch.randn(3, dataset.num_items), torch.randn(3, dataset.num_items)
    net.prior_weight.fill_(0.4)
    torch.testing.assert_close(net.join(item, intent), item + intent + 0.4 * torch.from_numpy(prior).float())
    torch.testing.assert_close(
        net.join(item, intent, (2.0, 3.0)), item + 2 * intent + 3 * torch.from_numpy(prior).float()
    )
    torch.testing.assert_close(net.join(item[:, :4], intent[:, :4], protocol="aligned"), item[:, :4] + intent[:, :4])


@pytest.mark.parametrize("calibrate", [True, False])
def test_a_fit_validates_when_and_on_whom_it_is_told(dataset, tmp_path, monkeypatch, calibrate):
    asked = []

    def spy(*arguments, **options):
        asked.append((*arguments[2:4], options["max_users"]))
        result = evaluate(*arguments, **options)
        assert len(result.users) == min(options["max_users"], len(dataset.holdout("valid")))
        return result

    monkeypatch.setattr("cafe.validate.evaluate", spy)
    options = {"valid_every": 2, "valid_users": 40, "epochs": 5, "calibrate": calibrate, "valid_protocol": "full"}
    net = fit(Config.make("cafe", **TINY, lr=1e-2, **options), dataset, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if "valid" in line] == [1, 3, 4]  # every second, and the last
    fits = 3 if calibrate else 1
    assert asked == [("valid", "full", 40)] * 3 * fits + [("valid", "aligned", 200)] * calibrate
    tensors, state = load_checkpoint(tmp_path / "run" / "best.safetensors")
    assert torch.equal(tensors["intent_weight"], net.intent_weight)
    if not calibrate:
        assert net.intent_weight.tolist() == [1.0, 1.0]
        return
    asked.clear()
    fit(net.config, dataset, tmp_path / "run", resume=True)
    assert not asked  # what is finished is not calibrated again
    monkeypatch.undo()
    stored = net.intent_weight.clone()
    assert stored[0].item() == pytest.approx(state["intent_weight"])
    assert stored[1].item() == pytest.approx(state["calibrated"]["aligned"]["intent_weight"])
    for place, (protocol, users) in enumerate((("full", 40), ("aligned", 200))):
        prior = float(net.prior_weight) if protocol == "full" else 0.0
        tried = [(weight, prior) for weight in JOINT_WEIGHTS[0]]
        found = evaluate(net, dataset, "valid", protocol, max_users=users, tried=tried)
        scores = [found.mean("ndcg@10", joint_name(weights)) for weights in tried]
        assert stored[place].item() == pytest.approx(tried[int(np.argmax(scores))][0])
