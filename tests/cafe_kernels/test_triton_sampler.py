"""AliasSampler on a device: in Triton's interpreter and by the other backends, the numbers of the C++ sampler to the bit.

The interpreter runs in a process of its own: see tests/interpreter.py.
"""

import numpy as np
import pytest
import torch

from cafe_kernels import AliasSampler
from tests.cafe_kernels.test_sampler import csr, zipf
from tests.interpreter import INTERPRETED, check_compile_cases, run_python

pytest.importorskip("triton")
METHODS = "sample_excluding", "sample_distinct"
BACKENDS = ["triton"] if INTERPRETED else ["cpu", "reference"]
backends = pytest.mark.parametrize("backend", BACKENDS)


def check_rows(weights, histories, rows, k, seed, offset, method, backend):
    sampler = AliasSampler(weights)
    rows = np.array(rows, np.int64)
    given = [torch.from_numpy(x) for x in (*csr(histories), rows)]
    drawn = getattr(sampler.to("cpu", backend), method)(*given, k, seed, offset)
    expected = getattr(sampler, method)(*csr(histories), rows, k, seed, offset)
    assert drawn.dtype == torch.int32
    assert drawn.shape == expected.shape
    assert (drawn.numpy() == expected).all()


@backends
@pytest.mark.parametrize("shape", [(), 0, 63, (5, 13), 111])
@pytest.mark.parametrize(("seed", "offset"), [(0, 0), (1, 1), (2**64 - 1, 2**32 - 40), (2**63, 2**63 - 111)])
def test_sample(backend, shape, seed, offset):
    sampler = AliasSampler(zipf(1003), 0.75)
    drawn = sampler.to("cpu", backend).sample(shape, seed, offset)
    assert drawn.dtype == torch.int32
    assert np.array_equal(drawn.numpy(), sampler.sample(shape, seed, offset))


@backends
@pytest.mark.parametrize("weights", [np.ones(1), np.array([0, 3, 0, 1]), np.array([1.0, 1e-12, 1e-300])])
def test_sample_of_few_items(backend, weights):
    sampler = AliasSampler(weights)
    assert np.array_equal(sampler.to("cpu", backend).sample(65, 7).numpy(), sampler.sample(65, 7))


@backends
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [0, 1, 21])
def test_rows(backend, method, k):
    rng = np.random.default_rng(1)
    histories = [np.sort(rng.choice(60, n, replace=False)) for n in (0, 1, 3, 26)] + [np.array([4, 4, 4, 9])]
    check_rows(zipf(60, 0.5), histories, [4, 0, 3, 3, 1, 2, 0], k, 2**63 + 5, 2**32 - 40, method, backend)
    check_rows(zipf(60, 0.5), histories, [], k, 1, 0, method, backend)


@backends
@pytest.mark.parametrize("method", METHODS)
def test_the_exact_list_draws_what_rejection_does_not_find(backend, method):
    """256 rejections are certain where what is left weighs 1e-9 of the whole; the list of a row then grows out of date."""
    weights = np.array([1e9, 2, 0, 1, 3, 6, 5, 1e9, 0, 1e-3])
    check_rows(weights, [[0, 7], [0, 0, 4, 7], []], [0, 1, 0], 5 if method == METHODS[0] else 4, 11, 9, method, backend)
    check_rows(weights, [[0, 1, 3, 4, 5, 6, 7]], [0], 1, 3, 0, method, backend)  # one item left
    if method == METHODS[1]:  # of the list made for the first draw the last ones leave 1e-9 again: it is made anew
        check_rows([1e9, 1e-6, 2e-6, 3e-6, 4.0, 1e-6], [[0]], [0, 0], 5, 4, 0, method, backend)


@backends
def test_nothing_left(backend):
    """Where the C++ sampler raises, a device draws -1."""
    indptr, indices = (torch.from_numpy(x) for x in csr([[0, 2], [0]]))
    sampler = AliasSampler([1.0, 0, 5, 1e-20]).to("cpu", backend)
    if backend == "triton":
        full = AliasSampler([1.0, 0, 5]).to("cpu", backend)
        assert full.sample_excluding(indptr, indices, torch.tensor([0, 1]), 3, 1).tolist() == [[-1] * 3, [2] * 3]
        assert full.sample_distinct(indptr, indices, torch.tensor([0, 1]), 3, 1).tolist() == [[-1] * 3, [2, -1, -1]]
        assert sampler.sample_excluding(indptr, indices, torch.tensor([0]), 3, 1).tolist() == [[3] * 3]
    else:
        for draw in (sampler.sample_excluding, sampler.sample_distinct):
            with pytest.raises(ValueError, match=r"rows\[0\] = 0"):
                draw(torch.tensor([0, 3]), torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([0]), 3, 1)


if INTERPRETED:

    @pytest.mark.parametrize("seed", range(4))
    def test_random_cases(seed):
        rng = np.random.default_rng(seed)
        v = rng.integers(2, 30)
        weights = rng.choice([0, 0, 1, 2, 1000, 10**9], v)
        weights[rng.integers(v)] = 3
        histories = [np.sort(rng.integers(0, v, rng.integers(0, v))) for _ in range(2)]
        left = min(sum(w > 0 and i not in h for i, w in enumerate(weights)) for h in histories)
        for method, k in zip(METHODS, (min(left, 1) * 4, left), strict=True):
            check_rows(
                weights, histories, [1, 0], k, int(rng.integers(2**62)), int(rng.integers(2**40)), method, "triton"
            )

else:

    def test_in_the_interpreter():
        run_python("-m", "pytest", "-x", __file__)

    def test_compile_cases_fit_their_kernels():
        from cafe_kernels.sampling.triton_sampler import compile_cases

        check_compile_cases(compile_cases())

    def test_bad_arguments():
        sampler = AliasSampler([1, 2])
        with pytest.raises(ValueError, match="backend 'triton' cannot run: it runs on a GPU, asked for cpu"):
            sampler.to("cpu", "triton")
        device = sampler.to("cpu")
        assert device.backend == "cpu"
        with pytest.raises(ValueError, match=r"seed must be in 0 ... 18446744073709551615, got -1"):
            device.sample(3, -1)
        with pytest.raises(ValueError, match=r"offset must be in 0 ... 9223372036854775805"):
            device.sample(3, 0, 2**63)
        indptr, indices = (torch.from_numpy(x) for x in csr([[0]]))
        with pytest.raises(
            ValueError, match=r"indices must be a 1-D torch.int32 tensor on cpu, got torch.int64 \(1,\)"
        ):
            device.sample_excluding(indptr, indices.long(), torch.tensor([0]), 3, 1)
        with pytest.raises(ValueError, match=r"rows must be a 1-D torch\.int64 tensor on cpu, got list"):
            device.sample_distinct(indptr, indices, [0], 3, 1)
