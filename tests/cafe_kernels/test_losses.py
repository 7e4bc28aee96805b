"""The fused sampled losses against the reference, and the reference against loops, PyTorch's own losses and gradcheck."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from cafe_kernels import _C, gbce, sampled_bce, sampled_softmax
from cafe_kernels.losses import ops

LOSSES = {"bce": sampled_bce, "gbce": gbce, "softmax": sampled_softmax}
SHARING = ("token", "sequence", "batch")
ITEMS, INTENTS = 50, 7


def case(
    tokens,
    count,
    dim,
    sharing,
    *,
    items=ITEMS,
    compose=False,
    log_q=False,
    ignore=False,
    seed=0,
    dtype=torch.float64,
    each=5,
):
    """Arguments of a loss, in sequences of some `each` tokens. With few items there are collisions and duplicates among the negatives."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    def ids(limit, *shape):
        return torch.randint(limit, shape, generator=rng)

    rows = max(1, tokens // each)
    sequence = ids(rows, tokens).sort().values
    shape = {"token": (tokens, count), "sequence": (rows, count), "batch": (count,)}[sharing]
    options = {}
    if sharing == "sequence" or (sharing == "batch" and ignore):
        options["sequence"] = sequence
    if ignore:
        options["ignore"] = ids(4, tokens if sharing == "token" else rows, count) == 0
    if compose:
        options["compose"] = normal(INTENTS, dim), ids(INTENTS, items)
    if log_q:
        options["log_q"] = normal(tokens), normal(*shape)
    return normal(tokens, dim), normal(items, dim), ids(items, tokens), ids(items, *shape), options


def compute(name, h, table, positives, negatives, options, backend, **more):
    """Loss and gradients by name; gradients of the sparse form made dense."""
    h, table = (x.clone().requires_grad_() for x in (h, table))
    learned = {"h": h, "table": table}
    if "compose" in options:
        intents = options["compose"][0].clone().requires_grad_()
        options = options | {"compose": (intents, options["compose"][1])}
        learned["intents"] = intents
    loss = LOSSES[name](h, table, positives, negatives, backend=backend, **options, **more)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    gradients = torch.autograd.grad(loss, learned.values(), upstream)
    return {"loss": loss.detach()} | {
        n: g.to_dense() if g.is_sparse else g for n, g in zip(learned, gradients, strict=True)
    }


def assert_equal(ours, expected, dim):
    """1e-5 of a tensor's largest value, as sums of terms of both signs have it. The sum of `dim` products that a logit is has an
    error of some sqrt(dim) roundings, and a logit's error is an error of the loss and, times a row, of a gradient."""
    for name, value in expected.items():
        scale = 1e-5 * max(1.0, math.sqrt(dim / 16))
        largest = max(1.0, float(value.abs().max())) if value.numel() else 1.0
        torch.testing.assert_close(
            ours[name].double(), value.double(), rtol=scale, atol=scale * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


def single(value):
    if isinstance(value, tuple):
        return tuple(single(v) for v in value)
    return value.float() if value.is_floating_point() else value


def check(name, arguments, backend="cpu", **more):
    h, table, positives, negatives, options = arguments
    expected = compute(name, h, table, positives, negatives, options, "reference", **more)
    given = {key: single(value) for key, value in options.items()}
    ours = compute(name, h.float(), table.float(), positives, negatives, given, backend, **more)
    assert_equal(ours, expected, h.shape[1])


# The reference


def by_loops(name, h, table, positives, negatives, options):
    """Each token's loss, from its candidates' logits by PyTorch's dense losses."""
    losses = []
    intents, item_intent = options.get("compose", (torch.zeros(1, h.shape[1]).to(h), torch.zeros(len(table)).long()))
    positive_log_q, log_q = options.get("log_q", (torch.zeros(len(h)).to(h), torch.zeros(negatives.shape).to(h)))
    for t in range(len(h)):
        row = int(options["sequence"][t]) if "sequence" in options else t
        drawn, drawn_log_q = (negatives, log_q) if negatives.dim() == 1 else (negatives[row], log_q[row])
        keep = drawn != positives[t]
        if "ignore" in options:
            keep &= ~options["ignore"][row]
        items = torch.cat([positives[t][None], drawn[keep]])
        logits = (table[items] + intents[item_intent[items]]) @ h[t]
        count = len(drawn)
        if name == "softmax":
            logits = logits - torch.cat([positive_log_q[t][None], drawn_log_q[keep]])
            losses.append(cross_entropy(logits[None], torch.tensor([0])))
            continue
        target = torch.zeros(len(items)).to(h)
        target[0] = 1
        each = binary_cross_entropy_with_logits(logits, target, reduction="none")
        if name == "gbce":
            alpha = count / (len(table) - 1)
            beta = alpha * (0.75 * (1 - 1 / alpha) + 1 / alpha)
            each = torch.cat([beta * each[:1], each[1:]]) / (count + 1)
        losses.append(each.sum())
    return torch.stack(losses)


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("more", [{}, {"compose": True, "ignore": True}])
def test_reference_equals_loops(name, sharing, more):
    arguments = case(11, 9, 5, sharing, items=12, log_q=name == "softmax", **more)
    options = arguments[-1]
    out = LOSSES[name](*arguments[:-1], reduction="none", backend="reference", **options)
    expected = by_loops(name, *arguments)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    for reduction in ("mean", "sum"):
        out = LOSSES[name](*arguments[:-1], reduction=reduction, backend="reference", **options)
        torch.testing.assert_close(out, getattr(expected, reduction)(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("name", LOSSES)
def test_reference_gradients(name, sharing):
    h, table, positives, negatives, options = case(6, 4, 3, sharing, items=8, compose=True, ignore=True)
    intents, item_intent = options.pop("compose")

    def loss(h, table, intents):
        compose = intents, item_intent
        return LOSSES[name](
            h, table, positives, negatives, compose=compose, reduction="none", backend="reference", **options
        )

    inputs = [x.requires_grad_() for x in (h, table, intents)]
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


# The C++ backend


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("count", [1, 2, 128, 700])
@pytest.mark.parametrize(("tokens", "dim"), [(1, 1), (63, 20), (64, 64), (65, 128), (111, 33)])
def test_cpu_equals_reference(name, sharing, tokens, count, dim):
    check(name, case(tokens, count, dim, sharing, log_q=name == "softmax"))


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("name", LOSSES)
def test_every_instruction_set(name, sharing, isa):
    check(name, case(65, 37, 52, sharing, compose=True, ignore=True, log_q=name == "softmax"))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("sparse_grad", [False, True])
def test_reductions_and_sparse_gradients(name, sharing, reduction, sparse_grad):
    arguments = case(70, 20, 24, sharing, compose=sparse_grad, ignore=True)
    check(name, arguments, reduction=reduction, sparse_grad=sparse_grad)


def test_many_tokens_share_their_negatives():
    """More tokens than one part's, so that the parts' sums are added."""
    check("softmax", case(2100, 33, 16, "batch", ignore=True))
    check("bce", case(1050, 5, 16, "sequence"))


@pytest.mark.parametrize("each", [1, 3, 40])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_short_and_long_sequences(name, each, reduction):
    """At d = 128 those shorter than 10 tokens are computed as if each token had its own negatives."""
    more = {"compose": True, "ignore": True, "log_q": name == "softmax", "each": each}
    for sparse_grad in (False, True):
        check(name, case(120, 37, 128, "sequence", **more), reduction=reduction, sparse_grad=sparse_grad)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(list(LOSSES)), sharing=st.sampled_from(SHARING), tokens=st.integers(0, 80),
    count=st.integers(1, 70), dim=st.integers(1, 70), items=st.integers(1, 40), compose=st.booleans(),
    ignore=st.booleans(), seed=st.integers(0, 99), sparse_grad=st.booleans(), reduction=st.sampled_from(["sum", "none"]),
)  # fmt: skip
def test_any_shape(name, sharing, tokens, count, dim, items, compose, ignore, seed, sparse_grad, reduction):
    arguments = case(tokens, count, dim, sharing, items=items, compose=compose, ignore=ignore, seed=seed)
    more = {"t": 0.3, "sampling_rate": 0.5} if name == "gbce" else {}
    check(name, arguments, reduction=reduction, sparse_grad=sparse_grad, **more)


@pytest.mark.parametrize("sharing", SHARING)
def test_sparse_gradient_has_the_distinct_rows_in_order(sharing):
    h, table, positives, negatives, _ = single_case = case(40, 3, 8, sharing, items=1000, dtype=torch.float32)
    table.requires_grad_()
    loss = sampled_bce(h, table, positives, negatives, sparse_grad=True, **single_case[-1])
    (gradient,) = torch.autograd.grad(loss, table, retain_graph=True)
    assert gradient.is_coalesced()
    drawn = torch.cat([positives, negatives.flatten()])
    assert torch.equal(gradient.indices()[0], drawn.unique())
    assert gradient.values().shape == (len(drawn.unique()), 8)
    optimizer = torch.optim.SparseAdam([table])
    loss.backward()
    optimizer.step()  # what torch's own row-sparse optimizer takes


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("name", LOSSES)
def test_negatives_that_do_not_count_change_nothing(name, sharing):
    """Collisions and ignored ones, whatever their rows hold; all of them leave the positive alone."""
    h, table, positives, negatives, options = case(30, 8, 16, sharing, dtype=torch.float32)
    positives = torch.full_like(positives, 3)
    alone = compute(name, h, table, positives, torch.full_like(negatives, 3), options, "cpu")
    ignore = torch.ones(len(h) if sharing == "token" else 6, 8, dtype=torch.bool)
    given = options | {"ignore": ignore} | ({} if sharing == "token" else {"sequence": torch.arange(30) // 5})
    ignored = compute(name, h, table, positives, torch.full_like(negatives, 9), given, "cpu")
    for key in alone:
        torch.testing.assert_close(alone[key], ignored[key], rtol=0, atol=0)
    logits = h @ table[3]
    beta = 1 - 0.75 * (1 - 8 / (ITEMS - 1))
    expected = {"softmax": 0.0, "bce": 1.0, "gbce": beta / 9}[name] * torch.nn.functional.softplus(-logits).mean()
    torch.testing.assert_close(alone["loss"], expected, rtol=1e-5, atol=1e-7)
    table[9] = float("inf")  # hidden from the loss, though 0 * inf is in the gradient of h, as in PyTorch
    assert torch.equal(
        compute(name, h, table, positives, torch.full_like(negatives, 9), given, "cpu")["loss"], alone["loss"]
    )


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e4, -1e4, 60.0, -60.0])
def test_extreme_logits_are_as_pytorchs(name, sharing, value):
    h, table, positives, negatives, options = case(6, 5, 1, sharing, items=30, dtype=torch.float32)
    h, table = torch.ones_like(h), table * 0.1
    table[negatives.flatten()[2]] = value
    arguments = h, table, positives, negatives, options
    ours, expected = (compute(name, *arguments, b, reduction="none")["loss"] for b in ("cpu", "reference"))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7, equal_nan=True)
    if math.isfinite(value):
        check(name, (h.double(), table.double(), *arguments[2:]))


def test_small_losses_keep_their_digits():
    """softplus(-20) = 2e-9 is not lost in 1 + 2e-9."""
    h, table = torch.ones(1, 1), torch.tensor([[20.0], [-20.0]])
    for shared in (torch.tensor([1]), torch.tensor([[1]])):
        assert sampled_bce(h, table, torch.tensor([0]), shared).item() == pytest.approx(
            2 * math.log1p(math.exp(-20)), rel=1e-5
        )
        softmax = sampled_softmax(h, table, torch.tensor([0]), shared).item()
        assert softmax == pytest.approx(math.log1p(math.exp(-40)), rel=1e-5)


def test_log_q_corrects_towards_the_full_softmax():
    """With every item drawn once, and log q = 0, the loss is the cross entropy over the catalog."""
    h, table, positives, _, _ = case(20, 1, 16, "batch", dtype=torch.float32)
    out = sampled_softmax(h, table, positives, torch.arange(ITEMS))
    torch.testing.assert_close(out, cross_entropy(h @ table.T, positives), rtol=1e-5, atol=1e-5)
    twice = torch.arange(ITEMS).repeat(
        2
    )  # every item expected twice: log q = log 2 undoes it, but for the hidden positive
    log_q = torch.zeros(20), torch.full((2 * ITEMS,), math.log(2))
    corrected = sampled_softmax(h, table, positives, twice, log_q=log_q)
    torch.testing.assert_close(corrected, out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("sharing", "each"), [("token", 5), ("sequence", 3), ("sequence", 30), ("batch", 5)])
@pytest.mark.parametrize("sparse_grad", [False, True])
def test_bits_do_not_depend_on_threads(sharing, each, sparse_grad):
    arguments = case(1300, 60, 64, sharing, items=900, compose=True, dtype=torch.float32, each=each)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(compute("softmax", *arguments, "cpu", sparse_grad=sparse_grad))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


@pytest.mark.parametrize("sharing", SHARING)
def test_bfloat16_table(sharing):
    """The rows are read as they are; the arithmetic is float32; a gradient is rounded once, to 2^-9 of itself."""
    h, table, positives, negatives, options = case(40, 9, 24, sharing, compose=True, dtype=torch.float32)
    low, intents = table.bfloat16(), options["compose"][0].bfloat16()
    ours = compute(
        "softmax", h, low, positives, negatives, options | {"compose": (intents, options["compose"][1])}, "cpu"
    )
    wide = options | {"compose": (intents.float(), options["compose"][1])}
    expected = compute("softmax", h, low.float(), positives, negatives, wide, "cpu")
    assert torch.equal(ours["loss"], expected["loss"])
    assert ours["table"].dtype == torch.bfloat16
    for name in ("table", "intents"):
        torch.testing.assert_close(ours[name].float(), expected[name], rtol=2**-8, atol=1e-8)


def test_half_precision_h_under_autocast():
    h, table, positives, negatives, _ = case(20, 5, 16, "token", dtype=torch.float32)
    h = h.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = sampled_bce(h, table, positives, negatives)
    loss.backward()
    assert loss.dtype == torch.float32
    assert h.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("sharing", SHARING)
def test_no_tokens(sharing):
    h, table, positives, negatives, options = case(0, 4, 16, sharing, dtype=torch.float32)
    total = compute("bce", h, table, positives, negatives, options, "cpu", reduction="sum")
    assert total["loss"] == 0
    assert (total["table"] == 0).all()
    assert torch.isnan(sampled_bce(h, table, positives, negatives, **options))  # as PyTorch's mean over nothing


def test_strided_inputs_and_int32_ids():
    h, table, positives, negatives, _ = case(40, 9, 24, "token", dtype=torch.float32)
    expected = compute("bce", h, table, positives, negatives, {}, "cpu")
    strided = [x.T.contiguous().T for x in (h, table)]
    assert not strided[0].is_contiguous()
    ours = compute("bce", *strided, positives.int(), negatives.T.contiguous().T.int(), {}, "cpu")
    assert all(torch.equal(ours[name], value) for name, value in expected.items())


def test_only_what_is_wanted_gets_a_gradient():
    h, table, positives, negatives, options = case(10, 4, 8, "token", compose=True, dtype=torch.float32)
    intents = options["compose"][0].requires_grad_()
    sampled_bce(h, table, positives, negatives, **options).backward()
    expected = compute("bce", h, table, positives, negatives, options, "cpu")
    assert torch.equal(intents.grad / 2, expected["intents"])  # compute's upstream gradient is 0.5
    assert h.grad is None
    assert table.grad is None
    with torch.no_grad():
        assert not sampled_bce(h.requires_grad_(), table, positives, negatives, **options).requires_grad


MEMORY = """
import resource, torch
from cafe_kernels import sampled_softmax
torch.set_num_threads(1)
tokens, count, dim, items = 2048, 4096, 64, 4096
h = torch.randn(tokens, dim, requires_grad=True)
table = torch.randn(items, dim, requires_grad=True)
negatives = torch.randint(items, ({shape}))
sequence = {sequence}
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
sampled_softmax(h[:64], table, torch.zeros(64, dtype=torch.long), negatives[{small}], sparse_grad=True,
                sequence=None if sequence is None else sequence[:64]).backward()
before = peak()
sampled_softmax(h, table, torch.zeros(tokens, dtype=torch.long), negatives, sparse_grad=True, sequence=sequence).backward()
print(peak() - before)
"""


@pytest.mark.parametrize(
    ("shape", "sequence", "small", "each", "limit"),
    [
        ("tokens, count", "None", ":64", 44, 33),
        ("count,", "None", ":", 0, 12),
        ("tokens, count", "torch.arange(tokens)", ":64", 56, 33),
        ("tokens // 8, count", "torch.arange(tokens) // 8", ":8", 56, 33),
    ],
)
def test_peak_memory(shape, sequence, small, each, limit):
    """A tensor of (tokens, K, d) would be 2 GiB, one of (tokens, K) 33.5 MB. Shared negatives need neither; those per token keep
    a float for each draw, and sort the draws, at 44 bytes each with their ids, and those per sequence no more but ids for tokens."""
    code = MEMORY.format(shape=shape, small=small, sequence=sequence)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert int(run.stdout) < 2048 * 4096 * each + limit * 2**20


# torch.library


@pytest.mark.parametrize(("sharing", "each"), [("token", 5), ("sequence", 5), ("sequence", 1), ("batch", 5)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(sharing, each, reduction):
    more = {"compose": True, "ignore": True, "dtype": torch.float32, "each": each}
    h, table, positives, negatives, options = case(10, 4, 8, sharing, **more)
    intents, item_intent = options["compose"]
    for x in (h, table, intents):
        x.requires_grad_()
    arguments = (
        h, table, intents, item_intent, positives, negatives, options.get("sequence"), options["ignore"], None, None,
        "bce", 1.0, 1.0, reduction, True, False, "cpu",
    )  # fmt: skip
    torch.library.opcheck(ops.forward_op, arguments)
    _, *gradients = ops.forward_op(*arguments)
    grad_loss = torch.ones(10 if reduction == "none" else ())
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in (*arguments[:10], *gradients)]
    for sparse_grad in (False, True):
        options = (*arguments[10:-2], sparse_grad, "cpu", True, True, True)
        torch.library.opcheck(ops.backward_op, (grad_loss, *plain, *options))


@pytest.mark.parametrize("sharing", ["sequence", "batch"])
def test_no_output_is_memory_of_others(sharing):
    """Width 8 has rows of 16 columns: the others are zero whatever the allocator gives."""
    h, table, positives, negatives, options = case(10, 4, 8, sharing, dtype=torch.float32)
    arguments = (h, table, None, None, positives, negatives, options.get("sequence"), None, None, None)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
    try:
        _, _, _, rows = ops.forward_op(*arguments, "bce", 1.0, 1.0, "mean", True, False, "cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    assert rows.shape[1] == 16
    assert not rows[:, 8:].any()
    assert rows.isfinite().all()


def test_compiles():
    h, table, positives, negatives, options = case(12, 4, 8, "batch", ignore=True, dtype=torch.float32)

    def loss(h, table):
        return sampled_softmax(2 * h, table, positives, negatives, **options)

    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        inputs = [x.clone().requires_grad_() for x in (h, table)]
        out = function(*inputs)
        results.append((out.detach(), *torch.autograd.grad(out, inputs)))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_backward_twice_through_a_kept_graph():
    h, table, positives, negatives, _ = case(10, 4, 8, "token", dtype=torch.float32)
    loss = sampled_bce(h.requires_grad_(), table.requires_grad_(), positives, negatives)
    (loss * 1).backward(retain_graph=True)
    once = h.grad.clone(), table.grad.clone()
    loss.backward()
    torch.testing.assert_close((h.grad, table.grad), (2 * once[0], 2 * once[1]), rtol=0, atol=0)


def test_second_backward_is_refused():
    h, table, positives, negatives, _ = case(10, 4, 8, "token", dtype=torch.float32)
    loss = sampled_bce(h.requires_grad_(), table, positives, negatives)
    (dh,) = torch.autograd.grad(loss, h, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative here: use backend='reference'"):
        dh.sum().backward()


@pytest.mark.parametrize(("t", "rate", "beta"), [(0, None, 1.0), (1, None, 8 / 49), (1, 1.0, 1.0), (0.5, 0.5, 0.75)])
def test_gbce_at_the_ends_of_its_ranges(t, rate, beta):
    """beta = 1 - t (1 - alpha); the positive's part of the loss is the whole less that of the negatives."""
    h, table, positives, negatives, _ = case(30, 8, 16, "token", items=50, dtype=torch.float32)
    positive = torch.nn.functional.softplus(-(h * table[positives]).sum(1)).mean()
    whole = sampled_bce(h, table, positives, negatives)
    expected = (whole - (1 - beta) * positive) / 9
    torch.testing.assert_close(gbce(h, table, positives, negatives, t=t, sampling_rate=rate), expected)


def test_gbce_with_two_items_draws_all_negatives():
    h, table = torch.randn(4, 8), torch.randn(2, 8)
    given = h, table, torch.zeros(4).long(), torch.ones(1).long()
    torch.testing.assert_close(gbce(*given), sampled_bce(*given) / 2)  # alpha = 1, so beta = 1


# Wrong input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"h": torch.zeros(5, 7)}, ValueError, r"one width d, got \(5, 7\) and \(50, 8\)"),
        ({"h": torch.zeros(5, 8, dtype=torch.long)}, ValueError, "h and table must be floating point"),
        ({"table": torch.zeros(0, 8)}, ValueError, "table"),
        ({"positives": torch.zeros(4, dtype=torch.long)}, ValueError, r"positives must have shape \(5,\), got \(4,\)"),
        ({"positives": torch.zeros(5)}, ValueError, "positives must be int64 or int32, got torch.float32"),
        ({"positives": torch.tensor([0, 1, 2, 50, 4])}, IndexError, "positives must be in 0 ... 49.*got 50 at place 3"),
        ({"negatives": torch.tensor([0, 1, -1])}, IndexError, "negatives must be in 0 ... 49.*got -1 at place 2"),
        ({"negatives": torch.zeros(4, 3, dtype=torch.long)}, ValueError, "negatives have 4 rows for 5 tokens"),
        ({"negatives": torch.zeros(5, 0, dtype=torch.long)}, ValueError, "K >= 1"),
        ({"ignore": torch.zeros(4, 3, dtype=torch.bool)}, ValueError, r"ignore must have shape \(5, 3\), got \(4, 3\)"),
        ({"ignore": torch.zeros(5, 3)}, ValueError, "ignore must be bool"),
        ({"sequence": torch.zeros(4, dtype=torch.long)}, ValueError, r"sequence must have shape \(5,\)"),
        (
            {"sequence": torch.tensor([0, 1, 2, 3, 4]), "ignore": torch.zeros(4, 3, dtype=torch.bool)},
            IndexError,
            "sequence must be in 0 ... 3, the rows of negatives or ignore, got 4",
        ),
        (
            {"negatives": torch.zeros(2, 3, dtype=torch.long), "sequence": torch.tensor([1, 0, 0, 0, 0])},
            ValueError,
            "sequence must ascend",
        ),
        *(
            ({"negatives": torch.zeros(5, 3, dtype=torch.long), "sequence": torch.tensor(sequence)}, error, message)
            for sequence, error, message in (
                ([0, 1, 2, 4, 3], ValueError, "sequence must ascend"),
                ([0, 1, 2, 3, 5], IndexError, "sequence must be in 0 ... 4, the rows of negatives or ignore, got 5"),
                ([-1, 0, 1, 2, 3], IndexError, "sequence must be in 0 ... 4, .* got -1"),
            )
        ),
        ({"compose": (torch.zeros(3, 7), torch.zeros(50, dtype=torch.long))}, ValueError, "intent_table of compose"),
        ({"compose": (torch.zeros(3, 8), torch.zeros(49, dtype=torch.long))}, ValueError, "item_intent of compose"),
        ({"compose": (torch.zeros(3, 8), torch.full((50,), 3))}, IndexError, "item_intent must be in 0 ... 2"),
        ({"compose": (torch.zeros(3, 8).double(), torch.full((50,), 3))}, ValueError, "one dtype"),
        ({"log_q": (torch.zeros(5), torch.zeros(4))}, ValueError, "log_q of the negatives"),
        ({"log_q": (torch.zeros(4), torch.zeros(3))}, ValueError, "log_q of the positives"),
        ({"h": torch.zeros(8)}, ValueError, r"h must be \(T, d\) and table"),
        ({"log_q": (torch.zeros(5), None)}, ValueError, "log_q must be two tensors or None, got Tensor, NoneType"),
        ({"log_q": (None, torch.zeros(3))}, ValueError, "log_q must be two tensors or None, got NoneType, Tensor"),
        ({"log_q": (torch.zeros(5), torch.zeros(3).requires_grad_())}, ValueError, "log_q requires a gradient"),
        ({"compose": (torch.zeros(3, 8), None)}, ValueError, "compose must be two tensors or None"),
        ({"positives": torch.arange(5, device="meta")}, ValueError, "must be on h's device cpu, got some on meta"),
        ({"table": torch.zeros(50, 8, device="meta")}, ValueError, "must be on h's device cpu, got some on meta"),
        ({"reduction": "max"}, ValueError, "reduction must be 'mean', 'sum' or 'none', got 'max'"),
        ({"backend": "cuda"}, ValueError, "unknown backend 'cuda'"),
        ({"h": torch.zeros(5, 8).double(), "backend": "cpu"}, ValueError, "h is float64; use backend='reference'"),
    ],
)
def test_refusals(change, error, message):
    given = {"h": torch.zeros(5, 8), "table": torch.zeros(50, 8), "positives": torch.arange(5)}
    given |= {"negatives": torch.tensor([7, 8, 9]), **change}
    with pytest.raises(error, match=message):
        sampled_softmax(**given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t": 1.5}, "t must be in"),
        ({"t": -0.1}, "t must be in"),
        ({"sampling_rate": 0.0}, "sampling_rate must be in"),
        ({"sampling_rate": 1.01}, "sampling_rate must be in"),
        ({"negatives": torch.tensor(3)}, "negatives must be"),
    ],
)
def test_gbce_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        gbce(torch.zeros(5, 8), torch.zeros(50, 8), torch.arange(5), **{"negatives": torch.arange(3), **options})


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("loss", LOSSES.values())
def test_the_gradient_of_the_table_is_sparse_only_where_asked(loss, backend):
    for options, sparse in (({}, False), ({"sparse_grad": True}, True)):
        table = torch.randn(50, 8, requires_grad=True)
        loss(torch.randn(5, 8), table, torch.arange(5), torch.arange(3), backend=backend, **options).backward()
        assert table.grad.is_sparse == sparse


@pytest.mark.parametrize("loss", LOSSES.values())
def test_every_loss_passes_the_backend_on(loss):
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        loss(torch.zeros(5, 8), torch.zeros(50, 8), torch.arange(5), torch.arange(3), backend="cuda")


def test_extension_checks_what_it_is_told_to_read():
    def zeros(*shape, dtype=np.float32):
        return np.zeros(shape, dtype)

    order, starts = np.array([0, 7], np.int32), np.array([0, 2])
    sums = [None, zeros(0, 4), zeros(0), zeros(2, 4), 1.0, zeros(1, 4), 1]
    with pytest.raises(IndexError, match="order must hold places"):
        _C.sum_segments(order, starts, 1, *sums)
    with pytest.raises(ValueError, match="starts must ascend within the 2 entries"):
        _C.sum_segments(order % 2, np.array([0, 3]), 1, *sums)
    with pytest.raises(IndexError, match="targets must be rows of out"):
        _C.sum_segments(order % 2, starts, 1, np.array([1]), *sums[1:])
    with pytest.raises(IndexError, match="ids must be in 0"):
        _C.sort_ids(np.array([5]), 5, zeros(1, dtype=np.int32), zeros(1, dtype=np.int64), zeros(2, dtype=np.int64))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5000), max_size=300), st.sampled_from([5001, 2**11, 2**22, 2**31 - 1]))
def test_sort_ids_is_a_stable_sort(ids, limit):
    ids = np.array([i % limit for i in ids], np.int64)
    order, distinct, starts = np.empty(len(ids), np.int32), np.empty_like(ids), np.empty(len(ids) + 1, np.int64)
    count = _C.sort_ids(ids, limit, order, distinct, starts)
    assert np.array_equal(order, np.argsort(ids, kind="stable"))
    expected, first = np.unique(ids, return_index=True)
    assert np.array_equal(distinct[:count], expected)
    assert np.array_equal(order[starts[:count]], first)
    assert starts[count] == len(ids)
