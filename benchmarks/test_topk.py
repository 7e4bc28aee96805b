"""Exact joint top-k over 1.91M items against brute force in torch and faiss, and the rank of an answer against torch.

Run as `pytest benchmarks/test_topk.py`. Two tables, both (1.91M, 128) with 10,000 intents:

    trained  a CAFE `best` (d = 128) is trained once on a simulated shop of 40,000 items and 200 intents (kept in
             build/topk-benchmark), and its items are repeated 50 times, each time turned by another random rotation, as are
             the states of its users; 1 item in 22 is dropped. So everything near a user is as training made it. The intent scores
             of the other 49 parts follow the trained ones' regression on the intents' centroids, with its noise.
    random   normal numbers, no intent scores: nothing can be skipped.

faiss is measured where it can be imported, on the item score alone, which is all it can do. Everybody has all threads.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.common import Medians, Spread, keep_memory, quartiles, recording
from cafe.config import Config
from cafe.data import simulate
from cafe.data.prepare import prepare
from cafe.runs import load_run
from cafe.train import fit
from cafe_kernels import TopKIndex

ITEMS, DIM, COPIES, USERS, K = 1_910_000, 128, 50, 256, 10
FOLDER = Path(os.environ.get("CAFE_TOPK_BENCHMARK", "build/topk-benchmark"))
OURS = "TopKIndex"
FULL_USERS = 131_000


def trained() -> SimpleNamespace:
    """The small trained model's items, and its users' states, intent scores and answers."""
    if not (FOLDER / "run/best.safetensors").exists():
        simulate.PRESETS["topk"] = simulate.Shop(220_000, 40_000, 200, 8_000)
        paths = simulate.simulate("topk", FOLDER)
        dataset = prepare(paths["interactions"], paths["items"], FOLDER / "data")
        config = Config.make("cafe", "best", dim=DIM, epochs=20, valid_users=1000)
        fit(config, dataset, FOLDER / "run", data=(FOLDER / "data").resolve())
    model, dataset = load_run(FOLDER / "run")
    holdout = dataset.holdout("test")
    rows = np.random.default_rng(0).choice(len(holdout.users), USERS, replace=False)
    history = holdout.histories.take(rows, last=50)
    with torch.inference_mode():
        user, coarse = model.states(
            torch.from_numpy(history.items.astype(np.int64)), torch.from_numpy(history.indptr.astype(np.int32))
        )
        scores = model.intent_logits(coarse) * model.intent_weight[0]
        items = model.embed(torch.arange(model.num_items))
    answers = torch.from_numpy(holdout.answers[rows].astype(np.int64))
    tensors = {"user": user, "scores": scores, "table": items, "intent": model.item_intent, "answers": answers}
    return SimpleNamespace(**{name: x.clone() for name, x in tensors.items()})


def scaled_up() -> SimpleNamespace:
    small, g = trained(), torch.Generator().manual_seed(0)
    items, intents = len(small.table), small.scores.shape[1]
    kept = torch.randperm(items * COPIES, generator=g)[:ITEMS].sort().values
    centroids = torch.zeros(intents, DIM).index_add_(0, small.intent, small.table)
    centroids /= small.intent.bincount(minlength=intents)[:, None]
    x, y = (small.user @ centroids.T).flatten(), small.scores.flatten()
    bulk = y < y.view(USERS, -1).topk(10).values[:, -1].repeat_interleave(intents)  # all but a user's ten best intents
    slope, offset = np.polyfit(x[bulk], y[bulk], 1)
    noise = float((y - slope * x - offset)[bulk].std())
    part = torch.randint(0, COPIES, (USERS,), generator=g)
    out, user = torch.empty(ITEMS, DIM), torch.empty(USERS, DIM)
    turned_centroids = torch.empty(COPIES, intents, DIM)
    for copy in range(COPIES):
        rotation = torch.linalg.qr(torch.randn(DIM, DIM, generator=g)).Q
        mine = (kept >= copy * items) & (kept < (copy + 1) * items)
        out[mine] = (small.table @ rotation)[kept[mine] - copy * items]
        user[part == copy] = small.user[part == copy] @ rotation
        turned_centroids[copy] = centroids @ rotation
    scores = slope * (user @ turned_centroids.view(-1, DIM).T) + offset
    scores += noise * torch.randn(USERS, COPIES * intents, generator=g)
    for u in range(USERS):
        scores[u, part[u] * intents : (part[u] + 1) * intents] = small.scores[u]
    answers = torch.searchsorted(kept, part * items + small.answers).clamp(
        max=ITEMS - 1
    )  # or the next, where it was dropped
    intent = small.intent.repeat(COPIES) + torch.arange(COPIES).repeat_interleave(items) * intents
    return SimpleNamespace(user=user, table=out, scores=scores.log_softmax(-1), intent=intent[kept], answers=answers)


@pytest.fixture(scope="module")
def record(pytestconfig: pytest.Config) -> Iterator[dict[str, Any]]:
    keep_memory()
    empty: dict[str, Any] = {
        "ours": [OURS],
        "threads": torch.get_num_threads(),
        "items": ITEMS,
        "dim": DIM,
        "k": K,
        "cases": {},
    }
    with recording("topk", pytestconfig, empty) as record:
        yield record["cases"]


@pytest.fixture(scope="module", params=["trained", "random"])
def data(request: pytest.FixtureRequest) -> SimpleNamespace:
    if request.param == "trained":
        d = scaled_up()
    else:
        g = torch.Generator().manual_seed(0)
        d = SimpleNamespace(user=torch.randn(USERS, DIM, generator=g), table=torch.randn(ITEMS, DIM, generator=g))
        d.scores, d.intent, d.answers = (
            None,
            torch.arange(ITEMS) % 10_000,
            torch.randint(0, ITEMS, (USERS,), generator=g),
        )
    d.name, d.index = request.param, TopKIndex(d.table, d.intent)
    d.index.search(d.user[:1], 1)
    try:
        import faiss

        d.faiss = faiss.IndexFlatIP(DIM)
        d.faiss.add(d.table.numpy())
    except ImportError:
        d.faiss = None
    return d


def brute_force(d: SimpleNamespace, user: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor]:
    """torch.matmul and topk, for 64 users at once."""
    best = []
    for at in range(0, len(user), 64):
        all_scores = user[at : at + 64] @ d.table.T
        if scores is not None:
            all_scores += scores[at : at + 64].index_select(1, d.intent)
        best.append(all_scores.topk(K))
    return torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])


def brute_force_blocks(d: SimpleNamespace, user: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same in blocks of items that stay in the cache, each with its own topk."""
    best = []
    for at in range(0, ITEMS, 8192):
        block = user @ d.table[at : at + 8192].T
        if scores is not None:
            block += scores.index_select(1, d.intent[at : at + 8192])
        values, items = block.topk(K)
        best.append((values, items + at))
    values, where = torch.cat([v for v, _ in best], 1).topk(K)
    return values, torch.cat([i for _, i in best], 1).gather(1, where)


def listing(title: str, median: dict[str, float], first: dict[str, float]) -> str:
    lines = [f"{title:<34}{'median s':>10}{'x ours':>9}{'first s':>10}"]
    ours = next(iter(median.values()))
    lines += [f"{name:<34}{t:>10.4f}{t / ours:>9.2f}{first[name]:>10.4f}" for name, t in median.items()]
    return "\n".join(["", *lines])


def timed(contestants: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, Any], Medians, Medians, Spread]:
    """The contestants' results, their median seconds over interleaved calls, the first call's, and the quartiles. Calls take seconds,
    and find the caches as another contestant left them."""
    results: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, f in contestants.items():
            began = time.perf_counter()
            results[name] = f()
            seconds[name].append(time.perf_counter() - began)
    return (
        results,
        {name: statistics.median(s[1:]) for name, s in seconds.items()},
        {n: s[0] for n, s in seconds.items()},
        {name: quartiles(s[1:]) for name, s in seconds.items()},
    )


@pytest.mark.parametrize("users", [1, USERS])
@pytest.mark.parametrize("score", ["joint", "item"])
def test_topk(
    data: SimpleNamespace, score: str, users: int, record: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    if score == "joint" and data.scores is None:
        pytest.skip("the random table has no intent scores")
    user, scores = data.user[:users], data.scores[:users] if score == "joint" else None
    contestants: dict[str, Callable[[], Any]] = {
        OURS: lambda: data.index.search(user, K, scores),
        "torch matmul + topk": lambda: brute_force(data, user, scores),
    }
    if users == 1:  # for many users it is the slower of the two
        contestants["torch blocks of matmul + topk"] = lambda: brute_force_blocks(data, user, scores)
    if data.faiss is not None and score == "item":
        contestants["faiss IndexFlatIP"] = lambda: data.faiss.search(user.numpy(), K)
    theirs, steady, first, spread = timed(contestants, 15 if users == 1 else 2)
    ours = theirs.pop(OURS)
    agree = {name: float((torch.as_tensor(i) == ours.items).float().mean()) for name, (_, i) in theirs.items()}
    for name, (values, _) in theirs.items():  # other roundings, so other orders of near ties, but the same scores
        torch.testing.assert_close(torch.as_tensor(values), ours.scores, rtol=1e-4, atol=1e-4, msg=name)
    ratios = {f"{name} / ours": t / steady[OURS] for name, t in steady.items() if name != OURS}
    record[f"{data.name} {score} users={users}"] = {
        "median_seconds": steady, "quartiles": spread, "first_seconds": first, "ratios": ratios, "same_item_at_same_place": agree,
        "share_of_pairs_scored": ours.scored, "exact_scores_per_user": ours.exact * ITEMS,
    }  # fmt: skip
    with capsys.disabled():
        print(listing(f"{data.name}, {score} score, {users} users", steady, first))
        print(f"  scored {ours.scored:.4f} of all pairs, {ours.exact * ITEMS:.0f} a user exactly; same items: {agree}")


def test_rank_of_the_answer(data: SimpleNamespace, record: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    def counted() -> Tensor:
        counts = []
        for at in range(0, USERS, 64):
            part = slice(at, at + 64)
            scores = data.user[part] @ data.table.T
            if data.scores is not None:
                scores += data.scores[part].index_select(1, data.intent)
            counts.append((scores > scores.gather(1, data.answers[part, None])).sum(1))
        return torch.cat(counts)

    contestants: dict[str, Callable[[], Any]] = {
        OURS + ".count_above": lambda: data.index.count_above(data.user, data.answers, data.scores),
        "torch matmul, compare, sum": counted,
    }
    results, steady, first, spread = timed(contestants, 2)
    ours, theirs = results[OURS + ".count_above"][0], results["torch matmul, compare, sum"]
    assert ((ours - theirs).abs() <= 3 + 1e-4 * theirs).all()  # torch's scores are rounded otherwise
    rate = USERS / steady[OURS + ".count_above"]
    record[f"{data.name} rank"] = {
        "median_seconds": steady, "quartiles": spread, "first_seconds": first, "users_per_second": rate,
        "median_rank": float(ours.float().median()),
        "hours_for_131000_users": FULL_USERS / rate / 3600,
    }  # fmt: skip
    with capsys.disabled():
        print(listing(f"{data.name}, exact rank of {USERS} answers", steady, first))
        print(
            f"  {rate:.0f} users/s: {FULL_USERS:,} users in {FULL_USERS / rate / 60:.1f} minutes; median rank {ours.float().median():.0f}"
        )
