"""The sampled losses on the CPU against what people write in PyTorch for the same loss: gather, einsum, loss, backward.

Run as `pytest benchmarks/test_losses.py`. 3,200 tokens, d = 128, one thread, float32, forward and backward: gradients of h and of
the table. The peers are the best forms that we know: one gather for the positive and the negatives, `bmm` for the logits, and a
sparse gradient (`sparse`), which PyTorch leaves uncoalesced; ours is coalesced. With a dense gradient, as most people train, both
fill a tensor of the table's size (`dense`; at 1.91M items that is all that there is to see). Negatives shared by the batch are a matrix
product for everybody. The peaks are of resident memory above that before the call, each in a process of its own.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, embedding

from benchmarks.common import compare, keep_memory, recording, table
from cafe_kernels import sampled_bce, sampled_softmax

TOKENS, DIM = 3200, 128
OURS, EAGER = "fused", "eager"
CASES = {
    "BCE, K=1 a token": ("bce", (TOKENS, 1)),
    "BCE, K=128 a token": ("bce", (TOKENS, 128)),
    "softmax, K=128 a token": ("softmax", (TOKENS, 128)),
    "softmax, K=512 shared": ("softmax", (512,)),
}
CATALOGS = {"V=10k": 10_000, "V=1.91M": 1_910_000}


def fused(x: SimpleNamespace, sparse: bool) -> Tensor:
    loss = {"bce": sampled_bce, "softmax": sampled_softmax}[x.kind]
    return loss(x.h, x.table, x.positives, x.negatives, sparse_grad=sparse, backend="cpu")


def eager(x: SimpleNamespace, sparse: bool) -> Tensor:
    if x.negatives.dim() == 1:
        rows = embedding(torch.cat([x.positives, x.negatives]), x.table, sparse=sparse)
        positive = (x.h * rows[:TOKENS]).sum(-1, keepdim=True)
        logits = torch.cat([positive, x.h @ rows[TOKENS:].T], 1)
    else:
        rows = embedding(torch.cat([x.positives[:, None], x.negatives], 1), x.table, sparse=sparse)
        logits = torch.bmm(rows, x.h.unsqueeze(-1)).squeeze(-1)
    hidden = x.negatives == x.positives[:, None]
    logits[:, 1:].masked_fill_(hidden, float("-inf"))
    if x.kind == "softmax":
        return cross_entropy(logits, torch.zeros_like(x.positives))
    target = torch.zeros_like(logits)
    target[:, 0] = 1
    each = binary_cross_entropy_with_logits(logits.clamp(min=-1e9), target, reduction="none")
    return each.sum() / TOKENS


def case(name: str, items: int, seed: int, weights: Tensor) -> SimpleNamespace:
    kind, shape = CASES[name]
    rng = torch.Generator().manual_seed(seed)
    h = torch.randn(TOKENS, DIM, generator=rng)
    ids = [torch.randint(items, size, generator=rng) for size in ((TOKENS,), shape)]
    return SimpleNamespace(kind=kind, h=h.requires_grad_(), table=weights, positives=ids[0], negatives=ids[1])


def step(function: Callable[..., Tensor], sparse: bool) -> Callable[[SimpleNamespace], tuple[Tensor, ...]]:
    return lambda x: torch.autograd.grad(function(x, sparse), (x.h, x.table))


def make_table(items: int) -> Tensor:
    return torch.empty(items, DIM).normal_(std=0.05, generator=torch.Generator().manual_seed(0)).requires_grad_()


def check_agreement(x: SimpleNamespace) -> None:
    (dh, rows), (dh_eager, rows_eager) = step(fused, True)(x), step(eager, True)(x)
    torch.testing.assert_close(dh, dh_eager, rtol=1e-4, atol=1e-7)
    rows_eager = rows_eager.coalesce()
    assert torch.equal(rows.indices(), rows_eager.indices())
    torch.testing.assert_close(rows.values(), rows_eager.values(), rtol=1e-4, atol=1e-7)


@pytest.fixture(scope="module")
def record(pytestconfig: pytest.Config) -> Iterator[dict[str, Any]]:
    keep_memory()
    empty: dict[str, Any] = {
        "ours": [OURS],
        "threads": 1,
        "tokens": TOKENS,
        "dim": DIM,
        "cases": {},
        "peak_megabytes": {},
    }
    with recording("losses", pytestconfig, empty) as record:
        yield record


@pytest.mark.parametrize("catalog", CATALOGS)
def test_losses(catalog: str, record: dict[str, Any], benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    items = CATALOGS[catalog]
    weights = make_table(items)
    for name in CASES:
        cases = [case(name, items, seed, weights) for seed in range(4)]
        check_agreement(cases[0])
        contestants = {f"{OURS}, sparse": step(fused, True), f"{EAGER}, sparse": step(eager, True)}
        if items < 100_000:
            contestants |= {f"{OURS}, dense": step(fused, False), f"{EAGER}, dense": step(eager, False)}
        steady, after, spread = compare(contestants, lambda number, cases=cases: cases[number % 4], seconds=8)  # type: ignore[misc]
        ratios = {peer: steady[peer] / steady[f"{OURS}, sparse"] for peer in steady}
        what = f"{name}, {catalog}"
        record["cases"][what] = {
            "median_seconds": {"steady": steady, "after_another": after}, "quartiles": spread, "ratios": ratios
        }  # fmt: skip
        with capsys.disabled():
            print(table(what, steady, after, f"{OURS}, sparse"))
            target = "none" if "shared" in name else ">= 5"
            print(f"  eager / ours = {ratios[f'{EAGER}, sparse']:.2f} (target: {target})")
        benchmark.extra_info[what] = ratios
    ours = step(fused, True)
    benchmark(lambda: ours(cases[0]))


PEAK = """
import sys, torch
from benchmarks.test_losses import case, eager, fused, make_table, step
torch.set_num_threads(1)
name, items, function = sys.argv[1], int(sys.argv[2]), {"fused": fused, "eager": eager}[sys.argv[3]]
x = case(name, items, 0, make_table(items))
def resident(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = resident("VmRSS")
step(function, True)(x)
print((resident("VmHWM") - before) / 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
def test_peak_memory(record: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for name in CASES:
        for catalog, items in CATALOGS.items():
            peaks = {}
            for contestant in (OURS, EAGER):
                arguments = [sys.executable, "-c", PEAK, name, str(items), contestant]
                run = subprocess.run(arguments, capture_output=True, text=True, check=True)
                peaks[contestant] = float(run.stdout)
            record["peak_megabytes"][f"{name}, {catalog}"] = peaks
            with capsys.disabled():
                print(f"{name + ', ' + catalog:<36}" + "".join(f"{who}: {mb:7.1f} MB   " for who, mb in peaks.items()))
