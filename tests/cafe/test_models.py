"""Models against their equations written out, on padded single sequences."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cafe.batches import Batches
from cafe.config import Config
from cafe.models import blocks, build
from cafe.train import make_optimizers, train_step
from cafe_kernels import DistanceMaskedAttention

SMALL = {"dim": 16, "heads": 2, "max_len": 8, "batch_size": 16, "dropout": 0.0}
CHOICES = [
    {},
    {"block": "query_norm", "attention_bias": True, "score_scale": "sqrt_head_dim", "scale_embeddings": True},
    {"mask_reads": "values", "qk_positions": True},
    {"distance_mask": False, "compose_items": True},
    {"loss": "softmax", "negatives": 9, "negatives_shared": "batch", "intent_loss": "softmax", "join": "log_softmax"},
    {"loss": "softmax", "negatives": 3, "negatives_alpha": 0.5},
]


def histories(dataset, count):
    rows = dataset.holdout("test").histories.take(np.arange(count), last=8)
    return torch.from_numpy(rows.items).long(), torch.from_numpy(rows.indptr).int()


@pytest.mark.parametrize("model", ["poprec", "sasrec", "cafe"])
@pytest.mark.parametrize("choice", CHOICES)
def test_scores_do_not_depend_on_batching_or_candidates(dataset, model, choice):
    torch.manual_seed(0)
    net = build(Config.make(model, **SMALL, **choice), dataset).eval()
    items, cu = histories(dataset, 9)
    full = net.score(items, cu)
    candidates = torch.randint(dataset.num_items, (9, 5), generator=torch.Generator().manual_seed(1))
    some = net.score(items, cu, candidates)
    torch.testing.assert_close(some.item, full.item.gather(1, candidates))
    for row in range(9):
        alone = net.score(items[cu[row] : cu[row + 1]], torch.tensor([0, cu[row + 1] - cu[row]], dtype=torch.int32))
        torch.testing.assert_close(alone.item[0], full.item[row], rtol=1e-4, atol=1e-5)
    if full.intent is not None:
        torch.testing.assert_close(some.intent, full.intent.gather(1, net.item_intent[candidates]))


def test_no_token_sees_what_comes_after_it(dataset):
    torch.manual_seed(0)
    net = build(Config.make("cafe", **SMALL), dataset).eval()
    states = []
    for tail in ([3, 4], [5, 6]):
        items = torch.tensor([1, 2, *tail])
        state, coarse = net.encode(
            items, torch.tensor([0, 4], dtype=torch.int32), 4, torch.zeros(4, dtype=torch.long), 0
        )
        states.append(torch.cat([state, coarse], 1))
    torch.testing.assert_close(states[0][:2], states[1][:2])
    assert not torch.allclose(states[0][2:], states[1][2:])


@pytest.mark.parametrize("model", ["sasrec", "cafe"])
def test_dropout_differs_between_steps_and_layers(dataset, model, monkeypatch):
    """Dropout outside the attention, with the attention's held fixed; then that of the attention weights alone."""
    torch.manual_seed(0)
    net = build(Config.make(model, **SMALL | {"dropout": 0.5, "layers": 2}), dataset).train()
    items, cu = histories(dataset, 9)
    sequence = torch.repeat_interleave(torch.arange(9), cu.diff().long())
    used, held = [], {}
    packed = DistanceMaskedAttention.packed

    def spy(self, *args, **options):
        used.append((options["seed"], options["offset"]))
        return packed(self, *args, **options | held)

    monkeypatch.setattr(DistanceMaskedAttention, "packed", spy)
    for fixed, masks in (({"offset": 0}, blocks.dropout_masks), ({}, lambda shape, *rest: torch.ones(shape))):
        held.clear()
        held.update(fixed)
        monkeypatch.setattr(blocks, "dropout_masks", masks)
        first, second, again = (net.encode(items, cu, 8, sequence, step)[0] for step in (5, 6, 5))
        assert torch.equal(first, again)
        assert not torch.allclose(first, second, atol=1e-3)
    encoders = 2 if model == "cafe" else 1
    a_step = 2 * encoders
    assert len(set(used[: 2 * a_step])) == 2 * a_step  # layers, encoders and steps: none shares its mask
    assert used[2 * a_step : 3 * a_step] == used[:a_step]


def test_cafe_is_the_sum_of_its_encoders_and_ranks_by_the_product(dataset):
    """Eq. 7, 8 and 10, from the parts."""
    torch.manual_seed(0)
    net = build(Config.make("cafe", **SMALL), dataset).eval()
    items, cu = histories(dataset, 1)
    sequence = torch.zeros(len(items), dtype=torch.long)
    fine = net.item_encoder(net.item_embedding[items], cu, len(items), sequence, 0)[-1]
    coarse = net.intent_encoder(net.intent_embedding[net.item_intent[items]], cu, len(items), sequence, 0)[-1]
    product = (
        torch.sigmoid(net.item_embedding @ (fine + coarse))
        * torch.sigmoid(net.intent_embedding @ coarse)[net.item_intent]
    )
    scores = net.score(items, cu)
    torch.testing.assert_close(net.join(scores.item, scores.intent[:, net.item_intent])[0].exp(), product)


def test_batches_feed_each_token_its_successor_and_no_negative_of_the_history(dataset):
    for shared in ("token", "batch"):
        config = Config.make("cafe", **SMALL, negatives=7, negatives_shared=shared)
        batches = Batches(config, dataset)
        rows = batches.order(0)[:16]
        batch = batches(rows, step=3)
        for number, row in enumerate(rows):
            begin, end = batch.cu_seqlens[number : number + 2].tolist()
            expected = dataset.train()[row][-9:]
            assert batch.items[begin:end].tolist() == expected[:-1].tolist()
            assert batch.positives[begin:end].tolist() == expected[1:].tolist()
            history = set(dataset.train()[row].tolist())
            if shared == "token":
                assert not history & set(batch.negatives[begin:end].flatten().tolist())
                seen_intents = set(dataset.item_intent[list(history)].tolist())
                if len(seen_intents) < dataset.num_intents:
                    assert not seen_intents & set(batch.intent_negatives[begin:end].flatten().tolist())
            else:
                assert batch.ignore[number].tolist() == [n in history for n in batch.negatives.tolist()]
        again = batches(rows, step=3)
        assert torch.equal(batch.negatives, again.negatives)
        assert not torch.equal(batch.negatives, batches(rows, step=4).negatives)


def test_held_out_items_may_be_negatives(dataset):
    """Excluding them would tell the model what to expect."""
    batches = Batches(Config.make("sasrec", **SMALL), dataset)
    held_out = dataset.sequences.lengths >= 3
    row = int(np.flatnonzero(held_out)[0])
    answer = dataset.sequences[row][-1]
    assert answer not in batches.seen[row] or answer in dataset.train()[row]


@pytest.mark.parametrize("model", ["sasrec", "cafe"])
@pytest.mark.parametrize("choice", CHOICES)
def test_every_parameter_learns_and_the_loss_falls(dataset, model, choice):
    torch.manual_seed(0)
    config = Config.make(model, **SMALL, **choice, lr=1e-2)
    net, batches = build(config, dataset), Batches(config, dataset)
    optimizers = make_optimizers(net)
    rows, losses = batches.order(0)[:32], []
    touched = set()
    for step in range(40):
        losses.append(train_step(net, optimizers, batches(rows, step)))
        touched |= {name for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched == {name for name, _ in net.named_parameters()}
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 0}, "at least 1"),
        ({"dim": 10, "heads": 4}, "multiple"),
        ({"dropout": 1.0}, "share"),
        ({"loss": "hinge"}, "expected one of 'bce', 'softmax'"),
        ({"epochs": 2.5}, "type int"),
        ({"lr": -1}, "positive"),
        ({"wings": 2}, "no such option: wings"),
    ],
)
def test_wrong_configuration(change, message):
    with pytest.raises(ValueError, match=message):
        Config.make("cafe", **change)


def test_sampled_softmax_by_hand(dataset):
    """One batch-shared draw: cross entropy of s - log q over the positive and the negatives the user has not had."""
    model = build(Config.make("sasrec", "best", dim=8, max_len=8, negatives=5, dropout=0.0), dataset)
    torch.manual_seed(0)
    positives, negatives = torch.tensor([3, 4]), torch.tensor([7, 3, 9, 1, 1])
    log_q = torch.randn(dataset.num_items)
    ignore = torch.tensor([[False, True, False, False, False]])
    state = torch.randn(2, 8)
    batch = SimpleNamespace(
        positives=positives, negatives=negatives, positive_log_q=log_q[positives], negative_log_q=log_q[negatives],
        ignore=ignore, sequence=torch.zeros(2, dtype=torch.long),
    )  # fmt: skip
    table = model.embed(torch.arange(dataset.num_items))
    expected = 0.0
    for t in range(2):
        corrected = table @ state[t] - log_q
        kept = [7, 9, 1, 1]
        total = sum(corrected[i].exp() for i in [int(positives[t]), *kept])
        expected += -(corrected[positives[t]].exp() / total).log().item() / 2
    assert abs(model.item_loss(state, batch).item() - expected) < 1e-5
