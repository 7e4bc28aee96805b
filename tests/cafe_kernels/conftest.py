import pytest
import torch

from cafe_kernels import _C


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request, monkeypatch):
    """Forces a code path, where the CPU has it."""
    try:
        _C.philox_bits(0, 0, 0, 0, 1, request.param)
    except ValueError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("CAFE_KERNELS_ISA", request.param)
    return request.param


@pytest.fixture
def threads():
    """Sets the number of threads: 1 for small problems, and where other processes may run on this machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)
