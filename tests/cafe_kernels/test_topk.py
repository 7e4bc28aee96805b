"""Exact top-k: the fast search gives, to the last bit, the items and scores of the brute force, whatever the input."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cafe_kernels import TopKIndex, joint_topk, topk_inner_product
from cafe_kernels.topk import cpu

JOINS = ["identity", "log_sigmoid"]


def problem(items: int, dim: int, intents: int, users: int, kind: str = "random", seed: int = 0) -> dict[str, Tensor]:
    """`random`; `integers`: many equal scores; `equal`: all scores are; `clustered`: most of the catalog can be skipped."""
    g = torch.Generator().manual_seed(seed)
    table, user = torch.randn(items, dim, generator=g), torch.randn(users, dim, generator=g)
    scores = 2 * torch.randn(users, intents, generator=g)
    intent = torch.randint(0, intents, (items,), generator=g)
    if kind == "integers":
        table, user, scores = table.round(), user.round(), scores.round()
    if kind == "equal":
        table, scores = torch.full_like(table, 0.1), torch.zeros_like(scores)
    if kind == "clustered":
        table = table * 0.02 + torch.randn(intents, dim, generator=g)[intent]
    return {"user": user, "table": table, "intent": intent, "scores": scores}


def excluded(users: int, items: int, each: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.arange(users + 1) * each, torch.randint(0, items, (users * each,), generator=g, dtype=torch.int32)


def assert_same(p: dict[str, Tensor], k: int, join: str, exclude: tuple[Tensor, Tensor] | None = None) -> float:
    """Both search and count_above; returns the share of the pairs that the search scored."""
    intents = p["scores"].shape[1]
    slow, fast = (TopKIndex(p["table"], p["intent"], intents, backend=b) for b in ("reference", "cpu"))
    want, got = (x.search(p["user"], k, p["scores"], join=join, exclude=exclude) for x in (slow, fast))
    assert torch.equal(want.items, got.items)
    assert torch.equal(want.scores, got.scores)
    assert 0 <= got.exact <= got.scored <= 1
    if len(p["table"]):
        answers = torch.arange(len(p["user"])) * 7 % len(p["table"])
        want_counts, counts = (
            x.count_above(p["user"], answers, p["scores"], join=join, exclude=exclude) for x in (slow, fast)
        )
        assert torch.equal(want_counts, counts)
    return got.scored


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CAFE_KERNELS_ISA", request.param)
    try:
        topk_inner_product(torch.ones(1, 1), torch.ones(1, 1), 1, backend="cpu")
    except ValueError as error:
        pytest.skip(str(error))
    return request.param


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("kind", ["random", "integers", "equal", "clustered"])
@pytest.mark.parametrize(
    ("items", "dim", "intents", "users", "k"),
    [
        (1, 1, 1, 1, 1),
        (63, 20, 1, 2, 5),
        (64, 64, 64, 3, 10),
        (65, 1, 7, 4, 9),
        (111, 128, 40, 9, 200),
        (2500, 20, 12, 11, 10),
    ],
)
def test_same_as_brute_force(
    isa: str, items: int, dim: int, intents: int, users: int, k: int, kind: str, join: str
) -> None:
    p = problem(items, dim, intents, users, kind)
    assert_same(p, k, join)
    assert_same(p, k, join, excluded(users, items, 20))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 400), st.integers(1, 40), st.integers(1, 400), st.integers(0, 12), st.integers(1, 30),
    st.sampled_from(["random", "integers", "equal", "clustered"]), st.sampled_from(JOINS),
    st.floats(-30, 15), st.floats(-3, 3), st.integers(0, 2**31),
)  # fmt: skip
def test_same_as_brute_force_at_any_scale(
    items: int, dim: int, intents: int, users: int, k: int, kind: str, join: str, table_scale: float,
    user_scale: float, seed: int,
) -> None:  # fmt: skip
    p = problem(items, dim, intents, users, kind, seed)
    p["table"], p["user"] = p["table"] * 10**table_scale, p["user"] * 10**user_scale
    assert_same(p, k, join, excluded(users, items, 10, seed) if items else None)


def test_an_intent_larger_than_a_group_and_intents_without_items() -> None:
    p = problem(3 * cpu.LARGEST // 2, 8, 9, 3, "integers")
    p["intent"] = (p["intent"] == 5) * 2 + 4  # most in intent 4, some in 6, none elsewhere
    for join in JOINS:
        assert_same(p, 10, join, excluded(3, len(p["table"]), 50))


def test_more_users_than_a_batch() -> None:
    assert_same(problem(300, 12, 5, 300, "clustered"), 3, "log_sigmoid", excluded(300, 300, 5))


def test_zero_vectors_and_subnormals() -> None:
    p = problem(200, 20, 4, 3, "integers")
    p["user"][0] = 0
    p["table"][::3] = 0
    p["table"][1::3] *= 1e-42
    for join in JOINS:
        assert_same(p, 20, join)


def test_saturated_sigmoids_tie_by_item() -> None:
    p = problem(500, 16, 6, 4)
    p["table"] *= 40  # log sigma is 0 for half of the items, as far as float32 can tell
    p["scores"] = p["scores"].round()
    assert_same(p, 10, "log_sigmoid")


def test_all_excluded_or_all_but_two() -> None:
    p = problem(90, 20, 3, 2)
    everything = torch.cat([torch.arange(90), torch.arange(88)])
    result = TopKIndex(p["table"], p["intent"], 3).search(
        p["user"], 4, p["scores"], exclude=(torch.tensor([0, 90, 178]), everything)
    )
    assert result.items[0].tolist() == [-1] * 4
    assert set(result.items[1].tolist()) == {-1, 88, 89}
    assert result.scores[0].isneginf().all()
    assert_same(p, 4, "identity", (torch.tensor([0, 90, 178]), everything))


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_any_number_of_threads_gives_the_same(threads: int) -> None:
    p = problem(6000, 20, 50, 5, "integers")
    index = TopKIndex(p["table"], p["intent"], 50)
    before, want = torch.get_num_threads(), index.search(p["user"], 20, p["scores"], join="log_sigmoid")
    torch.set_num_threads(threads)
    try:
        got = TopKIndex(p["table"], p["intent"], 50).search(p["user"], 20, p["scores"], join="log_sigmoid")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(want.items, got.items)
    assert torch.equal(want.scores, got.scores)


def test_most_of_a_clustered_catalog_is_skipped() -> None:
    p = problem(20_000, 32, 100, 4, "clustered")
    result = TopKIndex(p["table"], p["intent"]).search(p["user"], 10, 5 * p["scores"])
    assert result.scored < 0.15
    assert result.exact < 0.02
    assert_same({**p, "scores": 5 * p["scores"]}, 10, "identity")


def test_most_of_an_unclustered_catalog_is_scored_by_codes_only() -> None:
    p = problem(50_000, 128, 1, 4)
    result = TopKIndex(p["table"]).search(p["user"], 10)
    assert result.scored > 0.9
    assert result.exact < 0.02  # the codes' error is some 1% of |user| |item|


@pytest.mark.parametrize("items", [50, 3 * cpu.LARGEST // 2])
def test_no_pair_is_counted_twice(items: int) -> None:
    """Where nothing can be skipped all are scored, once: what is looked at for a first threshold is not looked at again."""
    p = problem(items, 64, 1, 3, "equal")
    result = TopKIndex(p["table"]).search(p["user"], items)
    assert (result.scored, result.exact) == (1, 1)


def test_scores_are_the_dot_products() -> None:
    p = problem(500, 64, 5, 3)
    best = topk_inner_product(p["user"], p["table"], 500)
    exact = p["user"].double() @ p["table"].double().T
    np.testing.assert_allclose(best.scores, exact.gather(1, best.items).numpy(), rtol=1e-7, atol=1e-30)
    assert best.items.sort(1).values.equal(torch.arange(500).expand(3, 500))


def test_joint_topk_takes_items_by_intent() -> None:
    p = problem(100, 8, 3, 2)
    indptr = torch.tensor([0, 40, 40, 100])
    intent = torch.repeat_interleave(torch.arange(3), indptr.diff())
    want = TopKIndex(p["table"], intent, 3).search(p["user"], 5, p["scores"], join="log_sigmoid")
    got = joint_topk(p["user"], p["table"], p["scores"], indptr, 5)
    assert torch.equal(want.items, got.items)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user": torch.full((2, 4), NAN)}, "user has numbers that are not finite"),
        ({"user": torch.full((2, 4), 1e38)}, "overflow"),
        ({"user": torch.ones(2, 5)}, r"user must be float32 \(2, 4\)"),
        ({"user": torch.ones(2, 4).double()}, "user must be float32"),
        ({"table": torch.full((9, 4), INF)}, "the table has numbers that are not finite"),
        ({"table": torch.ones(9, 4).half()}, "table must be float32"),
        ({"scores": torch.full((2, 3), -INF)}, "intent_scores has numbers that are not finite"),
        ({"scores": torch.zeros(2, 2)}, r"intent_scores must be float32 \(2, 3\)"),
        ({"intent": torch.full((9,), 3)}, r"item_intent must be in \[0, 3\)"),
        ({"intent": torch.zeros(8, dtype=torch.int64)}, "item_intent must be int64"),
        ({"k": 0}, "k must be at least 1"),
        ({"join": "product"}, "unknown join 'product'"),
        ({"exclude": (torch.tensor([0, 2, 1]), torch.tensor([1]))}, "must ascend"),
        ({"exclude": (torch.tensor([0, 1, 1]), torch.tensor([9]))}, "must be items 0 to 8"),
        ({"exclude": (torch.tensor([0, 1, 1]), torch.tensor([True]))}, r"integers \(3,\) and \(n,\), got .*torch.bool"),
        ({"exclude": (torch.tensor([False, True, True]), torch.tensor([1]))}, "exclude must be .*got torch.bool"),
        ({"backend": "gpu"}, "unknown backend"),
    ],
)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_wrong_input_is_explained(backend: str, change: dict[str, object], message: str) -> None:
    p = {**problem(9, 4, 3, 2), "k": 1, "join": "identity", "exclude": None, "backend": backend, **change}
    with pytest.raises(ValueError, match=message):
        TopKIndex(p["table"], p["intent"], 3, backend=p["backend"]).search(
            p["user"], p["k"], p["scores"], join=p["join"], exclude=p["exclude"]
        )


COUNTED_WRONG = [
    ({"user": torch.full((2, 4), NAN)}, "user has numbers that are not finite"),
    ({"scores": torch.full((2, 3), NAN)}, "intent_scores has numbers that are not finite"),
    ({"exclude": (torch.tensor([0, 1, 1]), torch.tensor([9]))}, "must be items 0 to 8"),
    ({"join": "product"}, "unknown join 'product'"),
]


@pytest.mark.parametrize(("change", "message"), COUNTED_WRONG)
def test_count_above_checks_its_input_too(change: dict[str, object], message: str) -> None:
    p = {**problem(9, 4, 3, 2), "join": "identity", "exclude": None, **change}
    index = TopKIndex(p["table"], p["intent"], 3)
    with pytest.raises(ValueError, match=message):
        index.count_above(p["user"], torch.tensor([0, 1]), p["scores"], join=p["join"], exclude=p["exclude"])


def test_intents_borders_must_be_integers() -> None:
    with pytest.raises(ValueError, match=r"intent_indptr must be integers .*got torch.float32"):
        joint_topk(torch.ones(1, 2), torch.ones(3, 2), torch.ones(1, 1), torch.tensor([0.0, 3.0]), 1)


def test_what_is_being_learned_can_be_searched() -> None:
    p = problem(9, 4, 3, 2)
    want = TopKIndex(p["table"], p["intent"], 3).search(p["user"], 3, p["scores"])
    learned = {name: x.requires_grad_() for name, x in p.items() if name != "intent"}
    index = TopKIndex(learned["table"], p["intent"], 3)
    got = index.search(learned["user"], 3, learned["scores"])
    assert torch.equal(want.items, got.items)
    assert index.count_above(learned["user"], got.items[:, 0], learned["scores"]).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_more_than_all_items_are_given(backend: str) -> None:
    index = TopKIndex(torch.ones(3, 2), backend=backend)
    assert index.search(torch.ones(1, 2), 10**10).items.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("searched", [True, False])
@pytest.mark.parametrize("what", ["table", "intent"])
def test_a_table_that_changed_is_noticed(backend: str, searched: bool, what: str) -> None:
    p = problem(9, 4, 3, 2)
    index = TopKIndex(p["table"], p["intent"], 3, backend=backend)
    if searched:
        index.search(p["user"], 1, p["scores"])
    p[what].copy_(p[what].flip(0))
    for call in (lambda: index.search(p["user"], 1), lambda: index.count_above(p["user"], torch.tensor([0, 1]))):
        with pytest.raises(ValueError, match="was changed after the index was built: build a new TopKIndex"):
            call()


def test_an_index_made_in_inference_mode_can_be_searched() -> None:
    with torch.inference_mode():
        index = TopKIndex(torch.tensor([[1.0], [2.0]]))
    assert index.search(torch.ones(1, 1), 1).items.tolist() == [[1]]


def test_every_block_knows_the_errors_of_those_after_it() -> None:
    """A segment of blocks is scanned with its first one's error. Here that is 0: the first 16 items are a multiple of the centroid's
    axes that the codes give exactly, the others are not, and matter alone to the users."""
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        near = torch.randn(112, 64, generator=g)
        near -= near.mean(0)
        far = torch.zeros(16, 64)
        axis = torch.arange(8)
        far[axis, axis], far[axis + 8, axis] = 14.0, -14.0
        user = torch.randn(20, 64, generator=g).sign()
        user[:, :8] = 0
        p = {"user": user, "table": torch.cat([far, near]), "intent": torch.zeros(128, dtype=torch.int64)}
        assert_same({**p, "scores": torch.zeros(20, 1)}, 5, "identity")


def test_sums_of_codes_that_float32_rounds(isa: str) -> None:
    """Codes that are exact, of sums just above 2^24, and an intent's score that cancels the dot products: what float32 takes from the
    sums is then more than anything else that may err. Each item must count as equal to itself, and to its copy."""
    q = torch.full((400, 4096), 65.0)
    q[:, 0], q[:, 1:132] = 127.0, 66.0
    q[:, 2] -= torch.arange(400) % 60
    q[:, 3] += torch.arange(400) // 60
    table = 1.875 * torch.cat([q, q[::2], -q, -q[::2]])  # of mean 0: the centroid has no part in it
    user = torch.full((600, 4096), 8001.0)  # 63 * 127: exact for codes up to 63, and up to 127
    dots, index = table.double() @ user[0].double(), TopKIndex(table)  # exact in float64
    for answers in (torch.arange(600), torch.arange(600, 1200)):
        offset = -dots[answers[0]].float()
        values = (dots + offset.double()).float()
        got = index.count_above(user, answers, offset.expand(600, 1))
        assert torch.equal(got[0], (values > values[answers, None]).sum(1))
        assert torch.equal(got[1], (values == values[answers, None]).sum(1) - 1)


def test_answers_must_be_items() -> None:
    index = TopKIndex(torch.ones(3, 2))
    with pytest.raises(ValueError, match="answers must be items 0 to 2"):
        index.count_above(torch.ones(1, 2), torch.tensor([3]))
    with pytest.raises(ValueError, match="answers must be int64"):
        index.count_above(torch.ones(1, 2), torch.tensor([1, 2]))
