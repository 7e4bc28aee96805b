"""distance_attention on a GPU against compiled FlexAttention with the same learned bias, SDPA with the bias materialised, and eager.

Run as `pytest -m gpu benchmarks/test_attention_gpu.py`. Everybody gets the same numbers and computes the same gradients: of q, k, v and
log_theta. Padded peers get tensors that are padded already; ours and FlexAttention, which knows documents, get packed tokens (and
FlexAttention its block mask, made before the clock starts, as a training loop would keep it). Times are by CUDA events, interleaved,
each on a cold L2 cache; the record holds medians and ratios.
"""

import statistics
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from benchmarks.common import machine, write
from benchmarks.test_attention import BEAUTY
from cafe_kernels.attention import distance_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

OURS, FLEX, SDPA, EAGER = (
    "distance_attention",
    "FlexAttention, compiled",
    "SDPA with a float mask, padded",
    "eager, padded",
)
CASES = {
    "n=50": (4096, 50),
    "Beauty's lengths": (8192, 50),
    "n=200": (512, 200),
    "n=1024": (64, 1024),
    "n=8192": (2, 8192),
}
HEADS, ROUNDS = 2, 30


def bias(log_theta: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    distance = torch.arange(n, device="cuda")[:, None] - torch.arange(n, device="cuda")
    return log_theta[:, distance.clamp(min=0)].masked_fill(distance < 0, float("-inf")).to(dtype)


def eager(x: SimpleNamespace, q: Tensor, k: Tensor, v: Tensor, log_theta: Tensor) -> Tensor:
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias(log_theta, x.n, q.dtype)
    return logits.softmax(-1) @ v


def sdpa(x: SimpleNamespace, q: Tensor, k: Tensor, v: Tensor, log_theta: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, bias(log_theta, x.n, q.dtype)[None])


def ours(x: SimpleNamespace, q: Tensor, k: Tensor, v: Tensor, log_theta: Tensor) -> Tensor:
    return distance_attention(q, k, v, log_theta, x.cu_seqlens, max_seqlen=x.n, backend="triton")


def flex(x: SimpleNamespace, q: Tensor, k: Tensor, v: Tensor, log_theta: Tensor) -> Tensor:
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    return compiled_flex(q, k, v, log_theta, x.block_mask)[0].transpose(0, 1)


def _flex(q: Tensor, k: Tensor, v: Tensor, log_theta: Tensor, block_mask: Any) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return s + log_theta[h, (i - j).clamp(0, log_theta.shape[1] - 1)]

    return flex_attention(q, k, v, score_mod=score, block_mask=block_mask)


compiled_flex = torch.compile(_flex, dynamic=False, fullgraph=True)
CONTESTANTS: dict[str, Callable[..., Tensor]] = {OURS: ours, FLEX: flex, SDPA: sdpa, EAGER: eager}


def case(name: str, dim: int, dtype: torch.dtype) -> SimpleNamespace:
    from torch.nn.attention.flex_attention import create_block_mask

    batch, n = CASES[name]
    rng = np.random.default_rng(0)
    weights = np.array(BEAUTY) / sum(BEAUTY)
    lengths = rng.choice(len(BEAUTY), batch, p=weights).tolist() if name.startswith("Beauty") else [n] * batch
    packed = [torch.randn(sum(lengths), HEADS, dim, device="cuda").to(dtype) for _ in range(3)]
    padded = [
        torch.stack([pad(s, (0, 0, 0, 0, 0, n - len(s))) for s in t.split(lengths)]).transpose(1, 2).contiguous()
        for t in packed
    ]
    document = torch.repeat_interleave(torch.arange(batch, device="cuda"), torch.tensor(lengths, device="cuda"))

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (document[i] == document[j])

    return SimpleNamespace(
        packed=packed,
        padded=padded,
        log_theta=torch.randn(HEADS, n, device="cuda"),
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device="cuda"),
        lengths=lengths,
        n=n,
        block_mask=create_block_mask(visible, None, None, len(document), len(document), device="cuda", _compile=True),
    )


def run(name: str, x: SimpleNamespace, backward: bool) -> Any:
    inputs = [*(x.padded if name in (SDPA, EAGER) else x.packed), x.log_theta]
    if not backward:
        with torch.no_grad():
            return CONTESTANTS[name](x, *inputs)
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = CONTESTANTS[name](x, *inputs)
    return out, *torch.autograd.grad(out, inputs, inputs[0].detach())


def milliseconds(names: list[str], x: SimpleNamespace, backward: bool) -> dict[str, float]:
    """Medians over interleaved rounds in a random order, a write of 512 MB before each to empty the L2 cache."""
    flush = torch.empty(512 * 2**20, dtype=torch.int8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in names}
    order, shuffle = list(names), np.random.default_rng(0)
    for _ in range(ROUNDS):
        shuffle.shuffle(order)
        for name in order:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            begin.record()
            run(name, x, backward)
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(t) for name, t in times.items()}


@pytest.fixture(scope="module")
def record() -> Iterator[dict[str, Any]]:
    results: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }
    results |= {"heads": HEADS, "cases": {}}
    yield results
    print(f"\n{machine()}\nwritten: {write('attention_gpu', results)}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", CASES)
def test_attention(
    name: str, dim: int, dtype: torch.dtype, record: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    torch._dynamo.reset()  # or the shapes of many cases reach its limit, and FlexAttention runs uncompiled from then on
    x = case(name, dim, dtype)
    usable, failed = [], {}
    for contestant in CONTESTANTS:  # warms up, and leaves out who has not the memory
        try:
            for backward in (False, True, True):
                run(contestant, x, backward)
            usable.append(contestant)
        except torch.OutOfMemoryError as error:
            failed[contestant] = str(error).splitlines()[0]
        torch.cuda.empty_cache()
    assert OURS in usable, failed
    check_agreement(x, usable)
    for backward in (False, True):
        what = f"{name}, head width {dim}, {str(dtype)[6:]}, forward" + (" + backward" if backward else "")
        found = milliseconds(usable, x, backward)
        ratios = {f"{peer} / ours": found[peer] / found[OURS] for peer in usable if peer != OURS}
        record["cases"][what] = {"median_ms": found, "ratios": ratios, "failed": failed}
        with capsys.disabled():
            print(f"\n{what}")
            for contestant in usable:
                print(f"  {contestant:<32}{found[contestant]:>10.3f} ms{found[contestant] / found[OURS]:>8.2f}")
            for contestant, reason in failed.items():
                print(f"  {contestant:<32}{reason}")


def check_agreement(x: SimpleNamespace, names: list[str]) -> None:
    """All contestants compute the same, to the precision of the type."""

    def flat(name: str) -> Tensor:
        out = run(name, x, False)
        if name in (SDPA, EAGER):
            out = torch.cat([s[:, :length].transpose(0, 1) for s, length in zip(out, x.lengths, strict=True)])
        return out.float()

    expected = flat(OURS)
    for name in names[1:]:
        error = (flat(name) - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert error < 2e-2, f"{name}: {error}"
