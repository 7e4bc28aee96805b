"""How the cost of every op grows with the catalog V, the length n, the negatives K and the threads: exponents fitted to measured points.

    python -m benchmarks.growth            # half a minute of CPU time; writes results/growth.json and results/growth.png
    python -m benchmarks.growth --draw     # only draws and prints what was recorded

Each line is one op as one number grows, ours and the peer's in turns in one run, in CPU seconds of the process on one thread; the lines
over threads are in wall seconds, and mean something on an idle machine only. The exponent is the slope of the least-squares line through
log seconds against log of what grows: 0 says that the cost does not depend on it, 1 that it is proportional, 2 that it is quadratic; -1
over threads is a perfect division of labour.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import RESULTS, busy, keep_memory, quartiles, read, write
from cafe_kernels import AliasSampler, RowSparseAdam, TopKIndex, sampled_bce
from cafe_kernels.attention import distance_attention

CATALOGS, LENGTHS, NEGATIVES = (10_000, 100_000, 1_000_000), (32, 64, 128, 256, 512, 1024), (1, 8, 32, 128, 512)
THREADS = tuple(sorted({1, 2, os.cpu_count() or 1}))
DIM, TOKENS, DRAWS, ROWS = 64, 2_048, 100_000, 4_800
ROUNDS, SECONDS = 7, 2.0
Call = Callable[[int], Any]  # given the number of the call


def sampler(v: int, threads: int = 1) -> dict[str, Call]:
    counts = np.random.default_rng(0).permutation((np.arange(v) + 1.0) ** -0.75)
    alias, out = AliasSampler(counts, num_threads=threads), np.empty(DRAWS, np.int32)
    weights = torch.from_numpy(counts / counts.sum())
    return {
        "AliasSampler": lambda number: alias.sample(DRAWS, 1, number * DRAWS, out),
        "torch.multinomial": lambda number: torch.multinomial(weights, DRAWS, replacement=True),
    }


def optimizer(v: int) -> dict[str, Call]:
    """The step on ROWS rows of a table of v."""

    def make(kind: str) -> Call:
        table = torch.nn.Parameter(torch.full((v, DIM), 0.1))
        step = {
            "RowSparseAdam exact": lambda: RowSparseAdam([table], mode="exact"),
            "torch.optim.SparseAdam": lambda: torch.optim.SparseAdam([table]),
            "torch.optim.Adam(fused=True)": lambda: torch.optim.Adam([table], fused=True),
        }[kind]().step
        generator = torch.Generator().manual_seed(0)
        gradients = []
        for _ in range(4):
            rows = torch.randperm(v, generator=generator)[:ROWS]
            sparse = torch.sparse_coo_tensor(
                rows[None], torch.full((ROWS, DIM), 1e-4), (v, DIM), check_invariants=False
            )
            gradients.append(sparse.to_dense() if "fused" in kind else sparse)

        def call(number: int) -> None:
            table.grad = gradients[number % 4]
            step()

        return call

    kinds = ["RowSparseAdam exact", "torch.optim.SparseAdam"]
    if v <= 100_000:  # beyond, its dense gradients do not fit in memory beside the others'
        kinds.append("torch.optim.Adam(fused=True)")
    return {kind: make(kind) for kind in kinds}


def loss(k: int, v: int = 100_000, tokens: int = TOKENS) -> dict[str, Call]:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(tokens, DIM, generator=generator).requires_grad_()
    table = (0.05 * torch.randn(v, DIM, generator=generator)).requires_grad_()
    positives = torch.randint(v, (tokens,), generator=generator)
    negatives = torch.randint(v, (tokens, k), generator=generator)

    def ours(number: int) -> Any:
        value = sampled_bce(h, table, positives, negatives, sparse_grad=True, backend="cpu")
        return torch.autograd.grad(value, (h, table))

    def eager(number: int) -> Any:
        rows = torch.nn.functional.embedding(torch.cat([positives[:, None], negatives], 1), table, sparse=True)
        logits = torch.bmm(rows, h.unsqueeze(-1)).squeeze(-1)
        target = torch.zeros_like(logits)
        target[:, 0] = 1
        value = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="sum") / tokens
        return torch.autograd.grad(value, (h, table))

    return {"sampled_bce": ours, "eager gather and bmm": eager}


def attention(n: int, tokens: int = 4096) -> dict[str, Call]:
    generator = torch.Generator().manual_seed(0)
    count = max(1, tokens // n)
    q, k, v = (torch.randn(count * n, 1, DIM, generator=generator).requires_grad_() for _ in range(3))
    log_theta = torch.randn(1, n, generator=generator).requires_grad_()
    cu_seqlens = torch.arange(0, count * n + 1, n, dtype=torch.int32)
    distance = torch.arange(n)[:, None] - torch.arange(n)

    def ours(number: int) -> Any:
        out = distance_attention(q, k, v, log_theta, cu_seqlens, backend="cpu")
        return torch.autograd.grad(out, (q, k, v, log_theta), q.detach())

    def eager(number: int) -> Any:
        squares = [x.view(count, n, 1, DIM).transpose(1, 2) for x in (q, k, v)]
        bias = log_theta[:, distance.clamp(min=0)].masked_fill(distance < 0, float("-inf"))
        weights = (squares[0] @ squares[1].transpose(-1, -2) * DIM**-0.5 + bias).softmax(-1)
        out = (weights @ squares[2]).transpose(1, 2).reshape(q.shape)
        return torch.autograd.grad(out, (q, k, v, log_theta), q.detach())

    return {"distance_attention": ours, "eager, same bias": eager}


def top_k(v: int, users: int = 32) -> dict[str, Call]:
    generator = torch.Generator().manual_seed(0)
    table, user = torch.randn(v, DIM, generator=generator), torch.randn(users, DIM, generator=generator)
    index = TopKIndex(table, torch.arange(v) % 1000)
    return {
        "TopKIndex, item score": lambda number: index.search(user, 10),
        "torch matmul + topk": lambda number: (user @ table.T).topk(10),
    }


LINES: dict[str, tuple[str, tuple[int, ...], Callable[[int], dict[str, Call]]]] = {
    f"sampler, {DRAWS:,} draws": ("V", CATALOGS, sampler),
    f"optimizer, {ROWS:,} rows": ("V", CATALOGS, optimizer),
    "BCE, K = 8": ("V", CATALOGS, lambda v: loss(8, v)),
    "top-10 of random items, 32 users": ("V", CATALOGS, top_k),
    "attention, forward + backward, 4,096 tokens": ("n", LENGTHS, attention),
    f"BCE, forward + backward, {TOKENS:,} tokens": ("K", NEGATIVES, loss),
    "sampler": ("threads", THREADS, lambda t: sampler(1_000_000, t)),
    "attention, n = 64": ("threads", THREADS, lambda t: attention(64, 16_384)),
    "BCE, K = 128": ("threads", THREADS, lambda t: loss(128)),
    "top-10, 32 users, V = 1,000,000": ("threads", THREADS, lambda t: top_k(1_000_000)),
}


def exponent(x: list[float], y: list[float]) -> float:
    """The slope of log y against log x by least squares.

    >>> round(exponent([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def measure(calls: dict[str, Call], clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each call: in turns, at most ROUNDS after the first, and no more than 3 once SECONDS are over."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for number in range(ROUNDS + 1):
        if number > 3 and time.perf_counter() - began > SECONDS:
            break
        for name, call in calls.items():
            start = clock()
            call(number)
            times[name].append(clock() - start)
    return {name: taken[1:] for name, taken in times.items()}


def measure_all() -> dict[str, Any]:
    lines: dict[str, Any] = {}
    for title, (grows, sizes, make) in LINES.items():
        clock = time.perf_counter if grows == "threads" else time.process_time
        found: dict[str, dict[int, list[float]]] = {}
        for size in sizes:
            torch.set_num_threads(size if grows == "threads" else 1)
            for name, taken in measure(make(size), clock).items():
                found.setdefault(name, {})[size] = taken
        lines[f"{title}, by {grows}"] = {
            "grows": grows,
            "contestants": {
                name: {
                    "sizes": list(taken),
                    "seconds": [statistics.median(t) for t in taken.values()],
                    "quartiles": [quartiles(t) for t in taken.values()],
                    "exponent": exponent(list(taken), [statistics.median(t) for t in taken.values()]),
                }
                for name, taken in found.items()
                if len(taken) > 1
            },
        }
        print(
            table({"lines": {f"{title}, by {grows}": lines[f"{title}, by {grows}"]}}, head=len(lines) == 1), flush=True
        )
    return {"threads": 1, "clock": "process CPU time; wall time over threads", "dim": DIM, "lines": lines}


def table(record: dict[str, Any], head: bool = True) -> str:
    lines = ["| what, by what | contestant | from | to | exponent |", "|---|---|--:|--:|--:|"] if head else []
    for title, line in record["lines"].items():
        for name, found in line["contestants"].items():
            if not np.isfinite([*found["seconds"], found["exponent"]]).all():
                lines.append(f"| {title} | {name} | not measured |")
                continue
            ends = [f"{found['sizes'][i]:,}: {1e3 * found['seconds'][i]:.3g} ms" for i in (0, -1)]
            lines.append(f"| {title} | {name} | {ends[0]} | {ends[1]} | {shown_exponent(record, line, found)} |")
    return "\n".join(lines)


def shown_exponent(record: dict[str, Any], line: dict[str, Any], found: dict[str, Any]) -> str:
    """Over threads there is none where the machine was busy while it was measured."""
    if line["grows"] == "threads" and "machine" in record and busy(record):
        return "measured on a busy machine"
    return f"{found['exponent']:.2f}"


def draw(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = -(-len(record["lines"]) // 2)
    figure, axes = pyplot.subplots(2, columns, figsize=(3.6 * columns, 7), layout="constrained")
    for panel, (title, line) in zip(axes.flat, record["lines"].items(), strict=False):
        for name, found in line["contestants"].items():
            low, high = np.array(found["quartiles"]).T * 1e3
            label = f"{name}: {shown_exponent(record, line, found)}"
            panel.plot(found["sizes"], np.array(found["seconds"]) * 1e3, marker="o", markersize=4, label=label)
            panel.fill_between(found["sizes"], low, high, alpha=0.2)
        panel.set(xscale="log", yscale="log", xlabel=line["grows"], ylabel="ms", title=title.rsplit(", by", 1)[0])
        panel.title.set_fontsize(9)
        panel.set_xticks(found["sizes"], [f"{size:,}" for size in found["sizes"]], fontsize=7)
        panel.minorticks_off()
        panel.legend(fontsize=7, title="exponent", title_fontsize=7)
    for panel in axes.flat[len(record["lines"]) :]:
        panel.set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="only draw and print what was recorded")
    path = RESULTS / "growth.json"
    if parser.parse_args().draw:
        print(table(read(path)))
    else:
        keep_memory()
        write("growth", measure_all())
    draw(read(path), path.with_suffix(".png"))
    print(f"written: {path}, {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
