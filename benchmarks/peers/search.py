"""Exact top-10 by inner product: TopKIndex against faiss flat, usearch's exact search, implicit's topk and torch.

    python -m benchmarks.peers.env [--threads 2] search benchmarks.peers.search [--items 1000000]   # writes results/peers_search.json

Random tables and users: nothing can be skipped. 256 users and one, d = 128, in turns in one process; answers are compared to torch's. Wall
seconds, since all have their own threads, and process CPU seconds beside them. No peer has the joint score: that comparison is in
test_topk.py, against torch. usearch's and faiss' approximate indices answer another question and are left out.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import torch
import usearch.index
from implicit.cpu.topk import topk as implicit_topk

from benchmarks.common import keep_memory, quartiles, write
from cafe_kernels import TopKIndex

DIM, K = 128, 10
OURS = "TopKIndex"


def measure(v: int, users: int, threads: int, rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    table, user = torch.randn(v, DIM, generator=generator), torch.randn(users, DIM, generator=generator)
    items, queries = table.numpy(), user.numpy()
    index, flat = TopKIndex(table, torch.arange(v) % 1000), faiss.IndexFlatIP(DIM)
    flat.add(items)
    exact = {"metric": usearch.index.MetricKind.IP, "exact": True, "threads": threads}
    contestants: dict[str, Callable[[], Any]] = {
        OURS: lambda: index.search(user, K).items.numpy(),
        "torch matmul + topk": lambda: (user @ table.T).topk(K).indices.numpy(),
        "faiss IndexFlatIP": lambda: flat.search(queries, K)[1],
        "usearch, exact": lambda: usearch.index.search(items, queries, K, **exact).keys.reshape(users, K),
        "implicit topk": lambda: implicit_topk(items, queries, K, num_threads=threads)[0],
    }
    wall: dict[str, list[float]] = {name: [] for name in contestants}
    cpu: dict[str, list[float]] = {name: [] for name in contestants}
    answers: dict[str, np.ndarray] = {}
    for _ in range(rounds + 1):
        for name, call in contestants.items():
            began = time.perf_counter(), time.process_time()
            answers[name] = call()
            wall[name].append(time.perf_counter() - began[0])
            cpu[name].append(time.process_time() - began[1])
    medians = {name: statistics.median(taken[1:]) for name, taken in wall.items()}
    truth = answers["torch matmul + topk"]
    return {
        "median_seconds": medians,
        "quartiles": {name: quartiles(taken[1:]) for name, taken in wall.items()},
        "cpu_seconds": {name: statistics.median(taken[1:]) for name, taken in cpu.items()},
        "same_item_at_same_place": {name: float((found == truth).mean()) for name, found in answers.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    keep_memory()
    cases = {}
    for users in (1, 256):
        cases[f"V={given.items} users={users}"] = found = measure(given.items, users, threads, given.rounds)
        for name, seconds in found["median_seconds"].items():
            ours = found["median_seconds"][OURS], found["cpu_seconds"][OURS]
            print(
                f"{users:>4} users  {name:<22}{1e3 * seconds:>10.2f} ms{seconds / ours[0]:>8.2f} x ours, CPU "
                f"{found['cpu_seconds'][name] / ours[1]:.2f} x; same items {found['same_item_at_same_place'][name]:.4f}",
                flush=True,
            )
    record = {"ours": [OURS], "threads": threads, "dim": DIM, "k": K, "cases": cases}
    print(f"written: {write('peers_search', record, packages=['faiss-cpu', 'usearch', 'implicit'])}")


if __name__ == "__main__":
    main()
