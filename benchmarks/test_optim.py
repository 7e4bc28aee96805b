"""RowSparseAdam on the CPU against torch.optim.SparseAdam and dense fused Adam on the same table, and against its own growth with V.

Run as `pytest benchmarks/test_optim.py`. Everybody has one thread, d = 128 and a gradient of 9,600 different random rows, other ones at
every step. The state is that of a run's 3,000th step, in which each step touched 9,600 rows: in the exact mode nearly all rows are
behind, by V / 9,600 steps on average. The limit is what reads and writes as many rows with torch: index_select and index_copy_ of the
three tables. Contestants on tables of 1 GB do not fit beside each other, so that each has its own turn of 3 + 15 steps; ours goes first
and last, and the medians of both turns are printed. Times are the thread's own (CLOCK_THREAD_CPUTIME_ID): other processes that
take the core away do not count, the cache that they take does. Between steps 64 MB are written, as a model's step does, so that at no V the
tables lie in the cache; `warm` is without.
"""

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.common import quartiles, recording
from cafe_kernels.optim import RowSparseAdam

warnings.filterwarnings("ignore", message="Sparse invariant checks")
ROWS, DIM, PAST = 9_600, 128, 3_000
V = 1_910_000


@pytest.fixture(scope="module")
def record(pytestconfig: pytest.Config) -> Iterator[dict[str, Any]]:
    what = {"rows": ROWS, "dim": DIM, "clock": "thread CPU time"}
    empty: dict[str, Any] = {"ours": ["lazy", "exact", "V="], "threads": 1, **what, "cases": {}}
    with recording("optim", pytestconfig, empty) as record:
        yield record["cases"]


def gradient(v: int, seed: int, like: Tensor) -> Tensor:
    """ROWS different rows in random order."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, v, (2 * ROWS,), generator=g).unique() if v > 10 * ROWS else torch.arange(v)
    rows = rows[torch.randperm(len(rows), generator=g)[:ROWS]]
    values = 1e-4 * torch.randn(ROWS, DIM, generator=g)
    return torch.sparse_coo_tensor(rows[None], values.to(like.dtype), like.shape)


def state_of_a_long_run(optimizer: RowSparseAdam, table: Tensor, mode: str) -> None:
    none = torch.zeros(1, 0, dtype=torch.long), torch.zeros(0, DIM, dtype=table.dtype)
    for _ in range(PAST):
        table.grad = torch.sparse_coo_tensor(*none, table.shape)
        optimizer.step()
    state = optimizer.state[table]
    state["exp_avg"].fill_(1e-5)
    state["exp_avg_sq"].fill_(1e-9)
    if mode == "exact":
        g = torch.Generator().manual_seed(1)
        gap = (
            torch.empty(len(table)).exponential_(ROWS / len(table), generator=g)
            if len(table) > ROWS
            else torch.zeros(1)
        )
        state["last_step"].copy_((PAST - 1 - gap).clamp(min=0))


def measure(
    v: int, dtype: torch.dtype, make: Callable[[Tensor], Any], cold: bool = True, dense: bool = False
) -> list[float]:
    """Seconds of each step of the optimizer that `make` gives to a new table."""
    table = torch.nn.Parameter(torch.empty(v, DIM, dtype=dtype).fill_(0.1))
    step = make(table)
    steps = 5 if dense else 15
    gradients = [gradient(v, seed, table) for seed in range(3 + steps)] if not dense else []
    model = torch.zeros(16 * 2**20)
    if dense:
        table.grad = torch.full_like(table, 1e-4)
    times = []
    for t in range(3 + steps):
        if not dense:
            table.grad = gradients[t]
        if cold:
            model += 1
        began = time.thread_time()
        step()
        times.append(time.thread_time() - began)
    del table, step, gradients
    gc.collect()
    return times[3:]


def ours(mode: str, **options: Any) -> Callable[[Tensor], Any]:
    def make(table: Tensor) -> Any:
        optimizer = RowSparseAdam([table], mode=mode, **options)
        state_of_a_long_run(optimizer, table, mode)
        return optimizer.step

    return make


def gather_and_scatter(table: Tensor) -> Any:
    tables = [table.detach(), torch.full_like(table.detach(), 1e-5), torch.full_like(table.detach(), 1e-9)]

    def step() -> None:
        assert table.grad is not None
        rows = table.grad._indices()[0].sort().values
        for x in tables:
            x.index_copy_(0, rows, x.index_select(0, rows))

    return step


def sparse_adam(table: Tensor) -> Any:
    return torch.optim.SparseAdam([table]).step


def fused_adam(table: Tensor) -> Any:
    return torch.optim.Adam([table], fused=True).step


def test_against_torch(record: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    contestants: list[tuple[str, Callable[[Tensor], Any]]] = [
        ("lazy", ours("lazy")),
        ("exact", ours("exact")),
        ("torch.optim.SparseAdam", sparse_adam),
        ("torch.optim.Adam(fused=True), dense", fused_adam),
        ("torch gather and scatter of 3 tables", gather_and_scatter),
        ("exact, again", ours("exact")),
        ("lazy, again", ours("lazy")),
    ]
    times = {name: measure(V, torch.float32, make, dense="dense" in name) for name, make in contestants}
    seconds = {name: statistics.median(taken) for name, taken in times.items()}
    lazy, exact = (min(seconds[name], seconds[name + ", again"]) for name in ("lazy", "exact"))
    ratios = {
        "SparseAdam / lazy": (seconds["torch.optim.SparseAdam"] / lazy, ">= 10"),
        "SparseAdam / exact": (seconds["torch.optim.SparseAdam"] / exact, "none"),
        "dense fused Adam / exact": (seconds["torch.optim.Adam(fused=True), dense"] / exact, ">= 100"),
        "exact / lazy": (exact / lazy, "<= 2"),
        "gather and scatter / lazy": (seconds["torch gather and scatter of 3 tables"] / lazy, "none"),
    }
    record[f"V={V}"] = {
        "median_seconds": seconds,
        "quartiles": {name: quartiles(taken) for name, taken in times.items()},
        "ratios": {name: x for name, (x, _) in ratios.items()},
    }
    with capsys.disabled():
        print(f"\nV = {V:,}, {ROWS:,} rows of {DIM}, float32")
        for name, s in seconds.items():
            print(f"{name:<40}{1e3 * s:>10.2f} ms")
        for name, (ratio, target) in ratios.items():
            print(f"  {name} = {ratio:.2f} (target: {target})")


@pytest.mark.parametrize("cold", [True, False], ids=["cold", "warm"])
def test_growth(cold: bool, record: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """The step at growing V; 10M rows with a bfloat16 table and bfloat16 moments, and 1.91M of those beside it."""
    small = {"moments_dtype": torch.bfloat16}
    cases: list[tuple[int, torch.dtype, dict[str, Any]]] = [
        (10_000, torch.float32, {}),
        (100_000, torch.float32, {}),
        (V, torch.float32, {}),
        (10_000, torch.bfloat16, small),
        (V, torch.bfloat16, small),
        (10_000_000, torch.bfloat16, small),
    ]
    times = {
        f"V={v}, {str(dtype)[6:]}, {mode}": measure(v, dtype, ours(mode, **options), cold)
        for mode in ("lazy", "exact")
        for v, dtype, options in cases
    }
    seconds = {case: statistics.median(taken) for case, taken in times.items()}
    name = "growth, " + ("cold" if cold else "warm")
    record[name] = {
        "median_seconds": seconds, "quartiles": {case: quartiles(taken) for case, taken in times.items()}
    }  # fmt: skip
    with capsys.disabled():
        print(f"\n{name}")
        for case, s in seconds.items():
            rest = case.split(",", 1)[1]
            print(f"{case:<36}{1e3 * s:>10.2f} ms{s / seconds['V=10000,' + rest]:>9.2f} x V=10000 (target: <= 1.3)")
