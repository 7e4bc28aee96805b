"""The C++ backend of distance_attention against the reference in fp64: every instruction set, head width and option.

TOLERANCE bounds the norm of the error by the norm of the truth; single elements, where terms cancel, may be ten times as
far off. float32 (u = 2^-24 = 6e-8): logits of size 5 carry some 10 u, which becomes a relative error of the weights, and a sum
of n <= 1000 rounded terms sqrt(n) u; together some 3e-6. bfloat16: what is stored carries 2^-9, and the gradients see the
rounded output too (delta = grad_out . out), after a subtraction that leaves about a quarter of it: 2^-7, and twice that.
"""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cafe_kernels import _C
from cafe_kernels.attention import distance_attention, ops

F32, BF16 = torch.float32, torch.bfloat16
pytestmark = pytest.mark.usefixtures("threads")
LENGTHS = [0, 1, 2, 9, 50, 63, 64, 65, 111, 300]
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2**-6}
OPTIONS = {
    "plain": {},
    "dropout": {"dropout_p": 0.3, "seed": 2**40 + 7, "offset": 2**33 + 5},
    "window": {"window": 20},
    "both": {"window": 200, "dropout_p": 0.5, "seed": 1, "scale": 0.2},
}
TWO_SIDED = {name: option | {"causal": False} for name, option in OPTIONS.items()}
NAMES = ["out", "dq", "dk", "dv", "dlog_theta"]


def packed(lengths, heads, dim, dtype=torch.float32, seed=0, causal=True):
    """q, k, v, log_theta, the gradient of the output, and cu_seqlens."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, grad_out = (torch.randn(sum(lengths), heads, dim, generator=generator).to(dtype) for _ in range(4))
    n_max = max(lengths, default=0) + 3
    log_theta = torch.randn(heads, n_max if causal else 2 * n_max - 1, generator=generator)
    return q, k, v, log_theta, grad_out, torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def compute(q, k, v, log_theta, grad_out, cu, **options):
    """The output and the gradients, by name."""
    leaves = [x if x is None else x.detach().requires_grad_() for x in (q, k, v, log_theta)]
    out = distance_attention(*leaves, cu, **options)
    gradients = torch.autograd.grad(out, [x for x in leaves if x is not None], grad_out, materialize_grads=True)
    return dict(zip(NAMES, [out.detach(), *gradients], strict=False))


def truth(q, k, v, log_theta, grad_out, cu, **options):
    doubles = [x if x is None else x.double() for x in (q, k, v, log_theta, grad_out)]
    return compute(*doubles, cu, backend="reference", **options)


def check(actual, expected, tolerance, floor=0.0):
    """`floor`: the root mean square below which the truth counts as that large."""
    for name, value in actual.items():
        error, scale = (value - expected[name]).abs(), expected[name].abs()
        if error.numel():
            rms = scale.square().mean().sqrt().clamp(min=floor)
            assert error.square().mean().sqrt() <= tolerance * rms, name
            assert (error <= 10 * tolerance * (scale + rms)).all(), name


def which_kept(lengths, keys, **options):
    """bool (total, 2, keys): with q = 0 no weight is 0 before dropout, and v of a column for each key tells which were kept."""
    q, _, _, _, _, cu = packed(lengths, 2, keys)
    v = torch.cat([torch.eye(n, keys) for n in lengths])[:, None].repeat(1, 2, 1)
    return distance_attention(q * 0, q, v, None, cu, **options) != 0


@cache
def case(heads, dim, dtype, option):
    lengths = np.random.default_rng([heads, dim]).choice(LENGTHS, 5).tolist()
    arguments = packed(lengths, heads, dim, dtype)
    return arguments, truth(*arguments, **OPTIONS[option])


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dim", [1, 16, 20, 64, 128, 200])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_equals_reference(heads, dim, dtype, option, isa):
    arguments, expected = case(heads, dim, dtype, option)
    actual = compute(*arguments, backend="cpu", **OPTIONS[option])
    assert actual["out"].dtype == actual["dv"].dtype == dtype
    # One channel leaves nothing to average the rounding of bfloat16 over.
    check(actual, expected, TOLERANCE[dtype] * (4 if (dim, dtype) == (1, torch.bfloat16) else 1))


@pytest.mark.parametrize("option", TWO_SIDED)
@pytest.mark.parametrize(
    ("heads", "dim", "dtype"), [(1, 20, F32), (2, 64, F32), (1, 1, F32), (2, 16, BF16), (1, 200, BF16)]
)
def test_two_sided_equals_reference(heads, dim, dtype, option, isa):
    for lengths in ([1, 0, 9, 63, 64], [16, 65, 2, 111]):
        arguments = packed(lengths, heads, dim, dtype, causal=False)
        actual = compute(*arguments, backend="cpu", **TWO_SIDED[option])
        check(actual, truth(*arguments, **TWO_SIDED[option]), TOLERANCE[dtype])


@pytest.mark.parametrize("window", [None, 1, 2, 90, 97, 193, 300])
@pytest.mark.parametrize("lengths", [[500], [300, 0, 193, 192, 97, 96], [17, 0, 16, 15] * 20])
def test_two_sided_windows_and_blocks(lengths, window, isa):
    arguments = packed(lengths, 1, 20, causal=False)
    options = {"causal": False, "window": window}
    # Of the gradients of q and k nothing is left where a token sees only itself.
    check(compute(*arguments, **options), truth(*arguments, **options), TOLERANCE[F32], floor=1)


@pytest.mark.parametrize("causal", [True, False])
def test_dropout_keeps_what_the_reference_keeps(causal, isa):
    lengths = [9, 0, 40, 100]
    options = {"causal": causal, "dropout_p": 0.4, "seed": 2**50, "offset": 2**40}
    found, expected = (which_kept(lengths, 100, backend=b, **options) for b in ("cpu", "reference"))
    assert torch.equal(found, expected)
    future = torch.arange(100) > torch.cat([torch.arange(n) for n in lengths])[:, None]
    inside = torch.arange(100) < torch.cat([torch.full((n,), n) for n in lengths])[:, None]
    kept = found.transpose(0, 1)[:, future & inside].float()
    if causal:
        assert not kept.any()
    else:  # the share kept is within 4.5 standard deviations but once in 150,000 seeds
        assert abs(kept.mean() - 0.6) < 4.5 * (0.24 / kept.numel()) ** 0.5


def test_dropout_draws_the_same_for_what_both_see(isa):
    """What a causal query keeps, it keeps when it sees the future too: one stream, by head, query and key."""
    options = {"dropout_p": 0.5, "seed": 3, "offset": 4}
    causal, both = (which_kept([70, 30], 70, causal=c, **options) for c in (True, False))
    past = torch.arange(70) <= torch.cat([torch.arange(n) for n in (70, 30)])[:, None]
    assert torch.equal(causal, both & past[:, None])


LONG = [[1000], [300, 0, 193, 192, 97, 96], [2, 0, 9, 1] * 70, list(range(20))]


@pytest.mark.parametrize("lengths", LONG, ids=["one long", "around the blocks", "many short", "around a vector"])
@pytest.mark.parametrize("option", OPTIONS)
def test_long_and_many_sequences(lengths, option, isa):
    arguments = packed(lengths, 2, 20)
    check(compute(*arguments, **OPTIONS[option]), truth(*arguments, **OPTIONS[option]), TOLERANCE[torch.float32])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 230), max_size=12),
    st.integers(1, 3),
    st.integers(1, 40),
    st.none() | st.integers(0, 240),
    st.sampled_from([0.0, 0.1, 0.9]),
    st.booleans(),
    st.booleans(),
)
def test_any_lengths(lengths, heads, dim, window, dropout_p, learned, causal):
    q, k, v, log_theta, *rest = packed(lengths, heads, dim, seed=sum(lengths), causal=causal)
    arguments = (q, k, v, log_theta if learned else None, *rest)
    window = window if causal or window is None else window + 1
    options = {"causal": causal, "window": window, "dropout_p": dropout_p, "seed": dim}
    # The gradients of q and k are sums of terms of size 1, of which nothing is left where a token sees only itself.
    check(compute(*arguments, **options), truth(*arguments, **options), TOLERANCE[torch.float32], floor=1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("causal", [True, False])
def test_threads_do_not_matter(causal, dtype, threads, isa):
    options = OPTIONS["both"] | {"causal": causal}
    arguments = packed([300, 9, 0, 111, 65, *[50] * 80], 4, 64, dtype, causal=causal)  # work for more than 8 threads
    threads(1)
    one = compute(*arguments, **options)
    for number in (2, 8):
        threads(number)
        for name, value in compute(*arguments, **options).items():
            assert torch.equal(value, one[name]), name


def test_two_sided_bad_numbers_stay_in_their_sequence_and_head(isa):
    lengths = [9, 70, 16]
    clean = packed(lengths, 2, 20, causal=False)
    expected = compute(*clean, causal=False)
    for where in range(3):
        arguments = [x.clone() for x in clean]
        arguments[where][9 + 42, 1, 3] = float("nan")
        actual = compute(*arguments, causal=False)
        assert actual["out"][9 + 42, 1].isnan().any()
        for name in NAMES[:4]:
            apart = actual[name].clone()
            apart[9:79, 1] = expected[name][9:79, 1]
            assert torch.equal(apart, expected[name]), name
        assert torch.equal(actual["dlog_theta"][0], expected["dlog_theta"][0])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", range(5), ids=["q", "k", "v", "log_theta", "grad_out"])
def test_bad_numbers_stay_in_their_sequence_and_head(where, value, dtype, isa):
    """The output is finite where the reference's is. There one bad row of v spoils its whole sequence, by 0 * NaN; here
    it may or may not spoil the tokens before it."""
    lengths, bad, head = [9, 70, 50], 9 + 42, 1
    arguments = packed(lengths, 2, 20, dtype)
    clean = compute(*arguments)
    if where == 3:
        arguments[3][head, 42] = value  # no other sequence is affected but the third and the second
    else:
        arguments[where][bad, head, 3] = value
    actual, expected = compute(*arguments), truth(*arguments)
    finite = actual["out"].isfinite()
    if where == 2:
        assert not finite[bad:79, head, 3].any()
        finite = finite[bad:]
    assert torch.equal(finite, expected["out"].isfinite()[-len(finite) :])
    if value == value and where != 3:
        assert not torch.equal(actual["dk"][9:79, head], clean["dk"][9:79, head])
    for name in NAMES[:4]:
        apart = actual[name].clone()
        apart[9 : 129 if where == 3 else 79, head] = clean[name][9 : 129 if where == 3 else 79, head]
        assert torch.equal(apart, clean[name]), name
    assert torch.equal(actual["dlog_theta"][0], clean["dlog_theta"][0])


@pytest.mark.parametrize("hidden", [-1e9, -1e38, -float("inf")])
@pytest.mark.parametrize("causal", [True, False])
def test_log_theta_hides_distances(causal, hidden, isa):
    arguments = packed([3, 65, 250], 2, 16, causal=causal)
    arguments[3][:, 1::2] = hidden
    check(compute(*arguments, causal=causal), truth(*arguments, causal=causal), TOLERANCE[torch.float32])


def test_nothing_to_attend_to_is_nan(isa):
    q, k, v, log_theta, *rest = packed([3, 65, 250], 2, 16)
    arguments = (q, k, v, torch.full_like(log_theta, -float("inf")), *rest)
    for result in (compute(*arguments), truth(*arguments)):
        assert all(value.isnan().all() for name, value in result.items() if name != "dlog_theta")


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_large_scores(shift, isa):
    """Logits of size L carry an absolute error of L u, and the weights that relative error: 1e4 * 6e-8 = 6e-4, a few of them."""
    q, k, v, log_theta, *rest = packed([3, 65, 250], 2, 16)
    check(compute(30 * q, 30 * k, v, log_theta, *rest), truth(30 * q, 30 * k, v, log_theta, *rest), 2e-3)
    arguments = (q, k, v, log_theta + shift, *rest)
    check(compute(*arguments), truth(*arguments), 2e-3)
    out = distance_attention(q, k, v, torch.full_like(log_theta, -3e38), rest[1])  # below any bias that hides
    assert out.isfinite().all()


def operator_arguments(dtype=torch.float32, causal=True):
    q, k, v, log_theta, grad_out, cu = packed([3, 0, 20], 2, 16, dtype, causal=causal)
    return (q, k, v, log_theta), cu, grad_out, (0, 0.25, causal, -1, 0.1, 5, 0, "cpu")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize(("empty", "causal"), [(True, True), (False, True), (False, False)])
def test_opcheck(dtype, learned, empty, causal):
    inputs, cu, grad_out, options = operator_arguments(dtype, causal)
    if empty:
        inputs, cu, grad_out = [*(x[:0] for x in inputs[:3]), inputs[3]], cu * 0, grad_out[:0]
    inputs = [*inputs[:3], inputs[3] if learned else None]
    out, lse = ops.forward_op(*inputs, cu, *options)
    torch.library.opcheck(ops.backward_op, (grad_out, *inputs, cu, out, lse, *options))
    leaves = [x if x is None else x.requires_grad_() for x in inputs]
    torch.library.opcheck(ops.forward_op, (*leaves, cu, *options))


@pytest.mark.parametrize(("compiler", "causal"), [("aot_eager", True), ("aot_eager", False), ("inductor", True)])
def test_compile(compiler, causal):
    """One graph, also when lengths, seed and offset change."""
    compiled = torch.compile(distance_attention, fullgraph=True, backend=compiler)
    for step, lengths in enumerate([[3, 20], [50, 1, 9], [64]]):
        q, k, v, log_theta, grad_out, cu = packed(lengths, 2, 16)
        results = []
        for f in (distance_attention, compiled):
            leaves = [x.clone().requires_grad_() for x in (q, k, v, log_theta.new_zeros(2, 70 if causal else 139))]
            out = f(*leaves, cu, max_seqlen=70, causal=causal, dropout_p=0.2, seed=2**40 + step, offset=step)
            results.append([out, *torch.autograd.grad(out, leaves, grad_out)])
        torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("mode", [TorchDispatchMode, TorchFunctionMode])
def test_modes_see_the_operator(mode):
    seen = []

    def see(self, function, types, args=(), kwargs=None):
        seen.append(function)
        return function(*args, **(kwargs or {}))

    q, k, v, log_theta, _, cu = packed([3, 20], 2, 16)
    with type("Log", (mode,), {"__torch_dispatch__": see, "__torch_function__": see})():
        distance_attention(q.requires_grad_(), k, v, log_theta, cu)
    assert ops.forward_op in seen


def test_autocast():
    """As PyTorch's own attention: whatever floats come, the lower precision computes."""
    q, k, v, log_theta, grad_out, cu = packed([3, 20], 2, 16)
    with torch.autocast("cpu"):
        leaves = [x.requires_grad_() for x in (q, k.bfloat16(), v, log_theta)]
        out = distance_attention(*leaves, cu)
        assert distance_attention(*(x.double() for x in (q, k, v)), None, cu).dtype == torch.float64
    assert out.dtype == torch.bfloat16
    gradients = torch.autograd.grad(out, leaves, grad_out.bfloat16())
    assert [x.dtype for x in gradients] == [x.dtype for x in leaves]
    rounded = [x.detach().bfloat16() for x in (q, k, v)]
    assert torch.equal(out, distance_attention(*rounded, log_theta, cu))


def test_double_backward_is_refused():
    q, k, v, log_theta, _, cu = packed([3, 20], 2, 16)
    out = distance_attention(q.requires_grad_(), k, v, log_theta, cu)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative here: use backend='reference'"):
        dq.sum().backward()


def test_strided_inputs():
    q, k, v, log_theta, grad_out, cu = packed([3, 20], 2, 16)
    strided = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (q, k, v)]
    twice = (
        log_theta.repeat_interleave(2, 1)[:, ::2],
        grad_out.repeat_interleave(2, 0)[::2],
        cu.repeat_interleave(2)[::2],
    )
    assert not any(x.is_contiguous() for x in (*strided, *twice))
    torch.testing.assert_close(compute(*strided, *twice), compute(q, k, v, log_theta, grad_out, cu), rtol=0, atol=0)
    expanded = torch.ones(()).expand_as(q)  # what out.sum().backward() passes
    packed_ones = compute(q, k, v, log_theta, torch.ones_like(q), cu)
    torch.testing.assert_close(compute(q, k, v, log_theta, expanded, cu), packed_ones, rtol=0, atol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_padded_call_equals_packed(causal):
    q, k, v, log_theta, grad_out, cu = packed([7] * 3, 2, 16, causal=causal)
    padded = [x.unflatten(0, (3, 7)).transpose(1, 2) for x in (q, k, v, grad_out)]
    by_pad = compute(*padded[:3], log_theta, padded[3], None, causal=causal)
    for name, value in compute(q, k, v, log_theta, grad_out, cu, causal=causal).items():
        flat = by_pad[name] if name == "dlog_theta" else by_pad[name].transpose(1, 2).flatten(0, 1)
        assert torch.equal(flat, value), name


def test_default_dtype_does_not_matter():
    arguments = packed([3, 20], 2, 16)
    expected = compute(*arguments)
    torch.set_default_dtype(torch.float64)
    try:
        torch.testing.assert_close(compute(*arguments), expected, rtol=0, atol=0)
    finally:
        torch.set_default_dtype(torch.float32)


def test_refusals(monkeypatch):
    q, k, v, log_theta, _, cu = packed([3, 20], 2, 16)
    with pytest.raises(ValueError, match="backend 'cpu' cannot run: it takes float32 and bfloat16, got"):
        distance_attention(q.double(), k.double(), v.double(), None, cu, backend="cpu")
    monkeypatch.setenv("CAFE_KERNELS_ISA", "mmx")
    with pytest.raises(ValueError, match="unknown instruction set 'mmx'"):
        distance_attention(q, k, v, log_theta, cu)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": np.zeros((4, 2, 16), np.float32)}, r"k must have shape \(5, 2, 16\), got \(4, 2, 16\)"),
        ({"lse": np.zeros((5, 2), np.float32)}, r"lse must have shape \(2, 5\)"),
        ({"q": np.zeros((5, 32), np.float32)}, r"q must be \(total, heads up to 65536, dim\), got shape \(5, 32\)"),
        ({"log_theta": np.zeros((2, 2), np.float32)}, r"log_theta must have shape \(2, n\), n >= 3"),
        (
            {"causal": False, "log_theta": np.zeros((2, 3), np.float32)},
            r"shape \(2, 2 n - 1\), n >= 3, .* got \(2, 3\)",
        ),
        (
            {"causal": False, "log_theta": np.zeros((2, 6), np.float32)},
            r"shape \(2, 2 n - 1\), n >= 3, .* got \(2, 6\)",
        ),
        ({"causal": False, "log_theta": np.zeros((2, 0), np.float32)}, r"shape \(2, 2 n - 1\)"),
        ({"cu_seqlens": np.array([0, 3, 2, 5], np.int32)}, "cu_seqlens must ascend from 0 to the 5 tokens"),
        ({"cu_seqlens": np.zeros(0, np.int32)}, "cu_seqlens must be"),
        ({"dropout_p": 1.0}, "dropout_p must be in"),
        ({"threads": 0}, r"threads must be in 1 ... 65536, got 0"),
        ({"dlog_theta": None}, "both be given, or neither"),
    ],
)
def test_extension_checks_its_arguments(change, message):
    """It reads and writes raw memory, so it trusts nobody."""
    tokens = ["q", "k", "v", "out", "grad_out", "dq", "dk", "dv"]
    given = {name: np.zeros((5, 2, 16), np.float32) for name in tokens}
    given |= {name: np.zeros((2, 5), np.float32) for name in ("lse", "log_theta", "dlog_theta")}
    given |= {
        "cu_seqlens": np.array([0, 2, 5], np.int32),
        "scale": 1.0,
        "causal": True,
        "window": -1,
        "dropout_p": 0.0,
        "seed": 0,
    }
    given |= {"offset": 0, "threads": 1, **change}
    with pytest.raises(ValueError, match=message):
        _C.attention_backward(**given)
    if "dlog_theta" not in change:
        with pytest.raises(ValueError, match=message):
            _C.attention_forward(**{x: given[x] for x in given if x[0] != "d" or x == "dropout_p" if x != "grad_out"})
