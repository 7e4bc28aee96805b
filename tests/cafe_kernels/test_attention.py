"""The reference op against a loop over sequences, heads and tokens, and its gradients by gradcheck in fp64."""

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from cafe_kernels.attention import distance_attention
from cafe_kernels.attention.reference import dropout_keep, philox

LENGTHS = [[1], [63, 0, 1], [64, 65], [111, 2, 0, 9], [0, 0]]


def packed(lengths, heads, dim, dtype=torch.float64, grad=False, causal=True):
    generator = torch.Generator().manual_seed(sum(lengths) + heads)
    total, longest = sum(lengths), max(lengths)
    q, k, v = (torch.randn(total, heads, dim, dtype=dtype, generator=generator) for _ in range(3))
    log_theta = torch.randn(heads, longest + 3 if causal else 2 * longest + 5, dtype=dtype, generator=generator)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    for tensor in (q, k, v, log_theta):
        tensor.requires_grad_(grad)
    return q, k, v, log_theta, cu


def by_loops(q, k, v, log_theta, cu, scale, causal, window=None):
    out, middle = torch.zeros_like(v), 0 if causal else log_theta.shape[1] // 2
    for begin, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        for head in range(q.shape[1]):
            for i in range(begin, end):
                seen = [j for j in range(begin, i + 1) if window is None or i - j <= window]
                if not causal:
                    seen = [j for j in range(begin, end) if window is None or abs(i - j) < window]
                bias = torch.stack([log_theta[head, middle + i - j] for j in seen])
                out[i, head] = (k[seen, head] @ q[i, head] * scale + bias).softmax(0) @ v[seen, head]
    return out


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("heads", "dim"), [(1, 20), (2, 16)])
@pytest.mark.parametrize(
    ("causal", "window"), [(True, None), (True, 0), (True, 3), (False, None), (False, 1), (False, 3)]
)
def test_equals_loops(lengths, heads, dim, causal, window):
    q, k, v, log_theta, cu = packed(lengths, heads, dim, causal=causal)
    out = distance_attention(q, k, v, log_theta, cu, scale=0.3, causal=causal, window=window)
    torch.testing.assert_close(out, by_loops(q, k, v, log_theta, cu, 0.3, causal, window), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("window", [None, 4])
def test_two_sided_equals_the_attention_of_pytorch(learned, window):
    """Padded, with the mask built by hand, (H, n, n); and each sequence of a packed batch by itself."""
    lengths = [9, 0, 1, 13]
    q, k, v, log_theta, cu = packed(lengths, 2, 16, causal=False)
    n_max = (log_theta.shape[1] + 1) // 2
    log_theta = log_theta if learned else None
    mask = torch.zeros(2, 13, 13, dtype=torch.float64)
    for i in range(13):
        for j in range(13):
            if learned:
                mask[:, i, j] = log_theta[:, n_max - 1 + (i - j)]
            if window is not None and abs(i - j) >= window:
                mask[:, i, j] = -torch.inf
    out = distance_attention(q, k, v, log_theta, cu, causal=False, window=window)
    for rows, n in zip(torch.arange(sum(lengths)).split(lengths), lengths, strict=True):
        alone = [x[rows].transpose(0, 1)[None] for x in (q, k, v)]
        expected = scaled_dot_product_attention(*alone, attn_mask=mask[None, :, :n, :n])
        torch.testing.assert_close(out[rows].transpose(0, 1)[None], expected)
        found = distance_attention(*alone, log_theta, causal=False, window=window)
        torch.testing.assert_close(found, expected)


def test_a_two_sided_table_that_hides_the_future_is_causal():
    q, k, v, log_theta, cu = packed([7, 0, 12], 2, 16)
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "cpu")):
        inputs = [x.to(dtype) for x in (q, k, v, log_theta)]
        future = torch.full((2, log_theta.shape[1] - 1), -torch.inf, dtype=dtype)
        both = torch.cat([future, inputs[3]], 1)
        expected = distance_attention(*inputs, cu, backend=backend)
        found = distance_attention(*inputs[:3], both, cu, causal=False, backend=backend)
        torch.testing.assert_close(found, expected)


OPTIONS = {"scale": 0.7, "causal": True, "window": 2, "dropout_p": 0.3, "seed": 5, "offset": 6, "backend": "reference"}


CHANGED = [
    OPTIONS | {"causal": False},
    *(OPTIONS | {name: OPTIONS[name] + 0.1} for name in ("scale", "dropout_p")),
    *(OPTIONS | {name: OPTIONS[name] + 1} for name in ("window", "seed", "offset")),
]


@pytest.mark.parametrize("options", [OPTIONS, *CHANGED])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_padded_call_equals_packed(dtype, options):
    q, k, v, log_theta, cu = packed([7, 7, 7], 2, 16, dtype, causal=options["causal"])
    padded = [x.unflatten(0, (3, 7)).transpose(1, 2) for x in (q, k, v)]
    out = distance_attention(*padded, log_theta, max_seqlen=7, **options).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(out, distance_attention(q, k, v, log_theta, cu, **options))
    if options != OPTIONS:  # every one of them counts
        causal = log_theta if options["causal"] else log_theta[:, log_theta.shape[1] // 2 :]
        assert not torch.allclose(out, distance_attention(q, k, v, causal, cu, **OPTIONS), atol=1e-3)


def test_backend_by_environment(monkeypatch):
    q, k, v, log_theta, cu = packed([3, 20], 2, 16, torch.float32)
    out = {name: distance_attention(q, k, v, log_theta, cu, backend=name) for name in ("reference", "cpu")}
    assert not torch.equal(*out.values())  # in their last bits, which tell one from the other
    assert torch.equal(distance_attention(q, k, v, log_theta, cu), out["cpu"])
    monkeypatch.setenv("CAFE_KERNELS_BACKEND", "reference")
    assert torch.equal(distance_attention(q, k, v, log_theta, cu), out["reference"])
    assert torch.equal(distance_attention(q, k, v, log_theta, cu, backend="cpu"), out["cpu"])
    monkeypatch.setenv("CAFE_KERNELS_BACKEND", "cpu")
    assert torch.equal(distance_attention(q, k, v, log_theta, cu), out["cpu"])
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot run: .*, got torch\.float64"):
        distance_attention(q.double(), k.double(), v.double(), None, cu)
    monkeypatch.setenv("CAFE_KERNELS_BACKEND", "abacus")
    with pytest.raises(ValueError, match="unknown backend 'abacus': expected reference, cpu, triton"):
        distance_attention(q, k, v, log_theta, cu)


def test_options_may_be_numpy_numbers():
    q, k, v, log_theta, cu = packed([3, 5], 1, 4, torch.float32)
    integers = {"max_seqlen": 5, "window": 2, "seed": 3, "offset": 1}
    expected = distance_attention(q, k, v, log_theta, cu, scale=0.5, dropout_p=0.2, **integers)
    integers = {name: np.int64(value) for name, value in integers.items()}
    for backend in ("cpu", "reference"):
        out = distance_attention(
            q, k, v, log_theta, cu, scale=np.float32(0.5), dropout_p=0.2, **integers, backend=backend
        )
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(("dtype", "causal"), [(torch.float16, True), (torch.float32, True), (torch.float32, False)])
def test_compile(dtype, causal):
    """One graph where max_seqlen is given, also when lengths and seed change; without it the graph breaks, and says why."""
    torch._dynamo.reset()
    options = {"causal": causal, "window": 5}
    if dtype == torch.float32:  # for float16 the rule picks the reference
        options |= {"backend": "reference", "dropout_p": 0.2, "seed": 2**40}
    whole = torch.compile(distance_attention, fullgraph=True, backend="aot_eager")
    parts = torch.compile(distance_attention, backend="aot_eager")
    for offset, lengths in enumerate([[3, 20], [7, 1, 9]]):
        q, k, v, log_theta, cu = packed(lengths, 2, 16, dtype)
        results = []
        for function, longest in ((distance_attention, 20), (whole, 20), (parts, None))[: 3 - offset]:
            leaves = [x.clone().requires_grad_() for x in (q, k, v, log_theta.new_ones(2, 25 if causal else 49))]
            out = function(*leaves, cu, max_seqlen=longest, offset=offset, **options)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        for result in results[1:]:
            torch.testing.assert_close(result, results[0])
    with pytest.raises(torch._dynamo.exc.Unsupported, match="max_seqlen_is_not_given"):
        whole(q, k, v, log_theta.new_ones(2, 25), cu, **options)
    with pytest.raises(Exception, match="agree in shape, dtype and device, got q"):
        whole(q, k[:4], v, log_theta, cu, max_seqlen=20, **options)


@pytest.mark.parametrize("backend", ["reference", None])
def test_borders_that_overflow_int32(backend):
    """-2 - 2147483647 is 2147483647 in int32: a step that seems to ascend."""
    q, cu = torch.zeros(23, 1, 4), torch.tensor([0, 2147483647, -2, 23], dtype=torch.int32)
    with pytest.raises(ValueError, match="ascend from 0 to the 23 tokens"):
        distance_attention(q, q, q, None, cu, backend=backend)


def test_reference_pads_to_the_longest_and_no_further():
    q, k, v, _, cu = packed([3, 5], 1, 4)
    out = distance_attention(q, k, v, None, cu, max_seqlen=2**40, backend="reference")
    assert torch.equal(out, distance_attention(q, k, v, None, cu, backend="reference"))


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (False, 2)])
def test_gradients(dropout_p, causal, window):
    q, k, v, log_theta, cu = packed([3, 0, 1, 5], 2, 4, grad=True, causal=causal)
    options = {"causal": causal, "window": window, "dropout_p": dropout_p, "seed": 3}
    assert torch.autograd.gradcheck(
        lambda q, k, v, r: distance_attention(q, k, v, r, cu, **options), (q, k, v, log_theta)
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("causal", "read"), [(True, slice(0, 5)), (False, slice(3, 12))])
def test_gradient_of_log_theta_is_zero_beyond_the_longest_distance(backend, causal, read):
    q, k, v, log_theta, cu = packed([3, 5], 1, 4, torch.float32, grad=True, causal=causal)
    distance_attention(q, k, v, log_theta, cu, causal=causal, backend=backend).square().sum().backward()
    assert (log_theta.grad[:, read] != 0).all()
    log_theta.grad[:, read] = 0
    assert (log_theta.grad == 0).all()


def test_philox_known_answers():
    """The test vectors published with Random123."""
    cases = [
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF,) * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]
    for counter, key, expected in cases:
        assert [int(word) for word in philox([torch.tensor(c) for c in counter], key)] == expected


def test_dropout_keeps_its_share_and_follows_seed_and_offset():
    keep = dropout_keep(torch.arange(200), 2, 50, 0.3, seed=5, offset=7)
    # 20,000 weights: the share kept is within 4.5 standard deviations but once in 150,000 seeds.
    assert abs(keep.float().mean() - 0.7) < 4.5 * (0.21 / keep.numel()) ** 0.5
    assert torch.equal(keep, dropout_keep(torch.arange(200), 2, 50, 0.3, seed=5, offset=7))
    assert not torch.equal(keep, dropout_keep(torch.arange(200), 2, 50, 0.3, seed=5, offset=8))
    assert not torch.equal(keep, dropout_keep(torch.arange(200), 2, 50, 0.3, seed=6, offset=7))
    assert torch.equal(keep[50:], dropout_keep(torch.arange(50, 200), 2, 50, 0.3, seed=5, offset=7))


Q = torch.zeros(5, 2, 4)
CU = torch.tensor([0, 2, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((Q, Q[:4], Q, None, CU), {}, "agree in shape"),
        ((Q, Q.double(), Q, None, CU), {}, "dtype"),
        ((Q, Q, Q), {}, "packed tokens need cu_seqlens"),
        ((Q[..., :0],) * 3 + (None, CU), {}, "D >= 1"),
        ((Q, Q, Q, None, CU.long()), {}, "int32"),
        ((Q, Q, Q, None, CU[:2]), {}, "ascend from 0 to the 5 tokens"),
        ((Q, Q, Q, None, torch.tensor([0, 4, 2, 5], dtype=torch.int32)), {}, "ascend"),
        ((Q, Q, Q, torch.zeros(2, 2), CU), {}, "covers distances below 2"),
        ((Q, Q, Q, torch.zeros(3, 9), CU), {}, r"\(H=2, n_max\)"),
        ((Q, Q, Q, torch.zeros(3, 9), CU), {"causal": False}, r"\(H=2, 2 n_max - 1\)"),
        (
            (Q, Q, Q, torch.zeros(2, 4), CU),
            {"causal": False},
            "2 n_max - 1 columns, .* got 4: a table of n_max columns is",
        ),
        (
            (Q, Q, Q, torch.zeros(2, 3), CU),
            {"causal": False},
            "has 3 tokens but log_theta covers distances below 2: causal=False needs 2 n_max - 1 columns, .* it has 3",
        ),
        (
            (Q, Q, Q, torch.zeros(2, 5), CU),
            {"causal": False, "max_seqlen": 4},
            "max_seqlen=4 but log_theta covers distances below 3",
        ),
        ((Q, Q, Q, None, CU), {"causal": 1}, "causal must be True or False, got 1"),
        ((Q, Q, Q, None, CU), {"causal": False, "window": 0}, "window must be at least 1 without causal"),
        ((Q, Q, Q, None, CU), {"max_seqlen": 2}, "has 3 tokens"),
        ((Q[None], Q[None], Q[None]), {"max_seqlen": 3}, "all sequences have 2 tokens"),
        ((Q, Q, Q, None, CU), {"max_seqlen": 3.0}, "max_seqlen must be an integer, got 3.0"),
        ((Q, Q, Q, None, CU), {"window": 1.5}, "window must be an integer"),
        ((Q, Q, Q, None, CU), {"seed": "3"}, "seed must be an integer, got '3'"),
        ((Q, Q, Q, None, CU), {"offset": 0.0}, "offset must be an integer"),
        ((Q, Q, Q, None, CU), {"scale": torch.ones(())}, "scale must be a number"),
        ((Q, Q, Q, None, [0, 2, 5]), {}, "cu_seqlens must be an int32 tensor .*, got list"),
        ((Q, Q, Q, None, CU), {"window": -1}, "window must not be negative"),
        ((Q, Q, Q, None, CU), {"backend": "cuda"}, "unknown backend"),
        ((Q, Q, Q, None, CU), {"dropout_p": 1.0}, "dropout_p"),
        ((Q, Q, Q, None, CU), {"dropout_p": 0.5}, "needs a seed"),
    ],
)
def test_wrong_input(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        distance_attention(*arguments, **options)
