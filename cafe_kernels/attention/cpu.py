"""The C++ backend of distance_attention (not written yet)."""

from torch import Tensor


def unavailable(q: Tensor) -> str | None:
    return "it is not written yet"
