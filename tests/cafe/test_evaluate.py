"""Protocols, candidates and results, on small data sets and hand-made models."""

import doctest
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from rich.console import Console
from torch.nn.functional import logsigmoid

import cafe.evaluate
from cafe.candidates import draw_candidates, draw_negatives, other_intents
from cafe.data.dataset import Dataset, Sequences
from cafe.evaluate import count_above, evaluate
from cafe.evaluation import BUCKETS, Evaluation, compare
from cafe.metrics import METRICS
from cafe.tables import print_comparison, print_evaluation

pytestmark = pytest.mark.filterwarnings("ignore:authors is an artefact")


def make_dataset(rows, num_items=None, intents=None):
    rows = [np.asarray(row, np.int32) for row in rows]
    num_items = num_items or int(max(row.max() for row in rows)) + 1
    intents = np.asarray(np.arange(num_items) % 7 if intents is None else intents, np.int32)
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return Dataset(
        Sequences(indptr, np.concatenate(rows)),
        intents,
        pl.Series(np.arange(len(rows))),
        pl.Series(np.arange(num_items)),
        pl.Series(np.arange(int(intents.max()) + 1)),
    )


@pytest.fixture(scope="module")
def dataset():
    """300 users of 3 to 60 items (some bought twice) out of 400, popularity as in Zipf's law, 7 intents."""
    rng = np.random.default_rng(0)
    popularity = 1 / np.arange(1, 401)
    lengths = rng.integers(1, 60, size=300)
    return make_dataset([rng.choice(400, size=n, p=popularity / popularity.sum()) for n in lengths], 400)


class Fake:
    """A model made of two functions of the users' histories: item logits (B, V), intent logits (B, C) or None."""

    def __init__(self, dataset, item, intent=None, max_len=50):
        self.config = SimpleNamespace(max_len=max_len, preset=None)
        self.item, self.intent = item, intent
        self.item_intent = torch.from_numpy(dataset.item_intent.astype(np.int64))

    def score(self, items, cu_seqlens, candidates=None, candidate_intents=None):
        histories = torch.tensor_split(items, cu_seqlens[1:-1].long())
        assert items.dtype == torch.int64
        assert cu_seqlens.dtype == torch.int32
        assert min(map(len, histories)) >= 1
        assert max(map(len, histories)) <= self.config.max_len
        item = self.item(histories)
        intent = None if self.intent is None else self.intent(histories)
        if candidates is not None:
            item = item.gather(1, candidates)
            if intent is not None:
                intent = intent.gather(
                    1, self.item_intent[candidates] if candidate_intents is None else candidate_intents
                )
        return item, intent

    def join(self, item_logits, intent_logits, weight=None, protocol="full"):
        return item_logits if intent_logits is None else logsigmoid(item_logits) + logsigmoid(intent_logits)


def constant(dataset):
    return Fake(
        dataset, lambda h: torch.zeros(len(h), dataset.num_items), lambda h: torch.zeros(len(h), dataset.num_intents)
    )


def random_model(dataset, seed, intents=True):
    """Scores that depend on the newest item only."""
    rng = torch.Generator().manual_seed(seed)
    item = torch.randn(dataset.num_items, dataset.num_items, generator=rng)
    intent = torch.randn(dataset.num_items, dataset.num_intents, generator=rng)
    newest = lambda table: lambda histories: table[[int(h[-1]) for h in histories]]  # noqa: E731
    return Fake(dataset, newest(item), newest(intent) if intents else None)


class Oracle(Fake):
    """Knows every answer: finds the user by her history."""

    def __init__(self, dataset, split, intents=True):
        holdout = dataset.holdout(split)
        answers = {tuple(h): int(a) for h, a in zip(holdout.histories, holdout.answers, strict=True)}

        def item(histories):
            return (
                torch.nn.functional.one_hot(
                    torch.tensor([answers[tuple(h.tolist())] for h in histories]), dataset.num_items
                )
                * 9.0
            )

        def intent(histories):
            own = [int(dataset.item_intent[answers[tuple(h.tolist())]]) for h in histories]
            return torch.nn.functional.one_hot(torch.tensor(own), dataset.num_intents) * 9.0

        super().__init__(dataset, item, intent if intents else None, max_len=1000)


# Scores that are known


@pytest.mark.parametrize("protocol", ["aligned", "full", "authors"])
@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("intents", [True, False])
def test_a_model_that_knows_the_answer_scores_one(protocol, split, intents):
    rng = np.random.default_rng(5)  # no two users with one history
    dataset = make_dataset([rng.permutation(60)[: rng.integers(5, 20)] for _ in range(40)], 60)
    result = evaluate(Oracle(dataset, split, intents), dataset, split, protocol, num_negatives=20)
    assert set(result.greater) == ({"item", "joint"} if intents else {"item"})
    for score in result.greater:
        assert {metric: result.mean(metric, score) for metric in METRICS} == pytest.approx(dict.fromkeys(METRICS, 1.0))


@pytest.mark.parametrize("score", ["item", "joint"])
def test_a_constant_model_scores_exactly_as_chance(dataset, score):
    aligned = evaluate(constant(dataset), dataset, num_negatives=50)
    assert aligned.short == 0
    for k in (1, 5, 10, 20):
        assert aligned.mean(f"hr@{k}", score) == pytest.approx(k / 51)
        assert aligned.mean(f"ndcg@{k}", score) == pytest.approx((1 / np.log2(np.arange(2, k + 2))).sum() / 51)
    full = evaluate(constant(dataset), dataset, protocol="full")
    holdout = dataset.holdout("test")
    ranked = [400 - len(set(h) - {a}) for h, a in zip(holdout.histories, holdout.answers, strict=True)]
    np.testing.assert_allclose(full.values("hr@10", score), 10 / np.array(ranked))
    np.testing.assert_allclose(full.values("mrr", score), [(1 / np.arange(1, n + 1)).mean() for n in ranked])
    authors = evaluate(constant(dataset), dataset, protocol="authors")
    assert authors.mean("hr@1", score) == 1  # its ties favour the model


def test_scores_equal_a_plain_loop(dataset):
    """Every protocol, both scores, against sorting one user at a time."""
    model = random_model(dataset, 1)
    item_table, intent_table = (f([torch.tensor([i]) for i in range(400)]) for f in (model.item, model.intent))
    holdout = dataset.holdout("test")
    for protocol in ("aligned", "full", "authors"):
        result = evaluate(model, dataset, protocol=protocol, num_negatives=30, batch_size=7)
        candidates = draw_candidates(dataset, protocol=protocol, num_negatives=30)
        for row in range(0, len(holdout), 11):
            history, answer = holdout.histories[row], holdout.answers[row]
            if protocol == "full":
                ids = [answer] + [i for i in range(400) if i not in history and i != answer]
                intents = dataset.item_intent[ids]
            else:
                ids, intents = candidates.items[row], candidates.intents[row]
            item = item_table[history[-1]][torch.tensor(np.array(ids)).long()]
            intent = intent_table[history[-1]][torch.tensor(intents).long()]
            joint = item + intent if protocol == "authors" else logsigmoid(item) + logsigmoid(intent)
            assert result.greater["item"][row] == (item > item[0]).sum()
            assert result.greater["joint"][row] == (joint > joint[0]).sum()
            assert result.equal["joint"][row] == (0 if protocol == "authors" else (joint == joint[0]).sum() - 1)


def test_shared_intents_show_the_artefact():
    """A model that knows the answer's intent and nothing else, where every candidate has one of two likely intents."""
    rng = np.random.default_rng(0)
    intents = np.repeat(np.arange(20), 20)  # 400 items
    rows = []
    for user in range(200):
        own = 20 * (user % 2)  # a user stays in intent 0 or 1
        rows.append(own + rng.permutation(20)[:6])
    rows.append(np.arange(400))  # so that every item is known to training, the two intents being popular
    dataset = make_dataset(rows, 400, intents)

    def intent(histories):
        return torch.nn.functional.one_hot(torch.tensor([intents[int(h[-1])] for h in histories]), 20) * 9.0

    model = Fake(dataset, lambda h: torch.zeros(len(h), 400), intent)
    aligned, authors = (evaluate(model, dataset, protocol=p).mean("ndcg@5") for p in ("aligned", "authors"))
    assert authors > 0.99
    assert aligned < 0.3


def test_sampled_negatives_favour_unseen_items_and_full_does_not():
    """The known bias of popularity-drawn negatives: a model that knows only which items training never saw."""
    rng = np.random.default_rng(0)
    rows = [np.append(rng.choice(150, 5, replace=False), 150 + user) for user in range(250)]  # each answer is new
    dataset = make_dataset(rows, 400)
    unseen = torch.from_numpy(dataset.train_counts() == 0).float()
    model = Fake(dataset, lambda h: unseen.expand(len(h), 400))
    train, everything = (evaluate(model, dataset, popularity=p).mean("ndcg@5") for p in ("train", "all"))
    assert train == 1
    assert everything < 0.4
    assert evaluate(model, dataset, protocol="full").mean("ndcg@5") < 0.02


# Candidates


@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("popularity", ["all", "train"])
def test_negatives_are_distinct_known_and_never_in_the_whole_history(dataset, split, popularity):
    candidates = draw_candidates(dataset, split, num_negatives=60, popularity=popularity)
    interactions = dataset.sequences if popularity == "all" else dataset.train()
    users, known = dataset.holdout(split).users, set(interactions.items)
    np.testing.assert_array_equal(candidates.items[:, 0], dataset.holdout(split).answers)
    for user, items in zip(users, candidates.items, strict=True):
        negatives = set(items[1:])
        assert len(negatives) == 60
        assert not negatives & set(dataset.sequences[user])
        assert negatives <= known
    np.testing.assert_array_equal(candidates.intents, dataset.item_intent[candidates.items])


def test_candidates_depend_on_the_seed_and_split_alone(dataset):
    items = draw_candidates(dataset, num_negatives=60).items
    np.testing.assert_array_equal(items, draw_candidates(dataset, num_negatives=60).items)
    assert not np.array_equal(items, draw_candidates(dataset, num_negatives=60, seed=1).items)
    assert not np.array_equal(items[:, 1:], draw_candidates(dataset, "valid", num_negatives=60).items[:, 1:])
    np.testing.assert_array_equal(items, draw_candidates(dataset, protocol="authors", num_negatives=60).items)
    some = draw_candidates(dataset, num_negatives=60, max_users=40)
    assert len(some.rows) == 40
    assert (np.diff(some.rows) > 0).all()
    np.testing.assert_array_equal(some.items, items[some.rows])


@pytest.mark.parametrize("protocol", ["aligned", "full", "authors"])
def test_results_do_not_depend_on_the_batch_size(dataset, protocol):
    model = random_model(dataset, 3)
    one, other = (evaluate(model, dataset, protocol=protocol, batch_size=b) for b in (1, 1000))
    tight = evaluate(model, dataset, protocol=protocol, memory_bytes=1)
    for result in (other, tight):
        assert result.candidates == one.candidates
        for score in one.greater:
            np.testing.assert_array_equal(result.greater[score], one.greater[score])
            np.testing.assert_array_equal(result.equal[score], one.equal[score])


def test_negatives_follow_popularity(dataset):
    """10,000 users without a history, one negative each: chi-square against the weights, error rate 0.1%."""
    weights = np.array([1, 2, 3, 4, 0, 10])
    histories = Sequences(np.zeros(10_001, np.int64), np.zeros(0, np.int32))
    drawn = draw_negatives(weights, histories, np.arange(10_000), 1, seed=2)
    observed, expected = np.bincount(drawn[:, 0], minlength=6), 500 * weights
    assert observed[4] == 0
    chi_square = ((observed - expected) ** 2 / np.maximum(expected, 1)).sum()
    assert chi_square < 18.47  # 4 degrees of freedom


@pytest.mark.parametrize(("popularity", "ranked"), [("all", [6, 7, 8]), ("train", [4, 5, 4])])
def test_a_catalog_with_too_few_negatives_gives_all_there_are(popularity, ranked):
    dataset = make_dataset([[0, 1, 2, 3, 4], [5, 6, 7, 8], [9, 0, 1]], 12)  # 10 and 11 were never had
    candidates = draw_candidates(dataset, num_negatives=100, popularity=popularity)
    assert candidates.short == 3
    known = set(range(10)) if popularity == "all" else {0, 1, 2, 5, 6, 9}
    for user, items in enumerate(candidates.items):
        assert set(items[items >= 0][1:]) == known - set(dataset.sequences[user])
    result = evaluate(constant(dataset), dataset, popularity=popularity)
    assert result.short == 3
    np.testing.assert_allclose(result.values("hr@1"), 1 / np.array(ranked))
    assert draw_candidates(dataset, num_negatives=min(ranked) - 1, popularity=popularity).short == 0


def test_authors_pairing_never_gives_the_true_or_the_own_intent(dataset):
    candidates = draw_candidates(dataset, protocol="authors", num_negatives=60)
    true = dataset.item_intent[candidates.items]
    np.testing.assert_array_equal(candidates.intents[:, 0], true[:, 0])
    given = candidates.intents[:, 1:]
    assert (given != true[:, :1]).all()
    assert (given != true[:, 1:]).all()
    assert set(np.unique(given)) == set(range(7))


@pytest.mark.parametrize(("answer", "own", "left"), [(0, 0, [1, 2, 3]), (3, 1, [0, 2]), (1, 2, [0, 3])])
def test_other_intents_are_uniform_over_those_left(answer, own, left):
    drawn = other_intents(np.array([[answer] + [own] * 3000]), 4, np.random.default_rng(0))
    counts = np.bincount(drawn[0], minlength=4)
    assert set(np.flatnonzero(counts)) == set(left)
    assert counts[left] == pytest.approx(3000 / len(left), abs=4 * np.sqrt(3000 / 4))  # four standard deviations


# What is seen, and what is refused


def test_full_leaves_out_what_was_seen_and_keeps_an_answer_bought_again():
    #                            history    answer
    dataset = make_dataset([[3, 3, 0, 1], [4, 1, 2, 4], [0, 1, 2]], 6)
    larger_is_better = Fake(dataset, lambda h: torch.arange(6.0).expand(len(h), 6))
    result = evaluate(larger_is_better, dataset, protocol="full")
    assert result.greater["item"].tolist() == [3, 1, 3]  # above: 2 4 5 (3 seen); 5 (1, 2 seen); 3 4 5
    result = evaluate(larger_is_better, dataset, "valid", protocol="full")
    assert result.greater["item"].tolist() == [4, 2, 4]  # 0: 1 2 4 5; 2: 3 5 (4 seen); 1: 2 3 4 5
    same = evaluate(Fake(dataset, lambda h: torch.zeros(len(h), 6)), dataset, protocol="full")
    assert same.equal["item"].tolist() == [3, 3, 3]


def test_only_the_newest_max_len_items_reach_the_model_but_all_are_seen(dataset):
    short = random_model(dataset, 3)
    short.config.max_len = 1
    full = evaluate(short, dataset, protocol="full")
    np.testing.assert_array_equal(
        full.greater["joint"], evaluate(random_model(dataset, 3), dataset, protocol="full").greater["joint"]
    )


@pytest.mark.parametrize("protocol", ["aligned", "full"])
@pytest.mark.parametrize("where", ["item", "intent"])
def test_nan_scores_are_refused(dataset, protocol, where):
    model = constant(dataset)
    if where == "item":
        model.item = lambda h: torch.full((len(h), 400), torch.nan)
    else:
        model.intent = lambda h: torch.full((len(h), 7), torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        evaluate(model, dataset, protocol=protocol)


def test_one_nan_among_good_scores_is_found():
    scores = torch.rand(3, 50)
    scores[1, 30] = torch.nan
    with pytest.raises(ValueError, match="NaN scores to 1 of 3"):
        count_above(scores, torch.zeros(3).long(), torch.zeros(0).long(), torch.zeros(0).long())


def test_infinite_scores_rank_as_they_should():
    scores = torch.tensor([[-torch.inf, -torch.inf, 1.0], [torch.inf, 0.0, 1.0]])
    counted = count_above(scores, torch.zeros(2).long(), torch.zeros(0).long(), torch.zeros(0).long())
    assert counted.tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"protocol": "alined"}, "expected one of aligned, full, authors"),
        ({"split": "train"}, "expected 'valid' or 'test'"),
        ({"num_negatives": 0}, "num_negatives"),
        ({"max_users": 0}, "max_users"),
        ({"popularity": "test"}, "expected one of all, train"),
    ],
)
def test_bad_arguments_are_refused(dataset, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate(constant(dataset), dataset, **arguments)


def test_nobody_to_evaluate_wrong_shapes_and_too_few_intents_are_refused(dataset):
    short = make_dataset([[0, 1], [1, 2]])
    with pytest.raises(ValueError, match="no users"):
        evaluate(constant(short), short)
    with pytest.raises(ValueError, match=r"item scores have shape \(\d+, 3\)"):
        evaluate(Fake(dataset, lambda h: torch.zeros(len(h), 3)), dataset, protocol="full")
    with pytest.raises(ValueError, match=r"intent scores have shape \(\d+, 9\)"):
        evaluate(Fake(dataset, constant(dataset).item, lambda h: torch.zeros(len(h), 9)), dataset, protocol="full")
    two = make_dataset([[0, 1, 2, 3]], intents=[0, 1, 0, 1])
    with pytest.raises(ValueError, match="at least 3 intents"):
        evaluate(constant(two), two, protocol="authors")


@pytest.mark.parametrize("protocol", ["aligned", "full", "authors"])
def test_a_personal_model_is_told_who_is_who(dataset, protocol):
    """It knows the answers by the users alone."""
    holdout = dataset.holdout("test")
    answers = torch.zeros(dataset.num_users, dtype=torch.long)
    answers[holdout.users] = torch.from_numpy(holdout.answers).long()

    class Personal(Fake):
        personal = True

        def score(self, *arguments, users, **options):
            self.item = lambda _: torch.nn.functional.one_hot(answers[users], dataset.num_items)
            return super().score(*arguments, **options)

    assert evaluate(Personal(dataset, None), dataset, protocol=protocol, batch_size=32).mean("hr@1") == 1.0


def test_a_torch_module_is_scored_in_eval_mode_and_put_back(dataset):
    class Module(torch.nn.Module):
        config = SimpleNamespace(max_len=10, preset="paper")

        def score(self, items, cu_seqlens, candidates=None, candidate_intents=None):
            assert not self.training
            assert not torch.is_grad_enabled()
            return torch.zeros(candidates.shape, dtype=torch.bfloat16), None

        def join(self, item_logits, intent_logits, weight=None, protocol="full"):
            raise AssertionError("no intents, nothing to join")

    module, seen = Module().train(), []
    result = evaluate(
        module, dataset, batch_size=100, max_users=250, progress=lambda done, total: seen.append((done, total))
    )
    assert module.training
    assert seen == [(100, 250), (200, 250), (250, 250)]
    assert (result.model, result.preset, result.label) == ("Module", "paper", "Module paper")
    with pytest.raises(ValueError, match="no joint score"):
        result.mean("mrr", "joint")


# Results


@pytest.fixture(scope="module")
def evaluations(dataset):
    models = random_model(dataset, 1), random_model(dataset, 2), constant(dataset)
    return [evaluate(model, dataset, name=name) for model, name in zip(models, "abc", strict=True)]


def test_buckets_partition_the_users(dataset, evaluations):
    for name in BUCKETS:
        members = np.stack(list(evaluations[0].buckets(name).values()))
        assert (members.sum(axis=0) == 1).all()
    frequency = evaluations[0].buckets("train_frequency")
    counts = dataset.train_counts()[dataset.holdout("test").answers]
    np.testing.assert_array_equal(frequency["0"], counts == 0)
    np.testing.assert_array_equal(frequency["2-4"], (counts >= 2) & (counts <= 4))
    np.testing.assert_array_equal(frequency["20+"], counts >= 20)


def test_summary_has_the_documented_shape_and_is_json(evaluations):
    summary = json.loads(json.dumps(evaluations[0].summary(resamples=50), allow_nan=False))
    assert summary["model"] == "a"
    assert summary["protocol"] == "aligned"
    assert summary["tied"] == 0
    assert evaluations[2].summary(resamples=2)["tied"] == 1
    assert summary["users"] == len(evaluations[0].users)
    for part in (summary, summary["item_score"]):
        assert set(part["metrics"]) == set(part["ci"]) == set(METRICS)
        for name, (low, high) in part["ci"].items():
            assert low <= part["metrics"][name] <= high
    assert summary["metrics"]["mrr"] == pytest.approx(evaluations[0].mean("mrr", "joint"))
    assert summary["item_score"]["metrics"]["mrr"] == pytest.approx(evaluations[0].mean("mrr", "item"))
    assert set(summary["buckets"]) == {"train_frequency", "history_length"}
    for buckets in summary["buckets"].values():
        assert sum(bucket["users"] for bucket in buckets.values()) == summary["users"]
        weighted = sum(b["users"] * b["metrics"]["hr@5"] for b in buckets.values() if b["users"])
        assert weighted / summary["users"] == pytest.approx(summary["metrics"]["hr@5"])


def test_save_and_load(tmp_path, evaluations):
    path = tmp_path / "test-aligned.npz"
    evaluations[1].save(path)
    evaluations[0].save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["test-aligned.npz"]
    loaded = Evaluation.load(path)
    assert loaded.summary(20) == evaluations[0].summary(20)
    assert compare(loaded, evaluations[0])["diff"] == 0


def test_a_failed_save_leaves_the_former_file(tmp_path, evaluations, monkeypatch):
    path = tmp_path / "test.npz"
    evaluations[0].save(path)
    monkeypatch.setattr(np, "savez_compressed", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        evaluations[1].save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["test.npz"]
    assert Evaluation.load(path).model == "a"


def test_damaged_and_foreign_files_are_refused(tmp_path, evaluations):
    good = tmp_path / "good.npz"
    evaluations[0].save(good)
    content = good.read_bytes()
    bad = tmp_path / "bad.npz"
    middle = len(content) // 2
    for damaged in (b"", b"text", content[:middle], content[:middle] + bytes(40) + content[middle + 40 :]):
        bad.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cannot read .*bad\.npz as a saved evaluation"):
            Evaluation.load(bad)
    for arrays in ({"x": np.zeros(3)}, {"meta": np.array(json.dumps({"format": "cafe-evaluation", "version": 9}))}):
        np.savez(bad, **arrays)
        with pytest.raises(ValueError, match="cannot read"):
            Evaluation.load(bad)
    rng, refused = np.random.default_rng(0), []
    for place in rng.choice(len(content) * 8, 800, replace=False).tolist():  # any one bit
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        bad.write_bytes(flipped)
        try:
            assert Evaluation.load(bad).summary(2) == evaluations[0].summary(2)  # some bits of a zip mean nothing
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 600
    assert all("bad.npz as a saved evaluation" in message for message in refused)
    np.save(tmp_path / "plain.npy", np.zeros(3))
    with pytest.raises(ValueError, match="cannot read"):
        Evaluation.load(tmp_path / "plain.npy")
    with pytest.raises(FileNotFoundError):
        Evaluation.load(tmp_path / "none.npz")


def test_what_was_altered_is_refused_and_what_had_no_checksum_yet_is_read(tmp_path, evaluations):
    path = tmp_path / "test.npz"
    evaluations[0].save(path)
    with np.load(path) as file:
        arrays = dict(file)
    meta = json.loads(str(arrays["meta"]))
    moved = {name.replace("greater/", "greater/x"): array for name, array in arrays.items()}
    other = {**arrays, "meta": np.array(json.dumps({**meta, "seed": meta["seed"] + 1}))}
    unsummed = {**arrays, "meta": np.array(json.dumps({k: v for k, v in meta.items() if k != "checksum"}))}
    for altered in (moved, other, unsummed, {**arrays, "equal/item": arrays["equal/item"] + 1}):
        np.savez(path, **altered)
        with pytest.raises(ValueError, match=r"cannot read .*test\.npz as a saved evaluation: .*checksum"):
            Evaluation.load(path)
    former = {k: v for k, v in meta.items() if k != "checksum"} | {"version": 1}
    np.savez(path, **{**arrays, "meta": np.array(json.dumps(former))})
    assert Evaluation.load(path).summary(20) == evaluations[0].summary(20)


def test_compare_finds_a_difference_and_none_where_there_is_none(dataset):
    noisy = evaluate(random_model(dataset, 1), dataset)
    holdout = dataset.holdout("test")
    answers = {tuple(h[-50:]): a for h, a in zip(holdout.histories, holdout.answers, strict=True)}
    helped = random_model(dataset, 1)
    plain = helped.item

    def item(histories):  # adds a little to the answer
        scores = plain(histories).clone()
        for row, history in enumerate(histories):
            scores[row, answers[tuple(history.numpy())]] += 1.0
        return scores

    helped.item = item
    better = compare(evaluate(helped, dataset), noisy, "ndcg@10")
    assert better["p"] < 0.01
    assert 1 < better["ratio_ci"][0] < better["ratio"] < better["ratio_ci"][1]
    assert better["diff"] == pytest.approx(better["mean_a"] - better["mean_b"])
    assert better["worse"] == 0 < better["better"]
    itself = compare(noisy, noisy)
    assert (itself["diff"], itself["ratio"], itself["p"]) == (0, 1, 1)


def test_compare_errs_as_often_as_it_says(evaluations):
    """200 pairs of equally good models: those with p < .05 are Binomial(200, .05); more than 20 has probability .1%."""
    rng, users = np.random.default_rng(0), len(evaluations[0].users)
    pairs = [[{"item": rng.integers(101, size=users)} for _ in "ab"] for _ in range(200)]
    none = {"item": np.zeros(users, int)}
    found = [
        compare(*(replace(evaluations[0], greater=greater, equal=none) for greater in pair), "mrr", resamples=300)
        for pair in pairs
    ]
    wrong = sum(result["p"] < 0.05 for result in found)
    assert wrong <= 20
    assert sum(not result["diff_ci"][0] <= 0 <= result["diff_ci"][1] for result in found) <= 20


def test_compare_averages_seeds_and_takes_either_score(evaluations):
    a, b, c = evaluations
    both = compare([a, b], [c], "mrr")
    assert both["mean_a"] == pytest.approx((a.mean("mrr") + b.mean("mrr")) / 2)
    scores = compare(a, a, "mrr", score_a="joint", score_b="item")
    assert scores["diff"] == pytest.approx(a.mean("mrr", "joint") - a.mean("mrr", "item"))
    with pytest.raises(ValueError, match="nothing to compare"):
        compare([], [a])


def test_compare_has_no_ratio_to_nothing(evaluations):
    users = len(evaluations[0].users)
    last = replace(evaluations[0], greater={"item": np.full(users, 100)}, equal={"item": np.zeros(users, int)})
    result = compare(evaluations[0], last, "ndcg@5")
    assert result["mean_b"] == 0
    assert result["ratio"] is None
    assert result["ratio_ci"] is None


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"split": "valid"}, "split"),
        ({"protocol": "full"}, "protocol"),
        ({"num_negatives": 50}, "num_negatives"),
        ({"seed": 1}, "seed"),
        ({"popularity": "train"}, "popularity"),
        ({"max_users": 100}, "candidates"),
    ],
)
def test_compare_refuses_what_was_not_the_same_task(dataset, evaluations, arguments, field):
    with pytest.raises(ValueError, match=f"cannot be compared: {field} is"):
        compare(evaluations[2], evaluate(constant(dataset), dataset, **arguments))


def test_compare_refuses_another_dataset(dataset, evaluations):
    other = make_dataset([*list(dataset.sequences), [0, 1]], 400)  # one more user, too short to be evaluated
    with pytest.raises(ValueError, match="dataset is"):
        compare(evaluations[2], evaluate(constant(other), other))


def test_tables(dataset, evaluations):
    console = Console(record=True, width=200)
    print_evaluation(console, evaluations, breakdown="ndcg@10")
    text = console.export_text()
    assert "aligned" in text
    assert "joint" in text
    assert "2-4" in text
    assert "artefact" not in text
    summary = evaluations[0].summary()
    low, high = summary["ci"]["mrr"]
    assert f"{summary['metrics']['mrr']:.4f} ±{(high - low) / 2:.3f}".replace("0.", ".") in text
    with pytest.warns(UserWarning, match="NOT a measure of quality"):
        authors = evaluate(constant(dataset), dataset, protocol="authors")
    print_evaluation(console, authors)
    assert "authors (artefact)" in console.export_text()
    print_comparison(console, compare(evaluations[0], evaluations[2]))
    text = console.export_text()
    assert "%, " in text
    assert "\\" not in text
    tiny = make_dataset([[0, 1, 2, 3, 4], [5, 6, 7, 8]])
    print_evaluation(console, evaluate(constant(tiny), tiny))
    assert "2 users have fewer than 100 negatives" in console.export_text()


def test_examples():
    assert doctest.testmod(cafe.evaluate).failed == 0
