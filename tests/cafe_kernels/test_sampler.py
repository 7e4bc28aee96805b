"""AliasSampler against the plain numpy version of the same numbers, and against the laws that it claims to draw from.

Seeds are fixed, so a test that passes once always passes. The chi-square tests reject at P_VALUE: a correct sampler
with another seed would fail one of them with that probability.
"""

import doctest
import itertools
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import cafe_kernels.sampling
from cafe_kernels import _C, AliasSampler
from cafe_kernels.sampling import reference

P_VALUE = 1e-4


def zipf(n, exponent=1.0, seed=0):
    return np.random.default_rng(seed).permutation((np.arange(n) + 1.0) ** -exponent)


def csr(rows):
    indptr = np.cumsum([0] + [len(row) for row in rows], dtype=np.int64)
    return indptr, np.array([v for row in rows for v in row], dtype=np.int32)


def p_value(observed, expected):
    """Of the chi-square test; categories that expect fewer than 5 are pooled."""
    rare = expected < 5
    if rare.any():
        observed = np.append(observed[~rare], observed[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    keep = expected > 0
    assert observed[~keep].sum() == 0
    return stats.chisquare(observed[keep], expected[keep]).pvalue


# The test vectors published with Random123 (kat_vectors: philox4x32 10).
KNOWN_ANSWERS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, words, isa):
    seed, position = key[0] | key[1] << 32, counter[0] | counter[1] << 32
    assert _C.philox(seed, position, counter[2], counter[3]) == tuple(words)
    assert reference.philox(seed, position, counter[2], counter[3]).tolist() == words
    bits = _C.philox_bits(seed, position, counter[2], counter[3], 1, isa)
    assert bits[0] == words[0] | words[1] << 32


def test_philox_bits_are_the_blocks_of_consecutive_positions(isa):
    seed, position = 2**63 + 12345, 2**32 - 21  # the low word of the position wraps within
    words = reference.philox(seed, position + np.arange(40, dtype=np.uint64), 3, 7)
    assert (_C.philox_bits(seed, position, 3, 7, 5, isa) == (words[:, 0] | words[:, 1] << np.uint64(32))).all()


@pytest.mark.parametrize(
    "weights",
    [
        np.ones(1),
        np.ones(7),
        np.array([0, 3, 0, 1, 5, 0, 0.5]),
        np.array([1e-300, 1, 1e300, 0, 1e308, 1e308]),
        np.array([1.0, 1e-12, 1e-12]),
        np.ones(49),  # 49 (1 / 49) < 1: nothing fills anything up
        np.array([1.0, 1 + 1e-12, 1 - 1e-12]),  # a column that is full but for less than 2^-32
        np.random.default_rng(0).integers(0, 4, 1001),
        zipf(30_011),
        zipf(2_003, 3.0),
    ],
    ids=["one", "uniform", "zeros", "extreme", "dominant", "below one", "full", "integers", "zipf", "steep"],
)
def test_table_holds_the_law_and_equals_the_reference(weights):
    sampler = AliasSampler(weights)
    p = np.asarray(weights / weights.max(), float)
    np.testing.assert_allclose(sampler.probabilities, p / p.sum(), rtol=1e-12)

    entries = sampler._table.entries
    threshold, alias = reference.alias_table(sampler.probabilities)
    assert (entries == np.stack([threshold, alias.astype(np.uint64)], 1)).all()

    held = entries[:, 0].astype(float)  # each column is 2^32 high
    np.add.at(held, entries[:, 1], 2.0**32 - entries[:, 0])
    held /= 2.0**32 * len(weights)
    assert np.abs(held - sampler.probabilities).max() < 2.0**-32  # rounding, of the columns that end in the item
    assert (held[np.asarray(weights) == 0] == 0).all()
    assert (held[sampler.probabilities > 0] > 0).all()


@pytest.mark.parametrize(("n", "offset"), [(1, 0), (7, 5), (1000, 2**32 - 500), (4097, 3), (128, 2**63 - 128)])
def test_sample_equals_the_reference(n, offset, isa):
    sampler = AliasSampler(zipf(5_003), 0.75)
    expected = reference.ReferenceSampler(sampler.probabilities).sample(n, 2**64 - 1, offset)
    assert (sampler.sample(n, 2**64 - 1, offset) == expected).all()


def test_the_low_bits_of_a_draw_count():
    """Of a million items they decide once in some thousand draws."""
    sampler = AliasSampler(zipf(1_000_003, 0.1))
    expected = reference.ReferenceSampler(sampler.probabilities).sample(400_000, 5, 0)
    assert (sampler.sample(400_000, 5) == expected).all()


def test_draws_begin_at_offset_zero():
    sampler, (indptr, indices) = AliasSampler(zipf(50)), csr([[0, 1], [2, 3]])
    assert (sampler.sample(9, 1) == sampler.sample(9, 1, 0)).all()
    for draw in (sampler.sample_excluding, sampler.sample_distinct):
        assert (draw(indptr, indices, [1, 0], 9, 1) == draw(indptr, indices, [1, 0], 9, 1, 0)).all()


@pytest.mark.parametrize("name", ["indptr", "indices", "rows"])
def test_says_which_argument_is_no_array(name):
    indptr, indices = csr([[0, 1], [2, 3]])
    given = {"indptr": indptr, "indices": indices, "rows": [0]} | {name: torch.ones(1, requires_grad=True)}
    with pytest.raises(TypeError, match=f"{name} must be a numpy array or a CPU tensor"):
        AliasSampler(zipf(50)).sample_excluding(**given, k=2, seed=1)


@pytest.mark.parametrize("distinct", [False, True])
def test_sample_rows_equal_the_reference(distinct, isa):
    rng = np.random.default_rng(1)
    sampler = AliasSampler(zipf(300, 1.5), num_threads=2)
    histories = [np.sort(rng.choice(300, n, replace=False)) for n in (0, 1, 3, 50, 63, 200, 260)]
    rows = rng.integers(0, len(histories), 60)
    draw = sampler.sample_distinct if distinct else sampler.sample_excluding
    expected = reference.ReferenceSampler(sampler.probabilities).sample_rows(
        *csr(histories), rows, 37, distinct, 11, 2**32 - 40
    )
    assert (draw(*csr(histories), rows, 37, 11, 2**32 - 40) == expected).all()


@pytest.mark.parametrize(
    ("weights", "alpha", "draws"),
    [(np.array([5, 0, 1, 2, 0, 9, 3]), alpha, 1_000_000) for alpha in (0, 0.5, 1, 2)]
    + [(zipf(100_000, 0.8), alpha, 5_000_000) for alpha in (0.75, 1)],
)
def test_sample_follows_the_law(weights, alpha, draws):
    drawn = np.bincount(AliasSampler(weights, alpha).sample(draws, seed=3), minlength=len(weights))
    powers = np.where(weights > 0, np.power(weights, alpha, dtype=float), 0)
    assert p_value(drawn, draws * powers / powers.sum()) > P_VALUE
    wrong = np.where(weights > 0, np.power(weights, alpha + 0.02, dtype=float), 0)
    assert p_value(drawn, draws * wrong / wrong.sum()) < P_VALUE  # the test can tell laws apart


def test_numbers_of_different_seeds_positions_and_attempts_are_independent():
    sampler = AliasSampler(np.ones(16))
    a, b = sampler.sample(400_000, 1), sampler.sample(400_000, 2)
    c = reference.ReferenceSampler(sampler.probabilities).draw(1, np.arange(400_000), attempt=1)
    for x, y in [(a, b), (a[1:], a[:-1]), (a, c)]:
        pairs = np.bincount(16 * x.astype(int) + y, minlength=256)
        assert p_value(pairs, np.full(256, len(x) / 256)) > P_VALUE


def test_sample_excluding_follows_the_law_of_what_is_left():
    weights = np.array([5.0, 0, 1, 2, 4, 9, 3])
    drawn = AliasSampler(weights).sample_excluding(*csr([[0], [2, 5]]), [1], 500_000, 5)[0]
    weights[[2, 5]] = 0
    assert p_value(np.bincount(drawn, minlength=7), 500_000 * weights / weights.sum()) > P_VALUE


@pytest.mark.parametrize(
    "weights", [[4.0, 2, 0, 1, 3, 6, 5], [1e9, 2, 0, 1, 3, 6, 5]], ids=["by rejection", "by the exact list"]
)
def test_sample_distinct_follows_the_sequential_law(weights):
    weights, n = np.array(weights), 200_000
    drawn = AliasSampler(weights).sample_distinct(*csr([[0]]), np.zeros(n, int), 3, 6)
    left = [1, 3, 4, 5, 6]
    codes, expected = [], []
    for triple in itertools.permutations(left, 3):
        remaining, probability = weights[left].sum(), 1.0
        for v in triple:
            probability *= weights[v] / remaining
            remaining -= weights[v]
        codes.append(np.dot(triple, [49, 7, 1]))
        expected.append(n * probability)
    counts = np.bincount(drawn @ [49, 7, 1], minlength=343)
    assert counts[codes].sum() == n
    assert p_value(counts[codes], np.array(expected)) > P_VALUE


cases = st.integers(1, 40).flatmap(
    lambda v: st.tuples(
        st.lists(st.sampled_from([0, 0, 1, 2, 1000, 10**9]), min_size=v, max_size=v).filter(any),
        st.lists(st.lists(st.integers(0, v - 1), max_size=v).map(sorted), min_size=1, max_size=4),
        st.integers(0, 12),
        st.integers(0, 2**64 - 1),
        st.integers(0, 2**40),
    )
)


@settings(max_examples=300, deadline=None)
@given(cases, st.booleans())
def test_rows_are_outside_the_history_and_distinct(case, distinct):
    weights, histories, k, seed, offset = case
    sampler = AliasSampler(weights)
    draw = sampler.sample_distinct if distinct else sampler.sample_excluding
    rows = list(range(len(histories))) * 2
    left = [sum(w > 0 and v not in histories[row] for v, w in enumerate(weights)) for row in rows]
    short = [i for i, n in enumerate(left) if n < (k if distinct else min(k, 1))]
    if short:
        with pytest.raises(ValueError, match=rf"^rows\[{short[0]}\] = {rows[short[0]]}:"):
            draw(*csr(histories), rows, k, seed, offset)
        return
    drawn = draw(*csr(histories), rows, k, seed, offset)
    assert drawn.shape == (len(rows), k)
    assert drawn.dtype == np.int32
    for row, ids in zip(rows, drawn.tolist(), strict=True):
        assert not set(ids) & set(histories[row])
        assert all(weights[v] > 0 for v in ids)
        assert not distinct or len(set(ids)) == k
    truth = reference.ReferenceSampler(sampler.probabilities)
    assert (drawn == truth.sample_rows(*csr(histories), rows, k, distinct, seed, offset)).all()


def test_one_item_left_however_unlikely():
    weights = np.full(1000, 1.0)
    weights[123] = 1e-30
    history = csr([[v for v in range(1000) if v != 123]])
    sampler = AliasSampler(weights)
    assert (sampler.sample_excluding(*history, [0], 50, 1) == 123).all()
    assert sampler.sample_distinct(*history, [0], 1, 1).tolist() == [[123]]
    with pytest.raises(ValueError, match=r"rows\[0\] = 0: only 1 items .* but 2 distinct ones"):
        sampler.sample_distinct(*history, [0], 2, 1)
    with pytest.raises(ValueError, match=r"rows\[1\] = 1: its history holds every item"):
        sampler.sample_excluding(*csr([[], range(1000)]), [0, 1], 1, 1)


def test_distinct_draws_the_whole_catalog():
    drawn = AliasSampler(zipf(3_000, 3.0)).sample_distinct(*csr([range(10)]), [0], 2_990, 1)
    assert sorted(drawn[0]) == list(range(10, 3_000))


def test_every_number_of_threads_gives_the_same_numbers():
    weights, rng = zipf(10_000), np.random.default_rng(0)
    histories = csr([np.sort(rng.choice(10_000, 50, replace=False)) for _ in range(500)])
    rows = rng.integers(0, 500, 8_000)
    results = []
    for threads in (1, 2, 8):
        s = AliasSampler(weights, num_threads=threads)
        results.append((s.sample(999_999, 1), s.sample_excluding(*histories, rows, 50, 1)))
        results[-1] += (s.sample_distinct(*histories, rows, 50, 1),)
    for other in results[1:]:
        assert all((a == b).all() for a, b in zip(results[0], other, strict=True))


def test_every_number_of_threads_names_the_same_bad_row():
    indptr, indices = csr([[0], [0, 1, 2], [1]])
    rows = np.zeros(20_000, int)
    rows[[7_001, 9_999, 19_000]] = 1
    for threads in (1, 2, 8):
        with pytest.raises(ValueError, match=r"^rows\[7001\] = 1: "):
            AliasSampler(np.ones(3), num_threads=threads).sample_excluding(indptr, indices, rows, 50, 1)


def test_one_sampler_serves_several_callers_at_once():
    sampler, histories = AliasSampler(zipf(5_000)), csr([range(50), range(7, 90)])

    def call(seed):
        return sampler.sample(20_000, seed), sampler.sample_distinct(*histories, [0, 1] * 200, 50, seed)

    with ThreadPoolExecutor(8) as pool:
        at_once = list(pool.map(call, range(16)))
    for seed, (a, b) in enumerate(at_once):
        assert (a == call(seed)[0]).all()
        assert (b == call(seed)[1]).all()


def test_the_gil_is_released():
    sampler, out, span = AliasSampler(np.ones(1000), num_threads=1), np.empty(20_000_000, np.int32), []

    def call():
        span.append(time.perf_counter())
        sampler.sample(len(out), 1, out=out)
        span.append(time.perf_counter())

    thread, ticks = threading.Thread(target=call), []
    thread.start()
    while thread.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0.0005)
    assert sum(span[0] < tick < span[1] for tick in ticks) > 10


def test_offset_names_the_position():
    sampler, histories = AliasSampler(zipf(100)), csr([[1, 2], [5]])
    assert (sampler.sample(10, 7, offset=5) == sampler.sample(15, 7)[5:]).all()
    assert (sampler.sample((3, 5), 7).ravel() == sampler.sample(15, 7)).all()
    assert (sampler.sample(100, 7) != sampler.sample(100, 8)).any()
    both = sampler.sample_excluding(*histories, [0, 1], 40, 7, offset=100)
    assert (sampler.sample_excluding(*histories, [1], 40, 7, offset=140) == both[1]).all()
    assert (sampler.sample_excluding(*histories, [1], 15, 7, offset=165) == both[1, 25:]).all()
    both = sampler.sample_distinct(*histories, [0, 1], 40, 7, offset=100)
    assert (sampler.sample_distinct(*histories, [1], 40, 7, offset=140) == both[1]).all()


def test_shapes():
    sampler, histories = AliasSampler(np.ones(9)), csr([[1, 2], [5]])
    for shape in [(), (0,), (3, 0, 2), (2, 3, 4)]:
        drawn = sampler.sample(shape, 1)
        assert drawn.shape == shape
        assert drawn.dtype == np.int32
    assert 0 <= sampler.sample((), 1) < 9
    assert sampler.sample(np.int64(4), np.uint64(2**63)).shape == (4,)
    for draw in (sampler.sample_excluding, sampler.sample_distinct):
        assert draw(*histories, [], 5, 1).shape == (0, 5)
        assert draw(*histories, [1, 0, 1], 0, 1).shape == (3, 0)
    assert len(sampler) == 9


def test_out_is_written_and_returned():
    sampler, histories = AliasSampler(zipf(50)), csr([[1, 2], [5]])
    out = np.full((2, 8), -1, np.int32)
    tensor = torch.zeros(2, 8, dtype=torch.int32)
    for draw in (
        lambda out: sampler.sample((2, 8), 1, out=out),
        lambda out: sampler.sample_excluding(*histories, [1, 0], 8, 1, out=out),
        lambda out: sampler.sample_distinct(*histories, [1, 0], 8, 1, out=out),
    ):
        out[:] = -1
        assert draw(out) is out
        assert (out == draw(None)).all()
        draw(tensor.numpy())
        assert (tensor.numpy() == out).all()


def test_tensors_serve_as_inputs():
    weights, (indptr, indices) = zipf(50), csr([[1, 2], [5]])
    a = AliasSampler(torch.from_numpy(weights)).sample_excluding(
        torch.from_numpy(indptr), torch.from_numpy(indices), torch.tensor([1, 0], dtype=torch.int32), 9, 1
    )
    assert (a == AliasSampler(weights).sample_excluding(indptr, indices, [1, 0], 9, 1)).all()


def test_log_prob():
    sampler = AliasSampler([1, 0, 4, 9], alpha=0.5)
    np.testing.assert_allclose(sampler.log_prob([[0, 2], [3, 3]]), np.log([[1 / 6, 2 / 6], [3 / 6, 3 / 6]]))
    with np.errstate(all="raise"):
        assert sampler.log_prob(1) == -np.inf
    assert not sampler.probabilities.flags.writeable
    with pytest.raises(ValueError, match=r"ids must be in 0 ... 3, got -1 ... 2"):
        sampler.log_prob([2, -1])
    with pytest.raises(ValueError, match="ids must be in"):
        sampler.log_prob([4])
    with pytest.raises(TypeError, match="ids must be integers, got float64"):
        sampler.log_prob([0.5])
    with pytest.raises(TypeError, match="ids must be a numpy array or a CPU tensor"):
        sampler.log_prob(torch.ones(1, requires_grad=True))


def test_weights_are_not_changed_or_kept():
    weights = np.array([1.0, 2, 3])
    sampler = AliasSampler(weights)
    assert weights.tolist() == [1, 2, 3]
    before = sampler.sample(100, 1)
    weights[:] = [1, 0, 0]
    assert (sampler.sample(100, 1) == before).all()
    assert sampler.probabilities[2] == 0.5


@pytest.mark.parametrize(
    ("weights", "options", "error", "message"),
    [
        ([], {}, ValueError, r"1 ... 2\^31 items, got shape \(0,\)"),
        ([[1.0, 2.0]], {}, ValueError, r"1-D .* got shape \(1, 2\)"),
        (3.0, {}, ValueError, r"1-D .* got shape \(\)"),
        ([0, 0, 0], {}, ValueError, "all zero"),
        ([1.0, np.nan], {}, ValueError, r"1 are not; the first: weights\[1\] = nan"),
        ([1.0, np.inf], {}, ValueError, r"weights\[1\] = inf"),
        ([-1, 2, -3], {}, ValueError, r"2 are not; the first: weights\[0\] = -1"),
        (["a", "b"], {}, TypeError, "integers or floats, got <U1"),
        ([True, False], {}, TypeError, "integers or floats, got bool"),
        ([1j], {}, TypeError, "integers or floats, got complex128"),
        (torch.ones(3, requires_grad=True), {}, TypeError, "weights must be a numpy array or a CPU tensor"),
        ([1], {"alpha": -0.5}, ValueError, "alpha must be finite and at least 0, got -0.5"),
        ([1], {"alpha": np.nan}, ValueError, "alpha must be finite"),
        ([1], {"alpha": "1"}, TypeError, "alpha must be a number, got str"),
        ([1], {"num_threads": 0}, ValueError, "num_threads must be at least 1, got 0"),
        ([1], {"num_threads": 1.5}, TypeError, "'float' object cannot be interpreted as an integer"),
    ],
)
def test_bad_laws(weights, options, error, message):
    with pytest.raises(error, match=message):
        AliasSampler(weights, **options)


def test_bad_instruction_set(monkeypatch):
    monkeypatch.setenv("CAFE_KERNELS_ISA", "mmx")
    with pytest.raises(ValueError, match="unknown instruction set 'mmx': expected auto, portable, avx2 or avx512"):
        AliasSampler([1])


READ_ONLY = np.zeros((2, 3), np.int32)
READ_ONLY.flags.writeable = False

BAD_DRAWS = [
    ({"seed": -1}, ValueError, "seed must be in 0 ... 18446744073709551615, got -1"),
    ({"seed": 2**64}, ValueError, "seed must be in"),
    ({"seed": 1.0}, TypeError, "seed must be an integer, got float"),
    ({"seed": None}, TypeError, "seed must be an integer, got NoneType"),
    ({"offset": -1}, ValueError, "offset must be in 0 "),
    ({"offset": 2**63 - 5}, ValueError, "offset must be in 0 ... 9223372036854775802"),
    ({"offset": "0"}, TypeError, "offset must be an integer, got str"),
    ({"out": np.zeros((2, 4), np.int32)}, ValueError, r"out must have shape \(2, 3\), got \(2, 4\)"),
    ({"out": np.zeros((2, 3), np.int64)}, TypeError, "out must be int32, got int64"),
    ({"out": np.zeros((3, 2), np.int32).T}, ValueError, "out must be C-contiguous"),
    ({"out": READ_ONLY}, ValueError, "out must be writable, got a read-only array"),
    ({"out": torch.zeros(2, 3, dtype=torch.int32)}, TypeError, r"got Tensor; for a CPU tensor t pass t.numpy\(\)"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *BAD_DRAWS,
        ({"shape": -1}, ValueError, "the result cannot have shape -1: negative dimensions"),
        ({"shape": (2, -3)}, ValueError, r"the result cannot have shape \(2, -3\): negative"),
        ({"shape": 2.0}, TypeError, "the result cannot have shape 2.0: expected .* integers"),
        ({"shape": "ab"}, TypeError, "the result cannot have shape ab"),
        ({"shape": 2**62}, ValueError, "the result cannot have shape 4611686018427387904"),
    ],
)
def test_bad_sample(change, error, message):
    arguments = {"shape": (2, 3), "seed": 1, **change}
    with pytest.raises(error, match=message):
        AliasSampler(np.ones(10)).sample(**arguments)


HISTORIES = {"indptr": np.array([0, 2, 2, 5]), "indices": np.array([3, 8, 0, 1, 9], np.int32)}


@pytest.mark.parametrize("method", ["sample_excluding", "sample_distinct"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *BAD_DRAWS,
        ({"k": -1}, ValueError, r"the result cannot have shape \(2, -1\): negative dimensions"),
        ({"k": 2.0}, TypeError, r"the result cannot have shape \(2, 2.0\)"),
        ({"rows": [0, 3]}, ValueError, r"rows\[1\] = 3 is out of range: indptr has 3 rows"),
        ({"rows": [-1, 0]}, ValueError, r"rows\[0\] = -1 is out of range"),
        ({"rows": np.array([2**64 - 1, 0], np.uint64)}, ValueError, r"rows\[0\] = -1 is out of range"),
        ({"rows": [0.0, 1.0]}, TypeError, "rows must be integers, got float64"),
        ({"rows": [[0, 1]]}, ValueError, r"rows must be 1-D, got shape \(1, 2\)"),
        ({"indptr": np.array([0, 2, 2, 4])}, ValueError, r"from 0 to len\(indices\) = 5, got 0 to 4"),
        ({"indptr": np.array([1, 2, 2, 5])}, ValueError, r"from 0 to len\(indices\) = 5, got 1 to 5"),
        ({"indptr": np.array([], int)}, ValueError, "indptr must go from 0 .* got an empty array"),
        ({"indptr": np.array([0, 7, 2, 5])}, ValueError, r"rows\[0\] = 0: indptr goes from 0 to 7, but must ascend"),
        ({"indptr": np.array([0, 2, -9, 5])}, ValueError, r"rows\[1\] = 2: indptr goes from -9 to 5"),
        ({"indptr": np.array([0, 2, 6, 5])}, ValueError, r"rows\[1\] = 2: indptr goes from 6 to 5"),
        (
            {"indptr": np.array([0.0, 2, 2, 5])},
            TypeError,
            r"indptr must be int64, got float64; .*astype\(numpy.int64\)",
        ),
        ({"indptr": np.array([[0, 5]])}, ValueError, r"indptr must be 1-D, got shape \(1, 2\)"),
        ({"indptr": np.array([0, 0, 2, 2, 2, 2, 5, 5])[::2]}, ValueError, "indptr must be C-contiguous"),
        (
            {"indices": np.array([3, 8, 0, 1, 9])},
            TypeError,
            r"indices must be int32, got int64; .*astype\(numpy.int32\)",
        ),
        ({"indices": np.array([8, 3, 0, 1, 9], np.int32)}, ValueError, r"rows\[0\] = 0: its history is not sorted"),
        ({"indices": np.array([3, 8, 0, 9, 1], np.int32)}, ValueError, r"rows\[1\] = 2: its history is not sorted"),
        ({"indices": np.array([3, 10, 0, 1, 9], np.int32)}, ValueError, r"rows\[0\] = 0: .* ids outside 0 ... 9"),
        ({"indices": np.array([3, 8, -1, 1, 9], np.int32)}, ValueError, r"rows\[1\] = 2: .* ids outside 0 ... 9"),
    ],
)
def test_bad_rows(method, change, error, message):
    arguments = {**HISTORIES, "rows": [0, 2], "k": 3, "seed": 1, **change}
    with pytest.raises(error, match=message):
        getattr(AliasSampler(np.ones(10)), method)(**arguments)


def test_only_the_rows_used_are_checked():
    indptr, indices = csr([[0, 1], [9, 3, 77]])
    assert AliasSampler(np.ones(10)).sample_excluding(indptr, indices, [0], 5, 1).min() >= 2


def test_the_extension_checks_what_memory_safety_rests_on():
    table = _C.AliasTable(np.full(4, 0.25))
    out, indptr, indices = np.zeros(4, np.int32), np.array([0, 1]), np.array([2], np.int32)
    rows = np.array([0])
    read_only, strided = out.view(), np.zeros(8, np.int32)[::2]
    read_only.flags.writeable = False
    for bad in (out.astype(np.int64), strided, read_only, None):
        with pytest.raises((TypeError, ValueError), match="out must be"):
            table.sample(1, 0, bad, 1)
    for bad in (np.zeros(4, np.int32), np.zeros((2, 4), np.int32)):
        with pytest.raises(ValueError, match="out must have a row for each of the 1 rows"):
            table.sample_rows(indptr, indices, rows, False, 1, 0, bad, 1)
    for bad in ((indptr.astype(np.int32), indices, rows), (indptr, indices.astype(np.int64), rows), ([0, 1], [2], [0])):
        with pytest.raises(TypeError, match="must be "):
            table.sample_rows(*bad, False, 1, 0, out.reshape(1, 4), 1)
    unaligned = np.zeros(17, np.uint8)[1:].view(np.int32)
    with pytest.raises(ValueError, match="out must be C-contiguous and aligned"):
        table.sample(1, 0, unaligned, 1)
    for bad in ([0.5, 0.4], [1.5, -0.5], [np.nan, 1.0], []):
        with pytest.raises(ValueError, match=r"probabilities must|there must be"):
            _C.AliasTable(np.array(bad))


def test_docstring_examples():
    assert doctest.testmod(cafe_kernels.sampling) == (0, 13)


@pytest.mark.parametrize("method", ["sample_excluding", "sample_distinct"])
@pytest.mark.parametrize("shared", ["indptr", "indices", "rows"])
def test_out_may_not_share_memory_with_what_is_read(method, shared):
    indptr, indices = csr([[0, 1], [2, 3]])
    arrays = {"indptr": indptr, "indices": indices, "rows": np.zeros(2, np.int64)}
    out = arrays[shared].view(np.int32)[:4].reshape(2, -1)
    before = out.copy()
    with pytest.raises(ValueError, match=f"out shares memory with {shared}"):
        getattr(AliasSampler(np.ones(9)), method)(**arrays, k=out.shape[1], seed=1, out=out)
    assert np.array_equal(out, before)


@pytest.mark.parametrize("alpha", [0.0, 0.75, 1.0])
def test_a_pickled_sampler_draws_the_same(alpha):
    sampler = AliasSampler(zipf(1003), alpha, num_threads=3)
    copy = pickle.loads(pickle.dumps(sampler))
    assert len(copy) == 1003
    assert copy.num_threads == 3
    assert not copy.probabilities.flags.writeable
    assert np.array_equal(copy.probabilities, sampler.probabilities)
    assert np.array_equal(copy.sample(100_000, seed=5), sampler.sample(100_000, seed=5))


def test_shapes_are_the_same_with_and_without_out():
    sampler = AliasSampler(np.ones(9))
    for shape in (6, (), (2, 3), [2, 3], np.array([3, 2]), np.int64(4)):
        wanted = sampler.sample(shape, seed=2)
        out = np.empty_like(wanted)
        assert sampler.sample(shape, seed=2, out=out) is out
        assert np.array_equal(out, wanted)
    for out in (None, np.empty(2, np.int32)):
        with pytest.raises(TypeError, match=r"the result cannot have shape 2\.0"):
            sampler.sample(2.0, seed=2, out=out)
