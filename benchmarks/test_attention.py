"""distance_attention on the CPU against what people write in PyTorch for the same function, and against its matrix products alone.

Run as `pytest benchmarks/test_attention.py`. Everybody has one thread, one head, float32, the same numbers and the same gradients:
of q, k, v and log_theta, from a gradient of the output. Padded peers get their tensors already padded to n, as people keep them;
ours gets packed tokens. The limit is `torch.bmm` (MKL or oneDNN sgemm) of the same products on whole n x n blocks: 2 of them
forward, 7 with backward. The share of the peak counts the causal triangle only, against `torch.mm` of 512 x 512 in the same rounds.
Memory freed by one call is kept for the next (glibc's malloc would give it back, and everybody would mostly measure page faults).
Torch's nested tensors take part by their matmul and softmax: on the CPU their scaled_dot_product_attention takes neither a mask
nor is_causal, and the jagged layout has no matmul of two ragged tensors. FlexAttention (its bias a score_mod that reads the table) has no
backward pass on the CPU, and takes part forward.

The two-sided case (causal=False, a bias for each distance of both signs) is against eager PyTorch and its attention with a float mask,
both padded, the keys of the padding hidden.
"""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

from benchmarks.common import RESULTS, compare, keep_memory, recording, table
from cafe_kernels.attention import distance_attention

OURS, EAGER, SDPA, LOOP = "distance_attention", "eager, padded", "SDPA with a float mask, padded", "SDPA a sequence"
NESTED = "eager, nested tensors"
FLEX = "FlexAttention, compiled, padded"  # forward: on the CPU it has no backward pass
LIMIT = "the products alone (bmm)"
PEAK = "torch.mm, 512 x 512"
# How many users of Amazon Beauty (5-core) have a history of 0, 1, 2, ... 50 or more items: 8.9 on average.
BEAUTY = (
    0, 0, 0, 0, 0, 7162, 4221, 2680, 1811, 1366, 881, 695, 558, 439, 361, 262, 207, 213, 141, 118, 112, 117, 84, 66, 73,
    74, 61, 54, 44, 44, 38, 30, 38, 20, 19, 21, 19, 23, 24, 22, 15, 17, 7, 10, 10, 15, 7, 11, 8, 4, 161,
)  # fmt: skip
CASES = {"n=50": (64, 50), "Beauty's lengths": (128, 50), "n=200": (16, 200), "n=1024": (4, 1024)}
LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048)  # of the growth


def attend(q: Tensor, k: Tensor, v: Tensor, log_theta: Tensor, cu_seqlens: Tensor) -> Tensor:
    return distance_attention(q, k, v, log_theta, cu_seqlens, backend="cpu")


def bias(log_theta: Tensor, n: int) -> Tensor:
    """The mask that PyTorch's attention needs, (H, n, n)."""
    distance = torch.arange(n)[:, None] - torch.arange(n)
    return log_theta[:, distance.clamp(min=0)].masked_fill(distance < 0, float("-inf"))


def eager(q: Tensor, k: Tensor, v: Tensor, log_theta: Tensor) -> Tensor:
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias(log_theta, q.shape[2])
    return logits.softmax(-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, log_theta: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, bias(log_theta, q.shape[2])[None])


@cache
def compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def flex(q: Tensor, k: Tensor, v: Tensor, log_theta: Tensor) -> Tensor:
    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(i >= j, s + log_theta[h, (i - j).clamp(min=0)], -float("inf"))

    return compiled_flex()(q, k, v, score_mod=score)


def sdpa_loop(q: Tensor, k: Tensor, v: Tensor, log_theta: Tensor, lengths: list[int]) -> Tensor:
    mask = bias(log_theta, max(lengths))
    sequences = zip(lengths, *(x.transpose(0, 1).split(lengths, 1) for x in (q, k, v)), strict=True)
    out = [
        scaled_dot_product_attention(a[None], b[None], c[None], mask[None, :, :n, :n])[0] for n, a, b, c in sequences
    ]
    return torch.cat(out, 1).transpose(0, 1)


def eager_nested(q: Tensor, k: Tensor, v: Tensor, log_theta: Tensor, lengths: list[int]) -> Tensor:
    a, b, c = (torch.nested.as_nested_tensor(list(x.transpose(0, 1).split(lengths, 1))) for x in (q, k, v))
    mask = bias(log_theta, max(lengths))
    logits = a @ b.transpose(-1, -2) * q.shape[-1] ** -0.5
    weights = torch.softmax(logits + torch.nested.as_nested_tensor([mask[:, :n, :n] for n in lengths]), -1)
    return torch.cat((weights @ c).unbind(), 1).transpose(0, 1)


def case(name: str, dim: int, seed: int) -> SimpleNamespace:
    """Packed and padded tensors of one batch."""
    batch, n = CASES[name]
    rng = np.random.default_rng(seed)
    weights = np.array(BEAUTY) / sum(BEAUTY)
    lengths = rng.choice(len(BEAUTY), batch, p=weights).tolist() if name.startswith("Beauty") else [n] * batch
    generator = torch.Generator().manual_seed(seed)
    packed = [torch.randn(sum(lengths), 1, dim, generator=generator) for _ in range(3)]
    padded = [
        torch.stack([pad(s, (0, 0, 0, 0, 0, n - len(s))) for s in x.split(lengths)]).transpose(1, 2).contiguous()
        for x in packed
    ]
    log_theta = torch.randn(1, n, generator=generator)
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return SimpleNamespace(
        packed=tuple(packed), padded=tuple(padded), log_theta=log_theta, cu_seqlens=cu_seqlens, lengths=lengths, n=n
    )


def contestants(name: str, backward: bool, dim: int) -> dict[str, Callable[[SimpleNamespace], Any]]:
    def run(function: Callable[..., Tensor], x: SimpleNamespace, inputs: tuple[Tensor, ...], *rest: Any) -> Any:
        if not backward:
            with torch.no_grad():
                return function(*inputs, *rest)
        inputs = tuple(t.detach().requires_grad_() for t in inputs)
        return torch.autograd.grad(function(*inputs, *rest), inputs, inputs[0])

    batch, n = CASES[name]
    square, wide = torch.empty(batch, n, n), torch.empty(batch, n, dim)

    def products(x: SimpleNamespace) -> None:
        q, k, v = (t[:, 0] for t in x.padded)
        for _ in range(
            3 if backward else 1
        ):  # s = q k', out = s v; backward: s and dp = do v', dq = ds k, dk = ds' q, dv = p' do
            torch.bmm(q, k.transpose(1, 2), out=square)
            torch.bmm(square, v, out=wide)
        if backward:
            torch.bmm(square.transpose(1, 2), q, out=wide)

    matrix, product = torch.randn(512, 512), torch.empty(512, 512)
    found = {
        PEAK: lambda x: torch.mm(matrix, matrix, out=product),
        OURS: lambda x: run(attend, x, (*x.packed, x.log_theta), x.cu_seqlens),
        EAGER: lambda x: run(eager, x, (*x.padded, x.log_theta)),
        SDPA: lambda x: run(sdpa, x, (*x.padded, x.log_theta)),
        LOOP: lambda x: run(sdpa_loop, x, (*x.packed, x.log_theta), x.lengths),
        NESTED: lambda x: run(eager_nested, x, (*x.packed, x.log_theta), x.lengths),
    }
    if not backward:
        found[FLEX] = lambda x: run(flex, x, (*x.padded, x.log_theta))
    return found if name.startswith("Beauty") else found | {LIMIT: products}


@pytest.fixture(scope="module")
def record(pytestconfig: pytest.Config) -> Iterator[dict[str, Any]]:
    keep_memory()
    with recording("attention", pytestconfig, {"ours": [OURS], "threads": 1, "cases": {}, "growth": {}}) as record:
        yield record


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", CASES)
def test_attention(
    name: str, dim: int, record: dict[str, Any], benchmark: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [case(name, dim, seed) for seed in range(8)]
    check_agreement(cases[0])
    for backward in (False, True):
        what = f"{name}, head width {dim}, forward" + (" + backward" if backward else "")
        steady, after, spread = compare(
            contestants(name, backward, dim), lambda number: fresh(cases[number % len(cases)]), seconds=4
        )
        ratios = {f"{peer} / ours": steady[peer] / steady[OURS] for peer in steady if peer not in (OURS, PEAK)}
        products = (
            sum(n * (n + 1) // 2 for x in cases for n in x.lengths) / len(cases) * 2 * dim * (7 if backward else 2)
        )
        peak = 2 * 512**3 / steady[PEAK]
        share = products / steady[OURS] / peak
        best_padded = min(steady[EAGER], steady[SDPA]) / steady[OURS]
        ratios["best padded peer / ours"] = best_padded
        record["cases"][what] = {
            "median_seconds": {"steady": steady, "after_another": after},
            "quartiles": spread,
            "ratios": ratios,
            "share_of_peak": share,
        }
        with capsys.disabled():
            print(table(what, steady, after, OURS))
            print(f"  ours: {share:.0%} of the peak, {peak / 1e9:.0f} GFLOP/s")
            target = {"n=50": ">= 3", "Beauty's lengths": ">= 10"}.get(name, "none") if backward else "none"
            print(f"  best padded peer / ours = {best_padded:.2f} (target: {target})")
            if LIMIT in steady:
                print(f"  the products alone / ours = {steady[LIMIT] / steady[OURS]:.2f} (target: >= 0.5)")
        benchmark.extra_info[what] = ratios
    numbers = iter(range(1_000_000_000))
    ours = contestants(name, True, dim)[OURS]
    benchmark(lambda: ours(cases[next(numbers) % len(cases)]))


def fresh(x: SimpleNamespace) -> SimpleNamespace:
    """The batch as a model has it: just computed."""
    for t in (*x.packed, *x.padded):
        t.mul_(1.0)
    return x


def check_agreement(x: SimpleNamespace) -> None:
    """All contestants compute the same."""
    ours = attend(*x.packed, x.log_theta, x.cu_seqlens)
    with torch.no_grad():
        flexed = flex(*x.padded, x.log_theta)
    for out in (eager(*x.padded, x.log_theta), sdpa(*x.padded, x.log_theta), flexed):
        packed = torch.cat([row[0, :length] for row, length in zip(out, x.lengths, strict=True)])
        torch.testing.assert_close(packed, ours[:, 0], rtol=1e-4, atol=1e-5)
    for packed_peer in (sdpa_loop, eager_nested):
        torch.testing.assert_close(packed_peer(*x.packed, x.log_theta, x.lengths), ours, rtol=1e-4, atol=1e-5)


def two_sided_bias(log_theta: Tensor, n: int, lengths: Tensor) -> Tensor:
    """(B, H, n, n), -inf at the keys of padding."""
    distance = torch.arange(n)[:, None] - torch.arange(n)
    padding = torch.arange(n) >= lengths[:, None]
    return log_theta[:, distance + n - 1][None].masked_fill(padding[:, None, None], float("-inf"))


def eager_two_sided(q: Tensor, k: Tensor, v: Tensor, log_theta: Tensor, lengths: Tensor) -> Tensor:
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + two_sided_bias(log_theta, q.shape[2], lengths)
    return logits.softmax(-1) @ v


def sdpa_two_sided(q: Tensor, k: Tensor, v: Tensor, log_theta: Tensor, lengths: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, two_sided_bias(log_theta, q.shape[2], lengths))


def attend_two_sided(q: Tensor, k: Tensor, v: Tensor, log_theta: Tensor, cu_seqlens: Tensor) -> Tensor:
    return distance_attention(q, k, v, log_theta, cu_seqlens, causal=False, backend="cpu")


@pytest.mark.parametrize("name", ["n=50", "Beauty's lengths"])
def test_two_sided(name: str, record: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    cases = [case(name, 64, seed) for seed in range(8)]
    for seed, x in enumerate(cases):
        x.two_sided = torch.randn(1, 2 * x.n - 1, generator=torch.Generator().manual_seed(seed))
        x.tensor_lengths = torch.tensor(x.lengths)

    def run(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], *rest: Any) -> Any:
        inputs = tuple(t.detach().requires_grad_() for t in inputs)
        return torch.autograd.grad(function(*inputs, *rest), inputs, inputs[0])

    x = cases[0]
    ours = attend_two_sided(*x.packed, x.two_sided, x.cu_seqlens)[:, 0]
    for peer in (eager_two_sided, sdpa_two_sided):
        out = peer(*x.padded, x.two_sided, x.tensor_lengths)
        same = torch.cat([row[0, :length] for row, length in zip(out, x.lengths, strict=True)])
        torch.testing.assert_close(same, ours, rtol=1e-4, atol=1e-5)
    steady, after, spread = compare(
        {
            OURS: lambda x: run(attend_two_sided, (*x.packed, x.two_sided), x.cu_seqlens),
            EAGER: lambda x: run(eager_two_sided, (*x.padded, x.two_sided), x.tensor_lengths),
            SDPA: lambda x: run(sdpa_two_sided, (*x.padded, x.two_sided), x.tensor_lengths),
        },
        lambda number: fresh(cases[number % len(cases)]),
        seconds=8,
    )
    what = f"{name}, head width 64, two-sided, forward + backward"
    ratios = {f"{peer} / ours": steady[peer] / steady[OURS] for peer in (EAGER, SDPA)}
    record["cases"][what] = {
        "median_seconds": {"steady": steady, "after_another": after}, "quartiles": spread, "ratios": ratios
    }  # fmt: skip
    with capsys.disabled():
        print(table(what, steady, after, OURS))


def test_growth(record: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Forward and backward of 4,096 tokens as their sequences get longer: ours against the padded peers, drawn to a picture."""
    medians: dict[str, list[float]] = {OURS: [], EAGER: [], SDPA: []}
    for n in LENGTHS:
        CASES["growth"] = (max(1, 4096 // n), n)
        x = case("growth", 64, 0)
        chosen = {name: f for name, f in contestants("growth", True, 64).items() if name in medians}
        steady, *_ = compare(chosen, lambda number, x=x: x, seconds=2, rounds=30)  # type: ignore[misc]
        for name, seconds in steady.items():
            medians[name].append(seconds)
    del CASES["growth"]
    record["growth"] = {"tokens": 4096, "lengths": LENGTHS, "median_seconds": medians}
    with capsys.disabled():
        for name, seconds in medians.items():
            print(f"{name:<32}" + "".join(f"{1e3 * s:>9.2f} ms" for s in seconds))
    draw_growth(medians, RESULTS / "attention_growth.png")


def draw_growth(medians: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, seconds in medians.items():
        axes.plot(LENGTHS, np.array(seconds) * 1e3, marker="o", label=name)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="length of the sequences (4,096 tokens in all)",
        ylabel="ms, forward + backward",
    )
    axes.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
