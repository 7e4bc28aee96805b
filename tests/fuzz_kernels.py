"""Hypothesis strategies for calls of the C++ entry points (csrc/, cafe_kernels/_C.pyi): right ones, and ones with something wrong in them.

A call may work or be refused (ValueError, TypeError, IndexError; MemoryError). Whether it reads or writes where it must not is for the
sanitizers to say: tests/fuzz.py. It needs no torch; the environment variable CAFE_EXTENSION names another build of the extension.
"""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

REFUSED = (ValueError, TypeError, IndexError, MemoryError)
INTEGERS = [-(2**63), -(2**31), -1, 0, 1, 2, 3, 7, 100, 2**31 - 1, 2**31, 2**32 + 1, 2**62, 2**63 - 1, 2**64 - 1, 2**64]
NUMBERS = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 1e-30, 1e38, 1e300, float("inf"), float("-inf"), float("nan")]
DTYPES = [np.float32, np.float64, np.int64, np.int32, np.uint16, np.uint8, np.bool_, np.complex64, ">f4", ">i8"]
Draw = Callable[[Any], Any]


def extension() -> Any:
    """cafe_kernels._C, or the build that CAFE_EXTENSION names."""
    if path := os.environ.get("CAFE_EXTENSION"):
        spec = importlib.util.spec_from_file_location("_C", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    from cafe_kernels import _C

    return _C


def available(isa: str) -> bool:
    try:
        _C.philox_bits(0, 0, 0, 0, 1, isa)
    except ValueError:
        return False
    return True


_C = extension()
ISAS = list(filter(available, ["auto", "portable", "avx2", "avx512"]))


def misaligned(x: np.ndarray) -> np.ndarray:
    """A copy that begins one byte after a multiple of its element's size."""
    room = np.zeros(x.nbytes + 1, np.uint8)[1:]
    copy = np.frombuffer(room.data, x.dtype, x.size).reshape(x.shape) if x.size else x
    if x.size:
        copy[...] = x
    return copy


def _array(draw: Draw, x: np.ndarray) -> Any:
    """Something wrong, or odd, in place of an array."""
    if max(x.shape, default=0) > 2**30:  # "huge" already, too large to be listed
        return x
    kind = draw(st.sampled_from(["values", "dtype", "shape", "strides", "aligned", "read", "none", "list", "huge"]))
    if kind == "values" and x.size and x.dtype != np.bool_:
        x, place = x.copy(), draw(st.integers(0, x.size - 1))
        if np.issubdtype(x.dtype, np.floating):
            with np.errstate(all="ignore"):
                x.flat[place] = draw(st.sampled_from(NUMBERS))
        else:
            value = draw(st.sampled_from(INTEGERS)) % 2 ** (8 * x.itemsize)
            x.flat[place] = np.array(value, f"u{x.itemsize}").astype(x.dtype)
        return x
    if kind == "dtype":
        with np.errstate(all="ignore"):
            return x.astype(draw(st.sampled_from(DTYPES)))
    if kind == "shape":
        change = draw(st.sampled_from(["cut", "grow", "flat", "more", "empty", "scalar"]))
        axis = draw(st.integers(0, max(0, x.ndim - 1)))
        if change == "cut" and x.ndim and x.shape[axis]:
            return np.ascontiguousarray(np.delete(x, 0, axis))
        if change == "grow" and x.ndim and x.shape[axis]:
            return np.ascontiguousarray(np.concatenate([x, x.take([0], axis)], axis))
        return {
            "flat": x.reshape(-1),
            "more": x[None],
            "empty": np.empty((0, *x.shape[1:]), x.dtype),
            "scalar": np.array(0, x.dtype),
        }.get(change, x)
    if kind == "strides":
        return draw(st.sampled_from([np.repeat(x, 2, 0)[::2] if x.ndim else x, x[::-1] if x.ndim else x, x.T]))
    if kind == "aligned":
        return misaligned(x)
    if kind == "read":
        x = x.copy()
        x.flags.writeable = False
        return x
    if kind == "huge":  # no memory behind it
        return np.empty((draw(st.sampled_from([2**31, 2**40, 2**58])), *[0] * max(1, x.ndim - 1)), x.dtype)
    return {"none": None, "list": x.tolist()}.get(kind, x)


def disturbed(draw: Draw, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments, in half of the cases with one or two of them wrong."""
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        name = draw(st.sampled_from(sorted(arguments)))
        value = arguments[name]
        if isinstance(value, np.ndarray):
            value = _array(draw, value)
        elif isinstance(value, bool) or value is None or isinstance(value, str):
            value = draw(st.sampled_from([None, True, 0, "", "avx9", "portable", "auto", 1.5]))
        elif isinstance(value, int):
            value = draw(st.sampled_from(INTEGERS))
        else:
            value = draw(st.sampled_from(NUMBERS))
        arguments = arguments | {name: value}
    return arguments


def call(draw: Draw, function: Callable[..., Any], **arguments: Any) -> bool:
    """Calls with the arguments, disturbed or not; True where that worked."""
    try:
        function(**disturbed(draw, arguments))
    except REFUSED:
        return False
    return True


def isa(draw: Draw) -> str:
    return draw(st.sampled_from(ISAS))


def rng_of(draw: Draw) -> np.random.Generator:
    return np.random.default_rng(draw(st.integers(0, 2**32 - 1)))


def floats(rng: np.random.Generator, half: bool, *shape: int) -> np.ndarray:
    """float32, or the bits of bfloat16."""
    x = rng.standard_normal(shape, np.float32)
    return (x.view(np.uint32) >> 16).astype(np.uint16) if half else x


def size(draw: Draw, most: int, rarely: int = 0) -> int:
    """0 to `most`, and now and then up to `rarely`."""
    return draw(st.integers(0, rarely if rarely and draw(st.integers(0, 15)) == 0 else most))


def csr(rng: np.random.Generator, rows: int, limit: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ascending, different ids below the limit."""
    lists = [np.sort(rng.permutation(limit)[: rng.integers(0, most + 1)]) for _ in range(rows)]
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in lists])]).astype(np.int64)
    return indptr, np.concatenate([*lists, np.empty(0, int)]).astype(np.int32)


def sampler(draw: Draw) -> bool:
    rng, items = rng_of(draw), 1 + size(draw, 60, 5000)
    p = rng.random(items) ** draw(st.sampled_from([1, 8, 100])) * (
        rng.random(items) < draw(st.sampled_from([1.0, 0.3]))
    )
    p[rng.integers(items)] += 1
    threads, seed, offset = draw(st.integers(1, 3)), draw(st.integers(0, 2**64 - 1)), draw(st.integers(0, 2**40))
    try:
        table = _C.AliasTable(**disturbed(draw, {"probabilities": p / p.sum(), "isa": isa(draw)}))
    except REFUSED:
        return False
    common = {"seed": seed, "offset": offset, "threads": threads}
    which = draw(st.sampled_from(["sample", "rows", "bits", "philox"]))
    if which == "sample":
        return call(draw, table.sample, out=np.empty(size(draw, 300, 20000), np.int32), **common)
    if which == "bits":
        options = {"position": offset, "attempt": 0, "stream": 0, "blocks_of_8": size(draw, 20), "isa": isa(draw)}
        arguments = disturbed(draw, {"seed": seed, **options})
        too_many = isinstance(n := arguments["blocks_of_8"], int) and 2**20 < n < 2**28
        return not too_many and call(draw, _C.philox_bits, **arguments)
    if which == "philox":
        return call(draw, _C.philox, seed=seed, position=offset, attempt=0, stream=0)
    histories, n, k = 1 + size(draw, 6), size(draw, 8, 300), size(draw, 8, 200)
    indptr, indices = csr(rng, histories, items, min(items, draw(st.sampled_from([3, items]))))
    out, rows = np.empty((n, k), np.int32), rng.integers(0, histories, n)
    distinct = draw(st.booleans())
    return call(
        draw, table.sample_rows, indptr=indptr, indices=indices, rows=rows, distinct=distinct, out=out, **common
    )


def attention(draw: Draw) -> bool:
    rng, half, causal = rng_of(draw), draw(st.booleans()), draw(st.booleans())
    lengths = [size(draw, 20, 420) for _ in range(size(draw, 5))]
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    total, longest = int(cu_seqlens[-1]), max(lengths, default=0)
    heads, dim = 1 + size(draw, 2), draw(st.sampled_from([0, 1, 3, 4, 7, 8, 9, 16, 17, 33, 64]))
    q, k, v, out, grad_out, dq, dk, dv = (floats(rng, half, total, heads, dim) for _ in range(8))
    columns = longest + size(draw, 2)
    columns = columns if causal else 2 * max(1, columns) - 1
    log_theta = floats(rng, False, heads, columns) if draw(st.booleans()) else None
    given = {
        "q": q, "k": k, "v": v, "log_theta": log_theta, "cu_seqlens": cu_seqlens, "out": out,
        "lse": np.empty((heads, total), np.float32), "scale": 0.3, "causal": causal, "window": draw(st.integers(-1, 30)),
        "dropout_p": draw(st.sampled_from([0.0, 0.3])), "seed": draw(st.integers(0, 2**64 - 1)), "offset": 5,
        "threads": draw(st.integers(1, 3)), "isa": isa(draw),
    }  # fmt: skip
    if not call(draw, _C.attention_forward, **given):
        return False
    dlog_theta = None if log_theta is None else np.empty_like(log_theta)
    gradients = {"grad_out": grad_out, "dq": dq, "dk": dk, "dv": dv, "dlog_theta": dlog_theta}
    return call(draw, _C.attention_backward, **given, **gradients)


def losses(draw: Draw) -> bool:
    rng, half = rng_of(draw), draw(st.booleans())
    tokens, count, items, intents = size(draw, 12, 300), size(draw, 20, 150), 1 + size(draw, 40), 1 + size(draw, 5)
    dim, drawn = draw(st.sampled_from([0, 1, 3, 8, 16, 17, 40])), draw(st.sampled_from(["token", "sequence", "once"]))
    sequences = 1 + size(draw, 4)
    rows = {"token": [tokens], "sequence": [sequences], "once": []}[drawn]
    composed, gradients, ignoring = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    sequence = np.sort(rng.integers(0, sequences, tokens)) if drawn == "sequence" else None
    stride = (dim + 15) // 16 * 16
    parts = {"token": 0, "sequence": sequences, "once": 1 + size(draw, 3)}[drawn]
    h, coefficients = (
        floats(rng, False, tokens, dim),
        np.empty(tokens + tokens * count * (drawn == "token"), np.float32),
    )
    negative_rows = np.empty((parts * count, stride), np.float32)
    item_intent = rng.integers(0, intents, items)
    positives, negatives = rng.integers(0, items, tokens), rng.integers(0, items, (*rows, count))
    ignore = rng.random((sequences if drawn == "sequence" else tokens, count)) < 0.3
    given = {
        "h": h, "table": floats(rng, half, items, dim), "intents": floats(rng, half, intents, dim) if composed else None,
        "item_intent": item_intent if composed else None, "positives": positives, "negatives": negatives,
        "sequence": sequence, "ignore": ignore if ignoring else None,
        "positive_log_q": floats(rng, False, tokens) if draw(st.booleans()) else None,
        "negative_log_q": floats(rng, False, *rows, count) if draw(st.booleans()) else None,
        "weights": floats(rng, False, tokens) if draw(st.booleans()) else None,
        "losses": np.empty(tokens, np.float32), "dh": np.empty((tokens, dim), np.float32) if gradients else None,
        "coefficients": coefficients if gradients else None, "negative_rows": negative_rows if gradients else None,
        "softmax": draw(st.booleans()), "positive_weight": 1.0, "negative_weight": 0.5, "parts": parts,
        "threads": draw(st.integers(1, 3)), "isa": isa(draw),
    }  # fmt: skip
    if not call(draw, _C.sampled_loss, **given):
        return False
    if not gradients:
        return True
    coefficients[:], negative_rows[:] = 1, 1  # a disturbed call may have filled others
    ids = rng.integers(0, items, len(coefficients) + len(negative_rows))
    order, distinct = np.zeros(len(ids), np.int32), np.empty(len(ids), np.int64)
    starts = np.zeros(len(ids) + 1, np.int64)
    if not call(draw, _C.sort_ids, ids=ids, limit=items, order=order, distinct=distinct, starts=starts):
        return False
    segments, dense = len(np.unique(ids)), draw(st.booleans())
    return call(
        draw, _C.sum_segments, order=order, starts=starts, segments=segments, targets=distinct if dense else None, h=h,
        coefficients=coefficients, rows=negative_rows, scale=0.5, threads=draw(st.integers(1, 3)), isa=isa(draw),
        out=np.empty((items if dense else segments, dim), np.float32),
    )  # fmt: skip


def optim(draw: Draw) -> bool:
    rng, half, half_moments = rng_of(draw), draw(st.booleans()), draw(st.booleans())
    items, dim, n = 1 + size(draw, 30), draw(st.sampled_from([0, 1, 3, 8, 15, 16, 40])), size(draw, 12, 600)
    exact, steps, first = draw(st.booleans()), size(draw, 12, 1500), draw(st.sampled_from([0, 0, 3]))
    now = first + steps
    history = np.abs(rng.standard_normal((steps + 2, 8)))
    history[:, 6] = np.minimum((np.arange(first, first + steps + 2) // 4 + 1) * 4, first + steps + 2)
    last_step = rng.integers(first, now + 1, items).astype(np.int32)
    values = floats(rng, draw(st.booleans()), n, dim) if draw(st.booleans()) else None
    rows = rng.integers(0, items, n) if values is not None or draw(st.booleans()) else None
    if draw(st.integers(0, 5)) == 0:
        length = draw(st.integers(1, 20))
        block, powers = draw(st.integers(first, now)), rng.random((length, 5))
        options = {"c": 0.9, "weight": 0.1, "decay": 0.99, "lr": 0.1}
        return call(
            draw, _C.append_step, history=history, powers=powers, first=first, block=block, step=block + 1, **options
        )
    if draw(st.integers(0, 9)) == 0:
        return call(
            draw, _C.use_huge_pages, array=np.zeros(size(draw, 10) << 18, np.uint8), collapse=draw(st.booleans())
        )
    return call(
        draw, _C.adam_rows, table=floats(rng, half, items, dim), exp_avg=floats(rng, half_moments, items, dim),
        exp_avg_sq=floats(rng, half_moments, items, dim), last_step=last_step if exact else None,
        history=history if exact else None, rows=rows, values=values, first=first if exact else 0,
        step=now + (values is not None), lr=0.01, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1,
        seed=draw(st.sampled_from([None, 0, 2**63])), threads=draw(st.integers(1, 3)), isa=isa(draw),
    )  # fmt: skip


def topk(draw: Draw) -> bool:
    rng = rng_of(draw)
    items, intents, users = size(draw, 100, 3000), 1 + size(draw, 8), size(draw, 5, 300)
    dim, k, threads = draw(st.sampled_from([1, 3, 4, 8, 17])), 1 + size(draw, 20), draw(st.integers(1, 3))
    item_intent = rng.integers(0, intents, items).astype(np.int32)
    order = np.argsort(item_intent, kind="stable").astype(np.int32)
    cuts = np.unique([0, *rng.integers(0, items + 1, size(draw, 6)), items]).astype(np.int64)
    counts = np.diff(cuts)
    start = np.concatenate([[0], np.cumsum(-(-counts // 16))]).astype(np.int32)
    groups, blocks, quads = len(counts), int(start[-1]), -(-dim // 4)
    table = floats(rng, False, items, dim) * np.float32(draw(st.sampled_from([1.0, 0.0, 1e-30, 1e15])))
    filled = {
        "centroids": np.empty((-(-groups // 16), dim, 16), np.float32), "centroid_norm": np.empty(groups),
        "radius": np.empty(blocks), "error": np.empty(blocks), "scale": np.empty(blocks * 16, np.float32),
        "slot_item": np.empty(blocks * 16, np.int32), "codes": np.empty((blocks, quads, 16, 4), np.uint8),
    }  # fmt: skip
    if not call(draw, _C.topk_build, table=table, order=order, borders=cuts, start=start, threads=threads, **filled):
        return False
    _C.topk_build(table=table, order=order, borders=cuts, start=start, threads=threads, **filled)
    first, last = (item_intent[order[x]].astype(np.int32) for x in (cuts[:-1], cuts[1:] - 1))
    arguments = {
        "table": table, "item_intent": item_intent, "intents": intents, "start": start, "size": counts.astype(np.int32),
        "first": first, "last": last, **filled,
    }  # fmt: skip
    try:
        index = _C.TopKIndex(**disturbed(draw, arguments))
    except REFUSED:
        return False
    indptr, indices = csr(rng, users, items, min(items, 9)) if draw(st.booleans()) else (None, None)
    common = {
        "user": floats(rng, False, users, dim), "sigmoid": draw(st.booleans()), "indptr": indptr, "indices": indices,
        "intent_scores": floats(rng, False, users, intents) if draw(st.booleans()) else None,
        "threads": threads, "isa": isa(draw),
    }  # fmt: skip
    if draw(st.booleans()):
        out_items, out_scores = np.empty((users, k), np.int64), np.empty((users, k), np.float32)
        return call(draw, index.search, k=k, out_items=out_items, out_scores=out_scores, **common)
    answers, out = rng.integers(0, max(1, items), users), np.empty((2, users), np.int64)
    return call(draw, index.count_above, answers=answers, out=out, **common)


KERNELS = {f.__name__: f for f in (sampler, attention, losses, optim, topk)}
