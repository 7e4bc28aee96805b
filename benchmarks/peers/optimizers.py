"""The optimizer's step on a table: RowSparseAdam against FBGEMM's fused embedding (TorchRec's) and torch's SparseAdam, on the CPU.

    python -m benchmarks.peers.env fbgemm benchmarks.peers.optimizers     # writes results/peers_optimizers.json

A step is all that a model does with its table: look up 9,600 different random rows, other ones at every step, get a gradient for each,
update the table. FBGEMM's `SplitTableBatchedEmbeddingBagsCodegen` fuses backward and optimizer, but on the CPU it has no Adam: the nearest
that 1.8.0 has is Adagrad, with one moment to an entry where Adam has two, and rowwise Adagrad with one to a row. SGD, with none, is the
floor. V rows of 128, float32, one thread, process CPU seconds, in turns in one process; between calls 64 MB are written, as a model does.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen

from benchmarks.common import keep_memory, quartiles, write
from cafe_kernels import RowSparseAdam

ROWS, DIM = 9_600, 128
ROUNDS = 11
OURS = "RowSparseAdam"
Step = Callable[[torch.Tensor, torch.Tensor], None]  # rows (ROWS,), gradient (ROWS, DIM)


def sparse(make: Callable[[torch.nn.Parameter], Any], v: int) -> Step:
    """A torch optimizer after torch's lookup with a sparse gradient."""
    table = torch.nn.Parameter(torch.full((v, DIM), 0.1))
    optimizer = make(table)

    def step(rows: torch.Tensor, gradient: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        if isinstance(optimizer, RowSparseAdam):
            optimizer.catch_up(table, rows)
        torch.nn.functional.embedding(rows, table, sparse=True).backward(gradient)
        optimizer.step()

    return step


def fbgemm(kind: EmbOptimType, v: int) -> Step:
    module = SplitTableBatchedEmbeddingBagsCodegen(
        [(v, DIM, EmbeddingLocation.HOST, ComputeDevice.CPU)], optimizer=kind, learning_rate=1e-3
    )
    module.init_embedding_weights_uniform(0.1, 0.1)
    offsets = torch.arange(ROWS + 1)  # bags of one

    def step(rows: torch.Tensor, gradient: torch.Tensor) -> None:
        module(rows, offsets).backward(gradient)

    return step


def measure(v: int) -> dict[str, Any]:
    contestants: dict[str, Step] = {
        f"{OURS} lazy": sparse(lambda table: RowSparseAdam([table], mode="lazy"), v),
        f"{OURS} exact": sparse(lambda table: RowSparseAdam([table], mode="exact"), v),
        "torch.optim.SparseAdam": sparse(lambda table: torch.optim.SparseAdam([table]), v),
        "FBGEMM Adagrad": fbgemm(EmbOptimType.EXACT_ADAGRAD, v),
        "FBGEMM rowwise Adagrad": fbgemm(EmbOptimType.EXACT_ROWWISE_ADAGRAD, v),
        "FBGEMM SGD": fbgemm(EmbOptimType.EXACT_SGD, v),
    }
    rng, model = np.random.default_rng(0), torch.zeros(16 * 2**20)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(ROUNDS + 2):
        rows = torch.from_numpy(rng.choice(v, ROWS, replace=False))
        gradient = 1e-4 * torch.randn(ROWS, DIM)
        for name, step in contestants.items():
            model += 1
            began = time.process_time()
            step(rows, gradient)
            times[name].append(time.process_time() - began)
    medians = {name: statistics.median(taken[2:]) for name, taken in times.items()}
    return {
        "median_seconds": medians,
        "quartiles": {name: quartiles(taken[2:]) for name, taken in times.items()},
        "ratios to lazy": {name: seconds / medians[f"{OURS} lazy"] for name, seconds in medians.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 1_000_000])
    torch.set_num_threads(1)
    keep_memory()
    cases = {}
    for v in parser.parse_args().items:
        cases[f"V={v}"] = measure(v)
        for name, seconds in cases[f"V={v}"]["median_seconds"].items():
            ratio = cases[f"V={v}"]["ratios to lazy"][name]
            print(f"V = {v:>9,}  {name:<28}{1e3 * seconds:>9.2f} ms{ratio:>8.2f} x lazy", flush=True)
    record = {"ours": [OURS], "threads": 1, "clock": "process CPU time", "rows": ROWS, "dim": DIM, "cases": cases}
    print(f"written: {write('peers_optimizers', record, packages=['fbgemm-gpu-cpu', 'torchrec'])}")


if __name__ == "__main__":
    main()
