"""AliasSampler against what people use to draw by popularity, and against the limit: a random gather of as many items.

Run as `pytest benchmarks/test_sampler.py`. Everybody has one thread. Every call has a fresh seed, fresh rows and fresh
indices to gather, so that nobody finds the very cache lines of its last call still warm. Popularity is Zipf's with
exponent 0.75 (at V = 1.91M the most popular item has 0.7% of the mass); histories are drawn by popularity too.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.common import compare, recording, table
from cafe_kernels import AliasSampler

OURS, EXCLUDING, DISTINCT = "AliasSampler", "AliasSampler, excluding", "AliasSampler, distinct"
MULTINOMIAL, SEARCH, SORTED = "torch.multinomial", "numpy cumulative search", "numpy cumulative search, sorted"
GATHERS = ["gather: numpy take", "gather: torch index_select", "gather: C loop"]
K, HISTORY, USERS = 50, 50, 20_000
C_LOOP = "void f(const double* a, const int* i, long n, double* o) { for (long j = 0; j < n; ++j) o[j] = a[i[j]]; }"


@pytest.fixture(scope="module")
def record(pytestconfig: pytest.Config) -> Iterator[dict[str, Any]]:
    empty: dict[str, Any] = {"ours": [OURS], "threads": 1, "history": HISTORY, "draws_a_row": K, "cases": {}}
    with recording("sampler", pytestconfig, empty) as record:
        yield record["cases"]


@pytest.fixture(scope="module")
def c_loop(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None] | None:
    """The plainest gather there is, where there is a compiler."""
    compiler = os.environ.get("CC") or shutil.which("cc")
    if not compiler:
        return None
    folder = tmp_path_factory.mktemp("gather")
    (folder / "gather.c").write_text(C_LOOP)
    subprocess.run([compiler, "-O3", "-shared", "-fPIC", "gather.c", "-o", "gather.so"], cwd=folder, check=True)
    f = ctypes.CDLL(str(folder / "gather.so")).f
    f.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p]
    return f


@pytest.mark.parametrize("draws", [3_200, 1_000_000])
@pytest.mark.parametrize("v", [10_000, 1_910_000])
def test_sampler(
    v: int, draws: int, record: dict[str, Any], c_loop: Any, benchmark: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    counts = rng.permutation((np.arange(v) + 1.0) ** -0.75)
    sampler = AliasSampler(counts, num_threads=1)
    p, cumulative = sampler.probabilities, np.cumsum(sampler.probabilities)
    weights = torch.from_numpy(p.copy())
    values, gathered = rng.random(v), np.empty(draws)
    torch_values, torch_gathered = torch.from_numpy(values), torch.from_numpy(gathered)
    out = np.empty(draws, np.int32)
    out_rows = out.reshape(-1, K)
    histories = np.sort(AliasSampler(counts).sample((USERS, HISTORY), seed=1), axis=1)
    indptr, indices = np.arange(USERS + 1) * HISTORY, histories.ravel()

    def prepare(number: int) -> SimpleNamespace:
        indices = rng.integers(0, v, draws)
        return SimpleNamespace(
            offset=number * draws,
            rows=rng.integers(0, USERS, draws // K),
            indices=indices,
            indices32=indices.astype(np.int32),
            torch_indices=torch.from_numpy(indices),
        )

    def search(n: int) -> Any:
        return np.minimum(np.searchsorted(cumulative, rng.random(n), side="right"), v - 1)

    def search_sorted(n: int) -> Any:  # neighbouring queries share cache lines; the draws must be shuffled again
        u = rng.random(n)
        u.sort()
        ids = np.minimum(np.searchsorted(cumulative, u, side="right"), v - 1)
        rng.shuffle(ids)
        return ids

    def search_excluding(rows: Any) -> Any:  # rejection, row against history all at once
        ids, mine = search(len(rows) * K).reshape(-1, K), histories[rows]
        again = np.arange(len(rows))
        while again.size:
            seen = np.stack([(mine[again] == ids[again, j, None]).any(1) for j in range(K)], 1)
            again, seen = again[seen.any(1)], seen[seen.any(1)]
            redrawn = ids[again]
            redrawn[seen] = search(int(seen.sum()))
            ids[again] = redrawn
        return ids

    contestants: dict[str, Callable[[Any], Any]] = {
        OURS: lambda x: sampler.sample(draws, 1, x.offset, out),
        EXCLUDING: lambda x: sampler.sample_excluding(indptr, indices, x.rows, K, 1, x.offset, out_rows),
        DISTINCT: lambda x: sampler.sample_distinct(indptr, indices, x.rows, K, 1, x.offset, out_rows),
        MULTINOMIAL: lambda x: torch.multinomial(weights, draws, replacement=True),
        "numpy choice(p)": lambda x: rng.choice(v, draws, p=p),
        SEARCH: lambda x: search(draws),
        SORTED: lambda x: search_sorted(draws),
        SEARCH + ", excluding": lambda x: search_excluding(x.rows),
        GATHERS[0]: lambda x: np.take(values, x.indices, out=gathered, mode="clip"),
        GATHERS[1]: lambda x: torch.index_select(torch_values, 0, x.torch_indices, out=torch_gathered),
    }
    if c_loop:
        pointers = values.ctypes.data, gathered.ctypes.data
        contestants[GATHERS[2]] = lambda x: c_loop(pointers[0], x.indices32.ctypes.data, draws, pointers[1])

    steady, after, spread = compare(contestants, prepare)

    def ratios(medians: dict[str, float]) -> dict[str, float]:
        ours = medians[OURS]
        return {
            "torch.multinomial / ours": medians[MULTINOMIAL] / ours,
            "numpy's faster cumulative search / ours": min(medians[SEARCH], medians[SORTED]) / ours,
            "ours / fastest gather": ours / min(medians[name] for name in GATHERS if name in medians),
            "ours excluding / ours": medians[EXCLUDING] / ours,
        }

    record[f"V={v} draws={draws}"] = {
        "steady": {"median_seconds": steady, "quartiles": spread, "ratios": ratios(steady)},
        "after_another": {"median_seconds": after, "ratios": ratios(after)},
    }
    targets = [">= 50", ">= 20", "<= 3", "<= 1.6"] if (v, draws) == (1_910_000, 3_200) else ["none"] * 4
    with capsys.disabled():
        print(table(f"V = {v:,}, {draws:,} draws a call", steady, after, OURS))
        for (name, ratio), target in zip(ratios(steady).items(), targets, strict=True):
            print(f"  {name} = {ratio:.2f} steady, {ratios(after)[name]:.2f} after another (target: {target})")

    benchmark.extra_info.update(ratios(steady))
    numbers = iter(range(1_000_000_000))
    benchmark(lambda: sampler.sample(draws, 2, next(numbers) * draws, out))
