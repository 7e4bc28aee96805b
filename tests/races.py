"""Runs the threaded paths of csrc/ for ThreadSanitizer: `make tsan`.

    python -m tests.races --seconds 600

Each entry point is called with work for several threads of its own, and from several Python threads at once on the same inputs (the
extension gives the GIL away); each thread has its own outputs. ThreadSanitizer reports races and ends the process with exit code 66. The
results must be those of one thread, bit for bit.
"""

import argparse
import sys
import threading
import time
from collections.abc import Callable

import numpy as np

from tests.fuzz_kernels import csr, extension, floats

THREADS = 3
_C = extension()
Work = Callable[[int], list[np.ndarray]]  # from a number of threads to the results


def sampler(rng: np.random.Generator) -> Work:
    p = rng.random(5000)
    table = _C.AliasTable(p / p.sum())
    indptr, indices = csr(rng, 40, 5000, 30)
    rows = rng.integers(0, 40, 300)

    def work(threads: int) -> list[np.ndarray]:
        plain, distinct, some = (
            np.empty(200_000, np.int32),
            np.empty((300, 500), np.int32),
            np.empty((300, 500), np.int32),
        )
        table.sample(1, 2, plain, threads)
        table.sample_rows(indptr, indices, rows, False, 3, 4, some, threads)
        table.sample_rows(indptr, indices, rows[:30], True, 3, 4, distinct[:30], threads)
        return [plain, distinct[:30], some]

    return work


def attention(rng: np.random.Generator) -> Work:
    lengths = rng.integers(1, 120, 30)
    cu = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    total = int(cu[-1])
    q, k, v, grad_out = (floats(rng, False, total, 2, 16) for _ in range(4))
    theta = floats(rng, False, 2, int(lengths.max()))

    def work(threads: int) -> list[np.ndarray]:
        out, dq, dk, dv, lse = *(np.empty_like(q) for _ in range(4)), np.empty((2, total), np.float32)
        dtheta, options = np.empty_like(theta), (0.25, True, -1, 0.1, 1, 2, threads)
        _C.attention_forward(q, k, v, theta, cu, out, lse, *options)
        _C.attention_backward(grad_out, q, k, v, theta, cu, out, lse, dq, dk, dv, dtheta, *options)
        return [out, lse, dq, dk, dv, dtheta]

    return work


def losses(rng: np.random.Generator) -> Work:
    tokens, items, dim, shared, own = 1500, 3000, 32, 256, 60
    h, table = floats(rng, False, tokens, dim), floats(rng, False, items, dim)
    positives, once = rng.integers(0, items, tokens), rng.integers(0, items, shared)
    each = rng.integers(0, items, (tokens, own))

    def work(threads: int) -> list[np.ndarray]:
        results = []
        for negatives, parts in ((once, 4), (each, 0)):
            count = tokens + (tokens * own if parts == 0 else 0)
            lost, dh = np.empty(tokens, np.float32), np.empty_like(h)
            coefficients, rows = np.empty(count, np.float32), np.empty((parts * shared, dim), np.float32)
            arrays = (lost, dh, coefficients, rows)
            _C.sampled_loss(
                h, table, None, None, positives, negatives, *[None] * 5, *arrays, True, 1.0, 1.0, parts, threads
            )
            ids = np.concatenate([positives, each.reshape(-1) if parts == 0 else np.tile(once, parts)])
            order, distinct, starts = np.empty(len(ids), np.int32), np.empty_like(ids), np.empty(len(ids) + 1, np.int64)
            n, out = _C.sort_ids(ids, items, order, distinct, starts), np.zeros_like(table)
            _C.sum_segments(order, starts, n, distinct, h, coefficients, rows, 1.0, out, threads)
            results += [*arrays, out]
        return results

    return work


def optim(rng: np.random.Generator) -> Work:
    items, dim, n = 6000, 64, 20000
    start, rows, values = floats(rng, False, items, dim), rng.integers(0, items, n), floats(rng, False, n, dim)

    def work(threads: int) -> list[np.ndarray]:
        table, m, v = start.copy(), np.zeros_like(start), np.zeros_like(start)
        for step in (1, 2):
            _C.adam_rows(table, m, v, None, None, rows, values, 0, step, 0.1, 0.9, 0.99, 1e-8, 0.1, 3, threads)
        return [table, m, v]

    return work


def topk(rng: np.random.Generator) -> Work:
    items, dim, groups, users, k = 4000, 8, 50, 40, 7
    table, user, start = (
        floats(rng, False, items, dim),
        floats(rng, False, users, dim),
        np.arange(groups + 1, dtype=np.int32) * 5,
    )
    intent = np.repeat(np.arange(groups, dtype=np.int32), items // groups)
    scores = floats(rng, False, users, groups)
    answers = rng.integers(0, items, users)

    def work(threads: int) -> list[np.ndarray]:
        arrays = (
            np.empty((4, dim, 16), np.float32), np.empty(groups), np.empty(groups * 5), np.empty(groups * 5),
            np.empty(groups * 80, np.float32), np.empty(groups * 80, np.int32), np.empty((groups * 5, dim // 4, 16, 4), np.uint8),
        )  # fmt: skip
        _C.topk_build(table, np.arange(items, dtype=np.int32), np.arange(groups + 1) * 80, start, *arrays, threads)
        whole, number = np.full(groups, 80, np.int32), np.arange(groups, dtype=np.int32)
        index = _C.TopKIndex(table, intent, groups, start, whole, number, number, *arrays)
        found, best, counts = (
            np.empty((users, k), np.int64),
            np.empty((users, k), np.float32),
            np.empty((2, users), np.int64),
        )
        index.search(user, scores, True, k, None, None, found, best, threads)
        index.count_above(user, scores, False, answers, None, None, counts, threads)
        return [*arrays, found, best, counts]

    return work


PARTS = {f.__name__: f for f in (sampler, attention, losses, optim, topk)}


def check(name: str, seed: int) -> None:
    """One round of one part."""
    work = PARTS[name](np.random.default_rng(seed))
    expected = work(1)
    results: list[list[np.ndarray]] = []
    workers = [threading.Thread(target=lambda: results.append(work(THREADS))) for _ in range(THREADS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == THREADS, f"{name}: a thread failed"
    for result in results:
        for x, y in zip(result, expected, strict=True):
            assert np.array_equal(x, y, equal_nan=x.dtype.kind == "f"), f"{name}: the result depends on threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all if none is given")
    parser.add_argument("--seconds", type=float, default=60, help="CPU time of all together")
    options = parser.parse_args()
    names, rounds = options.parts or list(PARTS), 0
    while time.process_time() < options.seconds:
        for name in names:
            check(name, rounds)
        rounds += 1
    print(f"{', '.join(names)}: {rounds} rounds in {time.process_time():.0f} CPU seconds, nothing wrong")


if __name__ == "__main__":
    sys.exit(main())
