"""Several ranks: what a step costs here with 1, 2 and 4 processes, a model that foresees it, and the same model for 8 to 64 GPUs.

    python -m benchmarks.distributed measure      # gloo processes on this machine; writes results/distributed.json
    python -m benchmarks.distributed plan         # the tables of docs/scale.md, by arithmetic alone

The model. A rank of R has in a step T tokens and asks for U distinct rows of width d, of which F are with others:

    bytes sent    = F (8 + 4 d) + G 4 d,     ids and gradients of the rows that it asks for, and G rows that others ask of it
    all-reduce    = 2 (R - 1) / R * 4 P      P dense parameters, as a ring sends them
    CPU seconds   = a + b T + X_R(U) - X_1(U)
    wall seconds  = CPU seconds of the slowest rank * max(1, (R + others) / cores)

T, U, F and G are drawn as training draws them (cafe.distributed.make_part), with no process started. a and b are fitted to one
process at three batch sizes; X_R, linear in U, is measured on R ranks that exchange rows and sums and do nothing else. others: how many
processes of other work share the cores, from wall by CPU seconds of one process. Nothing is fitted to the steps of several ranks.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import typer

from benchmarks.common import machine, write
from cafe.batches import Batches
from cafe.config import Config
from cafe.data.dataset import Dataset
from cafe.data.prepare import prepare
from cafe.data.simulate import simulate
from cafe.distributed import build, make_optimizers, make_part, train_step

RANKS, BATCHES, WARM_UP, STEPS = (1, 2, 4), (128, 256, 512), 4, 24
ROWS = 256, 4096  # that X is measured with
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def config_of(batch_size: int) -> Config:
    return Config.make("cafe", "best", batch_size=batch_size)


@app.command()
def measure() -> None:
    """Steps of 1, 2 and 4 processes beside what the model says of them."""
    with tempfile.TemporaryDirectory() as folder:
        files = simulate("sparse", Path(folder) / "files")
        data = Path(folder) / "data"
        prepare(files["interactions"], files["items"]).save(data)
        alone = [launch(1, data, size) for size in BATCHES]
        found = {1: alone[-1]} | {ranks: launch(ranks, data, BATCHES[-1]) for ranks in RANKS[1:]}
        dataset = Dataset.load(data)
        drawn = {ranks: draw(config_of(BATCHES[-1]), dataset, ranks) for ranks in RANKS}
        tokens = [np.mean([rank["tokens"] for rank in draw(config_of(size), dataset, 1)]) for size in BATCHES]
    b, a = np.polyfit(tokens, [result[0]["cpu"] for result in alone], 1)
    slowdown, cores = alone[-1][0]["wall"] / alone[-1][0]["cpu"], len(os.sched_getaffinity(0))
    others = slowdown * cores - 1 if slowdown > 1.2 else 0.0
    record: dict[str, Any] = {"config": "cafe best, d = 64", "batch": BATCHES[-1], "steps": STEPS, "others": others}
    record |= {"fixed_ms": 1e3 * a, "us_a_token": 1e6 * b, "ranks": {}}
    print(
        f"{machine()}\na = {1e3 * a:.1f} ms, b = {1e6 * b:.2f} us a token, {others:.1f} other processes on {cores} cores\n"
    )
    columns = "ranks", "rows a rank", "kB a rank sends, model / counted", "CPU ms a rank, model / measured"
    print(f"| {' | '.join(columns)} | wall ms, model / measured |")
    print("|--:|--:|--:|--:|--:|")
    for ranks, parts in drawn.items():
        x, one = ([np.poly1d(np.polyfit(ROWS, result["exchange"], 1)) for result in found[n]] for n in (ranks, 1))
        cpu = [a + b * p["tokens"] + x[r](p["asked"]) - one[0](p["asked"]) for r, p in enumerate(parts)]
        wall = max(cpu) * max(1, (ranks + others) / cores)
        row = {
            "rows": np.mean([p["asked"] for p in parts]),
            "kB": (np.mean([p["bytes"] for p in parts]) / 1e3, np.mean([r["bytes"] for r in found[ranks]]) / 1e3),
            "cpu_ms": (1e3 * np.mean(cpu), 1e3 * np.mean([r["cpu"] for r in found[ranks]])),
            "wall_ms": (1e3 * wall, 1e3 * np.mean([r["wall"] for r in found[ranks]])),
            "exchange_cpu_ms": [1e3 * np.mean([r["exchange"][i] for r in found[ranks]]) for i in range(len(ROWS))],
            "busiest_owner": max(p["served"] for p in parts) / np.mean([p["served"] for p in parts]),
        }
        record["ranks"][ranks] = row
        cells = (f"{row[name][0]:.1f} / {row[name][1]:.1f}" for name in ("kB", "cpu_ms", "wall_ms"))
        print(f"| {ranks} | {row['rows']:.0f} | {' | '.join(cells)} |")
    print(f"written: {write('distributed', record)}")


def draw(config: Config, dataset: Dataset, ranks: int) -> list[dict[str, float]]:
    """Of each rank the means of the measured steps: tokens, rows asked for, rows served, bytes sent all to all."""
    batches, block = Batches(config, dataset), -(-dataset.num_items // ranks)
    totals = [{"tokens": 0.0, "asked": 0.0, "served": 0.0, "bytes": 0.0} for _ in range(ranks)]
    for step in range(WARM_UP, WARM_UP + STEPS):
        rows = rows_of(batches, step)
        for rank in range(ranks):
            batch = make_part(batches, rows, step, rank, ranks).batch
            assert batch.rows is not None
            owners = np.bincount(batch.rows.numpy() // block, minlength=ranks)
            totals[rank]["tokens"] += len(batch.items) / STEPS
            totals[rank]["asked"] += owners.sum() / STEPS
            for owner, count in enumerate(owners):
                totals[owner]["served"] += count / STEPS
                if owner != rank:
                    totals[rank]["bytes"] += count * (8 + 4 * config.dim) / STEPS
                    totals[owner]["bytes"] += count * 4 * config.dim / STEPS
    return totals


def rows_of(batches: Batches, step: int) -> np.ndarray:
    size = batches.config.batch_size
    epoch, number = divmod(step, len(batches.rows) // size)
    return batches.order(epoch)[number * size :][:size]


def launch(ranks: int, data: Path, batch_size: int) -> list[dict[str, Any]]:
    """`rank` on so many processes; what each has measured."""
    with tempfile.TemporaryDirectory() as out:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"),
            *("benchmarks.distributed", "rank", data, str(batch_size), out),
        ]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return [json.loads((Path(out) / f"{rank}.json").read_text()) for rank in range(ranks)]


@app.command(hidden=True)
def rank(data: Path, batch_size: int, out: Path) -> None:
    """One of the processes of `launch`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    me, ranks, sent = dist.get_rank(), dist.get_world_size(), 0.0
    original = dist.all_to_all_single

    def counted(
        output: Any, input: Any, output_split_sizes: Any = None, input_split_sizes: Any = None, **more: Any
    ) -> Any:
        nonlocal sent
        mine = 1 / ranks if input_split_sizes is None else input_split_sizes[me] / max(1, len(input))
        sent += input.numel() * input.element_size() * (1 - mine)
        return original(output, input, output_split_sizes, input_split_sizes, **more)

    dist.all_to_all_single = counted
    config, dataset = config_of(batch_size), Dataset.load(data)
    model, batches = build(config, dataset, torch.device("cpu")).train(), Batches(config, dataset)
    optimizers = make_optimizers(model.model)
    parts = [make_part(batches, rows_of(batches, step), step, me, ranks) for step in range(WARM_UP + STEPS)]
    for part in parts[:WARM_UP]:
        train_step(model, optimizers, part)
    dist.barrier()
    sent, wall, cpu = 0.0, time.perf_counter(), time.process_time()
    for part in parts[WARM_UP:]:
        train_step(model, optimizers, part)
    result: dict[str, Any] = {"cpu": (time.process_time() - cpu) / STEPS, "bytes": sent / STEPS}
    dist.barrier()
    result["wall"] = (time.perf_counter() - wall) / STEPS
    dense = torch.zeros(sum(p.numel() for p in model.model.parameters()) - model.table.shard.numel())
    result |= {"dense": len(dense), "exchange": [exchange(model.table, count, dense) for count in ROWS]}
    (out / f"{me}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def exchange(table: Any, count: int, dense: torch.Tensor) -> float:
    """CPU seconds of the exchanges of a step, without its work."""
    began = 0.0
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            dist.barrier()
            began = time.process_time()
        ids = torch.randperm(table.num_rows)[:count].sort().values
        fetched = table.fetch(ids)
        fetched.backward(fetched.detach())
        table.gather_gradient()
        dist.all_reduce(dense)
    return (time.process_time() - began) / STEPS


# The plan: an NVIDIA H100 SXM, 8 a machine. Peaks are the vendor's; SHARE of them is an assumption, and nothing was measured on a GPU.
MEMORY, HBM, NVLINK, NETWORK, FLOPS, SHARE = 80e9, 3.35e12, 450e9, 50e9, 67e12, 0.5  # bytes, bytes/s, float32 flop/s
OP, LATENCY = 8e-6, 30e-6  # seconds: the host's for an operator of PyTorch, a collective's
TORCHREC = 1.5e-3  # seconds of TorchRec's Python in a step: measured here, on one rank with few rows
SEQUENCES, LENGTH, NEGATIVES, DIM, LAYERS, INTENTS = (
    128,
    50,
    2048,
    128,
    2,
    10_000,
)  # a rank's sequences, all full; CAFE best


@app.command()
def plan() -> None:
    """Memory, bytes and time of a step, for 100 million and a billion items."""
    tokens, d = SEQUENCES * LENGTH, DIM
    dense = 2 * INTENTS * d + 2 * (LENGTH * d + LAYERS * (6 * d * d + 4 * d) + 2 * d) + LAYERS * 2 * LENGTH * d
    asked = tokens + SEQUENCES + NEGATIVES
    flops = 3 * 2 * tokens * (2 * LAYERS * 6 * d * d + NEGATIVES * d + INTENTS * d)
    attention = (
        2 * LAYERS * (4 + 7) * 4 * tokens * d
    )  # docs/gpu.md: 4 tensors forward, 7 backward, each moved 1.01 times
    around = (
        2 * LAYERS * 60 * 4 * tokens * d + 2 * 4 * tokens * INTENTS / 64
    )  # what PyTorch moves between: about 60 tensors a block
    optimizer = 7 * 4 * d * asked + 7 * 4 * dense
    device = max(flops / FLOPS, (attention + around + optimizer) / HBM) / SHARE
    host = OP * operators() + TORCHREC
    print(f"{tokens} tokens, {asked} rows a rank, {dense / 1e6:.1f} M dense parameters, {operators()} operators a step")
    print(f"{flops / 1e9:.0f} GFLOP, {(attention + around + optimizer) / 1e9:.2f} GB", end=": ")
    print(f"{1e3 * device:.1f} ms on the device; {1e3 * host:.1f} ms on the host\n")
    columns = (
        "items",
        "GPUs",
        "GB a rank: float32",
        "moments in 16 bits",
        "all in 16 bits",
        "GB index",
        "GB per-item buffers",
    )
    columns += "MB all to all", "MB all-reduce", "ms a step"
    print(f"| {' | '.join(columns)} |\n|{'--:|' * len(columns)}")
    for items in (100_000_000, 1_000_000_000):
        for ranks in (8, 16, 32, 64):
            rows = items / ranks
            weights = [rows * (d * size + 4) / 1e9 for size in (12, 8, 6)]
            index, buffers = rows * 4 * (d + 2) / 1e9, items * 16 / 1e9
            away = (ranks - 1) / ranks
            to_all = asked * away * (8 + 2 * 4 * d)
            reduced = 2 * away * 4 * dense
            speed = NVLINK if ranks <= 8 else NETWORK
            exchanged = (to_all + reduced) / (speed * SHARE) + 5 * LATENCY
            step = max(host, device) + exchanged
            fits = ("" if w + index + buffers + 8 < MEMORY / 1e9 else " (too large)" for w in weights)
            memory = " | ".join(f"{w:.1f}{fit}" for w, fit in zip(weights, fits, strict=True))
            sent = f"{to_all / 1e6:.1f} | {reduced / 1e6:.1f}"
            print(
                f"| {items // 10**6} M | {ranks} | {memory} | {index:.1f} | {buffers:.1f} | {sent} | {1e3 * step:.1f} |"
            )


def operators() -> int:
    """Operators of PyTorch in a step of CAFE best, counted on the CPU."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from cafe.train import make_optimizers as make
    from cafe.train import train_step as step

    class Count(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Count.seen += function._schema.name not in ("aten::detach", "aten::view", "aten::t", "aten::slice")
            return function(*args, **(kwargs or {}))

    with tempfile.TemporaryDirectory() as folder:
        files = simulate("demo", folder)
        dataset = prepare(files["interactions"], files["items"])
    from cafe.models import build as plain

    config = config_of(64)
    model, batches = plain(config, dataset).train(), Batches(config, dataset)
    optimizers = make(model)
    for number in range(2):
        batch = batches(rows_of(batches, number), number).of_its_rows()
        with Count():
            Count.seen = 0
            step(model, optimizers, batch)
    return Count.seen


if __name__ == "__main__":
    app()
