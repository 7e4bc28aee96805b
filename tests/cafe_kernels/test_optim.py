"""RowSparseAdam against torch.optim: SparseAdam for the lazy mode, Adam and AdamW on the whole table, in fp64, for the exact one.

Tolerances. One float32 step carries some u = 6e-8 of its lr-sized move and of the weight; over n steps they add up like sqrt(n), and for
n = 1,000, lr = 1e-2 and weights of size 1 that is 2e-6 of a weight. dense Adam in float32, measured the same way, is off by more.
"""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cafe_kernels import _C
from cafe_kernels.optim import RowSparseAdam
from cafe_kernels.optim import history as past
from tests.interpreter import INTERPRETED, check_compile_cases, run_python

pytestmark = pytest.mark.usefixtures("threads")
RELATIVE = 1e-5  # of a weight of size 1


def gradients(v, d, steps, rows=4, scale=1e-3, seed=0):
    """(rows, values) of each step, with repeats; low rows are frequent, high ones rare, row v - 1 is touched at first only."""
    g = torch.Generator().manual_seed(seed)
    for t in range(steps):
        n = int(torch.randint(0, rows + 1, (), generator=g)) if t else rows
        r = (torch.rand(n, generator=g) ** 4 * v).long()
        if t == 0:
            r[0] = v - 1
        size = scale * 10 ** torch.randn(n, 1, generator=g)
        yield r, torch.randn(n, d, generator=g, dtype=torch.float64) * size


def rate(t, steps):
    """A schedule that changes every step: warm-up from 0, then a cosine."""
    return 1e-2 * min(1, t / 20) * (0.6 + 0.4 * math.cos(3 * t / steps))


def table(v, d, dtype, seed=1):
    w = torch.randn(v, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.Parameter(w.to(dtype))


def sparse(rows, values, like):
    return torch.sparse_coo_tensor(rows[None], values.to(like.dtype), like.shape)


def train(optimizer, w, given, steps, dense=False, start=0):
    for t, (rows, values) in enumerate(given, start):
        optimizer.param_groups[0]["lr"] = rate(t, steps)
        if dense:
            w.grad = torch.zeros_like(w).index_add_(0, rows, values.to(w.dtype))
        else:
            w.grad = sparse(rows, values, w)
        optimizer.step()


def compare(v, d, steps, mode, dtype=torch.float32, kind=None, options=None, scale=1e-3, backend=None, ours=None):
    """Both optimizers' tables after the same gradients, and the start."""
    options = options or {}
    peer, mine = table(v, d, torch.float64), table(v, d, dtype)
    kind = kind or (torch.optim.SparseAdam if mode == "lazy" else torch.optim.AdamW)
    if kind is torch.optim.AdamW:
        options = {"weight_decay": 0.0, **options}
    theirs = kind([peer], lr=1e-2, **options)
    optimizer = RowSparseAdam([mine], lr=1e-2, mode=mode, backend=backend, **options, **(ours or {}))
    given_rows = list(gradients(v, d, steps, scale=scale))
    # SparseAdam refuses lr = 0: both start at the schedule's second step.
    train(theirs, peer, given_rows, steps, dense=mode == "exact", start=1)
    train(optimizer, mine, given_rows, steps, start=1)
    optimizer.flush()
    return mine.detach().double(), peer.detach(), table(v, d, torch.float64).detach()


SHAPES = [(1, 1), (1, 64), (7, 20), (300, 1), (130, 64), (64, 111), (65, 128)]


@pytest.mark.parametrize(("v", "d"), SHAPES)
@pytest.mark.parametrize("mode", ["lazy", "exact"])
def test_equals_torch(v, d, mode, isa):
    mine, peer, start = compare(v, d, 60, mode)
    assert not torch.equal(peer, start)
    torch.testing.assert_close(mine, peer, rtol=RELATIVE, atol=RELATIVE * 0.1)


@pytest.mark.parametrize("mode", ["lazy", "exact"])
def test_reference_equals_torch_in_fp64(mode):
    mine, peer, _ = compare(30, 20, 300, mode, torch.float64)
    torch.testing.assert_close(mine, peer, rtol=1e-8, atol=1e-9)  # what momentum older than the window would have added


LONG = {
    "default": ({}, 1e-3),
    "weight decay": ({"weight_decay": 0.3}, 1e-3),
    "gradients near eps": ({}, 1e-8),
    "gradients far below eps": ({}, 1e-12),
    "large eps": ({"eps": 1e-3, "weight_decay": 0.1}, 1e-3),
    "beta2 = 0.95": ({"betas": (0.9, 0.95)}, 1e-8),
    "beta2 = 0.9": ({"betas": (0.9, 0.9)}, 1e-8),
    "beta1 = 0.98": ({"betas": (0.98, 0.99)}, 1e-7),
    "beta1 = 0": ({"betas": (0.0, 0.99)}, 1e-7),
}


@pytest.mark.parametrize("case", LONG)
def test_exact_equals_adam_after_1000_steps(case):
    """A learning rate that changes every step; rows untouched for up to 999 steps. What moved is compared too, which is all there
    is where gradients are far below eps."""
    options, scale = LONG[case]
    mine, peer, start = compare(200, 20, 1000, "exact", options=options, scale=scale)
    torch.testing.assert_close(mine, peer, rtol=RELATIVE, atol=RELATIVE * 0.1)
    moved, rounding = (peer - start).norm(), 2.0**-24 * peer.norm()
    assert (mine - peer).norm() < RELATIVE * moved + 20 * rounding


def test_a_row_left_out_for_longer_than_the_table_of_powers(isa):
    """Rows 1,500 steps behind: their second moment has decayed by 0.999^1500 = 0.22, which the next step's size shows."""
    peer, mine = table(3, 20, torch.float64), table(3, 20, torch.float32)
    theirs, ours = torch.optim.Adam([peer], lr=1e-2), RowSparseAdam([mine], lr=1e-2, mode="exact")
    g = torch.Generator().manual_seed(0)
    for t in range(1501):
        rows = torch.arange(3) if t % 1500 == 0 else torch.tensor([0])
        values = torch.randn(len(rows), 20, generator=g, dtype=torch.float64)
        peer.grad = torch.zeros_like(peer).index_add_(0, rows, values)
        mine.grad = sparse(rows, values, mine)
        theirs.step(), ours.step()
    torch.testing.assert_close(mine.double(), peer, rtol=RELATIVE, atol=RELATIVE * 0.1)


def test_exact_is_nearer_to_adam_than_float32_adam_itself():
    mine, peer, _ = compare(100, 16, 500, "exact")
    dense = table(100, 16, torch.float32)
    train(torch.optim.Adam([dense], lr=1e-2), dense, gradients(100, 16, 500), 500, dense=True, start=1)
    assert (mine - peer).norm() < 2 * (dense.double() - peer).norm()


def test_lazy_is_not_exact():
    lazy = RowSparseAdam([w := table(2, 3, torch.float32)], mode="lazy")
    exact = RowSparseAdam([x := table(2, 3, torch.float32)], mode="exact")
    for rows in ([0], [1], [1]):
        values = torch.ones(1, 3)
        w.grad, x.grad = (sparse(torch.tensor(rows), values, y) for y in (w, x))
        lazy.step(), exact.step()
    assert torch.equal(w[0], x[0])  # not yet brought up to date
    exact.flush()
    assert ((x[0] - w[0]).abs() > 5e-4).all()  # two more steps of momentum


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([(0.9, 0.999), (0.8, 0.9), (0.0, 0.5)]),
    st.sampled_from([1e-3, 1e-8]),
    st.sampled_from(["cpu", "reference"]),
    st.data(),
)
def test_any_pattern(v, d, steps, weight_decay, betas, scale, backend, data):
    """Any rows, repeats, catch-ups and flushes in between."""
    options = {"lr": 1e-2, "betas": betas, "weight_decay": weight_decay}
    peer, mine = table(v, d, torch.float64), table(v, d, torch.float32)
    theirs, ours = torch.optim.AdamW([peer], **options), RowSparseAdam([mine], mode="exact", backend=backend, **options)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    for t in range(steps):
        rows = torch.from_numpy(rng.integers(0, v, rng.integers(0, 6)))
        if rng.random() < 0.3:
            ours.catch_up(mine, rows)
            torch.testing.assert_close(mine[rows].double(), peer[rows], rtol=RELATIVE, atol=RELATIVE * 0.1)
        step = [(rows, torch.from_numpy(rng.normal(size=(len(rows), d))) * scale)]
        train(theirs, peer, step, steps, dense=True, start=t)
        train(ours, mine, step, steps, start=t)
        if rng.random() < 0.1:
            ours.flush()
    ours.flush()
    torch.testing.assert_close(mine.double(), peer, rtol=RELATIVE, atol=RELATIVE * 0.1)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 60))
def test_any_shape_equals_sparse_adam(v, d, steps):
    mine, peer, _ = compare(v, d, steps, "lazy")
    torch.testing.assert_close(mine, peer, rtol=RELATIVE, atol=RELATIVE * 0.1)


@pytest.mark.parametrize("mode", ["lazy", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_matter(mode, dtype, threads):
    """Many repeats and rows enough for several threads: bit-identical."""
    results = []
    for number in (1, 2, 5):
        threads(number)
        w = table(9000, 128, dtype)
        optimizer = RowSparseAdam([w], mode=mode, weight_decay=0.1)
        for t in range(4):
            g = torch.Generator().manual_seed(t)
            rows = torch.randint(0, 9000, (12000,), generator=g)
            w.grad = sparse(rows, torch.randn(12000, 128, generator=g), w)
            optimizer.step()
        optimizer.flush()
        results.append((w.detach().clone(), *(x for x in optimizer.state[w].values())))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_repeats_are_summed_in_order():
    """1e8 + 1 - 1e8 in float32 depends on the order: 0 here, 1 if sorted otherwise."""
    for values, expected in (([1e8, 1.0, -1e8], 0.0), ([1e8, -1e8, 1.0], 1.0)):
        w = torch.nn.Parameter(torch.zeros(5, 1))
        optimizer = RowSparseAdam([w], betas=(0.5, 0.5))
        w.grad = sparse(
            torch.tensor([3, 0, 3, 3, 1]), torch.tensor([[values[0]], [7], [values[1]], [values[2]], [7]]), w
        )
        optimizer.step()
        assert optimizer.state[w]["exp_avg"][3].item() == expected * 0.5


def test_coalesced_and_embedding_gradients():
    """An embedding's own gradients, several of them added by autograd, and the same coalesced."""
    results = []
    for coalesced in (False, True):
        torch.manual_seed(0)
        layer = torch.nn.Embedding(50, 20, sparse=True)
        optimizer = RowSparseAdam(layer.parameters(), mode="exact")
        for t in range(5):
            items = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(t))
            (layer(items).square().sum() + layer(items[0]).sum()).backward()
            if coalesced:
                layer.weight.grad = layer.weight.grad.coalesce()
            optimizer.step()
            optimizer.zero_grad()
        results.append(layer.weight.detach())
    torch.testing.assert_close(*results)


def test_training_with_catch_up_equals_dense_adam():
    """The gradients come from the model: rows must be up to date in the forward pass."""

    def run(sparse_table, catch_up):
        torch.manual_seed(0)
        layer = torch.nn.Embedding(30, 8, sparse=sparse_table).double()
        optimizer = (
            RowSparseAdam(layer.parameters(), lr=0.05, mode="exact")
            if sparse_table
            else torch.optim.Adam(layer.parameters(), lr=0.05)
        )
        for t in range(150):
            items = torch.randint(0, 30, (4,), generator=torch.Generator().manual_seed(t))
            if catch_up:
                optimizer.catch_up(layer.weight, items.view(2, 2))
            optimizer.zero_grad()
            (layer(items).cos() * (1 + items[:, None])).sum().backward()
            optimizer.step()
        if sparse_table:
            optimizer.flush()
        return layer.weight.detach()

    dense = run(False, False)
    assert (run(True, True) - dense).abs().max() < 1e-6
    assert (run(True, False) - dense).abs().max() > 1e-3


def test_empty_gradient():
    """Counts as a step, as in torch; no gradient at all does not."""
    for mode in ("lazy", "exact"):
        w = table(5, 3, torch.float32)
        optimizer = RowSparseAdam([w], mode=mode)
        optimizer.step()
        assert not optimizer.state[w]
        before = w.detach().clone()
        w.grad = sparse(torch.zeros(0, dtype=torch.long), torch.zeros(0, 3), w)
        optimizer.step()
        assert optimizer.state[w]["step"] == 1
        optimizer.flush()
        assert torch.equal(w, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("mode", ["lazy", "exact"])
def test_bad_numbers_stay_in_their_row(bad, mode, isa):
    w = table(6, 20, torch.float32)
    optimizer = RowSparseAdam([w], mode=mode)
    for _ in range(2):
        values = torch.ones(3, 20)
        values[1, 5] = bad
        w.grad = sparse(torch.tensor([4, 2, 0]), values, w)
        optimizer.step()
    optimizer.flush()
    assert w[2, 5].isnan()
    assert w.isfinite().sum() == 6 * 20 - 1


@pytest.mark.parametrize("mode", ["lazy", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_goes_on_bit_for_bit(mode, dtype, tmp_path):
    """In the exact mode without a flush: rows are behind when it is saved."""
    options = {"mode": mode, "weight_decay": 0.1, "moments_dtype": torch.bfloat16 if dtype == torch.bfloat16 else None}
    steps = list(gradients(40, 20, 700))
    w = table(40, 20, dtype)
    optimizer = RowSparseAdam([w], **options)
    train(optimizer, w, steps[:300], 700)
    torch.save((w, optimizer.state_dict()), tmp_path / "state.pt")
    train(optimizer, w, steps[300:], 700, start=300)
    optimizer.flush()

    again, state = torch.load(tmp_path / "state.pt")
    assert all(isinstance(x, torch.Tensor) and x.is_contiguous() for x in state["state"][0].values())
    resumed = RowSparseAdam([again], **{**options, "weight_decay": 0.7})  # what is saved counts
    resumed.load_state_dict(state)
    train(resumed, again, steps[300:], 700, start=300)
    resumed.flush()
    assert torch.equal(w, again)
    for name, x in optimizer.state[w].items():
        assert torch.equal(x, resumed.state[again][name]), name
        assert x.dtype == resumed.state[again][name].dtype


def test_copies_are_independent():
    w = table(9, 4, torch.float32)
    optimizer = RowSparseAdam([w], mode="exact")
    train(optimizer, w, gradients(9, 4, 20), 20)
    twin, twin_w = RowSparseAdam([x := copy.deepcopy(w)], mode="exact"), x
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for o, y in ((optimizer, w), (twin, twin_w)):
        train(o, y, gradients(9, 4, 20, seed=5), 20)
        o.flush()
    assert torch.equal(w, twin_w)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_the_optimizer_itself_can_be_copied(copied):
    """With its table, as a checkpoint by pickle or a snapshot in memory takes both."""
    w = table(9, 4, torch.float32)
    optimizer = RowSparseAdam([w], mode="exact", moments_dtype=torch.bfloat16, backend="reference")
    train(optimizer, w, gradients(9, 4, 20), 20)
    twin_w, twin = copied((w, optimizer))
    assert (twin.moments_dtype, twin.backend) == (torch.bfloat16, "reference")
    late_w = table(5, 4, torch.float32)  # gets its moments after the copy
    twin.add_param_group({"params": [late_w]})
    late_w.grad = sparse(torch.tensor([1]), torch.ones(1, 4), late_w)
    for o, y in ((optimizer, w), (twin, twin_w)):
        train(o, y, gradients(9, 4, 20, seed=5), 20)
        o.flush()
    assert torch.equal(w, twin_w)
    assert twin.state[late_w]["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ["lazy", "exact"])
def test_two_that_load_one_state_count_alone(mode):
    """load_state_dict shares the large tensors, as torch does, but not the counters, which step() changes in place."""
    w = table(9, 4, torch.float32)
    optimizer = RowSparseAdam([w], mode=mode)
    train(optimizer, w, gradients(9, 4, 5), 20)
    saved = optimizer.state_dict()
    twin = RowSparseAdam([x := copy.deepcopy(w)], mode=mode)
    twin.load_state_dict(saved)
    train(twin, x, gradients(9, 4, 3, seed=2), 20)
    assert int(twin.state[x]["step"]) == 8
    assert int(optimizer.state[w]["step"]) == int(saved["state"][0]["step"]) == 5


def test_flush_shortens_the_history_and_changes_no_result():
    tables = []
    for every in (1000, 7):
        w = table(30, 8, torch.float32)
        optimizer = RowSparseAdam([w], mode="exact", weight_decay=0.1)
        for t, step in enumerate(gradients(30, 8, 600)):
            train(optimizer, w, [step], 600, start=t)
            if t % every == every - 1:
                optimizer.flush()
                assert len(optimizer.state[w]["history"]) == 256
                assert (optimizer.state[w]["last_step"] == t + 1).all()
        if every == 1000:
            assert len(optimizer.state[w]["history"]) == 1024
        optimizer.flush()
        before = w.detach().clone()
        optimizer.flush()
        assert torch.equal(w, before)
        tables.append(before)
    torch.testing.assert_close(*tables, rtol=RELATIVE, atol=RELATIVE * 0.1)


def test_schedulers_and_groups():
    """Two groups, each with its own rate, under torch's schedulers."""
    peers, mine = ([table(v, 4, torch.float64, seed=v) for v in (5, 9)] for _ in range(2))

    def groups(tables):
        return [{"params": [tables[0]], "lr": 0.1}, {"params": [tables[1]], "weight_decay": 0.2}]

    theirs = torch.optim.AdamW(groups(peers), lr=0.01, weight_decay=0.0)
    ours = RowSparseAdam(groups(mine), lr=0.01, mode="exact")
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 50, cycle_momentum=False) for o in (theirs, ours)]
    for rows, values in gradients(5, 4, 50):
        for w in peers:
            w.grad = torch.zeros_like(w).index_add_(0, rows, values)
        for w in mine:
            w.grad = sparse(rows, values, w)
        theirs.step(), ours.step()
        for schedule in schedules:
            schedule.step()
    ours.flush()
    for x, y in zip(mine, peers, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-8)


def test_history_on_a_device_equals_the_extension():
    """append_step in PyTorch, which GPUs use, against C++."""
    tables = [past.new(torch.device("cpu")) for _ in range(2)]
    powers = past._powers(0.9, 0.999, past.window(0.9, 0.999), torch.device("cpu"))
    for step in range(1, 150):
        arguments = (0, max(0, step - 40), step, 0.3, 1e-3 * step, 0.99, 1e-3)
        past.append_step(tables[0], powers, *arguments)
        _C.append_step(tables[1].numpy(), powers.numpy(), *arguments)
    torch.testing.assert_close(*tables, rtol=1e-13, atol=0)


# bfloat16.


def bf16_error(dtype, moments, seed, steps, lr, touched):
    """|what a table moved - what it should have moved| / |what it should have moved|, in norms, by Adam in fp64 from the same start,
    with weights of size 0.1 and gradients of signal-to-noise 1 : 2. `touched`: the share of rows that a step has."""
    g = torch.Generator().manual_seed(0)
    start = (0.1 * torch.randn(64, 32, generator=g)).to(dtype)
    peer, mine = (torch.nn.Parameter(start.to(x, copy=True)) for x in (torch.float64, dtype))
    theirs = torch.optim.Adam([peer], lr=lr)
    ours = RowSparseAdam([mine], lr=lr, mode="exact", moments_dtype=moments, seed=seed)
    signal = torch.randn(64, 32, generator=g)
    for _ in range(steps):
        rows = torch.nonzero(torch.rand(64, generator=g) < touched)[:, 0]
        values = (signal[rows] + 2 * torch.randn(len(rows), 32, generator=g)).to(dtype)
        peer.grad = torch.zeros_like(peer).index_add_(0, rows, values.double())
        mine.grad = sparse(rows, values, mine)
        theirs.step(), ours.step()
    ours.flush()
    return float(((mine - peer).norm() / (peer - start).norm()).detach())


@pytest.mark.parametrize(
    ("dtype", "moments", "touched", "most"),
    [
        (torch.float32, torch.float32, 1.0, 1e-5),  # measured 3e-6
        (torch.float32, torch.bfloat16, 1.0, 0.02),  # 0.008
        (torch.float32, torch.bfloat16, 0.05, 0.02),  # 0.002
        (torch.bfloat16, torch.float32, 1.0, 0.15),  # 0.10; to nearest 0.91
        (torch.bfloat16, torch.float32, 0.05, 0.21),  # 0.18; to nearest 0.21
        (torch.bfloat16, torch.bfloat16, 1.0, 0.15),  # 0.10; to nearest 0.91
    ],
)
def test_bfloat16_error(dtype, moments, touched, most):
    assert bf16_error(dtype, moments, 0, 1000, 1e-4, touched) < most


def test_rounding_to_nearest_stands_still():
    """Steps of lr = 1e-4 on weights of size 0.1, whose last place is 5e-4: what stochastic rounding is for."""
    assert bf16_error(torch.bfloat16, torch.float32, None, 1000, 1e-4, 1.0) > 0.8


def test_stochastic_rounding_is_unbiased():
    """A constant pull of 1/20 of a bfloat16's last place a step: nearest never moves, stochastic moves by the mean. 4,096 weights, 40
    steps: the mean's standard error is sqrt(40 * 0.05 * 0.95 / 4096) = 2.2% of a place around 2 places; 5 of them are allowed."""
    place = 2.0**-7
    results = {}
    for seed in (3, None):
        w = torch.nn.Parameter(torch.full((32, 128), 1.5, dtype=torch.bfloat16))
        optimizer = RowSparseAdam([w], lr=place / 20, betas=(0.0, 0.5), eps=1e-12, seed=seed)
        for _ in range(40):
            w.grad = sparse(torch.arange(32), torch.ones(32, 128), w)
            optimizer.step()
        results[seed] = (1.5 - w.detach().double().mean().item()) / place
    assert results[None] == 0
    assert abs(results[3] - 2) < 5 * 0.022


@pytest.mark.parametrize("mode", ["lazy", "exact"])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_bfloat16_equals_the_reference(mode, moments, isa):
    """The same random bits: but for the last place where float32 sums were rounded differently."""
    results = []
    for backend in ("cpu", "reference"):
        w = table(50, 20, torch.bfloat16)
        optimizer = RowSparseAdam([w], mode=mode, moments_dtype=moments, seed=2**40 + 5, backend=backend)
        train(optimizer, w, gradients(50, 20, 12), 12)
        optimizer.flush()
        results.append(w.detach().float())
    same = (results[0] == results[1]).float().mean()
    assert same > 0.995
    torch.testing.assert_close(*results, rtol=2**-6, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be finite and at least 0, got -1.0"),
        ({"lr": math.nan}, "lr must be finite"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"eps": 0.0}, "eps must be finite and at least 1e-30, got 0.0"),
        ({"eps": 1e-45}, "eps must be finite and at least 1e-30, got 1e-45"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"weight_decay": 2.0, "lr": 0.5}, "lr \\* weight_decay below 1"),
        ({"mode": "dense"}, "mode must be 'lazy' or 'exact', got 'dense'"),
        ({"mode": "exact", "betas": (0.9, 0.8)}, r"needs beta1 < sqrt\(beta2\)"),
        ({"seed": -1}, "seed must be an integer"),
        ({"moments_dtype": torch.int8}, "moments_dtype must be"),
        ({"backend": "gpu"}, "unknown backend 'gpu'"),
    ],
)
def test_refuses_options(options, message):
    with pytest.raises(ValueError, match=message):
        RowSparseAdam([table(3, 2, torch.float32)], **options)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(3), "give other parameters to torch.optim.AdamW"),
        (torch.zeros(0, 3), r"takes dense \(V, d\) tables"),
        (torch.zeros(3, 2, dtype=torch.float16), "must be float32, bfloat16 or float64, got torch.float16"),
        (torch.zeros(3, 2).t(), "must be contiguous"),
    ],
)
def test_refuses_tables(bad, message):
    with pytest.raises(ValueError, match=message):
        RowSparseAdam([torch.nn.Parameter(bad)])


def test_refuses_gradients():
    w = table(4, 2, torch.float32)
    optimizer = RowSparseAdam([w], mode="exact")
    w.grad = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"is dense, which RowSparseAdam refuses.*torch\.optim\.AdamW"):
        optimizer.step()
    before = w.detach().clone()
    for backend in ("cpu", "reference"):
        optimizer.backend = backend
        w.grad = torch.sparse_coo_tensor(torch.tensor([[0, 4]]), torch.ones(2, 2), (4, 2), check_invariants=False)
        with pytest.raises(ValueError, match=r"the gradient has row 4, but the table has rows 0 ... 3"):
            optimizer.step()
    assert torch.equal(w, before)
    w.grad = torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.long), torch.ones(1), (4, 2))
    with pytest.raises(ValueError, match="1 sparse dimension"):
        optimizer.step()
    with pytest.raises(ValueError, match="not a table of this optimizer"):
        optimizer.catch_up(torch.zeros(2, 2), torch.tensor([0]))
    for rows in (torch.tensor([True, False]), torch.tensor([1.0])):
        with pytest.raises(ValueError, match="catch_up takes the numbers of rows, integers, got torch"):
            optimizer.catch_up(w, rows)


@pytest.mark.parametrize(("before", "after"), [("lazy", "exact"), ("exact", "lazy")])
def test_refuses_another_mode_for_a_table_that_has_begun(before, after):
    w = table(4, 2, torch.float32)
    optimizer = RowSparseAdam([w], mode=after)
    optimizer.param_groups[0]["mode"] = before  # not begun: it may
    w.grad = sparse(torch.tensor([1]), torch.ones(1, 2), w)
    optimizer.step()
    saved, value = optimizer.state_dict(), w.detach().clone()
    optimizer.param_groups[0]["mode"] = after
    for call in (optimizer.step, optimizer.flush, lambda: optimizer.catch_up(w, torch.tensor([1]))):
        with pytest.raises(
            ValueError, match=f"mode was changed to '{after}', but a table keeps the mode of its first step"
        ):
            call()
    assert torch.equal(w, value)
    with pytest.raises(ValueError, match=f"the state is of mode '{before}', this optimizer's is '{after}'"):
        RowSparseAdam([w], mode=after).load_state_dict(
            {**saved, "param_groups": [{**saved["param_groups"][0], "mode": before}]}
        )


@pytest.mark.parametrize("kind", [torch.optim.SparseAdam, torch.optim.Adam, torch.optim.SGD])
def test_refuses_the_state_of_another_optimizer(kind):
    w = table(4, 2, torch.float32)
    theirs = kind([w], lr=0.1)
    w.grad = sparse(torch.tensor([1]), torch.ones(1, 2), w)
    if kind is torch.optim.Adam:
        w.grad = w.grad.to_dense()
    theirs.step()
    ours = RowSparseAdam([w])
    with pytest.raises(ValueError, match=r"of another optimizer than RowSparseAdam: its groups have .*lr"):
        ours.load_state_dict(theirs.state_dict())


def test_refuses_a_state_that_is_of_another_table_or_lacks_a_part():
    w, x = table(4, 2, torch.float32), table(5, 2, torch.float32)
    optimizer = RowSparseAdam([w], mode="exact")
    w.grad = sparse(torch.tensor([1]), torch.ones(1, 2), w)
    optimizer.step()
    with pytest.raises(ValueError, match=r"not one of RowSparseAdam for a \(5, 2\) table: it has .*exp_avg \(4, 2\)"):
        RowSparseAdam([x], mode="exact").load_state_dict(optimizer.state_dict())
    saved = optimizer.state_dict()
    del saved["state"][0]["history"]
    with pytest.raises(ValueError, match="the state of table 0 is not one of RowSparseAdam"):
        RowSparseAdam([w], mode="exact").load_state_dict(saved)


@pytest.mark.parametrize(("name", "value"), [("lr", math.nan), ("weight_decay", -1.0), ("eps", 0.0)])
def test_refuses_options_that_a_schedule_made_bad(name, value):
    w = table(4, 2, torch.float32)
    optimizer, before = RowSparseAdam([w]), w.detach().clone()
    optimizer.param_groups[0][name] = value
    w.grad = sparse(torch.tensor([1]), torch.ones(1, 2), w)
    with pytest.raises(ValueError, match=f"{name} must be"):
        optimizer.step()
    assert torch.equal(w, before)


def test_refuses_other_betas_between_flushes():
    w = table(4, 2, torch.float32)
    optimizer = RowSparseAdam([w], mode="exact")
    w.grad = sparse(torch.tensor([1]), torch.ones(1, 2), w)
    optimizer.step()
    optimizer.param_groups[0]["betas"] = (0.8, 0.99)
    with pytest.raises(ValueError, match="may change only right after flush"):
        optimizer.step()
    optimizer.param_groups[0]["betas"] = (0.9, 0.999)
    optimizer.flush()
    optimizer.param_groups[0]["betas"] = (0.8, 0.99)
    optimizer.step()
    optimizer.step()  # the new ones count from here on
    optimizer.param_groups[0]["betas"] = (0.9, 0.999)
    with pytest.raises(ValueError, match=r"went from \(0.8, 0.99, 1e-08\) to \(0.9, 0.999"):
        optimizer.step()


def test_bumps_the_version():
    """Autograd notices that a table that it needs was changed."""
    w = table(4, 2, torch.float32)
    optimizer = RowSparseAdam([w])
    loss = w.square().sum()
    w.grad = sparse(torch.tensor([1]), torch.ones(1, 2), w)
    optimizer.step()
    w.grad = None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exp_avg": np.zeros((5, 3), np.float32)}, r"exp_avg must have shape \(4, 3\)"),
        ({"last_step": np.zeros(3, np.int32)}, r"last_step must have shape \(4,\), got \(3,\)"),
        ({"last_step": np.array([0, 9, 0, 0], np.int32)}, "last_step holds 9, expected 0 ... 2"),
        ({"history": np.zeros((2, 8))}, r"history must be \(n > 2, 8\), got \(2, 8\)"),
        ({"history": np.zeros((3, 8)), "last_step": np.ones(4, np.int32)}, "history is damaged at step 1"),
        ({"history": None}, "must both be given"),
        ({"values": np.zeros((1, 2), np.float32)}, r"values must have shape \(2, 3\)"),
        ({"rows": np.array([1, -1])}, "the gradient has row -1"),
        ({"rows": None}, "values need rows"),
        ({"step": 0}, "steps must ascend"),
        ({"threads": 0}, r"threads must be in 1 ... 65536, got 0"),
    ],
)
def test_extension_checks_its_arguments(change, message):
    """It reads and writes raw memory, so it trusts nobody."""
    given_arguments = {name: np.zeros((4, 3), np.float32) for name in ("table", "exp_avg", "exp_avg_sq")}
    given_arguments |= {"last_step": np.zeros(4, np.int32), "history": past.new(torch.device("cpu")).numpy()}
    given_arguments |= {"rows": np.array([1, 2]), "values": np.zeros((2, 3), np.float32), "first": 0, "step": 3}
    given_arguments |= {
        "lr": 0.1,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "seed": None,
        "threads": 1,
    }
    with pytest.raises(ValueError, match=message):
        _C.adam_rows(**{**given_arguments, **change})


# Triton, in its interpreter, which must be switched on before triton is imported: in a process of its own.


def test_triton_in_the_interpreter():
    pytest.importorskip("triton")
    if INTERPRETED:
        pytest.skip("it is on already")
    printed = run_python("-m", "pytest", "-v", "-k", "interpreted", __file__)
    assert "passed" in printed
    assert "skipped" not in printed


@pytest.mark.skipif(not INTERPRETED, reason="run by test_triton_in_the_interpreter")
@pytest.mark.parametrize("mode", ["lazy", "exact"])
@pytest.mark.parametrize(("v", "d"), [(1, 1), (9, 20), (30, 64)])
def test_interpreted(v, d, mode):
    options = {"weight_decay": 0.1} if mode == "exact" else {}
    mine, peer, _ = compare(v, d, 25, mode, backend="triton", options=options, scale=1e-7)
    torch.testing.assert_close(mine, peer, rtol=RELATIVE, atol=RELATIVE * 0.1)


@pytest.mark.skipif(not INTERPRETED, reason="run by test_triton_in_the_interpreter")
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_interpreted_bfloat16(moments):
    results = []
    for backend in ("triton", "reference"):
        w = table(9, 20, torch.bfloat16)
        optimizer = RowSparseAdam([w], mode="exact", moments_dtype=moments, seed=2**40 + 5, backend=backend)
        train(optimizer, w, gradients(9, 20, 12), 12)
        optimizer.flush()
        results.append(w.detach().float())
    assert (results[0] == results[1]).float().mean() > 0.99
    torch.testing.assert_close(*results, rtol=2**-6, atol=1e-3)


def test_compile_cases_fit_their_kernels():
    pytest.importorskip("triton")
    if INTERPRETED:
        pytest.skip("the interpreter's kernels do not list their arguments")
    from cafe_kernels.optim.triton_rows import compile_cases

    check_compile_cases(compile_cases())
