"""The Triton kernels on a GPU: the same numbers as the reference, the same numbers every time, torch.compile, and no waiting.

Run as `pytest -m gpu`. TOLERANCE as in test_triton_attention.py; a GPU rounds bfloat16 to nearest and may keep less of float32 in
exp2 and log2 (2 units in the last place), which the bounds leave room for.
"""

import pytest
import torch

from cafe_kernels.attention import distance_attention, ops
from cafe_kernels.backends import choose_backend
from tests.cafe_kernels.test_cpu_attention import NAMES, packed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-8, torch.bfloat16: 2**-6}
SHORT, LONG = [0, 1, 2, 9, 50, 63, 64, 33], [64, 0, 65, 111, 1000, 2]
OPTIONS = {
    "plain": {},
    "dropout": {"dropout_p": 0.3, "seed": 2**40 + 7, "offset": 2**33 + 5},
    "both": {"window": 40, "dropout_p": 0.5, "seed": 1, "scale": 0.2},
}
BOTH_KINDS = pytest.mark.parametrize("causal", [True, False])


def on_gpu(lengths, heads, dim, dtype=torch.float32, seed=0, causal=True):
    return [x.cuda() for x in packed(lengths, heads, dim, dtype, seed, causal)]


def compute(q, k, v, log_theta, grad_out, cu, function=distance_attention, **options):
    leaves = [x if x is None else x.detach().requires_grad_() for x in (q, k, v, log_theta)]
    out = function(*leaves, cu, **options)
    gradients = torch.autograd.grad(out, [x for x in leaves if x is not None], grad_out)
    return dict(zip(NAMES, [out.detach(), *gradients], strict=False))


def check(arguments, tolerance, **options):
    actual = compute(*arguments, backend="triton", **options)
    doubles = [x if x is None else x.double() for x in arguments[:5]]
    expected = compute(*doubles, arguments[5], backend="reference", **options)
    for name, value in actual.items():
        error, scale = (value - expected[name]).abs(), expected[name].abs()
        rms = scale.square().mean().sqrt()
        assert error.square().mean().sqrt() <= tolerance * rms, name
        assert (error <= 10 * tolerance * (scale + rms)).all(), name


@pytest.mark.parametrize("lengths", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dim", [16, 20, 64, 128, 200, 256])
@pytest.mark.parametrize("heads", [1, 4])
@BOTH_KINDS
def test_equals_reference(causal, heads, dim, dtype, option, lengths):
    check(on_gpu(lengths, heads, dim, dtype, causal=causal), TOLERANCE[dtype], causal=causal, **OPTIONS[option])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lengths", [[50] * 3000, [5, 6, 9, 30] * 2000, [8192]], ids=["n=50", "many short", "n=8192"])
@BOTH_KINDS
def test_large_batches(causal, lengths, dtype):
    check(on_gpu(lengths, 1, 64, dtype, causal=causal), TOLERANCE[dtype], causal=causal)


@BOTH_KINDS
def test_without_log_theta(causal):
    for lengths in (SHORT, LONG):
        q, k, v, _, *rest = on_gpu(lengths, 2, 64)
        check((q, k, v, None, *rest), TOLERANCE[torch.float32], causal=causal)


@pytest.mark.parametrize("lengths", [[5, 6, 9, 30] * 2000, [300, 64, 1000] * 10], ids=["short", "long"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@BOTH_KINDS
def test_bit_identical_from_run_to_run(causal, dtype, lengths):
    arguments, options = on_gpu(lengths, 4, 64, dtype, causal=causal), OPTIONS["both"] | {"causal": causal}
    first = compute(*arguments, **options)
    for _ in range(20):
        for name, value in compute(*arguments, **options).items():
            assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("lengths", [SHORT, LONG], ids=["short", "long"])
@BOTH_KINDS
def test_dropout_keeps_what_the_reference_keeps(causal, lengths):
    """With q = 0 the weights before dropout are known, so that the output tells which were kept."""
    q, k, v, _, _, cu = on_gpu([length for length in lengths if length], 2, 64)
    options = {"causal": causal, "dropout_p": 0.4, "seed": 2**50, "offset": 2**40}
    found, expected = (distance_attention(q * 0, k, v, None, cu, backend=b, **options) for b in ("triton", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [SHORT, LONG], ids=["short", "long"])
@BOTH_KINDS
def test_opcheck(causal, lengths):
    q, k, v, log_theta, grad_out, cu = on_gpu(lengths, 2, 16, causal=causal)
    options = (0, 0.25, causal, -1, 0.1, 5, 0, "triton")
    out, lse = ops.forward_op(q, k, v, log_theta, cu, *options)
    torch.library.opcheck(ops.backward_op, (grad_out, q, k, v, log_theta, cu, out, lse, *options))
    leaves = [x.requires_grad_() for x in (q, k, v, log_theta)]
    torch.library.opcheck(ops.forward_op, (*leaves, cu, *options))


@BOTH_KINDS
def test_compile(causal):
    compiled = torch.compile(distance_attention, fullgraph=True)
    for step, lengths in enumerate([[3, 20], [50, 1, 9], [64]]):
        q, k, v, _, grad_out, cu = on_gpu(lengths, 2, 16)
        log_theta = torch.randn(2, 70 if causal else 139, device="cuda")
        options = {"causal": causal, "max_seqlen": 64, "dropout_p": 0.2, "seed": 2**40 + step, "offset": step}
        actual = compute(q, k, v, log_theta, grad_out, cu, compiled, **options)
        torch.testing.assert_close(actual, compute(q, k, v, log_theta, grad_out, cu, **options))


def test_autocast():
    q, k, v, log_theta, _, cu = on_gpu([3, 20], 2, 16)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = distance_attention(q, k, v, log_theta, cu)
    rounded = [x.bfloat16() for x in (q, k, v)]
    assert torch.equal(out, distance_attention(*rounded, log_theta, cu))


@BOTH_KINDS
def test_it_is_the_default_and_does_not_wait(causal):
    """With max_seqlen given nothing looks at a value on the GPU, forward or backward."""
    for lengths in (SHORT, LONG):
        arguments = on_gpu(lengths, 2, 64, causal=causal)
        assert choose_backend(None, ops.backend_module, arguments[0]) == "triton"
        compute(*arguments, causal=causal, max_seqlen=max(lengths))  # compiles
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            compute(*arguments, causal=causal, max_seqlen=max(lengths), dropout_p=0.0)
        finally:
            torch.cuda.set_sync_debug_mode(before)
