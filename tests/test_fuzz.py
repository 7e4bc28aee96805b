"""A little of what tests/fuzz.py does for long, without sanitizers, and that memory stays flat."""

import ctypes
import gc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cafe_kernels import _C
from tests.fuzz_kernels import KERNELS, csr, floats, misaligned
from tests.fuzz_readers import TARGETS
from tests.soak import resident, verdict

FEW = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=40, **FEW)
@given(data=st.data())
def test_kernels_work_or_refuse(name, data):
    KERNELS[name](data.draw)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=15, **FEW)
@given(data=st.data())
def test_files_are_read_or_refused_in_one_line(name, data):
    TARGETS[name](data.draw)


class Malloc(ctypes.Structure):
    """glibc's struct mallinfo2, of which two fields are read."""

    _fields_ = [(f"field{i}", ctypes.c_size_t) for i in range(10)]


def allocated() -> int:
    """Bytes that malloc has given out; what Python keeps for its own small objects is not among them."""
    gc.collect()
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Malloc
    found = mallinfo()
    return found.field7 + found.field4  # uordblks, in use; hblkhd, mapped


def loops() -> dict[str, Callable[[], object]]:
    """A call of each entry point: every operation that allocates in C++, and a refusal."""
    rng = np.random.default_rng(0)
    p = np.full(50, 1 / 50)
    sampler = _C.AliasTable(p)
    indptr, indices = csr(rng, 4, 50, 9)
    out, rows = np.empty((8, 30), np.int32), rng.integers(0, 4, 8)
    q, k, v, o, do, dq, dk, dv = (floats(rng, False, 30, 2, 8) for _ in range(8))
    theta, lse, cu = floats(rng, False, 2, 20), np.empty((2, 30), np.float32), np.array([0, 20, 30], np.int32)
    options = (0.3, True, -1, 0.2, 1, 2, 2)
    h, table, ids = floats(rng, False, 20, 8), floats(rng, False, 40, 8), rng.integers(0, 40, 20)
    negatives, losses, dh = rng.integers(0, 40, 16), np.empty(20, np.float32), np.empty((20, 8), np.float32)
    coefficients, rows_of = np.empty(20, np.float32), np.empty((16, 16), np.float32)
    order, distinct, starts = np.empty(20, np.int32), np.empty(20, np.int64), np.empty(21, np.int64)
    moments = np.zeros((2, 40, 8), np.float32)
    last, history = np.zeros(40, np.int32), np.zeros((12, 8))
    history[:, 0], history[:, 1], history[:, 6] = 1, 1, 100
    arrays = {
        "centroids": np.empty((1, 8, 16), np.float32), "centroid_norm": np.empty(1), "radius": np.empty(3), "error": np.empty(3),
        "scale": np.empty(48, np.float32), "slot_item": np.empty(48, np.int32), "codes": np.empty((3, 2, 16, 4), np.uint8),
    }  # fmt: skip
    start, users = np.array([0, 3], np.int32), floats(rng, False, 9, 8)
    items, scores, counts = np.empty((9, 5), np.int64), np.empty((9, 5), np.float32), np.empty((2, 9), np.int64)

    def build() -> object:
        _C.topk_build(table, np.arange(40, dtype=np.int32), np.array([0, 40]), start, *arrays.values(), 1)
        zero = np.zeros(1, np.int32)
        return _C.TopKIndex(
            table, np.zeros(40, np.int32), 1, start, np.array([40], np.int32), zero, zero, *arrays.values()
        )

    index = build()

    def refused() -> None:
        with pytest.raises(ValueError, match="parts"):
            _C.sampled_loss(
                h, table, None, None, ids, negatives, *[None] * 5, losses, *[None] * 3, True, 1.0, 1.0, 0, 1
            )

    return {
        "AliasTable": lambda: _C.AliasTable(p),
        "sample": lambda: sampler.sample(1, 2, out, 2),
        "sample_rows": lambda: sampler.sample_rows(indptr, indices, rows, True, 1, 2, out, 2),
        "philox_bits": lambda: _C.philox_bits(1, 2, 0, 0, 9),
        "attention": lambda: _C.attention_forward(q, k, v, theta, cu, o, lse, *options),
        "gradients": lambda: _C.attention_backward(do, q, k, v, theta, cu, o, lse, dq, dk, dv, np.empty_like(theta), *options),
        "sampled_loss": lambda: _C.sampled_loss(
            h, table, None, None, ids, negatives, *[None] * 5, losses, dh, coefficients, rows_of, True, 1.0, 1.0, 1, 2
        ),
        "sort_ids": lambda: _C.sort_ids(ids, 40, order, distinct, starts),
        "sum_segments": lambda: _C.sum_segments(
            np.arange(20, dtype=np.int32), np.arange(21), 20, ids, h, coefficients, h[:0], 1.0, np.empty_like(table), 2
        ),
        "adam_rows": lambda: _C.adam_rows(
            table, *moments, last * 0, history, ids, h, 0, 11, 0.01, 0.9, 0.999, 1e-8, 0.1, None, 2
        ),
        "append_step": lambda: _C.append_step(history, np.ones((9, 5)), 0, 3, 5, 0.9, 0.1, 0.99, 0.1),
        "use_huge_pages": lambda: _C.use_huge_pages(np.empty(1 << 20, np.uint8), False),
        "TopKIndex": build,
        "search": lambda: index.search(users, None, True, 5, None, None, items, scores, 2),
        "count_above": lambda: index.count_above(users, None, True, ids[:9], None, None, counts, 2),
        "refusal": refused,
    }  # fmt: skip


@pytest.mark.parametrize("name", loops())
def test_memory_is_flat_over_a_thousand_calls(name):
    """Less than 8 bytes a call stay: anything that each call forgot would be more."""
    call = loops()[name]
    for _ in range(100):
        call()
    memory, before = resident(), allocated()
    for _ in range(1000):
        call()
    assert allocated() - before < 8000
    assert resident() - memory < 4  # MiB, in whole pages


@pytest.mark.parametrize(
    ("refuse", "message"),
    [
        (lambda p: _C.philox_bits(0, 0, 0, 0, 1 << 28), "blocks_of_8"),
        (lambda p: _C.philox_bits(0, 0, 0, 0, -1), "blocks_of_8"),
        (lambda p: p["loss"](parts=2**62), "parts must be in 1 ... 4096"),
        (lambda p: p["loss"](threads=10**9), "threads must be in 1 ... 65536"),
        (lambda p: p["sum"](segments=2**63 - 1), "starts must have segments"),
        (lambda p: p["adam"](0, 3, np.full((5, 8), 0.5)), "history is damaged at step 1"),
        (lambda p: p["adam"](0, 2**40, np.ones((5, 8))), "step must be in"),
        (lambda p: p["adam"](0, -(2**63), np.ones((5, 8))), "step must be in"),
        (lambda p: _C.append_step(np.ones((5, 8)), np.ones((9, 5)), 0, 2**62, -(2**62), 1.0, 1.0, 1.0, 1.0), "steps must ascend"),
        (lambda p: p["build"](p["table"] * np.float32("nan")), "table holds numbers that are not finite"),
        (lambda p: p["build"](p["table"], start=np.array([0, -(2**31), 1], np.int32), cuts=np.array([0, 1, 4])), "borders are damaged"),
        (lambda p: p["search"](np.full((1, 2), np.nan, np.float32)), "user holds numbers that are not finite"),
        (lambda p: p["search"](np.full((1, 2), 3e38, np.float32)), "user is too large"),
        (lambda p: p["search"](np.ones((1, 2), np.float32), np.full((1, 1), np.inf, np.float32)), "intent_scores holds numbers"),
    ],
)  # fmt: skip
def test_what_would_overflow_or_never_end_is_refused(refuse, message):
    """Each of these overflowed, could read out of bounds, or looped for ever."""
    table = np.full((4, 2), 3.0, np.float32)
    ids = np.zeros(4, np.int64)

    def loss(parts: int = 1, threads: int = 1) -> None:
        _C.sampled_loss(
            table,
            table,
            None,
            None,
            ids,
            ids,
            *[None] * 5,
            np.empty(4, np.float32),
            *[None] * 3,
            True,
            1.0,
            1.0,
            parts,
            threads,
        )

    def sums(segments: int) -> None:
        _C.sum_segments(
            np.zeros(4, np.int32),
            np.arange(5),
            segments,
            ids,
            table,
            np.ones(4, np.float32),
            table[:0],
            1.0,
            table.copy(),
            1,
        )

    def adam(first: int, step: int, history: np.ndarray) -> None:
        last = np.ones(4, np.int32)
        history[:, 6] = 1.5
        _C.adam_rows(
            table.copy(),
            table.copy(),
            table.copy(),
            last,
            history,
            ids,
            table,
            first,
            step,
            0.1,
            0.9,
            0.99,
            1e-8,
            0.0,
            None,
            1,
        )

    def build(table: np.ndarray, start: np.ndarray | None = None, cuts: np.ndarray | None = None) -> object:
        start, cuts = (np.array([0, 1], np.int32), np.array([0, 4])) if start is None else (start, cuts)
        arrays = (
            np.empty((1, 2, 16), np.float32), np.empty(len(start) - 1), np.empty(1), np.empty(1), np.empty(16, np.float32),
            np.empty(16, np.int32), np.empty((1, 1, 16, 4), np.uint8),
        )  # fmt: skip
        _C.topk_build(table, np.arange(4, dtype=np.int32), cuts, start, *arrays, 1)
        zero = np.zeros(1, np.int32)
        return _C.TopKIndex(table, np.zeros(4, np.int32), 1, start, np.array([4], np.int32), zero, zero, *arrays)

    def search(user: np.ndarray, intents: np.ndarray | None = None) -> None:
        build(table).search(
            user, intents, False, 1, None, None, np.empty((1, 1), np.int64), np.empty((1, 1), np.float32), 1
        )

    with pytest.raises(ValueError, match=message):
        refuse({"table": table, "loss": loss, "sum": sums, "adam": adam, "build": build, "search": search})


def test_arrays_that_are_not_aligned_are_refused():
    good = np.zeros((2, 4), np.float32)
    bad, ids = misaligned(good), np.zeros(2, np.int64)
    rest = (None, None, ids, 0, 1, 0.1, 0.9, 0.99, 1e-8, 0.0, None, 1)
    for x in (bad, good):
        arguments = (good.copy(), good.copy(), good.copy(), *rest[:3], x, *rest[3:])
        if x is good:
            _C.adam_rows(*arguments)
        else:
            with pytest.raises(ValueError, match="values must be C-contiguous and aligned"):
                _C.adam_rows(*arguments)
    with pytest.raises(TypeError):
        _C.sort_ids(misaligned(ids), 1, np.zeros(2, np.int32), ids.copy(), np.zeros(3, np.int64))


def test_the_verdict_of_the_soak():
    assert verdict([100.0] * 12, [50.0] * 12) == []
    assert verdict([100.0 + minute for minute in range(30)], [50.0] * 30) == ["memory grew by 16.0 MiB"]
    assert verdict([100.0] * 30, [50.0] * 20 + [30.0] * 10) == ["speed fell by 40%"]
