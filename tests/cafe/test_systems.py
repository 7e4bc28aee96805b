"""Each system of Table 2 learns a planted structure that the model without its idea cannot, on shops made for it."""

import numpy as np
import polars as pl
import pytest
import torch

from cafe.batches import Batches
from cafe.config import Config
from cafe.data.dataset import Dataset, Sequences
from cafe.evaluate import evaluate
from cafe.models import build
from cafe.models.bert4rec import BERT4Rec
from cafe.recommend import Recommender
from cafe.train import make_optimizers, train_step

SMALL = {"dim": 16, "max_len": 8, "batch_size": 32, "dropout": 0.0, "lr": 0.01, "loss": "full", "mask_prob": 0.2}


def make_shop(rows, item_intent) -> Dataset:
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return Dataset(
        Sequences(indptr, np.concatenate(rows).astype(np.int32)),
        np.asarray(item_intent, np.int32),
        *(pl.Series(range(count)) for count in (len(rows), len(item_intent), max(item_intent) + 1)),
    )


def trained(model, dataset, steps, change=lambda net: None, **options):
    torch.manual_seed(0)
    net = build(Config.make(model, **SMALL | options), dataset)
    change(net)
    batches, optimizers = Batches(net.config, dataset), make_optimizers(net)
    for step in range(steps):
        order = batches.order(step // len(batches))
        size = net.config.batch_size
        rows = order[step % len(batches) * size :][:size]
        train_step(net, optimizers, batches(rows, step))
    optimizers.tables.flush()
    return net.eval()


def hits(net, dataset) -> float:
    return evaluate(net, dataset, protocol="full").mean("hr@1", "item")


def test_ssept_learns_what_a_user_likes():
    """Everybody takes 0 and then their own favourite, and models read one item: after 0 only the user tells."""
    favourite = 1 + np.arange(60) % 20
    dataset = make_shop([[0, f] * 4 for f in favourite], [0] * 21)
    options = {"max_len": 1, "steps": 150, "sse_user": 0.3, "user_dim": 16}
    assert hits(trained("sasrec", dataset, **options), dataset) < 0.15  # 1 / 20 by chance
    net = trained("ssept", dataset, **options)
    assert hits(net, dataset) > 0.9
    recommender, users = Recommender(net, dataset), list(range(60))
    for _ in range(2):  # by scoring the catalog, then by the index
        named = recommender.recommend([[0]] * 60, k=1, users=users)
        assert np.mean([answer.items == [favourite[user]] for user, answer in zip(users, named, strict=True)]) > 0.9
        unknown = recommender.recommend([[0]] * 3, k=1, users=[None, "nobody", 60])
        assert unknown == recommender.recommend([[0]] * 3, k=1)
    with pytest.raises(ValueError, match="expected one user id for each of 2 histories"):
        recommender.recommend([[0], [0]], users=[1])


def fill(net, dataset) -> float:
    """The share of hidden items named, each first item of a pair hidden in turn."""
    right = []
    for row in range(30):
        items = torch.from_numpy(dataset.sequences[row][:6]).long()
        tokens = net.history(items, torch.tensor([0, 6], dtype=torch.int32))
        tokens.items, tokens.cu_seqlens, tokens.max_seqlen = items, torch.tensor([0, 6], dtype=torch.int32), 6
        tokens.sequence, tokens.targets = torch.zeros(6, dtype=torch.long), torch.tensor([2])
        state = net.encode(tokens)[0][2]
        right.append(int((net.item_embedding @ state).argmax()) == int(items[2]))
    return float(np.mean(right))


def test_bert4rec_reads_what_comes_after_a_gap(monkeypatch):
    """Pairs (x, x + 15) with x at random: a hidden x follows from its right neighbour only."""
    rng = np.random.default_rng(0)
    first = rng.integers(15, size=(200, 4))
    dataset = make_shop(np.stack([first, first + 15], 2).reshape(200, 8), [0] * 30)
    options = {"steps": 300, "mask_prob": 0.3}
    assert fill(trained("bert4rec", dataset, **options), dataset) > 0.9
    monkeypatch.setattr(BERT4Rec, "causal", True)
    assert fill(trained("bert4rec", dataset, **options), dataset) < 0.4


def no_positions(net):
    net.item_encoder.position.data.zero_()
    net.item_encoder.position.requires_grad_(False)


@pytest.mark.parametrize("local", [None, "window", "initial", "adapt"])
def test_locker_looks_near_by(local):
    """The next item follows from the newest one, behind jumps; positions are taken away, so that only local heads know which it is."""
    rng = np.random.default_rng(0)
    follows, rows = rng.permutation(20), []
    for _ in range(300):
        row = [rng.integers(20)]
        while len(row) < 8:
            row.append(follows[row[-1]] if len(row) > 4 else rng.integers(20))
        rows.append(row)
    dataset = make_shop(rows, [0] * 20)
    options = {"steps": 300, "heads": 2, "change": no_positions, "mask_last": 1.0, "local_width": 1}
    if local is None:
        assert hits(trained("bert4rec", dataset, **options), dataset) < 0.6
    else:
        assert hits(trained("locker", dataset, local=local, **options), dataset) > 0.8


CARRIERS, FRESH = 60, 200


def intent_shop() -> Dataset:
    """Carrier items of four intents, each followed by the answer of its intent; the last carrier is new to training."""
    rng = np.random.default_rng(0)
    intents = rng.integers(4, size=CARRIERS + FRESH)
    rows = []
    for user in range(FRESH):
        seen = rng.integers(CARRIERS, size=2)
        carriers = [*seen, CARRIERS + user]
        rows.append(np.array([[4 + c, intents[c]] for c in carriers]).ravel())
    return make_shop(rows, [*range(4, 8), *intents])


@pytest.mark.parametrize(
    ("model", "reads", "steps"),
    [
        ("sasrec", False, 600),
        ("fdsa", True, 600),
        ("bert4rec", False, 300),
        ("bertf", True, 300),
        ("lockerf", True, 300),
    ],
)
def test_fusion_learns_a_rule_of_intents(model, reads, steps):
    dataset = intent_shop()
    rate = hits(trained(model, dataset, steps=steps, mask_last=0.5), dataset)
    assert rate > 0.9 if reads else rate < 0.6


def key_shop(rng, pool, users, behind) -> list[list[int]]:
    """Four items of which one has the intent of a key; it is taken again."""
    keys, others = pool[::4], np.setdiff1d(pool, pool[::4])
    rows = []
    for _ in range(users):
        key = rng.choice(keys)
        rows.append([*rng.permutation([key, *rng.choice(others, 3, replace=False)]), key, *behind])
    return rows


def fixed_items(net):
    net.item_embedding.requires_grad_(False)


def test_nova_attends_by_intent():
    """The item of the key's intent is taken again. Items' vectors are random and fixed: among items that are new to training the
    intent alone tells which."""
    rng = np.random.default_rng(0)
    known, fresh = np.arange(200), np.arange(200, 400)
    dataset = make_shop(key_shop(rng, known, 600, [0, 1]), (np.arange(400) % 4 == 0).astype(int))
    cases = np.array(key_shop(rng, fresh, 200, []))
    candidates = torch.from_numpy(cases[:, :4])
    options = {"steps": 300, "mask_last": 1.0, "dim": 32, "lr": 0.003, "init_std": 0.2, "scale_embeddings": False}
    right = {}
    for model in ("bert4rec", "nova"):
        net = trained(model, dataset, change=fixed_items, **options)
        scores = net.score(candidates.flatten(), torch.arange(0, 801, 4, dtype=torch.int32), candidates).item
        right[model] = float((cases[np.arange(200), scores.argmax(1)] == cases[:, 4]).mean())
    assert right["nova"] > 0.7 > 0.45 > right["bert4rec"], right
